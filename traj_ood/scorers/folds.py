"""Parts of the training images, each measured by a fit to the others, as new images will be."""

from __future__ import annotations

import torch
from torch import Tensor


def folds(vectors: Tensor, count: int) -> Tensor:
    """(B,) int64 0 … count − 1: equal parts drawn at random, the same in any order of the rows (B, …) as long as they
    differ. Lists are often sorted by class, or alternate between the two kinds of a pair."""
    draws = torch.Generator().manual_seed(0)
    flat = vectors.double().flatten(1)
    direction = torch.randn(flat.shape[1], generator=draws, dtype=torch.float64)
    rank = (flat @ direction).argsort(stable=True)
    fold = torch.empty(len(flat), dtype=torch.int64)
    fold[rank] = torch.randperm(len(flat), generator=draws) % count
    return fold
