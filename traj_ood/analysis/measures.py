"""Measures that several questions report, as functions of plain tensors."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from traj_ood.errors import TrajOODError

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
        The cosines in [-1, 1], (K,) float64, and the indices of the closest training images, (K,) int64.
    Raises:
        TrajOODError: an empty set, or shapes that differ.

    >>> a, which = memorization_coefficients(torch.eye(2), torch.tensor([[3.0, 4.0], [0.0, -1.0]]))
    >>> a.tolist(), which.tolist()
    ([0.6, 0.8], [0, 0])
    """
    if not len(decoded) or not len(training) or decoded.shape[1:] != training.shape[1:]:
        raise TrajOODError(
            f"memorization: expected decoded attractors and training images of one shape, got {tuple(decoded.shape)} "
            f"and {tuple(training.shape)}"
        )
    return _closest(decoded, training)


def chamfer_similarity(a: Tensor, b: Tensor) -> float:
    """Symmetric Chamfer similarity of two sets: the mean cosine to the nearest point of the other set, averaged over
    both directions.

    §3.2.2 names it without a formula. Cosines are used because the paper distinguishes attractors by cosine. It is 1 if
    and only if both sets have the same directions.

    Args:
        a: (N, *).
        b: (M, *).
    Raises:
        TrajOODError: an empty set, or shapes that differ.

    >>> chamfer_similarity(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[5.0, 0.0]]))
    0.75
    """
    if not len(a) or not len(b) or a.shape[1:] != b.shape[1:]:
        raise TrajOODError(
            f"Chamfer similarity: expected two sets of points of one shape, got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    return float((_closest(a, b)[0].mean() + _closest(b, a)[0].mean()) / 2)


def rank_explaining(points: Tensor, share: float = 0.9) -> int:
    """Number of principal directions that explain ``share`` of the variance of the rows (Fig. 13's "generalization
    entropy"); 0 if all rows are equal.

    Rows are centred, since variance is about the mean. App. B.5 takes the SVD of the matrix without centring, whose
    first direction would mostly be the mean.

    Args:
        points: (N, *).
        share: share of the total variance, in (0, 1].
    Raises:
        TrajOODError: no rows, or a share outside (0, 1].
    """
    if not len(points) or not 0 < share <= 1:
        raise TrajOODError(f"rank: expected rows and a share in (0, 1], got {len(points)} rows and {share}")
    rows = points.flatten(1).double()
    centred = rows - rows.mean(dim=0)
    variances = torch.linalg.svdvals(centred).square()
    total = variances.sum()
    # Rounding gives identical rows a variance of this relative size.
    if total <= torch.finfo(torch.float32).eps ** 2 * rows.square().sum():
        return 0
    # Cumulative sums may end slightly below 1 by rounding, which must not raise the rank.
    return int((variances.cumsum(0) / total < share - 1e-12).sum()) + 1


def _closest(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """For each row of ``a`` the largest cosine with a row of ``b``, and the index of that row; (N,) each. A zero vector
    has cosine 0."""
    a, b = normalize(a.flatten(1).double(), dim=1), normalize(b.flatten(1).double(), dim=1)
    best = [(part @ b.T).max(dim=1) for part in a.split(_BLOCK_ROWS)]
    cosines = torch.cat([m.values for m in best]).clamp(-1.0, 1.0)
    return cosines.cpu(), torch.cat([m.indices for m in best]).cpu()
