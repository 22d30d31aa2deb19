"""DeLong's test: whether one scorer has a higher AUROC than another on the same images."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from traj_ood import TrajOODError
from traj_ood.evaluation.metrics import Floats, check_scores


class DeLong(NamedTuple):
    """Result of :func:`delong`: the two AUROCs, and the z statistic and two-sided p-value of their difference."""

    auroc_a: float
    auroc_b: float
    z: float
    p: float


def delong(id_scores_a: ArrayLike, ood_scores_a: ArrayLike, id_scores_b: ArrayLike, ood_scores_b: ArrayLike) -> DeLong:
    """DeLong's test of two correlated AUROCs (DeLong et al. 1988), in O(N log N) as Sun and Xu (2014).

    The placement of an OOD image is the share of ID images with lower scores, ties counted half, and vice versa for an
    ID image; a scorer's AUROC is the mean placement. With D the difference of placements between the scorers,
    Var(AUROC_a − AUROC_b) = var(D over OOD)/m + var(D over ID)/n, and z is standard normal if there is no difference.
    Sun and Xu compute placements from ranks; binary search among the sorted other scores gives the same values.

    Args:
        id_scores_a, id_scores_b: (n,) scores of both scorers on the same n >= 2 images in the same order.
        ood_scores_a, ood_scores_b: (m,), likewise, m >= 2.
    Returns:
        ``(auroc_a, auroc_b, z, p)``; z > 0 if a is better, p is two-sided. If D is the same for all images the variance
        is 0: then z = 0 and p = 1 for equal AUROCs (such as two perfect scorers), else z = ±∞ and p = 0.
    Raises:
        TrajOODError: scores are empty or not finite, have different lengths, or there is a single image.
    """
    # SciPy tests one AUROC (mannwhitneyu), but not two on the same images.
    id_a, id_b = _paired("ID", id_scores_a, id_scores_b)
    ood_a, ood_b = _paired("OOD", ood_scores_a, ood_scores_b)
    above_a, below_a = _placements(id_a, ood_a)
    above_b, below_b = _placements(id_b, ood_b)
    difference = float(np.mean(above_a - above_b))
    variance = np.var(above_a - above_b, ddof=1) / len(ood_a) + np.var(below_a - below_b, ddof=1) / len(id_a)
    # Placements are multiples of 1/2n and 1/2m; smaller differences are rounding.
    if abs(difference) < 0.25 / (len(id_a) * len(ood_a)):
        difference = 0.0
    deviation = math.sqrt(float(variance)) if variance > 1e-24 else 0.0
    z = difference / deviation if deviation else math.copysign(math.inf, difference) if difference else 0.0
    return DeLong(float(np.mean(above_a)), float(np.mean(above_b)), z, math.erfc(abs(z) / math.sqrt(2)))


def _paired(name: str, a: ArrayLike, b: ArrayLike) -> tuple[Floats, Floats]:
    first, second = check_scores(a, f"{name} (a)"), check_scores(b, f"{name} (b)")
    if len(first) != len(second):
        raise TrajOODError(
            f"paired test: expected both scorers on the same {name} images, got {len(first)} and {len(second)} scores; "
            "score the same images with both"
        )
    if len(first) < 2:
        raise TrajOODError(f"paired test: expected at least 2 {name} images, got 1; one image has no variance")
    return first, second


def _placements(id_scores: Floats, ood_scores: Floats) -> tuple[Floats, Floats]:
    """The share of ID images below each OOD image (m,), and of OOD images above each ID image (n,)."""

    def below(values: Floats, others: Floats) -> Floats:
        ordered = np.sort(others)
        return (np.searchsorted(ordered, values, "left") + np.searchsorted(ordered, values, "right")) / (
            2.0 * len(others)
        )

    return below(ood_scores, id_scores), 1.0 - below(id_scores, ood_scores)
