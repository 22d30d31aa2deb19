"""Second moments of many features in float64, without a float64 copy of the features."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_HELD = 2**18 * 3 // 2  # float64 values of features at a time: 3 MiB, which stay in the cache while they are needed
_COLUMNS = 192  # of a triangular factor at a time: narrower blocks leave out more, and multiply more slowly


@dataclass(frozen=True)
class Moments:
    """Moments of N offsets x − μ in d dimensions.

    Attributes:
        count: N.
        covariance: (d, d) float64, Σ (x − μ)(x − μ)ᵀ / N.
        fourth: Σ ‖x − μ‖⁴ / N, which only :func:`ledoit_wolf` reads; NaN where nobody asked.
    """

    count: int
    covariance: Tensor
    fourth: float


def class_means(features: Tensor, classes: Tensor, count: int) -> Tensor:
    """(count, d) float64 means of features (N, d) by class (N,) int64 in 0 … count − 1, all of which occur."""
    sums = torch.zeros(count, features.shape[1], dtype=torch.float64)
    for part, own, room in _parts(features, classes):
        sums.index_add_(0, own, room.copy_(part))
    return sums / classes.bincount(minlength=count)[:, None]


def moments(features: Tensor, centres: Tensor, classes: Tensor, *, fourth: bool = True) -> Moments:
    """Moments of features (N, d) around their own centre: ``centres`` (C, d) float64, ``classes`` (N,) int64."""
    from scipy.linalg.blas import dsyrk  # computes one half of what is symmetric; torch's product would do both

    dimension = features.shape[1]
    half = np.zeros((dimension, dimension), order="F")
    lengths = torch.full((), 0.0 if fourth else torch.nan, dtype=torch.float64)
    for part, own, room in _parts(features, classes):
        offsets = torch.index_select(centres, 0, own, out=room).sub_(part)  # μ − x, whose products are those of x − μ
        half = dsyrk(1.0, offsets.numpy().T, beta=1.0, c=half, overwrite_c=True)
        if fourth:
            lengths += offsets.norm(dim=1).pow(4).sum()
    upper = torch.from_numpy(half)
    matrix = upper.triu() + upper.triu(1).T
    return Moments(len(features), matrix / len(features), float(lengths) / len(features))


def _parts(features: Tensor, classes: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Some rows of the features with their classes, and float64 room for as many: always the same, since memory that
    comes anew for each part is touched page by page, which takes longer than what is done with it."""
    step = max(1, _HELD // features.shape[1])
    room = torch.empty(min(step, len(features)), features.shape[1], dtype=torch.float64)
    for part, own in zip(features.split(step), classes.split(step), strict=True):
        yield part, own, room[: len(part)]


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


def times_upper(rows: Tensor, factor: Tensor) -> Tensor:
    """(B, d) ``rows`` times an upper triangular ``factor`` (d, d), of which nothing below its diagonal is read: little
    more than half of the product's time. What :func:`whitening` returns is triangular where Σ is regular."""
    out = torch.empty_like(rows)
    for first in range(0, len(factor), _COLUMNS):
        end = min(first + _COLUMNS, len(factor))
        torch.mm(rows[:, :end], factor[:end, first:end], out=out[:, first:end])
    return out


def is_upper(factor: Tensor) -> bool:
    """Whether ``factor`` (d, r) is square, and zero below its diagonal."""
    return factor.shape[0] == factor.shape[1] and not bool(factor.tril(-1).any())
