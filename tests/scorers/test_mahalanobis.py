"""Mahalanobis against scikit-learn, pytorch-ood and the definition in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from traj_ood.errors import TrajOODError
from traj_ood.scorers import Evidence, Mahalanobis
from traj_ood.scorers.covariance import class_means, covariance, is_upper, times_upper, whitening


def draw(count: int, dimension: int = 12, seed: int = 0, classes: int = 3) -> tuple[Tensor, Tensor]:
    """Features far from the origin, of decaying spectrum, in ``classes`` clusters; and their labels."""
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.arange(1, dimension + 1) ** -0.5
    means = torch.randn(classes, dimension, generator=torch.Generator().manual_seed(99)) * spectrum
    labels = torch.randint(classes, (count,), generator=generator)
    return 5 + 2 * means[labels] + torch.randn(count, dimension, generator=generator) * spectrum, labels


def evidence(features: Tensor, labels: Tensor | None = None) -> Evidence:
    return Evidence(features={"mean": features}, labels=labels)


def by_definition(train: Tensor, labels: Tensor, queries: Tensor, estimator: type) -> np.ndarray:
    """(B,) the smallest of all classes' sqrt((z − μ_c)ᵀ Σ⁻¹ (z − μ_c)), Σ⁻¹ as scikit-learn estimates it."""
    x, y, z = train.double().numpy(), labels.numpy(), queries.double().numpy()
    means = np.stack([x[y == c].mean(axis=0) for c in np.unique(y)])
    centred = np.concatenate([x[y == c] - m for c, m in zip(np.unique(y), means, strict=True)])
    precision = estimator().fit(centred).precision_
    squared = np.stack([np.einsum("bi,ij,bj->b", z - m, precision, z - m) for m in means])
    return np.sqrt(squared.min(axis=0))


@pytest.mark.parametrize(("count", "dimension"), [(400, 12), (5000, 12), (40, 60), (2, 5), (30, 1)])
def test_one_gaussian_is_scikit_learns_ledoit_wolf(count: int, dimension: int) -> None:
    from sklearn.covariance import LedoitWolf

    train, queries = draw(count, dimension)[0], 2 * draw(50, dimension, seed=1)[0]
    scores = Mahalanobis().fit(evidence(train)).score(evidence(queries))
    expected = np.sqrt(LedoitWolf().fit(train.double().numpy()).mahalanobis(queries.double().numpy()))
    np.testing.assert_allclose(scores.numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize("covariance", ["ledoit-wolf", "empirical"])
def test_classes_against_the_definition(covariance: str) -> None:
    from sklearn.covariance import EmpiricalCovariance, LedoitWolf

    (train, labels), queries = draw(500), draw(80, seed=1)[0]
    estimator = {"ledoit-wolf": LedoitWolf, "empirical": EmpiricalCovariance}[covariance]
    scorer = Mahalanobis(classes=True, covariance=covariance)  # type: ignore[arg-type]
    scores = scorer.fit(evidence(train, labels)).score(evidence(queries))
    np.testing.assert_allclose(scores.numpy(), by_definition(train, labels, queries, estimator), rtol=1e-9)


def test_classes_and_empirical_are_pytorch_oods() -> None:
    oracle = pytest.importorskip("pytorch_ood.detector", reason="pytorch-ood is not installed").Mahalanobis(None)
    (train, labels), queries = draw(2000), draw(200, seed=1)[0]
    ours = Mahalanobis(classes=True, covariance="empirical").fit(evidence(train, labels)).score(evidence(queries))
    theirs = oracle.fit_features(train, labels).predict_features(queries)
    # Theirs is float32, half the square, and not divided by N.
    torch.testing.assert_close((2 * len(train) * theirs.double()).sqrt(), ours, rtol=1e-4, atol=0)


def test_classes_and_empirical_are_openoods_formula_in_its_float32() -> None:
    (train, labels), queries = draw(2000), draw(200, seed=1)[0]
    ours = Mahalanobis(classes=True, covariance="empirical").fit(evidence(train, labels)).score(evidence(queries))
    means = torch.stack([train[labels == c].mean(0) for c in range(3)])
    from sklearn.covariance import EmpiricalCovariance

    fit = EmpiricalCovariance().fit((train - means[labels]).numpy())
    precision = torch.from_numpy(fit.precision_).float()
    offsets = queries[:, None] - means
    confidence = (-torch.einsum("bci,ij,bcj->bc", offsets, precision, offsets)).amax(dim=1)
    torch.testing.assert_close((-confidence).double().sqrt(), ours, rtol=1e-4, atol=0)


@pytest.mark.parametrize("duplicated", [True, False])
def test_singular_covariance_is_pseudo_inverted_as_scikit_learns(duplicated: bool) -> None:
    from sklearn.covariance import EmpiricalCovariance

    (train, labels), queries = draw(500 if duplicated else 8), draw(60, seed=1)[0]
    if duplicated:  # a dead unit, and one that repeats another
        train[:, 3], train[:, 5] = 0, train[:, 4]
    scorer = Mahalanobis(classes=True, covariance="empirical")
    scores = scorer.fit(evidence(train, labels)).score(evidence(queries))
    assert scorer.state["factor"].shape[1] < train.shape[1]
    np.testing.assert_allclose(scores.numpy(), by_definition(train, labels, queries, EmpiricalCovariance), rtol=1e-6)


def test_constant_features_are_no_distance_apart() -> None:
    scorer = Mahalanobis().fit(evidence(torch.ones(4, 3)))
    assert scorer.score(evidence(torch.ones(2, 3))).tolist() == [0.0, 0.0]


def test_numbers_of_classes_do_not_matter_and_absent_ones_are_left_out() -> None:
    (train, labels), queries = draw(300), evidence(draw(40, seed=1)[0])
    plain = Mahalanobis(classes=True).fit(evidence(train, labels)).score(queries)
    renamed = Mahalanobis(classes=True).fit(evidence(train, torch.tensor([7, 0, 400])[labels]))
    assert renamed.state["means"].shape[0] == 3
    torch.testing.assert_close(renamed.score(queries), plain, rtol=1e-12, atol=0)


def test_a_class_mean_is_at_distance_zero_from_far_away() -> None:
    train, labels = draw(600, dimension=4)
    train[labels == 2] += 1e4  # whitened means far apart: the expansion of the square would leave 1e-4
    scorer = Mahalanobis(classes=True).fit(evidence(train, labels))
    at_mean = train[labels == 2].double().mean(dim=0).float()
    assert float(scorer.score(evidence(at_mean[None]))) < 0.01


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        (None, "scorer mahalanobis:classes=true: expected class labels of the training images, got none"),
        (torch.zeros(4, dtype=torch.int64), r"expected 5 labels, whole numbers from 0, got shape \(4,\), torch.int64"),
        (torch.tensor([0, 1, -1, 0, 1]), r"expected 5 labels, whole numbers from 0, got shape \(5,\), .*, smallest -1"),
        (torch.zeros(5), r"expected 5 labels, whole numbers from 0, got shape \(5,\), torch.float32"),
    ],
)
def test_bad_labels(labels: Tensor | None, text: str) -> None:
    with pytest.raises(TrajOODError, match=text):
        Mahalanobis(classes=True).fit(evidence(torch.randn(5, 3), labels))


