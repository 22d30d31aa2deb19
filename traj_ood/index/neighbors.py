"""What a search answers, and what an approximate one loses."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Neighbors:
    """``distances`` (B, k) float64 ascending (plain, not squared) and ``indices`` (B, k) int64 into the points."""

    distances: Tensor
    indices: Tensor


@dataclass(frozen=True)
class Recall:
    """How much an approximate index loses against the exact search.

    Attributes:
        queries: number of queries it was measured on.
        recall: share of them whose nearest point (or one exactly as near) was found.
        mean_excess, max_excess: (distance found − true distance) / true distance; infinite if a query lies on a point
            that was missed.
    """

    queries: int
    recall: float
    mean_excess: float
    max_excess: float
