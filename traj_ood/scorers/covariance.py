"""Covariances of features in float64, without a float64 copy of all features."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

_BLOCK_VALUES = 2**18 * 3 // 2  # float64 values of features per block: 3 MiB, which stay in the cache
_BLOCK_COLUMNS = 192  # columns of a triangular factor per block: narrower blocks skip more, but multiply more slowly


def class_means(features: Tensor, classes: Tensor | None = None) -> Tensor:
    """Class means, (C, d) float64, of features (N, d).

    Args:
        classes: (N,) int64 in 0 … C − 1, none empty. Default: all features are one class.
    """
    classes = _numbered(features, classes)
    sums = torch.zeros(int(classes.max()) + 1, features.shape[1], dtype=torch.float64)
    for part, own, room in _parts(features, classes):
        sums.index_add_(0, own, room.copy_(part))
    return sums / classes.bincount()[:, None]


def covariance(features: Tensor, centres: Tensor, classes: Tensor | None = None, *, shrink: bool) -> Tensor:
    """Covariance Σ (x − μ)(x − μ)ᵀ / N, (d, d) float64, of features (N, d) about the centre μ of their class.

    Args:
        centres: (C, d) float64.
        classes: (N,) int64 in 0 … C − 1. Default: all features are one class.
        shrink: whether to shrink it as Ledoit and Wolf (2004, §3.2): the same estimate as scikit-learn's.
    """
    from scipy.linalg import get_blas_funcs

    dimension = features.shape[1]
    half = np.zeros((dimension, dimension), order="F")
    dsyrk: Any = get_blas_funcs("syrk", (half,))  # one triangle; torch would compute both
    fourth = torch.zeros((), dtype=torch.float64)
    for part, own, room in _parts(features, _numbered(features, classes)):
        offsets = torch.index_select(centres, 0, own, out=room).sub_(part)  # μ − x, whose products are those of x − μ
        half = dsyrk(1.0, offsets.numpy().T, beta=1.0, c=half, overwrite_c=True)
        if shrink:
            fourth += offsets.norm(dim=1).pow(4).sum()
    upper = torch.from_numpy(half)
    matrix = (upper.triu() + upper.triu(1).T) / len(features)
    return _shrunk(matrix, float(fourth) / len(features), len(features)) if shrink else matrix


def gaussian(features: Tensor, *, shrink: bool) -> tuple[Tensor, Tensor]:
    """Mean (d,) and :func:`covariance` (d, d) of features (N, d), float64."""
    mean = class_means(features)
    return mean[0], covariance(features, mean, shrink=shrink)


def _numbered(features: Tensor, classes: Tensor | None) -> Tensor:
    return torch.zeros(len(features), dtype=torch.int64) if classes is None else classes


def _parts(features: Tensor, classes: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Blocks of features with their classes, and a float64 buffer of the block's size.

    The buffer is the same for all blocks, because the page faults of newly allocated memory would take longer than the
    computation.
    """
    step = max(1, _BLOCK_VALUES // features.shape[1])
    room = torch.empty(min(step, len(features)), features.shape[1], dtype=torch.float64)
    for part, own in zip(features.split(step), classes.split(step), strict=True):
        yield part, own, room[: len(part)]


def _shrunk(covariance: Tensor, fourth: float, count: int) -> Tensor:
    """Covariance shrunk towards μI: (1 − ρ) S + ρ μI, μ = tr(S)/d, with ρ as in Ledoit and Wolf (2004, §3.2).

    ``fourth`` is Σ ‖x − μ‖⁴ / N: the sum of all entries of (X∘X)ᵀ(X∘X), a product that scikit-learn forms.
    """
    dimension = len(covariance)
    scale = float(covariance.trace()) / dimension
    spread = float(covariance.square().sum())
    to_target = spread - dimension * scale**2  # the paper's d² times the dimension; ``noise`` is its b², likewise
    noise = min((fourth - spread) / count, to_target)
    shrinkage = noise / to_target if noise > 0 else 0.0
    return (1 - shrinkage) * covariance + shrinkage * scale * torch.eye(dimension, dtype=torch.float64)


def whitening(covariance: Tensor) -> Tensor:
    """Whitening factor F (d, r) float64 with F Fᵀ = Σ⁺, so that (z − μ)ᵀ Σ⁺ (z − μ) = ‖(z − μ) F‖².

    Eigenvalues below d · 2⁻⁵² of the largest count as zero, as in SciPy's ``pinvh`` and hence in scikit-learn:
    directions that the training features do not span are ignored.
    """
    share = len(covariance) * torch.finfo(torch.float64).eps
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if not failed:
        inverse = torch.linalg.solve_triangular(factor, torch.eye(len(factor), dtype=torch.float64), upper=False)
        # ‖L⁻¹‖² = tr Σ⁻¹ >= 1/λ_min and ‖Σ‖ >= λ_max: if this holds no eigenvalue counts as zero: eigh is not needed
        if float(inverse.square().sum()) * float(covariance.norm()) * share < 1:
            return inverse.T.contiguous()
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > share * values.abs().max()
    return vectors[:, kept] / values[kept].sqrt()


def times_upper(rows: Tensor, factor: Tensor) -> Tensor:
    """Product of ``rows`` (B, d) and an upper triangular ``factor`` (d, d), in little more than half of the time.

    Nothing below the diagonal is read. :func:`whitening` returns a triangular factor where Σ is regular.
    """
    out = torch.empty_like(rows)
    for first in range(0, len(factor), _BLOCK_COLUMNS):
        end = min(first + _BLOCK_COLUMNS, len(factor))
        torch.mm(rows[:, :end], factor[:end, first:end], out=out[:, first:end])
    return out


def is_upper(factor: Tensor) -> bool:
    """Whether ``factor`` (d, r) is square and zero below its diagonal."""
    return factor.shape[0] == factor.shape[1] and not bool(factor.tril(-1).any())
