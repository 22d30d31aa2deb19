"""Second moments of many features in float64, without a float64 copy of the features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_ROWS = 2048  # features in float64 at a time: 12 MB at 768 dimensions


@dataclass(frozen=True)
class Moments:
    """Of N offsets x − μ in d dimensions.

    Attributes:
        count: N.
        covariance: (d, d) float64, Σ (x − μ)(x − μ)ᵀ / N.
        fourth: Σ ‖x − μ‖⁴ / N.
    """

    count: int
    covariance: Tensor
    fourth: float


def class_means(features: Tensor, classes: Tensor, count: int) -> Tensor:
    """(count, d) float64 means of features (N, d) by class (N,) int64 in 0 … count − 1, all of which occur."""
    sums = torch.zeros(count, features.shape[1], dtype=torch.float64)
    for part, own in zip(features.split(_ROWS), classes.split(_ROWS), strict=True):
        sums.index_add_(0, own, part.double())
    return sums / classes.bincount(minlength=count)[:, None]


def moments(features: Tensor, centres: Tensor, classes: Tensor) -> Moments:
    """Moments of features (N, d) around their own centre: ``centres`` (C, d) float64, ``classes`` (N,) int64."""
    matrix = torch.zeros(features.shape[1], features.shape[1], dtype=torch.float64)
    fourth = torch.zeros((), dtype=torch.float64)
    for part, own in zip(features.split(_ROWS), classes.split(_ROWS), strict=True):
        offsets = part.to(torch.float64, copy=True).sub_(centres[own])
        array = offsets.numpy()
        matrix += torch.from_numpy(array.T @ array)  # NumPy sees the symmetry and computes one half; torch does both
        fourth += offsets.norm(dim=1).pow(4).sum()
    return Moments(len(features), matrix / len(features), float(fourth) / len(features))


def ledoit_wolf(sample: Moments) -> Tensor:
    """(d, d) covariance shrunk towards μI, μ = tr(S)/d: (1 − ρ) S + ρ μI, ρ as in Ledoit and Wolf (2004, §3.2).

    The estimate is scikit-learn's. The sum over all entries of (X∘X)ᵀ(X∘X), for which it forms that product, is the
    sum of the rows' ‖x‖⁴: what costs two more products there is here known from one look at the features.
    """
    covariance, dimension = sample.covariance, len(sample.covariance)
    scale = float(covariance.trace()) / dimension
    spread = float(covariance.square().sum())
    to_target = spread - dimension * scale**2  # d² of the paper, times the dimension; likewise b² below
    noise = min((sample.fourth - spread) / sample.count, to_target)
    shrinkage = noise / to_target if noise > 0 else 0.0
    return (1 - shrinkage) * covariance + shrinkage * scale * torch.eye(dimension, dtype=torch.float64)


def whitening(covariance: Tensor) -> Tensor:
    """(d, r) float64 F with F Fᵀ = Σ⁺, so that (z − μ)ᵀ Σ⁺ (z − μ) = ‖(z − μ) F‖²: two products become one.

    Eigenvalues below d · 2⁻⁵² of the largest count as zero, as in SciPy's ``pinvh`` and hence in scikit-learn: what the
    training features do not span is not measured.
    """
    share = len(covariance) * torch.finfo(torch.float64).eps
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if not failed:
        inverse = torch.linalg.solve_triangular(factor, torch.eye(len(factor), dtype=torch.float64), upper=False)
        # ‖L⁻¹‖² = tr Σ⁻¹ >= 1/λ_min and ‖Σ‖ >= λ_max: below, no eigenvalue is small, and none has to be computed
        if float(inverse.square().sum()) * float(covariance.norm()) * share < 1:
            return inverse.T.contiguous()
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > share * values.abs().max()
    return vectors[:, kept] / values[kept].sqrt()
