"""Candidates for the k nearest points, from one float32 product and a bound on its rounding error."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# A product of 512 rows and 2,048 points runs at the speed of a large one, and its result (4 MiB) is still in the cache
# when it is searched.
_TILE_ROWS, _TILE_POINTS = 512, 2048
_BLOCK_VALUES = 2**25  # float32 values held at a time: 128 MiB
# Points per group, of which the first pass reads only the minimum. Larger groups shorten the first pass and lengthen
# the second, which searches the groups that the first leaves.
_GROUP_POINTS = 32
_GROUPS_PER_NEIGHBOUR = 4  # with fewer groups the first pass would exclude little


@dataclass(frozen=True)
class Candidates:
    """Pairs of a query and a point that may be among the query's k nearest, ordered by query.

    Attributes:
        rows: (P,) int64 indices of the queries.
        points: (P,) int64 indices of the points.
        certain: (P,) bool, whether the point is certainly at most as far as the k-th nearest.
        crowded: (B,) bool, queries with too many candidates to list; they have no pairs.
    """

    rows: Tensor
    points: Tensor
    certain: Tensor
    crowded: Tensor


class Scan:
    """Finds candidates for the k nearest of points (N, d) float32.

    For a query x and a point y, v = ‖y‖² − 2 x·y computed in float32 equals ‖x − y‖² − ‖x‖² up to a known error e. Let
    v_k be the k-th smallest v. At least k points have a true value of at most v_k + e, so each of the k nearest has
    v <= v_k + 2e. Fewer than k points have a true value below v_k − e, so a point with v < v_k − 2e is one of the k
    nearest. An upper bound of v_k is the k-th smallest minimum over disjoint groups, which is selected among N/32
    numbers only.
    """

    def __init__(self, points: Tensor) -> None:
        self._points = points
        parts = points.split(max(1, _BLOCK_VALUES // points.shape[1]))
        self._squared = torch.cat([part.square().sum(dim=1) for part in parts])

    def candidates(self, queries: Tensor, k: int, error: Tensor, limit: int) -> Candidates:
        """All pairs that may be among the k nearest.

        Args:
            queries: (B, d) float32, at least one.
            k: at most N.
            error: (B,) float64 bounds on the error of v.
            limit: a query with more than k + ``limit`` candidates is crowded.
        """
        tile = min(_TILE_POINTS, len(self._points))
        group = max(1, min(_GROUP_POINTS, len(self._points) // (_GROUPS_PER_NEIGHBOUR * k)))
        tile = -(-tile // group) * group
        tiles = -(-len(self._points) // tile)
        step = min(_TILE_ROWS, max(1, _BLOCK_VALUES // (tiles * tile)), len(queries))
        values = self._points.new_full((tiles, step, tile), torch.inf)  # infinite beyond the last point
        minima = values.new_empty(step, tiles, tile // group)
        slack = (2 * error).float()
        found = []
        for i, part in enumerate(queries.split(step)):
            own = slack[i * step : i * step + len(part)]
            rows, points, v, crowded = self._block(part, k, own, k + limit, values[:, : len(part)], minima[: len(part)])
            nearest = table(rows, v, len(part), torch.inf, k)
            v_k = nearest.kthvalue(k, dim=1).values
            crowded |= (nearest <= (v_k + own)[:, None]).sum(dim=1) > k + limit
            kept = (v <= (v_k + own)[rows]) & ~crowded[rows]
            rows, v = rows[kept], v[kept]
            found.append((rows + i * step, points[kept], v < (v_k - own)[rows], crowded))
        return Candidates(*(torch.cat(parts) for parts in zip(*found, strict=True)))

    def _block(
        self, queries: Tensor, k: int, slack: Tensor, limit: int, values: Tensor, minima: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Rows, points and values (P,) of all pairs with v <= v_k + ``slack``, and of some others; and whether each
        query is crowded, (B,) bool: it has such pairs in more than ``limit`` groups, and none is returned. ``values``
        and ``minima`` are buffers."""
        count, tile = len(self._points), values.shape[2]
        groups = minima.shape[2]
        for i, first in enumerate(range(0, count, tile)):
            points = self._points[first : first + tile]
            out = values[i, :, : len(points)]
            torch.addmm(self._squared[first : first + tile], queries, points.T, alpha=-2, out=out)
            # A group is every tile/32-th point, because minima over the outer of two dimensions are much faster.
            torch.amin(values[i].view(len(queries), -1, groups), dim=1, out=minima[:, i])
        smallest = minima.reshape(len(queries), -1)
        bound = smallest.kthvalue(k, dim=1).values + slack
        hit = smallest <= bound[:, None]
        crowded = hit.sum(dim=1) > limit
        rows, places = (hit & ~crowded[:, None]).nonzero(as_tuple=True)
        members = values.view(len(values), len(queries), -1, groups)[places // groups, rows, :, places % groups]
        pairs, inside = (members <= bound[rows, None]).nonzero(as_tuple=True)
        rows, places = rows[pairs], places[pairs]
        indices = places // groups * tile + inside * groups + places % groups
        return rows, indices, members[pairs, inside], crowded


def table(rows: Tensor, values: Tensor, count: int, fill: float, width: int) -> Tensor:
    """Arrange values (P,) into a table (count, W >= width), one row per value of ``rows``, padded with ``fill``.

    Args:
        rows: (P,) int64, ascending.
    """
    sizes = rows.bincount(minlength=count)
    out = values.new_full((count, max(width, int(sizes.max()))), fill)
    out[rows, torch.arange(len(rows), device=rows.device) - (sizes.cumsum(0) - sizes)[rows]] = values
    return out


def smallest(distances: Tensor, indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k smallest distances of each row, ascending, and their indices; of equal ones the lowest index first."""
    by_index = indices.argsort(dim=1)
    distances, indices = distances.gather(1, by_index), indices.gather(1, by_index)
    order = distances.argsort(dim=1, stable=True)[:, :k]
    return distances.gather(1, order), indices.gather(1, order)
