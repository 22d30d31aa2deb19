"""Metrics against scikit-learn, against a brute force over all pairs, and against OpenOOD's formulas derived anew."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from traj_ood.errors import TrajOODError
from traj_ood.evaluation.metrics import (
    METRIC_NAMES,
    Metrics,
    bootstrap,
    compute_metrics,
    mean_metrics,
    metrics_of_counts,
)

Floats = NDArray[np.float64]


def brute_force(id_scores: Floats, ood_scores: Floats) -> tuple[float, float]:
    """AUROC over all pairs, and the paper's FPR over all thresholds: O(nm), no library."""
    wins = sum((o > i) + 0.5 * (o == i) for i in id_scores for o in ood_scores)
    keeping = [t for t in np.concatenate([id_scores, ood_scores]) if np.mean(id_scores <= t) >= 0.95]
    return wins / (len(id_scores) * len(ood_scores)), float(np.mean(ood_scores <= min(keeping)))


def openood(id_scores: Floats, ood_scores: Floats) -> dict[str, float]:
    """What OpenOOD reports: confidence = -score, OOD labelled -1 and positive, scikit-learn's curves and areas."""
    from sklearn.metrics import auc, precision_recall_curve, roc_curve

    conf = -np.concatenate([id_scores, ood_scores])
    positive = np.concatenate([np.zeros(len(id_scores)), np.ones(len(ood_scores))])
    fpr, tpr, _ = roc_curve(positive, -conf)
    p_in, r_in, _ = precision_recall_curve(1 - positive, conf)
    p_out, r_out, _ = precision_recall_curve(positive, -conf)
    first = next(i for i, t in enumerate(tpr) if t >= 0.95)
    return {
        "auroc": auc(fpr, tpr),
        "aupr_in": auc(r_in, p_in),
        "aupr_out": auc(r_out, p_out),
        "fpr95_openood": fpr[first],
    }


def of_unit_counts(id_scores: Floats, ood_scores: Floats) -> Floats:
    """The bootstrap's own arithmetic on a "resample" that draws every image once."""
    distinct, rank = np.unique(np.concatenate([id_scores, ood_scores]), return_inverse=True)
    id_counts = np.bincount(rank[: len(id_scores)], minlength=len(distinct))
    ood_counts = np.bincount(rank[len(id_scores) :], minlength=len(distinct))
    return metrics_of_counts(id_counts[None], ood_counts[None])[0]


def cases() -> dict[str, tuple[Floats, Floats]]:
    rng = np.random.default_rng(7)
    grid = np.arange(20.0)
    return {
        "continuous": (rng.normal(0, 1, 300), rng.normal(1, 1.5, 170)),
        "near 40": (40 + rng.normal(0, 1e-3, 200), 40.002 + rng.normal(0, 1e-3, 200)),
        "three values": (rng.integers(0, 3, 90).astype(float), rng.integers(1, 4, 55).astype(float)),
        "all equal": (np.full(8, 3.0), np.full(5, 3.0)),
        "identical grids": (grid, grid.copy()),  # one long diagonal, which roc_curve's defaults collapse
        "repeated grids": (np.repeat(grid, 3), np.repeat(grid[5:], 2)),
        "perfect": (np.arange(30.0), np.arange(30.0) + 100),
        "inverted": (np.arange(30.0) + 100, np.arange(30.0)),
        "one each": (np.array([1.0]), np.array([2.0])),
        "one each, tied": (np.array([1.0]), np.array([1.0])),
        "one ID": (np.array([0.5]), rng.random(40)),
        "tiny and huge": (np.array([1e-300, 1e300, 0.0]), np.array([1e-300, -1e300, 5.0])),
    }


@pytest.mark.parametrize("name", cases())
def test_metrics_equal_brute_force_and_openood(name: str) -> None:
    id_scores, ood_scores = cases()[name]
    got = compute_metrics(id_scores, ood_scores)
    auroc, fpr95 = brute_force(id_scores, ood_scores)
    assert got.auroc == pytest.approx(auroc, abs=1e-12)
    assert got.fpr95 == pytest.approx(fpr95, abs=1e-12)
    for metric, expected in openood(id_scores, ood_scores).items():
        assert getattr(got, metric) == pytest.approx(expected, abs=1e-12), metric
    assert all(0.0 <= getattr(got, metric) <= 1.0 for metric in METRIC_NAMES)


@pytest.mark.parametrize("name", cases())
def test_bootstrap_arithmetic_equals_compute_metrics(name: str) -> None:
    id_scores, ood_scores = cases()[name]
    got = compute_metrics(id_scores, ood_scores)
    expected = [getattr(got, metric) for metric in METRIC_NAMES]
    np.testing.assert_allclose(of_unit_counts(id_scores, ood_scores), expected, rtol=0, atol=1e-12)


def test_bootstrap_arithmetic_equals_compute_metrics_on_many_heavy_ties() -> None:
    rng = np.random.default_rng(0)
    for _ in range(400):
        levels, n, m = rng.integers(1, 8), rng.integers(1, 30), rng.integers(1, 30)
        id_scores = 40 + rng.integers(0, levels, n).astype(float)
        ood_scores = 40 + rng.integers(0, levels, m).astype(float)
        got = compute_metrics(id_scores, ood_scores)
        expected = [getattr(got, metric) for metric in METRIC_NAMES]
        np.testing.assert_allclose(of_unit_counts(id_scores, ood_scores), expected, rtol=0, atol=1e-12)


