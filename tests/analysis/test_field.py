"""Fields of autoencoders that can be worked out by hand: linear, of the principal axes, homogeneous (§A.4)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from shorthand import noise, raises
from tiny_digits import write_digits
from torch import Tensor, nn

from traj_ood.analysis import Workspace, find_question, options_from
from traj_ood.analysis.field import SAME_DISTANCE, VectorField, box, plane, settled_ends, vector_field
from traj_ood.analysis.models import PAPER_TOL
from traj_ood.analysis.singular import jacobians
from traj_ood.autoencoders import CallableAutoencoder
from traj_ood.index import greedy_leaders

TINY = ["data=mnist", "train_images=24", "at=0,1", "runs=2", "width=1", "grid=6", "codes=12", "max_steps=20"]


def relu_network(seed: int, bias: bool) -> Callable[[Tensor], Tensor]:
    """z → W₃ relu(W₂ relu(W₁ z)), an encoder after a decoder, with or without biases."""
    torch.manual_seed(seed)
    layers = (
        nn.Linear(2, 16, bias=bias),
        nn.ReLU(),
        nn.Linear(16, 16, bias=bias),
        nn.ReLU(),
        nn.Linear(16, 2, bias=bias),
    )
    return nn.Sequential(*layers).double().requires_grad_(False)


# ---------------------------------------------------------------------------------------------- fields


def stretched() -> Tensor:
    """(300, 1, 1, 5) images whose principal axes are no coordinate axes."""
    turn = torch.linalg.qr(noise(5, 5, seed=7)).Q
    spread = torch.tensor([3.0, 2.0, 1.0, 0.5, 0.1], dtype=torch.float64)
    return ((noise(300, 5) * spread) @ turn + 4).reshape(-1, 1, 1, 5)


def projecting(encoder: Tensor, decoder: Tensor, mean: Tensor) -> CallableAutoencoder:
    """E(x) = encoderᵀ(x − μ), D(z) = decoder z + μ, both (5, 2)."""
    return CallableAutoencoder(
        lambda x: (x.flatten(1) - mean) @ encoder,
        lambda z: (z @ decoder.T + mean).reshape(-1, 1, 1, 5),
        (1, 1, 5),
        chunk=8,
    )


def field_of(model: CallableAutoencoder, codes: Tensor) -> Tensor:
    return vector_field(model.self_map, codes, model.chunk)


def test_an_autoencoder_of_the_principal_axes_has_no_field() -> None:
    """§A.4: aligned with the data's principal axes, f is the identity and nothing contracts; misaligned, it is not."""
    images = stretched()
    flat = images.flatten(1)
    mean = flat.mean(dim=0)
    values, vectors = np.linalg.eigh(np.cov(flat.T.numpy(), bias=True))  # ascending
    axes = torch.from_numpy(vectors[:, ::-1].copy())
    aligned = projecting(axes[:, :2], axes[:, :2], mean)
    codes = aligned.encode(images)
    assert float(field_of(aligned, codes).abs().max()) < 1e-12
    # They are the principal axes: what is lost is the variance along the other three.
    lost = (aligned.decode(codes) - images).flatten(1).square().sum(dim=1).mean()
    assert float(lost) == pytest.approx(values[:3].sum())
    assert torch.tensor(np.cov(codes.T.numpy(), bias=True)).allclose(torch.diag(torch.tensor(values[[4, 3]])))

    # A decoder that is turned by 60° out of the first axis: f shrinks that coordinate to cos 60° of itself.
    turned = torch.stack([axes[:, 0] / 2 + 3**0.5 / 2 * axes[:, 2], axes[:, 1]], dim=1)
    misaligned = projecting(axes[:, :2], turned, mean)
    torch.testing.assert_close(field_of(misaligned, codes), codes * torch.tensor([-0.5, 0.0]).double())


