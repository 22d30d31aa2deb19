"""Measures that several questions report, as functions of plain tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import normalize

from traj_ood.evaluation.metrics import Metrics, compute_metrics

Values = Sequence[float | None] | pd.Series
_BLOCK_ROWS = 2048  # rows of a similarity matrix per block


def memorization_coefficients(decoded: Tensor, training: Tensor) -> tuple[Tensor, Tensor]:
    """Memorisation coefficient mem(z*) of each decoded attractor: the cosine to its closest training image (§3.2.1).

    The paper's formula has min over x of cos(D(z*), x), which would be the farthest image; its text says the closest,
    so this is the maximum.

    Args:
        decoded: (K, *) D(z*).
        training: (N, *) training images in the same units. The paper does not say whether pixels are centred; pixels in
            [0, 1] are not.
    Returns:
        The cosines in [-1, 1], (K,) float64, 0 for a zero vector, and the indices of the closest training images, (K,)
        int64.

    >>> a, which = memorization_coefficients(torch.eye(2), torch.tensor([[3.0, 4.0], [0.0, -1.0]]))
    >>> a.tolist(), which.tolist()
    ([0.6, 0.8], [0, 0])
    """
    a, b = (normalize(images.flatten(1).double(), dim=1) for images in (decoded, training))
    best = [(part @ b.T).max(dim=1) for part in a.split(_BLOCK_ROWS)]
    cosines = torch.cat([m.values for m in best]).clamp(-1.0, 1.0)
    return cosines.cpu(), torch.cat([m.indices for m in best]).cpu()


def chamfer_similarity(a: Tensor, b: Tensor) -> float:
    """Symmetric Chamfer similarity of sets (N, *) and (M, *): the mean cosine to the nearest point of the other set,
    averaged over both directions.

    §3.2.2 names it without a formula. Cosines are used because the paper distinguishes attractors by cosine. It is 1 if
    and only if both sets have the same directions.

    >>> chamfer_similarity(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[5.0, 0.0]]))
    0.75
    """
    there, back = (memorization_coefficients(*sets)[0].mean() for sets in ((a, b), (b, a)))
    return float((there + back) / 2)


def rank_explaining(points: Tensor, share: float = 0.9) -> int:
    """Number of principal directions that explain a ``share`` in (0, 1] of the variance of the rows (N, *), Fig. 13's
    "generalization entropy"; 0 if all rows are equal.

    Rows are centred, since variance is about the mean. App. B.5 takes the SVD of the matrix without centring, whose
    first direction would mostly be the mean.
    """
    rows = points.flatten(1).double()
    centred = rows - rows.mean(dim=0)
    variances = torch.linalg.svdvals(centred).square()
    total = variances.sum()
    # Rounding gives identical rows a variance of this relative size.
    if total <= torch.finfo(torch.float32).eps ** 2 * rows.square().sum():
        return 0
    # Cumulative sums may end slightly below 1 by rounding, which must not raise the rank.
    return int((variances.cumsum(0) / total < share - 1e-12).sum()) + 1


def separation(known: Tensor, ood: Tensor) -> Metrics | None:
    """The metrics of scores of ID samples (n,) against those of OOD samples (m,); None if a score is not finite."""
    is_finite = bool(known.isfinite().all()) and bool(ood.isfinite().all())
    return compute_metrics(known.numpy(), ood.numpy()) if is_finite else None


def finite(value: Tensor | float) -> float | None:
    """The value as a number for the record; None for NaN and infinity."""
    return float(value) if math.isfinite(value) else None


def median(values: Tensor) -> float | None:
    """Median of the values that are not NaN; None if there are none or it is infinite."""
    return finite(values.nanmedian())


def share(mask: Tensor) -> float:
    """Share of the entries that are true."""
    return float(mask.double().mean())


def correlation(x: Values, y: Values, method: Literal["pearson", "spearman"] = "spearman") -> float | None:
    """Correlation over the pairs where both are known; None for fewer than 3 pairs or if a side does not vary."""
    pairs = pd.DataFrame({"x": list(x), "y": list(y)}, dtype=float).dropna()
    if len(pairs) < 3 or (pairs.nunique() < 2).any():
        return None
    return float(pairs["x"].corr(pairs["y"], method=method))
