"""Spectral norms against explicit Jacobians; linear autoencoders, whose limit and rate can be written down (§A.4)."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from scipy.stats import pearsonr
from shorthand import noise, raises
from tiny_digits import write_digits
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from traj_ood.analysis import Workspace, convergence, find_question, options_from, subjects
from traj_ood.analysis.convergence import (
    Convergence,
    curve_figures,
    errors_on_the_way,
    first_below,
    predicted_steps,
    steps_figure,
)
from traj_ood.analysis.field import vector_field
from traj_ood.analysis.images import sample, stack
from traj_ood.analysis.measures import correlation
from traj_ood.analysis.singular import explicit_norms, explicit_radii, jacobians, spectral_norms
from traj_ood.autoencoders import CallableAutoencoder, load_autoencoder
from traj_ood.data import ArrayImages, Split, read_folder
from traj_ood.drawing.style import save_figure
from traj_ood.dynamics.iterate import iterate
from traj_ood.dynamics.jacobian import spectral_radii
from traj_ood.evaluation.curves import curve_quantiles
from traj_ood.io.parts import Part


def norms_by_reverse_mode(function: Callable[[Tensor], Tensor], points: Tensor) -> Tensor:
    def one(z: Tensor) -> Tensor:
        return function(z[None])[0].flatten()

    with sdpa_kernel(SDPBackend.MATH):
        jacobians = torch.stack([torch.func.jacrev(one)(z).reshape(-1, z.numel()) for z in points])
    return torch.linalg.matrix_norm(jacobians, ord=2)


# ---------------------------------------------------------------------------------------------- the spectral norm


def test_derivatives_are_those_of_the_network_in_evaluation_mode() -> None:
    torch.manual_seed(0)
    decoder = nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 16))
    encoder = nn.Linear(16, 5).requires_grad_(False)
    network = nn.ModuleDict({"encoder": encoder, "decoder": decoder.requires_grad_(False)}).train()
    model = CallableAutoencoder(
        lambda x: encoder(x.flatten(1)), lambda z: decoder(z).reshape(-1, 1, 4, 4), (1, 4, 4), module=network
    )
    points = noise(6, 5).float()
    with model.fixed():
        norms = norms_by_reverse_mode(lambda z: encoder(decoder(z)), points)
        stretches = norms_by_reverse_mode(decoder, points)
        explicit = torch.stack([torch.func.jacrev(lambda z: encoder(decoder(z[None]))[0])(z) for z in points])
        field = encoder(decoder(points)) - points
    assert network.training
    for function, expected in ((model.self_map, norms), (model.decode_batch, stretches)):
        found = spectral_norms(function, points, chunk=6)
        torch.testing.assert_close(found, expected.double(), rtol=0.01, atol=0)
    torch.testing.assert_close(jacobians(model.self_map, points, 6), explicit.double(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(vector_field(model.self_map, points, 6), field, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sizes", [(6, 6), (3, 20), (20, 3)])
def test_norms_are_those_of_the_explicit_jacobian(sizes: tuple[int, int]) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(sizes[0], 32), nn.Tanh(), nn.Linear(32, sizes[1])).double().requires_grad_(False)
    points = noise(7, sizes[0])
    found = spectral_norms(network, points, chunk=3)
    expected = norms_by_reverse_mode(network, points)
    torch.testing.assert_close(found, expected, rtol=0.01, atol=0)
    assert bool((found <= expected * (1 + 1e-9)).all())  # power iteration: from below


def test_norms_of_a_transformers_self_map() -> None:
    model = tiny.vit()
    points = model.encode(tiny.images(1))
    found = spectral_norms(model.self_map, points, chunk=model.chunk)
    expected = norms_by_reverse_mode(model.self_map, points.clone())  # type: ignore[arg-type]
    torch.testing.assert_close(found.float(), expected, rtol=0.01, atol=0)
    radii = spectral_radii(model.self_map, points, chunk=model.chunk)
    assert bool((radii.values <= found * 1.03).all())  # ρ(J) ≤ ‖J‖


def test_a_matrix_that_is_not_normal_has_a_norm_above_its_radius() -> None:
    matrix = torch.tensor([[0.5, 3.0], [0.0, 0.4]], dtype=torch.float64)

    def f(z: Tensor) -> Tensor:
        return z @ matrix.T

    found = spectral_norms(f, noise(2, 2))
    expected = torch.linalg.matrix_norm(matrix, ord=2).expand(2)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(spectral_radii(f, noise(2, 2)).values, torch.full((2,), 0.5).double(), rtol=0.03, atol=0)


def test_products_that_overflow_are_infinite_and_never_zero() -> None:
    """Entries of ±1e25: the products of float32 leave the finite numbers, or their lengths do."""
    signs = noise(3, 3, seed=4).sign().float()
    for size in (1e19, 1e25, 1e38):
        found = spectral_norms(lambda z, m=size * signs: z @ m.T, noise(4, 3).float())
        assert found.tolist() == [math.inf] * 4
    mixed = spectral_norms(lambda z: torch.where(z > 0, 1e25, 0.5) * z, torch.tensor([[1.0], [-1.0]]))
    assert mixed.tolist() == [math.inf, pytest.approx(0.5)]


def test_explicit_matrices_that_are_not_finite_are_infinite() -> None:
    matrices = torch.stack([torch.diag(torch.tensor([0.5, -2.0])), torch.full((2, 2), torch.nan)])
    assert explicit_norms(matrices).tolist() == explicit_radii(matrices).tolist() == [2, math.inf]


def test_a_constant_map_has_norm_zero_and_bad_input_is_refused() -> None:
    assert spectral_norms(lambda z: 0 * z, noise(3, 2)).tolist() == [0, 0, 0]
    with raises("spectral norm: expected a map with forward and reverse derivatives"):
        spectral_norms(_Opaque.apply, noise(1, 2))


class _Opaque(torch.autograd.Function):
    """No forward derivative."""

    @staticmethod
    def forward(z: Tensor) -> Tensor:
        return z.clone()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        pass

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        return gradient


# ---------------------------------------------------------------------------------------------- linear autoencoders


def linear(largest: float, symmetric: bool, seed: int = 0) -> tuple[CallableAutoencoder, Tensor, Tensor]:
    """E(x) = Ax + b and D(z) = Bz + c on 4 numbers, with f(z) = ABz + Ac + b; the model, AB and the fixed point."""
    torch.manual_seed(seed)
    a, b = torch.randn(3, 4).double(), torch.randn(4, 3).double()
    b = a.T if symmetric else b
    a = a * (largest / torch.linalg.eigvals(a @ b).abs().max())
    shift_x, shift_z = torch.randn(4).double(), torch.randn(3).double()
    model = CallableAutoencoder(
        lambda x: x.flatten(1) @ a.T + shift_z,
        lambda z: (z @ b.T + shift_x).reshape(-1, 1, 2, 2),
        (1, 2, 2),
        name="linear",
        chunk=4,
    )
    f = a @ b
    return model, f, torch.linalg.solve(torch.eye(3).double() - f, a @ shift_x + shift_z)


@pytest.mark.parametrize("symmetric", [True, False])
def test_linear_autoencoders_end_at_their_analytic_limit(symmetric: bool) -> None:
    model, f, limit = linear(0.9, symmetric)
    starts = 5 * noise(6, 3)
    path, errors = errors_on_the_way(model, starts, tol=1e-24, max_steps=1000)
    torch.testing.assert_close(path.final, limit.expand(6, 3), rtol=1e-9, atol=1e-9)
    expected, z = [], starts
    for _ in range(40):
        expected.append((z - limit).norm(dim=1))
        z = (z - limit) @ f.T + limit
    torch.testing.assert_close(errors[:, :40], torch.stack(expected, dim=1), rtol=1e-6, atol=1e-9)
    shrink = errors[:, 100] / errors[:, 99]
    torch.testing.assert_close(shrink, torch.full((6,), 0.9).double(), rtol=0.02, atol=0)  # the analytic rate
    norms = spectral_norms(model.self_map, path.final)
    torch.testing.assert_close(norms, torch.linalg.matrix_norm(f, ord=2).expand(6), rtol=1e-4, atol=0)


def test_the_predicted_steps_are_exact_where_every_direction_shrinks_alike() -> None:
    """f(z) = 0.8 z: ‖e_t‖ = 0.8ᵗ‖e₀‖, so the first t with an error of at most ε is ⌈T⌉."""
    model = CallableAutoencoder(lambda x: 0.8 * x.flatten(1), lambda z: z.reshape(-1, 1, 2, 2), (1, 2, 2), chunk=4)
    starts = noise(5, 4)
    _, errors = errors_on_the_way(model, starts, tol=1e-24, max_steps=500)
    predicted = predicted_steps(starts.norm(dim=1), torch.full((5,), 0.8), 1e-3)
    assert first_below(errors, 1e-3).tolist() == predicted.ceil().int().tolist()
    assert predicted[0].item() == pytest.approx(math.log(1e-3 / float(starts[0].norm())) / math.log(0.8))


def test_by_the_norm_of_a_symmetric_map_no_trajectory_takes_longer() -> None:
    model, f, limit = linear(0.85, symmetric=True)
    starts = noise(20, 3, seed=5)
    _, errors = errors_on_the_way(model, starts, tol=1e-24, max_steps=1000)
    norm = torch.linalg.matrix_norm(f, ord=2).expand(20)
    predicted = predicted_steps((starts - limit).norm(dim=1), norm, 1e-4)
    assert bool((first_below(errors, 1e-4) <= predicted.ceil()).all())


def test_predictions_without_an_answer() -> None:
    found = predicted_steps(torch.tensor([1.0, 1.0, 1.0, 1e-3, 1.0]), torch.tensor([0.5, 1.0, 2.0, 0.5, 0.0]), 0.25)
    assert found[[0, 3, 4]].tolist() == [2, 0, 0]
    assert found[[1, 2]].isnan().all()


def test_first_below_counts_from_the_start_and_skips_padding() -> None:
    table = torch.tensor([[5.0, 2.0, 1.0], [0.5, torch.nan, torch.nan], [5.0, 3.0, torch.nan]])
    assert first_below(table, 2.0).tolist() == [1, 0, -1]


def test_pearson_is_scipys() -> None:
    a, b = noise(30).tolist(), noise(30, seed=1).tolist()
    assert correlation(a, b, "pearson") == pytest.approx(pearsonr(a, b).statistic)
    assert correlation(a[:2], b[:2], "pearson") is None
    assert correlation(np.ones(5).tolist(), b[:5], "pearson") is None


# ---------------------------------------------------------------------------------------------- the question


def saved_conv(folder: Path, gain: float = 1.0) -> Path:
    model = tiny.conv()
    for parameter in model.module.parameters():
        parameter.mul_(gain)
    model.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_any_saved_model_on_any_benchmark(tmp_path: Path) -> None:
    model, data = saved_conv(tmp_path / "model"), tiny.write_benchmark(tmp_path / "data")
    pairs = [f"model={model}", f"data={data}", "images=8", "tol=1e-13", "epsilon=0.01", "curve_steps=9", "max_steps=60"]
    question = options_from(find_question("convergence"), pairs)
    finding = question.run(Workspace(tmp_path / "work"), tmp_path / "out")
    figures = finding.figures
    assert figures["converged"] == 1
    assert figures["radius_below_1"] == 1
    assert [(row["from"], row["rate"]) for row in figures["predictions"]] == [
        ("start", "norm"), ("start", "radius"), ("last factor of ten", "norm"), ("last factor of ten", "radius")
    ]  # fmt: skip
    for file in ("convergence.png", "curves.png"):
        assert (tmp_path / "out" / file).read_bytes().startswith(b"\x89PNG")
    work = Workspace(tmp_path / "work")
    assert question.run(work, tmp_path / "again").figures == figures
    assert work.resumed > 0


def test_a_model_trained_for_the_question(tmp_path: Path) -> None:
    pairs = [
        "model=conv",
        "data=mnist",
        "images=4",
        "train_images=20",
        "epochs=1",
        "width=1",
        "tol=1e-9",
        "max_steps=60",
    ]
    work = Workspace(tmp_path / "work", data_root=write_digits(tmp_path / "digits"))
    finding = options_from(find_question("convergence"), [*pairs, "curve_steps=5"]).run(work, tmp_path / "out")
    assert finding.figures["model"] == "conv-mnist-k2"
    assert "epochs: 1 here, 500 with --paper (the paper does not state it)" in finding.differences
    assert "train_images: 20 here, all in the paper" in finding.differences
    assert set(Convergence.unstated) < set(Convergence().options())
    assert Convergence.paper().differences() == ()


@pytest.mark.slow
def test_chunks_change_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = saved_conv(tmp_path / "model"), tiny.write_benchmark(tmp_path / "data")
    question = Convergence(model=str(model), data=str(data), images=11, tol=1e-13, epsilon=0.01, curve_steps=9)
    figures = []
    for size in (1000, 1):  # the model's own chunk of rows is the least
        monkeypatch.setattr(subjects, "_UNIT_IMAGES", size)
        work = Workspace(tmp_path / f"work-{size}")
        figures.append(question.run(work, tmp_path / "out").figures)
        units = len(list(work.folder.glob("trajectories-*")))
        assert units == (1 if size == 1000 else -(-11 // load_autoencoder(model).chunk))
    assert figures[0] == figures[1]


def test_a_folder_gives_the_curves_alone(tmp_path: Path) -> None:
    model = saved_conv(tmp_path / "model", gain=4)
    tiny.write_images(tmp_path / "root" / "photos", 6, seed=1)
    pairs = [f"model={model}", "data=photos", "images=5", "predict=false", "curve_steps=3", "curve_tol=1e-30"]
    work = Workspace(tmp_path / "work", data_root=tmp_path / "root")
    finding = options_from(find_question("convergence"), pairs).run(work, tmp_path / "out")
    assert finding.pictures == ("curves.png",)
    curves = finding.figures["curves"]
    loaded = load_autoencoder(model)
    chosen = sample(read_folder(tmp_path / "root" / "photos", prefix="photos"), 5, 0, "convergence")
    z = loaded.encode(stack(loaded.transform, chosen))
    for step in range(3):
        image = loaded.self_map(z.clone()).detach()
        expected = [np.quantile(v.flatten(1).norm(dim=1).double().numpy(), 0.5) for v in (z, image - z)]
        assert [curves["norm"]["q50"][step], curves["residual"]["q50"][step]] == pytest.approx(expected, rel=1e-3)
        z = image
    assert curves["running"] == [1] * 3
    assert "5 images, 3 steps" in finding.sentence


def test_curves_of_the_record_are_thin_and_keep_both_ends() -> None:
    residuals = 0.9 ** torch.arange(250).double().repeat(4, 1)
    steps, status = torch.full((4,), 250), torch.ones(4, dtype=torch.int64)
    tensors = {"steps": steps, "status": status, "residuals": residuals, "norm": torch.ones(4, 251).double()}
    table = curve_quantiles(
        Split("train", "train", ArrayImages(("a",), np.zeros((1, 8, 8), np.uint8))), [Part((), [], tensors, {})], 1e-5
    )
    found = curve_figures(table)
    assert len(found["steps"]) == 100
    assert (found["steps"][0], found["steps"][-1]) == (0, 249)
    assert found["residual"]["q50"][:2] == pytest.approx([0.9 ** (t / 2) for t in found["steps"][:2]], rel=1e-5)
    assert found["residual"]["q50"][-1] is None  # below the tolerance
    assert set(found["norm"]["q05"]) == {1}


def test_the_sentence_counts_the_images_that_settled() -> None:
    rows = [{"from": f, "rate": r, "points": 0, "pearson": None} for f in ("start", "last factor of ten")
            for r in ("norm", "radius")]  # fmt: skip
    told = convergence.sentence(
        {"model": "m", "converged": 0.8, "norm_below_1": 1.0, "radius_below_1": 1.0, "predictions": rows}
    )
    assert told.startswith("m: 80% of the images settled; of these the spectral norm is below 1 at the end points of")


@pytest.mark.parametrize(
    ("predicted", "reason"),
    [([], "no image to compare"), ([np.nan], "it is 1 or more"), ([0.0, np.nan], "no step predicted or measured")],
)
def test_the_picture_says_why_there_is_no_prediction(predicted: list[float], reason: str, tmp_path: Path) -> None:
    names = [f"{prefix}{name}" for prefix in ("", "last ") for name in ("by norm", "by radius")]
    table = pd.DataFrame(dict.fromkeys(names, predicted), dtype=float)
    table[["error", "measured", "last measured"]] = 3.0
    figure = steps_figure(table, "m")
    for axis in figure.axes[1:]:
        assert axis.get_lines()[0].get_label() == f"by the spectral norm: none, {reason}"
    save_figure(figure, tmp_path / "a.png")


def test_what_cannot_be_measured_is_told_in_one_line(tmp_path: Path) -> None:
    work = Workspace(tmp_path / "work")
    model, data = saved_conv(tmp_path / "model"), tiny.write_benchmark(tmp_path / "data")
    restless = saved_conv(tmp_path / "restless", gain=3)
    with raises("convergence: expected trajectories that move and converge, got 0 of 8 that converged"):
        Convergence(model=str(restless), data=str(data), images=8, tol=1e-30, max_steps=2).run(work, tmp_path / "out")
    with raises("unknown model 'fashion-may': did you mean 'fashion-mae'"):
        Convergence(model="fashion-may", data=str(data)).run(work, tmp_path / "out")
    with raises("model conv: expected data of fashion-mnist, mnist, cifar10 to train on"):
        Convergence(model="conv", data=str(data)).run(work, tmp_path / "out")
    with raises("convergence: expected 1 to 12 images"):
        Convergence(model=str(model), data=str(data), images=99).run(work, tmp_path / "out")
    with raises("convergence: epsilon: expected a share between 0 and 1, got 2.0"):
        Convergence(epsilon=2.0)
    assert not (tmp_path / "out").exists()


def test_curves_stop_where_the_iteration_does() -> None:
    """The first column is ‖f(z₀) − z₀‖², as the engine's own residuals."""
    model = tiny.conv()
    start = model.encode(tiny.images(3))
    path = iterate(model.self_map, start, chunk=model.chunk, max_steps=5)
    expected = (model.self_map(start.clone()) - start).square().sum(dim=1)
    torch.testing.assert_close(path.residuals[:, 0].float(), expected, rtol=1e-4, atol=1e-9)
