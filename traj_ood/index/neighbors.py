"""Results of a search, and the accuracy of an approximate one."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Neighbors:
    """The k nearest points of B queries.

    Attributes:
        distances: (B, k) float64 Euclidean distances, ascending.
        indices: (B, k) int64 indices of the points.
    """

    distances: Tensor
    indices: Tensor


@dataclass(frozen=True)
class Recall:
    """The accuracy of an approximate index, relative to the exact search.

    Attributes:
        queries: number of queries.
        recall: share of the queries whose nearest point, or one exactly as near, was found.
        mean_excess: mean of (distance found − true distance) / true distance; infinite if a query coincides with a
            point that was missed.
        max_excess: the maximum, likewise.
    """

    queries: int
    recall: float
    mean_excess: float
    max_excess: float