def test_a_trained_linear_autoencoder_loses_its_field() -> None:
    images = stretched()
    flat, mean = images.flatten(1), images.flatten(1).mean(dim=0)
    weights = [noise(5, 2, seed=s).mul(0.3).requires_grad_() for s in (1, 2)]
    optimizer = torch.optim.LBFGS(
        weights, max_iter=500, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def strength() -> float:
        model = projecting(*(w.detach() for w in weights), mean)
        codes = model.encode(images)
        return float(field_of(model, codes).norm() / codes.norm())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = ((flat - mean) @ weights[0] @ weights[1].T - (flat - mean)).square().mean()
        loss.backward()
        return loss

    assert strength() > 0.3
    optimizer.step(closure)
    assert strength() < 1e-5
    axes = torch.linalg.svd(flat - mean, full_matrices=False).Vh[:2].T
    projection = weights[0].detach() @ weights[1].detach().T
    torch.testing.assert_close(projection, axes @ axes.T, rtol=0, atol=1e-4)


def test_the_field_of_a_linear_map_is_linear_whatever_the_chunk() -> None:
    matrix, points = noise(2, 2, seed=2), noise(11, 2, seed=3)
    expected = points @ (matrix.T - torch.eye(2).double())
    for chunk in (1, 4, 11):
        torch.testing.assert_close(vector_field(lambda z: z @ matrix.T, points, chunk), expected)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_homogeneous_networks_are_their_jacobian(seed: int) -> None:
    """ReLU networks without biases: f(z) = J_f(z) z (Eq. 6); with biases they are not."""
    points = noise(40, 2, seed=seed)
    network = relu_network(seed, bias=False)
    by_jacobian = (jacobians(network, points, 8) @ points[..., None])[..., 0]
    torch.testing.assert_close(by_jacobian, network(points), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(network(3 * points), 3 * network(points))
    biased = relu_network(seed, bias=True)
    assert float(((jacobians(biased, points, 8) @ points[..., None])[..., 0] - biased(points)).abs().max()) > 0.01


def test_jacobians_are_the_reverse_modes() -> None:
    def curl(z: Tensor) -> Tensor:
        return torch.stack([z[:, 0] ** 2 + z[:, 1], (z[:, 0] * z[:, 1]).sin()], dim=1)

    points = noise(9, 2)
    expected = torch.func.vmap(torch.func.jacrev(lambda z: curl(z[None])[0]))(points)
    torch.testing.assert_close(jacobians(curl, points, 4), expected)


# ---------------------------------------------------------------------------------------------- attractors


def found(self_map: Callable[[Tensor], Tensor], scale: float, max_steps: int = 1000) -> tuple[Tensor, int, int]:
    """Attractors from a grid over [−scale, scale]², how many starts settled, and how many there were."""
    side = torch.full((2,), scale)
    starts = plane(-side, side, 9).float()
    diagonal = float((2 * side).norm())
    ends = settled_ends(self_map, starts, diagonal, PAPER_TOL, max_steps, 32)
    return ends[greedy_leaders(ends.double(), SAME_DISTANCE * diagonal)[0]], len(ends), len(starts)


@pytest.mark.parametrize("scale", [1e-3, 0.1, 1.0, 100.0])
@pytest.mark.parametrize("rate", [0.5, 0.99])
def test_a_slow_contraction_has_one_attractor_at_any_scale(rate: float, scale: float) -> None:
    spots, settled, starts = found(lambda z: rate * z, scale)
    assert (len(spots), settled) == (1, starts)
    assert float(spots.norm()) < 0.01 * scale


def test_what_is_on_its_way_or_no_attractor_has_not_settled() -> None:
    assert found(lambda z: 0.9999 * z, 0.1)[1] == 1  # only the start at 0 itself is there
    assert found(lambda z: z.clone(), 1.0)[1] == 0  # everything rests, nothing attracts
    assert found(lambda z: 2 * z, 1.0)[1] == 0  # 0 rests and repels
    assert found(lambda z: z * torch.nan, 1.0)[1] == 0
    assert found(lambda z: 0.9 * z, 1.0, max_steps=5)[1] == 1


def test_attractors_are_those_of_the_cubic() -> None:
    """f(z) = z + 0.3 (z − z³), a coordinate at a time: ±1 attract, 0 repels."""

    def cubic(z: Tensor) -> Tensor:
        return z + 0.3 * (z - z**3)

    spots, settled, starts = found(cubic, 1.2)
    assert sorted(map(tuple, spots.round(decimals=3).tolist())) == [(-1, -1), (-1, 1), (1, -1), (1, 1)]
    assert settled == starts - 17  # of 9 × 9 starts those on an axis end at a saddle or at 0


# ---------------------------------------------------------------------------------------------- the box


def test_the_plane_is_numpys_grid() -> None:
    points = plane(torch.tensor([-1.0, 2.0]), torch.tensor([1.0, 4.0]), 3)
    expected = np.stack(np.meshgrid([-1, 0, 1], [2, 3, 4]), axis=-1).reshape(-1, 2)
    np.testing.assert_array_equal(points.numpy(), expected)


def test_the_box_is_the_papers_or_holds_the_support() -> None:
    low, high = box(noise(50, 2), 8.0)
    assert (low.tolist(), high.tolist()) == ([-8, -8], [8, 8])
    codes = noise(5000, 2) * torch.tensor([4.0, 1.0]) + 10
    low, high = box(codes, 0.0)
    inside = ((codes > low) & (codes < high)).all(dim=1)
    assert bool(inside.all())
    sides = high - low
    assert float(sides[0]) == pytest.approx(float(sides[1]))
    low, high = box(torch.ones(5, 2), 0.0)  # a collapsed encoder still has a plane around it
    assert bool((high > low).all())


# ---------------------------------------------------------------------------------------------- the question


@pytest.mark.slow
def test_the_question_is_answered_drawn_and_resumed(tmp_path: Path) -> None:
    question = options_from(find_question("field"), TINY)
    root = write_digits(tmp_path / "digits")
    finding = question.run(Workspace(tmp_path / "work", data_root=root), tmp_path / "out")
    assert [(row["run"], row["epoch"]) for row in finding.figures["rows"]] == [(0, 0), (0, 1), (1, 1)]
    for row in finding.figures["rows"]:
        assert 0 <= row["settled"] <= 1
        assert (row["attractors"] == 0) == (row["attractors_cosine"] == 0) == (row["settled"] == 0)
    assert "attractors found: " in finding.sentence
    assert (tmp_path / "out" / "field.png").read_bytes().startswith(b"\x89PNG")
    work = Workspace(tmp_path / "work", data_root=root)
    assert question.run(work, tmp_path / "again").figures == finding.figures
    assert work.resumed > 0


def test_options_are_checked() -> None:
    with raises("field: at: expected epochs of at least 0, the last at least 1, got 0"):
        VectorField(at=(0,))
    with raises("field: reach: expected 0 (fit) or more, got -1.0"):
        VectorField(reach=-1.0)
    with raises("unknown option of field 'epochs'"):
        options_from(find_question("field"), ["epochs=3"])
    with raises("field: reach: expected 0 (fit) or more, got inf"):
        VectorField(reach=float("inf"))


def test_differences_say_what_the_paper_states_in_words() -> None:
    told = VectorField().differences()
    assert "reach: fitted to the codes here, 8.0 in the paper" in told
    assert "train_images: 5000 here, all in the paper" in told
    assert "training ends after epoch 40 here, 500 in the paper" in told
    assert "width: 16 here, 32 with --paper (the paper does not state it)" in told
    assert VectorField.paper().differences() == ()
    assert set(VectorField.unstated) < set(VectorField().options())
