"""Memorisation, rank and similarity against NumPy; models whose attractors are known; resumed trainings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from known import Known, patterns
from scipy.stats import spearmanr
from shorthand import noise, raises
from tiny_digits import write_digits
from torch import Tensor

from traj_ood.analysis import Finding, Workspace, experiment, models, options_from
from traj_ood.analysis.images import load_images
from traj_ood.analysis.measures import chamfer_similarity, correlation, memorization_coefficients, rank_explaining
from traj_ood.analysis.memorization import Memorization
from traj_ood.analysis.memory import MeasuredImages, memory, normalised, pixels, reference, settle_images
from traj_ood.analysis.models import paper_recipe, settle, train_conv
from traj_ood.autoencoders import ConvAutoencoder, ConvNetwork

TINY = ["images=24", "epochs=2", "batch=8", "width=1", "starts=6", "test=10", "max_steps=4", "data=mnist"]


# ---------------------------------------------------------------------------------------------- measures


def cosines(a: Tensor, b: Tensor) -> np.ndarray:
    x, y = a.flatten(1).numpy(), b.flatten(1).numpy()
    return (x @ y.T) / np.linalg.norm(x, axis=1)[:, None] / np.linalg.norm(y, axis=1)


def test_memorization_is_the_cosine_to_the_closest_image() -> None:
    decoded, training = noise(2500, 1, 3, 3), noise(40, 1, 3, 3, seed=1)  # more rows than one block of the product
    expected = cosines(decoded, training)
    found, which = memorization_coefficients(decoded, training)
    np.testing.assert_allclose(found.numpy(), expected.max(axis=1), atol=1e-12)
    assert (which.numpy() == expected.argmax(axis=1)).all()
    assert memorization_coefficients(training[:3] * 7, training)[0].allclose(torch.ones(3, dtype=torch.float64))
    assert memorization_coefficients(torch.zeros(1, 2), torch.ones(1, 2))[0].item() == 0.0  # black, not NaN


def test_chamfer_similarity_is_symmetric_and_one_for_the_same_directions() -> None:
    a, b = noise(30, 5), noise(7, 5, seed=1)
    table = cosines(a, b)
    assert chamfer_similarity(a, b) == pytest.approx((table.max(axis=1).mean() + table.max(axis=0).mean()) / 2)
    assert chamfer_similarity(a, b) == pytest.approx(chamfer_similarity(b, a), abs=1e-15)
    assert chamfer_similarity(a, 3 * a.flip(0)) == pytest.approx(1.0)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.9, 1.0])
def test_rank_is_numpys(share: float) -> None:
    points = noise(60, 12) * torch.linspace(0.1, 3, 12).double() + 5
    values = np.linalg.svd(points.numpy() - points.numpy().mean(axis=0), compute_uv=False) ** 2
    expected = int(np.searchsorted(np.cumsum(values) / values.sum(), share - 1e-12)) + 1
    assert rank_explaining(points, share) == expected


def test_rank_of_equal_variances_and_of_none() -> None:
    corners = torch.cat([torch.eye(10), -torch.eye(10)])  # ten directions of one variance each
    assert [rank_explaining(corners, s) for s in (0.1, 0.11, 0.9, 0.91, 1.0)] == [1, 2, 9, 10, 10]
    assert rank_explaining(torch.full((5, 3), 0.1)) == 0


def test_spearman_is_the_pearson_correlation_of_mean_ranks_and_none_without_ranks() -> None:
    x, y = [1.0, 2.0, 3.0, 4.0, 5.0], [2.0, 2.0, 7.0, 1.0, None]
    assert correlation(x, y) == pytest.approx(spearmanr(x[:4], y[:4]).statistic)
    assert correlation([1, 2], [1, 2]) is None
    assert correlation([1, 2, 3], [4, 4, 4]) is None


# ---------------------------------------------------------------------------------------------- one model


def test_a_model_that_stores_its_training_images_has_memorised_them() -> None:
    training, model = patterns(), Known()
    images = MeasuredImages(training, torch.arange(8), 0.8 * training + 0.1)
    ends = settle_images(model, 0.8 * training + 0.1, 1e-12, 200)
    found, shown = memory(model, images, ends)
    assert found["memorization"] == pytest.approx(1.0, abs=1e-6)
    assert found["memorization_std"] == pytest.approx(0.0, abs=1e-6)
    assert found["memorization_distinct"] == found["memorization_converged"] == pytest.approx(1.0, abs=1e-6)
    assert (found["own"], found["distinct"], found["starts"]) == (1.0, 8, 8)
    assert (found["converged"], found["finite"]) == (1.0, 1.0)
    assert found["rank90"] == 3  # three pixels that vary, each as much
    # D(E(x)) of a coordinate 0.8 is 0.8 + 0.3 (0.8 − 0.512) = 0.8864, 0.0432 off in pixels; at ±1 nothing moves.
    assert found["test_error"] == pytest.approx(0.0432**2, rel=1e-4)
    assert found["train_error"] == pytest.approx(0.0, abs=1e-12)
    assert torch.allclose(shown["decoded"], shown["closest"], atol=1e-5)


def test_a_model_of_one_attractor_has_memorised_one_image() -> None:
    white = Known(lambda z: torch.ones_like(z))
    images = MeasuredImages(patterns(), torch.arange(8), patterns())
    found, _ = memory(white, images, settle_images(white, patterns(), 1e-6, 9))
    assert (found["distinct"], found["rank90"], found["rank90_unit"], found["own"]) == (1, 0, 0, 1 / 8)
    assert found["memorization"] == pytest.approx(1.0)


def test_a_model_that_diverges_has_no_figures_of_attractors() -> None:
    wild = Known(lambda z: z + torch.inf)
    images = MeasuredImages(patterns(), torch.arange(8), patterns())
    found, shown = memory(wild, images, settle_images(wild, patterns(), 1, 9))
    assert (found["finite"], found["converged"], found["test_error"]) == (0.0, 0.0, None)
    assert found["memorization"] is found["rank90"] is found["distinct"] is None
    assert shown == {}


def test_end_points_that_decode_to_nothing_are_left_out() -> None:
    """D overflows where z is finite: half of the images end there."""
    model = Known(lambda z: torch.where(z[:, :1] > 0, z / z.abs(), torch.nan))
    starts = torch.cat([patterns()[:4], 1 - patterns()[4:]])
    ends = settle_images(Known(), starts, 1e-12, 200)
    found, shown = memory(model, MeasuredImages(starts, torch.arange(8), starts), ends)
    assert (found["finite"], found["distinct"], found["memorization"]) == (0.5, 8, pytest.approx(1.0, abs=1e-6))
    assert len(shown["decoded"]) == 4


def test_pixels_are_what_the_transform_makes_of_them() -> None:
    model = Known()
    model.mean, model.std = (0.3,), (0.2,)
    images = torch.rand(5, 1, 2, 2)
    assert torch.allclose(pixels(model, normalised(model, images)), images)


def test_the_reference_is_what_unseen_images_reach() -> None:
    training = patterns()
    assert reference(MeasuredImages(training, torch.arange(2), training[:3])) == pytest.approx(1.0)


# ---------------------------------------------------------------------------------------------- training


def trained(work: Workspace, folder: Path, **options: Any) -> models.Trained:
    data = load_images("mnist", folder)
    settings: dict[str, Any] = {"width": 2, "bottleneck": 3, "seed": 1, "at": (0, 2)} | options
    return train_conv(work, "model", data.train, data.shape, paper_recipe(5, 8), **settings)


def weights(found: models.Trained) -> dict[int, str]:
    return {epoch: model.fingerprint() for epoch, model in found.models.items()}


def test_training_keeps_the_epochs_asked_for_and_improves(tmp_path: Path) -> None:
    found = trained(Workspace(tmp_path / "units"), write_digits(tmp_path / "digits"))
    assert list(found.models) == [0, 2, 5]
    assert len(set(weights(found).values())) == 3
    assert len(found.losses) == 5
    assert found.losses[-1] < found.losses[0]
    torch.manual_seed(1)
    first = ConvNetwork(1, 28, 2, 3)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), found.models[0].module.parameters(), strict=True))


def test_a_training_cut_off_between_epochs_ends_with_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digits = write_digits(tmp_path / "digits")
    whole = weights(trained(Workspace(tmp_path / "a"), digits))
    monkeypatch.setattr("traj_ood.training.loop.CHECKPOINT_SECONDS", 0.0)
    calls = []

    def cut_off(network: ConvNetwork, images: Tensor, draws: torch.Generator) -> Tensor:
        calls.append(1)
        if len(calls) == 18:  # five steps an epoch: in the fourth
            raise KeyboardInterrupt
        return models.mse(network, images, draws)

    work = Workspace(tmp_path / "b")
    with pytest.raises(KeyboardInterrupt):
        trained(work, digits, loss=cut_off)
    assert weights(trained(work, digits, loss=cut_off)) == whole
    assert len(calls) == 18 + 2 * 5
    assert [path.suffix for path in (tmp_path / "b").iterdir()] == [".safetensors"]  # no checkpoints left behind


def test_settle_stops_at_the_papers_tolerance() -> None:
    ends, trajectory = settle(Known(), torch.full((1, 4), 0.5))
    assert float(ends.residuals[0]) < models.PAPER_TOL
    assert trajectory.max_steps == 3000
    assert torch.allclose(ends.points, torch.ones(1, 4), atol=1e-3)


# ---------------------------------------------------------------------------------------------- the question


@pytest.mark.slow
def test_the_question_resumes_between_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digits = write_digits(tmp_path / "digits")
    asked = options_from(Memorization, [*TINY, "bottlenecks=2,5"])
    whole = asked.run(Workspace(tmp_path / "a", data_root=digits), tmp_path / "a-out")
    measured = []

    def cut_off(model: ConvAutoencoder, images: MeasuredImages, ends: Any) -> Any:
        measured.append(ends.points.shape[1])
        if len(measured) == 2:
            raise KeyboardInterrupt
        return memory(model, images, ends)

    monkeypatch.setattr(experiment, "memory", cut_off)
    work = Workspace(tmp_path / "b", data_root=digits)
    with pytest.raises(KeyboardInterrupt):
        asked.run(work, tmp_path / "b-out")
    assert not (tmp_path / "b-out").exists()
    resumed = asked.run(work, tmp_path / "b-out")
    assert measured == [2, 5, 5]
    assert resumed.figures == whole.figures
    assert Finding.load(tmp_path / "b-out").sentence == whole.sentence
    assert {row["bottleneck"] for row in whole.figures["rows"]} == {2, 5}


def test_the_question_refuses_impossible_options() -> None:
    with raises("memorization: bottlenecks: expected ascending, >= 1, got 4, 2"):
        Memorization(bottlenecks=(4, 2))
    with raises("unknown memorization: data 'fashion'"):
        Memorization(data="fashion")
    with raises("memorization: tol: expected above 0, got 0.0"):
        Memorization(tol=0.0)


def test_the_papers_settings_are_an_option_away() -> None:
    paper = Memorization.paper()
    assert (paper.epochs, paper.rate, paper.decay, paper.tol, paper.max_steps) == (500, 5e-4, 1e-4, 1e-6, 3000)
    assert (paper.images, paper.bottlenecks[0], paper.bottlenecks[-1]) == (0, 2, 512)
    assert "images: 4000 here, all in the paper" in Memorization().differences()
    assert not any(d.startswith("data") for d in Memorization(data="cifar10").differences())  # Fig. 2 has it, too