def test_a_resample_equals_compute_metrics_of_the_drawn_images() -> None:
    rng = np.random.default_rng(3)
    for _ in range(200):
        distinct = np.arange(rng.integers(1, 9), dtype=float)
        id_counts = rng.integers(0, 4, len(distinct))
        ood_counts = rng.integers(0, 4, len(distinct))
        if id_counts.sum() == 0 or ood_counts.sum() == 0:
            continue
        got = compute_metrics(np.repeat(distinct, id_counts), np.repeat(distinct, ood_counts))
        expected = [getattr(got, metric) for metric in METRIC_NAMES]
        values = metrics_of_counts(id_counts[None], ood_counts[None])[0]
        np.testing.assert_allclose(values, expected, rtol=0, atol=1e-12)


def test_perfect_and_inverted_separation() -> None:
    low, high = np.linspace(39.99, 40.0, 50), np.linspace(40.01, 40.02, 70)
    assert compute_metrics(low, high) == Metrics(1.0, 1.0, 1.0, 0.0, 0.0)
    inverted = compute_metrics(high, low)
    assert (inverted.auroc, inverted.fpr95, inverted.fpr95_openood) == (0.0, 1.0, 1.0)


def test_the_two_fprs_differ() -> None:
    # ID 0..99: keeping 95 means the threshold 94, which accepts the 10 OOD scores below it and none above.
    ood = np.concatenate([np.full(10, 50.5), np.full(90, 200.0)])
    got = compute_metrics(np.arange(100.0), ood)
    assert got.fpr95 == 0.10
    assert got.fpr95_openood == 0.49  # catching 95 % of OOD needs the threshold 50.5; ID 51..99 lie above it


@pytest.mark.parametrize(
    ("id_scores", "ood_scores", "message"),
    [
        ([], [1.0], "ID scores: expected at least 1 score, got 0; check that this split has images"),
        ([1.0], [], "OOD scores: expected at least 1 score, got 0; check that this split has images"),
        ([[1.0]], [1.0], "ID scores: expected one score per image, shape (n,); got shape (1, 1)"),
        (
            [1.0],
            [0.0, np.nan, np.inf],
            "OOD scores: expected finite numbers, got 2 of 3 NaN or infinite (first at index 1); "
            "drop those images and record them as failures",
        ),
    ],
)
@pytest.mark.parametrize("function", [compute_metrics, bootstrap])
def test_bad_scores_are_named(function: object, id_scores: list, ood_scores: list, message: str) -> None:
    with pytest.raises(TrajOODError) as error:
        function(id_scores, ood_scores)  # type: ignore[operator]
    assert str(error.value) == message


def test_bootstrap_is_deterministic_and_independent_of_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    id_scores, ood_scores = rng.normal(0, 1, 101), rng.normal(1, 1, 53)
    first = bootstrap(id_scores, ood_scores, resamples=60, seed=4)
    assert list(first) == list(METRIC_NAMES)
    assert bootstrap(id_scores, ood_scores, resamples=60, seed=4) == first
    assert bootstrap(id_scores, ood_scores, resamples=60, seed=5) != first
    monkeypatch.setattr("traj_ood.evaluation.metrics.CHUNK_COUNTS", 7 * 154)
    assert bootstrap(id_scores, ood_scores, resamples=60, seed=4) == first


def test_bootstrap_intervals_cover_the_true_auroc() -> None:
    from math import erf

    truth = 0.5 * (1 + erf(1 / 2))  # P(OOD > ID) for N(0, 1) and N(1, 1) is Phi(1 / sqrt 2)
    rng = np.random.default_rng(2)
    covered = 0
    for trial in range(100):
        low, high = bootstrap(rng.normal(0, 1, 80), rng.normal(1, 1, 60), resamples=200, seed=trial)["auroc"]
        covered += low <= truth <= high
    assert 86 <= covered <= 100  # 95 expected


def test_bootstrap_contains_the_estimate_and_narrows_with_images() -> None:
    rng = np.random.default_rng(5)
    widths = []
    for n in (100, 1600):
        id_scores, ood_scores = rng.normal(0, 1, n), rng.normal(1, 1, n)
        intervals, got = bootstrap(id_scores, ood_scores), compute_metrics(id_scores, ood_scores)
        for metric, (low, high) in intervals.items():
            assert low <= getattr(got, metric) <= high
        widths.append(intervals["auroc"][1] - intervals["auroc"][0])
    assert widths[1] == pytest.approx(widths[0] / 4, rel=0.35)


def test_bootstrap_computes_its_resamples_many_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """What makes it fast enough for every set and scorer: 16 resamples of 8,000 images in a step, 32 steps for 500."""
    sizes = []

    def counted(id_counts: Any, ood_counts: Any) -> Floats:
        sizes.append(len(id_counts))
        return metrics_of_counts(id_counts, ood_counts)

    monkeypatch.setattr("traj_ood.evaluation.metrics.metrics_of_counts", counted)
    rng = np.random.default_rng(6)
    bootstrap(rng.normal(0, 1, 7000), rng.normal(1, 1, 1000))
    assert sum(sizes) == 500
    assert len(sizes) == 32


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"resamples": 0}, "resamples: expected at least 1, got 0; 500 is the default"),
        ({"level": 1.0}, "level: expected a share between 0 and 1, got 1.0; 0.95 is the default"),
    ],
)
def test_bootstrap_options_are_checked(option: dict, message: str) -> None:
    with pytest.raises(TrajOODError) as error:
        bootstrap([1.0], [2.0], **option)
    assert str(error.value) == message


def test_mean_metrics() -> None:
    assert mean_metrics([Metrics(0.0, 0.2, 0.4, 0.6, 0.8), Metrics(1.0, 0.4, 0.6, 0.8, 1.0)]) == Metrics(
        0.5, pytest.approx(0.3), 0.5, pytest.approx(0.7), 0.9
    )
    with pytest.raises(TrajOODError, match=r"expected at least 1 OOD set, got 0"):
        mean_metrics([])
