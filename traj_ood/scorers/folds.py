"""Folds of the training images for cross-fitting: each fold is measured by a fit to the others, like new images."""

from __future__ import annotations

import torch
from torch import Tensor


def folds(vectors: Tensor, count: int) -> Tensor:
    """Fold numbers (B,) int64 in 0 … count − 1: random folds of equal size, the same for any order of distinct rows.

    Random, because lists of images are often sorted by class or alternate between the two kinds of a pair.

    Args:
        vectors: (B, …) one row per image.
        count: number of folds.
    """
    draws = torch.Generator().manual_seed(0)
    flat = vectors.double().flatten(1)
    direction = torch.randn(flat.shape[1], generator=draws, dtype=torch.float64)
    rank = (flat @ direction).argsort(stable=True)
    fold = torch.empty(len(flat), dtype=torch.int64)
    fold[rank] = torch.randperm(len(flat), generator=draws) % count
    return fold
