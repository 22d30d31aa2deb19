"""Principal axes in float64, with more images than dimensions or fewer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from traj_ood.errors import TrajOODError
from traj_ood.scorers.covariance import class_means, gaussian

_BLOCK_COLUMNS = 4096  # dimensions per float64 block, where there are more dimensions than images


@dataclass(frozen=True)
class Principal:
    """The q leading principal axes of features (N, d).

    Attributes:
        mean: (d,) float64 mean of the features.
        axes: (d, q) float64, orthonormal.
        variances: (q,) float64 variances along the axes, descending.
    """

    mean: Tensor
    axes: Tensor
    variances: Tensor


def principal_axes(scorer: str, features: Tensor, share: float) -> Principal:
    """The fewest principal axes that hold ``share`` of the variance of features (N, d); one direction is always left.

    Raises:
        TrajOODError: the features do not vary.
    """
    wide = features.shape[1] > len(features)
    if wide:
        mean = class_means(features)[0]
        matrix = _gram(features, mean)
    else:
        mean, matrix = gaussian(features, shrink=False)
    values, vectors = (t.flip(-1) for t in torch.linalg.eigh(matrix))
    rank = int((values > len(matrix) * torch.finfo(torch.float64).eps * values[0]).sum())
    if not (values[0] > 0 and bool(values.isfinite().all())):
        raise TrajOODError(f"scorer {scorer}: expected training features that differ, got {len(features)} equal ones")
    total = values[:rank].sum()
    reached = int((values[:rank].cumsum(0) < share * total).sum()) + 1
    kept = min(reached, rank - 1)
    axes = vectors[:, :kept]
    if wide:
        axes = _axes(features, mean, axes) / (len(features) * values[:kept]).sqrt()
    return Principal(mean, axes.contiguous(), values[:kept])


def _gram(features: Tensor, mean: Tensor) -> Tensor:
    """Gram matrix (N, N) of the centred features over N, which has the nonzero eigenvalues of their covariance."""
    gram = torch.zeros(len(features), len(features), dtype=torch.float64)
    for part, centre in zip(features.split(_BLOCK_COLUMNS, dim=1), mean.split(_BLOCK_COLUMNS), strict=True):
        offsets = part.double() - centre
        gram += offsets @ offsets.T
    return gram / len(features)


def _axes(features: Tensor, mean: Tensor, vectors: Tensor) -> Tensor:
    """Unnormalised axes (d, q) of the eigenvectors (N, q) of the Gram matrix."""
    parts = zip(features.split(_BLOCK_COLUMNS, dim=1), mean.split(_BLOCK_COLUMNS), strict=True)
    return torch.cat([(part.double() - centre).T @ vectors for part, centre in parts])