def test_means_and_covariance_by_hand() -> None:
    features, labels = draw(5000)  # several blocks
    means = class_means(features, labels)
    offsets = features.double() - means[labels]
    for c in range(3):
        torch.testing.assert_close(means[c], features[labels == c].double().mean(dim=0), rtol=1e-12, atol=0)
    found = covariance(features, means, labels, shrink=False)
    torch.testing.assert_close(found, offsets.T @ offsets / 5000, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("smallest", [1.0, 1e-9, 1e-13, 0.0])
def test_whitening_is_the_root_of_the_pseudo_inverse(smallest: float) -> None:
    from scipy.linalg import pinvh

    basis = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    matrix = (basis * torch.tensor([3.0, 2.0, 1.0, 1.0, 1.0, smallest], dtype=torch.float64)) @ basis.T
    matrix = (matrix + matrix.T) / 2
    factor = whitening(matrix)
    expected = pinvh(matrix.numpy())
    scale = np.abs(expected).max()
    np.testing.assert_allclose((factor @ factor.T).numpy(), expected, atol=max(1e-12, 1e-14 / (smallest or 1)) * scale)
    assert factor.shape == (6, 6 if smallest else 5)


def test_shrinkage_of_white_noise_is_whole() -> None:
    features = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]])
    found = covariance(features, torch.zeros(1, 2).double(), shrink=True)
    torch.testing.assert_close(found, 0.5 * torch.eye(2, dtype=torch.float64))


def test_classes_of_one_image_each_measure_nothing() -> None:
    features = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    train = Evidence(features={"mean": features}, labels=torch.arange(6))
    for estimator in ("ledoit-wolf", "empirical"):
        with pytest.raises(TrajOODError, match=r"do not vary within their classes \(6 classes of 6 images\)"):
            Mahalanobis(classes=True, covariance=estimator).fit(train)  # type: ignore[arg-type]


@pytest.mark.parametrize("dimension", [1, 127, 128, 300])
def test_a_triangular_product_reads_nothing_below_the_diagonal(dimension: int) -> None:
    generator = torch.Generator().manual_seed(dimension)
    rows = torch.randn(9, dimension, dtype=torch.float64, generator=generator)
    factor = torch.randn(dimension, dimension, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(times_upper(rows, factor.triu() + 0), rows @ factor.triu(), rtol=1e-12, atol=1e-12)
    assert is_upper(factor.triu())
    assert is_upper(factor) == (dimension == 1)
    assert not is_upper(factor.triu()[:, :-1])


def test_a_singular_covariance_has_no_triangular_factor_and_the_same_distances() -> None:
    train = draw(200)[0]
    doubled, queries = torch.cat([train, train], dim=1), draw(20, seed=1)[0]
    scorer = Mahalanobis(covariance="empirical").fit(evidence(doubled))
    assert not is_upper(scorer.state["factor"])
    single = Mahalanobis(covariance="empirical").fit(evidence(train))
    assert is_upper(single.state["factor"])
    scores = scorer.score(evidence(torch.cat([queries, queries], dim=1)))
    torch.testing.assert_close(scores, single.score(evidence(queries)), rtol=1e-6, atol=0)
