"""Results of a search, and the accuracy of an approximate one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from traj_ood.errors import TrajOODError


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


def check_table(expected: str, found: object, width: int | None = None, least: int = 0) -> None:
    """Raise ``TrajOODError``, which begins with ``expected``, unless ``found`` is a floating-point tensor of ``least``
    or more rows, of ``width`` columns if given."""
    if not isinstance(found, Tensor):
        raise TrajOODError(f"{expected}, got {type(found).__name__}: convert it by torch.as_tensor()")
    if not found.is_floating_point():
        raise TrajOODError(f"{expected}, of a floating-point type, got {found.dtype}")
    if found.ndim != 2 or len(found) < least or found.shape[1] != (width or found.shape[1]):
        raise TrajOODError(f"{expected}, got {tuple(found.shape)}")


def check_left_out(indices: Tensor, queries: int, points: int) -> None:
    """Check that ``indices`` names for each query a point to leave out, or -1, and that there is another point.

    Raises:
        TrajOODError: it does not. A single index would silently apply to all queries.
    """
    if points < 2:
        raise TrajOODError("index: expected at least 2 points if one is left out, got 1")
    is_fit = indices.shape == (queries,) and indices.dtype == torch.int64 and indices.device.type == "cpu"
    if is_fit:
        found = indices.numpy()  # on the CPU by contract, so that the host waits for no device
        is_fit = bool(((found >= -1) & (found < points)).all())
    if not is_fit:
        raise TrajOODError(
            f"other_than: expected an int64 index from -1 to {points - 1} on the CPU for each of {queries} queries, "
            f"got {indices.dtype} of shape {tuple(indices.shape)} on {indices.device}: give each query the index of "
            "its own point, or -1"
        )
