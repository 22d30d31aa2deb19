"""RMDS, SSD, class-conditional Mahalanobis(++) and PatchCore against pytorch-ood, scikit-learn and float64 loops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from traj_ood.errors import TrajOODError
from traj_ood.scorers import Evidence, create_scorer
from traj_ood.scorers.patchcore import greedy_coreset

CLASSES, WIDTH = 4, 10


@pytest.fixture
def library() -> Any:
    return pytest.importorskip("pytorch_ood.detector", reason="pytorch-ood is not installed")


def evidence(count: int, seed: int) -> Evidence:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    centres = 2 * torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(9))
    spread = torch.arange(1, WIDTH + 1) ** -0.5
    features = centres[labels] + torch.randn(count, WIDTH, generator=generator) * spread
    return Evidence({"mean": features}, labels=labels)


TRAIN, TEST = evidence(200, 0), evidence(30, 1)


def ours(spec: str) -> np.ndarray:
    return create_scorer(spec).fit(TRAIN).score(TEST).numpy()


def arrays(unit: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    x, z = (e.features["mean"].double().numpy() for e in (TRAIN, TEST))
    if unit:
        x, z = (a / np.linalg.norm(a, axis=1)[:, None] for a in (x, z))
    return x, z, np.asarray(TRAIN.labels)


def squared(z: np.ndarray, mean: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    inverse = np.linalg.pinv(covariance, hermitian=True)
    return np.array([(row - mean) @ inverse @ (row - mean) for row in z])


def within(x: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    means = np.stack([x[labels == c].mean(axis=0) for c in range(CLASSES)])
    return means, x - means[labels]


@pytest.mark.parametrize("unit", [False, True])
def test_rmds_by_the_formula(unit: bool) -> None:
    x, z, labels = arrays(unit)
    means, rest = within(x, labels)
    own = np.stack([squared(z, m, rest.T @ rest / len(x)) for m in means])
    expected = own.min(axis=0) - squared(z, x.mean(axis=0), np.cov(x.T, bias=True))
    spec = "rmds:normalize=true" if unit else "rmds"
    np.testing.assert_allclose(ours(spec), expected, rtol=1e-5, atol=1e-5)


def test_rmds_is_pytorch_oods_over_n(library: Any) -> None:
    made = library.RMD(None).fit_features(TRAIN.features["mean"], TRAIN.labels)
    expected = made.predict_features(TEST.features["mean"]).double().numpy() * len(TRAIN.features["mean"])
    np.testing.assert_allclose(ours("rmds"), expected, rtol=1e-3, atol=1e-3)


def test_mahalanobis_plus_plus_is_the_class_conditional_form_of_unit_features() -> None:
    x, z, labels = arrays(unit=True)
    means, rest = within(x, labels)
    expected = np.sqrt(np.stack([squared(z, m, rest.T @ rest / len(x)) for m in means]).min(axis=0))
    spec = "mahalanobis:classes=true:normalize=true:covariance=empirical"
    np.testing.assert_allclose(ours(spec), expected, rtol=1e-5)


def test_ssd_of_one_cluster_is_class_free_mahalanobis_plus_plus_squared() -> None:
    x, z, _ = arrays(unit=True)
    np.testing.assert_allclose(ours("ssd"), squared(z, x.mean(axis=0), np.cov(x.T, bias=True)), rtol=1e-5)
    other = ours("mahalanobis:normalize=true:covariance=empirical")
    np.testing.assert_allclose(ours("ssd"), other**2, rtol=1e-5)


def test_ssd_with_classes_has_a_covariance_for_each() -> None:
    x, z, labels = arrays(unit=True)
    z, x = (z - x.mean(axis=0)) / x.std(axis=0), (x - x.mean(axis=0)) / x.std(axis=0)
    each = [x[labels == c] for c in range(CLASSES)]
    expected = np.stack([squared(z, own.mean(axis=0), np.cov(own.T, bias=True)) for own in each]).min(axis=0)
    np.testing.assert_allclose(ours("ssd:classes=true"), expected, rtol=1e-5)


def test_ssd_finds_separated_clusters() -> None:
    np.testing.assert_allclose(ours("ssd:clusters=4"), ours("ssd:classes=true"), rtol=1e-6)


@pytest.mark.parametrize("spec", ["rmds", "ssd:classes=true", "mahalanobis:classes=true:normalize=true"])
def test_labels_are_asked_for(spec: str) -> None:
    with pytest.raises(TrajOODError, match=f"scorer {spec}: expected class labels of the training images, got none"):
        create_scorer(spec).fit(Evidence(TRAIN.features))
    with pytest.raises(TrajOODError, match="expected 200 labels, whole numbers from 0, got shape"):
        create_scorer(spec).fit(Evidence(TRAIN.features, labels=torch.full((200,), -1)))


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("ssd:clusters=0", "clusters must be at least 1, got 0"),
        ("ssd:clusters=2:classes=true", "expected clusters or classes=true, got both"),
        ("patchcore:share=0", "share must be above 0 and at most 1, got 0"),
        ("patchcore:neighbours=0", "neighbours must be at least 1, got 0"),
        ("patchcore:view=tokens", "unknown view of scorer patchcore 'tokens'"),
    ],
)
def test_options_that_cannot_be(spec: str, text: str) -> None:
    with pytest.raises(TrajOODError, match=text):
        create_scorer(spec)


# ---------------------------------------------------------------------------------------------- PatchCore


def patches(count: int, seed: int, cells: int = 6) -> Tensor:
    return torch.randn(count, cells, 7, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("neighbours", [1, 3, 9])
def test_patchcore_by_anomalibs_steps(neighbours: int) -> None:
    train, test = patches(20, 0), patches(15, 1)
    scorer = create_scorer(f"patchcore:neighbours={neighbours}").fit(Evidence({"grid": train}))
    bank = scorer.state["bank"].double().numpy()
    assert bank.shape == (12, 7)
    expected = []
    for image in test.double().numpy():
        distances = np.linalg.norm(image[:, None] - bank, axis=2)
        farthest = distances.min(axis=1).argmax()
        score, nearest = distances[farthest].min(), distances[farthest].argmin()
        support = np.argsort(np.linalg.norm(bank - bank[nearest], axis=1), kind="stable")[:neighbours]
        odds = np.exp(np.linalg.norm(image[farthest] - bank[support], axis=1))
        expected.append(score if neighbours == 1 else (1 - odds[0] / odds.sum()) * score)
    found = scorer.score(Evidence({"grid": test})).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_coreset_takes_the_farthest_patch_each_time() -> None:
    points = patches(40, 2, cells=1)[:, 0]
    chosen = greedy_coreset(points, 10, seed=3)
    assert len(set(chosen.tolist())) == 10
    x = points.double().numpy()
    for k in range(1, 10):
        least = np.linalg.norm(x[:, None] - x[chosen[:k].numpy()], axis=2).min(axis=1)
        assert least[chosen[k]] == pytest.approx(least.max())


def test_a_coreset_of_wide_patches_is_chosen_in_a_projection() -> None:
    points = torch.randn(60, 400, generator=torch.Generator().manual_seed(0))
    assert len(set(greedy_coreset(points, 20, seed=0).tolist())) == 20


@pytest.mark.parametrize("spec", ["rmds", "ssd:classes=true"])
def test_one_image_of_each_class_measures_nothing(spec: str) -> None:
    alone = Evidence({"mean": TRAIN.features["mean"][:20]}, labels=torch.arange(20))
    with pytest.raises(TrajOODError, match="so no distance can be measured: use more images"):
        create_scorer(spec).fit(alone)
