"""The numbers that several questions report, each a function of plain tensors with the paper's symbols."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from traj_ood.errors import TrajOODError

_ROWS = 2048  # rows of a similarity matrix at a time


def memorization_coefficients(decoded: Tensor, training: Tensor) -> tuple[Tensor, Tensor]:
    """mem(z*) of each decoded attractor: the cosine to its closest training image, and which one that is (§3.2.1).

    The paper prints min over x of cos(D(z*), x), which would be the farthest image; its sentence says the closest, so
    this is the maximum.

    Args:
        decoded: (K, *) D(z*). training: (N, *). Both in units in which a cosine means what it should: the paper does
            not say whether pixels are centred; pixels in [0, 1] are not.
    Returns:
        (K,) float64 cosines in [-1, 1], (K,) int64 rows of ``training``.
    Raises:
        TrajOODError: nothing to compare, or shapes that differ.

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
    """Symmetric Chamfer similarity of two sets: the mean cosine to the nearest of the other set, both ways, averaged.

    §3.2.2 names it without a formula. Cosines, because the paper tells attractors apart by cosine; 1 exactly when
    every direction of one set is one of the other.

    Args:
        a, b: (N, *), (M, *).
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
    """Fewest principal directions that explain ``share`` of the variance of the rows (Fig. 13's "generalization
    entropy").

    Rows are centred, since variance is about the mean; App. B.5 writes the SVD of the matrix as it is, whose first
    direction would mostly be that mean.

    Args:
        points: (N, *). share: of the total variance, in (0, 1].
    Returns:
        0 where all rows agree.
    Raises:
        TrajOODError: no rows, or a share outside (0, 1].
    """
    if not len(points) or not 0 < share <= 1:
        raise TrajOODError(f"rank: expected rows and a share in (0, 1], got {len(points)} rows and {share}")
    rows = points.flatten(1).double()
    centred = rows - rows.mean(dim=0)
    variances = torch.linalg.svdvals(centred).square()
    total = variances.sum()
    # Rounding leaves identical rows a variance of this relative size.
    if total <= torch.finfo(torch.float32).eps ** 2 * rows.square().sum():
        return 0
    # Cumulative sums end a rounding error below 1; a rank must not grow by that.
    return int((variances.cumsum(0) / total < share - 1e-12).sum()) + 1


def _closest(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) largest cosine of each row of ``a`` with a row of ``b``, and its row; a zero vector has cosine 0."""
    a, b = normalize(a.flatten(1).double(), dim=1), normalize(b.flatten(1).double(), dim=1)
    best = [(part @ b.T).max(dim=1) for part in a.split(_ROWS)]
    cosines = torch.cat([m.values for m in best]).clamp(-1.0, 1.0)
    return cosines.cpu(), torch.cat([m.indices for m in best]).cpu()
