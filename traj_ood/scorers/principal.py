"""Principal axes in float64, for more images than dimensions or fewer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from traj_ood.errors import TrajOODError
from traj_ood.scorers.covariance import class_means, moments

_COLUMNS = 4096  # dimensions in float64 at a time, where there are more of them than images


@dataclass(frozen=True)
class Principal:
    """Leading q of the principal axes of features (N, d).

    Attributes:
        mean: (d,) float64.
        axes: (d, q) float64, orthonormal.
        variances: (q,) float64 along them, descending.
    """

    mean: Tensor
    axes: Tensor
    variances: Tensor


def check_share(scorer: str, share: float) -> None:
    """Raises TrajOODError unless 0 < share < 1."""
    if not 0 < share < 1:
        raise TrajOODError(f"scorer {scorer}: share must be above 0 and below 1, got {share}")


def principal_axes(scorer: str, features: Tensor, share: float) -> Principal:
    """The fewest axes that hold a share of the variance of features (N, d), but never all that have any.

    Raises:
        TrajOODError: the features do not vary.
    """
    together = torch.zeros(len(features), dtype=torch.int64)
    mean = class_means(features, together, 1)
    wide = features.shape[1] > len(features)
    matrix = _gram(features, mean[0]) if wide else moments(features, mean, together).covariance
    values, vectors = (t.flip(-1) for t in torch.linalg.eigh(matrix))
    rank = int((values > len(matrix) * torch.finfo(torch.float64).eps * values[0]).sum())
    if not (values[0] > 0 and bool(values.isfinite().all())):
        raise TrajOODError(f"scorer {scorer}: expected training features that differ, got {len(features)} equal ones")
    total = values[:rank].sum()
    reached = int((values[:rank].cumsum(0) < share * total).sum()) + 1
    kept = min(reached, rank - 1)
    axes = vectors[:, :kept]
    if wide:
        axes = _axes(features, mean[0], axes) / (len(features) * values[:kept]).sqrt()
    return Principal(mean[0], axes.contiguous(), values[:kept])


def _gram(features: Tensor, mean: Tensor) -> Tensor:
    """(N, N) products of the centred features over N: the eigenvalues of their covariance."""
    gram = torch.zeros(len(features), len(features), dtype=torch.float64)
    for part, centre in zip(features.split(_COLUMNS, dim=1), mean.split(_COLUMNS), strict=True):
        offsets = part.double() - centre
        gram += offsets @ offsets.T
    return gram / len(features)


def _axes(features: Tensor, mean: Tensor, vectors: Tensor) -> Tensor:
    """(d, q) directions of the Gram matrix's eigenvectors (N, q)."""
    parts = zip(features.split(_COLUMNS, dim=1), mean.split(_COLUMNS), strict=True)
    return torch.cat([(part.double() - centre).T @ vectors for part, centre in parts])
