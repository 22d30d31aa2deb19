"""Fields of autoencoders that can be worked out by hand: linear, of the principal axes, homogeneous (§A.4)."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_digits import write_digits
from torch import Tensor, nn

from traj_ood.analysis import Workspace, find_question, options_from
from traj_ood.analysis.field import Field, planar_jacobians, vector_field
from traj_ood.analysis.grid import box, plane
from traj_ood.errors import TrajOODError

TINY = ["data=mnist", "train_images=24", "at=0,1", "runs=2", "width=1", "grid=6", "codes=12", "max_steps=20"]


def raises(text: str):  # type: ignore[no-untyped-def]
    return pytest.raises(TrajOODError, match=re.escape(text))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


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


def test_an_autoencoder_of_the_principal_axes_has_no_field() -> None:
    """E = Uᵀ(x − μ), D = Uz + μ with the data's principal axes U: f is the identity and the field vanishes (§A.4)."""
    data = noise(200, 5) * torch.tensor([3.0, 2.0, 1.0, 0.5, 0.1], dtype=torch.float64) + 4
    mean = data.mean(dim=0)
    axes = torch.linalg.svd(data - mean, full_matrices=False).Vh[:2].T
    field = vector_field(lambda z: (z @ axes.T + mean - mean) @ axes, noise(30, 2, seed=1), 7)
    assert float(field.abs().max()) < 1e-13


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
    by_jacobian = (planar_jacobians(network, points, 8) @ points[..., None])[..., 0]
    torch.testing.assert_close(by_jacobian, network(points), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(network(3 * points), 3 * network(points))
    biased = relu_network(seed, bias=True)
    assert (
        float(((planar_jacobians(biased, points, 8) @ points[..., None])[..., 0] - biased(points)).abs().max()) > 0.01
    )


def test_jacobians_are_the_reverse_modes() -> None:
    def curl(z: Tensor) -> Tensor:
        return torch.stack([z[:, 0] ** 2 + z[:, 1], (z[:, 0] * z[:, 1]).sin()], dim=1)

    points = noise(9, 2)
    expected = torch.func.vmap(torch.func.jacrev(lambda z: curl(z[None])[0]))(points)
    torch.testing.assert_close(planar_jacobians(curl, points, 4), expected)


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


def test_the_question_is_answered_drawn_and_resumed(tmp_path: Path) -> None:
    question = options_from(find_question("field"), TINY)
    root = write_digits(tmp_path / "digits")
    finding = question.run(Workspace(tmp_path / "work", data_root=root), tmp_path / "out")
    assert [(row["run"], row["epoch"]) for row in finding.figures["rows"]] == [(0, 0), (0, 1), (1, 1)]
    for row in finding.figures["rows"]:
        assert 0 <= row["converged"] <= 1
        assert row["attractors"] >= row["attractors_cosine"] >= 0
    assert (tmp_path / "out" / "field.png").read_bytes().startswith(b"\x89PNG")
    work = Workspace(tmp_path / "work", data_root=root)
    assert question.run(work, tmp_path / "again").figures == finding.figures
    assert work.resumed > 0


def test_options_are_checked() -> None:
    with raises("field: at: expected epochs of at least 0, the last at least 1, got 0"):
        Field(at=(0,))
    with raises("field: reach: expected 0 (fit) or more, got -1.0"):
        Field(reach=-1.0)
    with raises("unknown option of field 'epochs'"):
        options_from(find_question("field"), ["epochs=3"])
    assert "reach: 0.0 here, 8.0 in the paper" in Field().differences()
