"""Metrics of the separation of ID and OOD images: AUROC, AUPR and FPR@95, with bootstrap intervals.

All metrics depend only on the ranks of the raw float64 scores (HIGHER = MORE OOD). Scores are never transformed: a
sigmoid in float32 maps all scores near 40 to the same number, and a perfect detector then appears as chance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import ArrayLike, NDArray

from traj_ood.errors import TrajOODError

RECALL = 0.95
"""The "95" of FPR@95, in both definitions."""

CHUNK_COUNTS = 2**17
"""Counts per array in a chunk of resamples: a dozen of 1 MiB at a time. Larger ones leave the cache and take twice as
long."""

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Metrics:
    """The metrics of one scorer on one OOD set, all fractions in [0, 1].

    The two FPRs have different definitions and must not be compared with each other.

    Attributes:
        auroc: probability that an OOD image scores above an ID image, ties counted half.
        aupr_in: area under the precision-recall curve with ID as the positive class.
        aupr_out: area under the precision-recall curve with OOD as the positive class.
        fpr95: the paper's FPR: share of OOD accepted as ID by the threshold that keeps at least 95 % of ID.
        fpr95_openood: OpenOOD's FPR: share of ID rejected by the threshold that rejects at least 95 % of OOD.
    """

    auroc: float
    aupr_in: float
    aupr_out: float
    fpr95: float
    fpr95_openood: float


METRIC_NAMES: tuple[str, ...] = tuple(field.name for field in fields(Metrics))


def check_scores(scores: ArrayLike, name: str) -> Floats:
    """``scores`` as a finite float64 vector (n,), n >= 1.

    Raises ``TrajOODError`` if they are not; the message begins with ``name`` and gives the number of entries that are
    not finite, and the first index.
    """
    vector = np.asarray(scores, dtype=np.float64)
    if vector.ndim != 1:
        raise TrajOODError(f"{name} scores: expected one score per image, shape (n,); got shape {vector.shape}")
    if vector.size == 0:
        raise TrajOODError(f"{name} scores: expected at least 1 score, got 0; check that this split has images")
    wrong = np.flatnonzero(~np.isfinite(vector))
    if wrong.size:
        raise TrajOODError(
            f"{name} scores: expected finite numbers, got {wrong.size} of {vector.size} NaN or infinite "
            f"(first at index {wrong[0]}); drop those images and record them as failures"
        )
    return vector


def compute_metrics(id_scores: ArrayLike, ood_scores: ArrayLike) -> Metrics:
    """The metrics of ``id_scores`` (n,) against ``ood_scores`` (m,), higher = more OOD, computed with scikit-learn.

    >>> round(compute_metrics([0.1, 0.2, 0.6], [0.5, 0.8]).auroc, 4)    # 5 of 6 pairs are in order
    0.8333

    AUROC, both AUPRs and ``fpr95_openood`` are computed as in OpenOOD 1.5 (``openood/evaluators/metrics.py``):
    ``roc_curve`` with its defaults, ``auc`` of the curve, and the first point with TPR >= 0.95. These defaults drop
    collinear points, which changes an FPR if ID and OOD scores are tied in equal proportion at several thresholds.
    ``fpr95``, the paper's, uses all thresholds.

    Raises ``TrajOODError`` if scores are empty or not finite.
    """
    from sklearn import metrics as sk

    id_scores, ood_scores = check_scores(id_scores, "ID"), check_scores(ood_scores, "OOD")
    scores = np.concatenate([id_scores, ood_scores])
    is_ood = np.repeat([0, 1], [id_scores.size, ood_scores.size])
    fpr, tpr, _ = sk.roc_curve(is_ood, scores)
    false_accepts, kept, _ = sk.roc_curve(1 - is_ood, -scores, drop_intermediate=False)
    precision_in, recall_in, _ = sk.precision_recall_curve(1 - is_ood, -scores)
    precision_out, recall_out, _ = sk.precision_recall_curve(is_ood, scores)
    return Metrics(
        auroc=float(sk.auc(fpr, tpr)),
        aupr_in=float(sk.auc(recall_in, precision_in)),
        aupr_out=float(sk.auc(recall_out, precision_out)),
        fpr95=float(false_accepts[np.argmax(kept >= RECALL)]),
        fpr95_openood=float(fpr[np.argmax(tpr >= RECALL)]),
    )


def mean_metrics(metrics: Sequence[Metrics]) -> Metrics:
    """The mean of each metric over OOD sets, with equal weight whatever their size, as in OpenOOD.

    Raises ``TrajOODError`` if there are none.
    """
    if not metrics:
        raise TrajOODError("mean of metrics: expected at least 1 OOD set, got 0; name a near or far split")
    return Metrics(**{name: math.fsum(getattr(m, name) for m in metrics) / len(metrics) for name in METRIC_NAMES})


def bootstrap(
    id_scores: ArrayLike, ood_scores: ArrayLike, *, resamples: int = 500, seed: int = 0, level: float = 0.95
) -> dict[str, tuple[float, float]]:
    """Percentile intervals (low, high) of every metric, by name, from a bootstrap over images.

    ID and OOD images are resampled independently. The intervals reflect the choice of test images only, not that of
    training or of attractors. A resample is a vector of counts over the sorted distinct scores, so that it takes a
    cumulative sum, not a sort.

    Args:
        id_scores, ood_scores: (n,) and (m,) scores, higher = more OOD.
        resamples: number of resamples. Default 500: about 12 draws are beyond either end of a 95 % interval.
        seed: seed of the draws.
        level: level of the intervals. Default 0.95.
    Raises:
        TrajOODError: scores are empty or not finite, ``resamples`` < 1, or ``level`` is outside (0, 1).
    """
    if resamples < 1:
        raise TrajOODError(f"resamples: expected at least 1, got {resamples}; 500 is the default")
    if not 0.0 < level < 1.0:
        raise TrajOODError(f"level: expected a share between 0 and 1, got {level}; 0.95 is the default")
    id_scores, ood_scores = check_scores(id_scores, "ID"), check_scores(ood_scores, "OOD")
    # scipy.stats.bootstrap would sort every resample again, for one metric at a time, and with other draws than those
    # of the recorded intervals.
    distinct, rank = np.unique(np.concatenate([id_scores, ood_scores]), return_inverse=True)
    id_rank, ood_rank = rank[: id_scores.size], rank[id_scores.size :]
    # One stream each, so that draws and intervals do not depend on the size of a chunk.
    id_draws, ood_draws = (np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(2))
    rows = max(1, CHUNK_COUNTS // max(distinct.size, id_scores.size, ood_scores.size))
    values = []
    for start in range(0, resamples, rows):
        size = min(rows, resamples - start)
        id_counts = resample(id_rank, distinct.size, size, id_draws)
        ood_counts = resample(ood_rank, distinct.size, size, ood_draws)
        values.append(metrics_of_counts(id_counts, ood_counts))
    low, high = np.quantile(np.concatenate(values), [(1 - level) / 2, (1 + level) / 2], axis=0)
    return {name: (float(a), float(b)) for name, a, b in zip(METRIC_NAMES, low, high, strict=True)}


def resample(rank: Counts, distinct: int, size: int, draws: np.random.Generator) -> Counts:
    """``size`` resamples of the images with these ranks (n,), as counts per distinct score (size, distinct)."""
    drawn = rank[draws.integers(rank.size, size=(size, rank.size))]
    drawn += distinct * np.arange(size)[:, None]  # a block of bins per resample, for a single bincount
    return np.bincount(drawn.ravel(), minlength=size * distinct).reshape(size, distinct)


def metrics_of_counts(id_counts: Counts, ood_counts: Counts) -> Floats:
    """Metrics (R, 5), in the order of ``METRIC_NAMES``, of R count vectors (R, D) over ascending distinct scores."""
    tp, fp = np.cumsum(id_counts, axis=1), np.cumsum(ood_counts, axis=1)
    aupr_in = _area_precision_recall(id_counts, tp, fp)
    kept = _first_at_recall(tp)
    fpr95 = _at(fp, kept) / fp[:, -1]
    # Sum over scores of ID count x (OOD above + half of OOD at the same score), times 2.
    wins = np.einsum("rd,rd->r", id_counts, 2 * (fp[:, -1:] - fp) + ood_counts)
    auroc = wins / (2.0 * tp[:, -1] * fp[:, -1])

    id_counts, ood_counts = id_counts[:, ::-1], ood_counts[:, ::-1]  # OOD as the positive class: highest score first
    tp, fp = np.cumsum(ood_counts, axis=1), np.cumsum(id_counts, axis=1)
    aupr_out = _area_precision_recall(ood_counts, tp, fp)
    caught = _skip_collinear(_first_at_recall(tp), ood_counts, id_counts)
    fpr95_openood = _at(fp, caught) / fp[:, -1]
    return np.stack([auroc, aupr_in, aupr_out, fpr95, fpr95_openood], axis=1)


def _area_precision_recall(positive: Counts, tp: Counts, fp: Counts) -> Floats:
    """Trapezoidal area (R,) under precision over recall, starting at (0, 1); all arguments are (R, D)."""
    precision = np.ones((tp.shape[0], tp.shape[1] + 1))
    # A score that a resample did not draw has the precision of the previous one, and 1 before the first draw.
    np.divide(tp, tp + fp, out=precision[:, 1:], where=tp + fp > 0)
    return np.einsum("rd,rd->r", positive, precision[:, 1:] + precision[:, :-1]) / (2.0 * tp[:, -1])


def _first_at_recall(tp: Counts) -> Counts:
    """Index (R,) of the first score at which the cumulative positives (R, D) reach a share of 95 %."""
    return np.argmax(tp / tp[:, -1:] >= RECALL, axis=1)


def _at(values: Counts, index: Counts) -> Counts:
    """``values[r, index[r]]`` for every row, (R,)."""
    return np.take_along_axis(values, index[:, None], axis=1)[:, 0]


def _skip_collinear(index: Counts, positive: Counts, negative: Counts) -> Counts:
    """Move each index (R,) past the points that ``roc_curve`` drops by default, as in OpenOOD's FPR.

    A point is dropped if the steps into it and out of it are equal. This affects the FPR only if both classes are tied
    at the crossing, so that the loop visits few rows for continuous scores.
    """
    index = index.copy()
    for row in np.flatnonzero((_at(positive, index) > 0) & (_at(negative, index) > 0)):
        drawn = np.flatnonzero(positive[row] + negative[row])
        steps = np.stack([positive[row, drawn], negative[row, drawn]])
        corner = np.any(steps[:, 1:] != steps[:, :-1], axis=0)  # (drawn - 1,): whether score i is a corner of the curve
        corner = np.append(corner, True)
        corner[0] = True  # roc_curve keeps the first and the last point
        here = int(np.searchsorted(drawn, index[row]))
        index[row] = drawn[here + int(np.argmax(corner[here:]))]
    return index
