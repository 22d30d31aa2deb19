"""Who may be among the k nearest: all pairs once in float32, and a bound on its rounding that leaves nobody out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# A product of 512 rows and 2,048 points runs at the speed of a large one, and what is looked for in it (4 MiB) has not
# left the cache.
_ROWS, _TILE = 512, 2048
_HELD = 2**25  # float32 values at a time: 128 MiB
# Points whose smallest value stands for them in the first look. More of them make that look shorter and the second,
# into the groups that it leaves, longer.
_GROUP = 32
_LOOKS = 4  # groups for each of the k, or the first look would rule out little


@dataclass(frozen=True)
class Candidates:
    """Pairs of a query and a point that may be among its k nearest, ordered by query.

    Attributes:
        rows, points: (P,) int64.
        certain: (P,) bool, whether the point is nearer than the k-th nearest for certain, or exactly as near.
        crowded: (B,) bool, queries with too many candidates to be listed; they have no pairs.
    """

    rows: Tensor
    points: Tensor
    certain: Tensor
    crowded: Tensor


class Scan:
    """Points (N, d) float32, and the proof of who is near.

    For x a query and y a point, v = ‖y‖² − 2 x·y in float32 is ‖x − y‖² − ‖x‖² up to a known error e. With v_k the
    k-th smallest, k points are no farther than v_k + e, so whoever is among the k nearest has v <= v_k + 2e; and fewer
    than k points are nearer than v_k − e, so v < v_k − 2e is one of these. The k-th smallest of the minima of disjoint
    groups is no smaller than v_k, and takes a selection among N/32 numbers only.
    """

    def __init__(self, points: Tensor) -> None:
        self._points = points
        self._squared = torch.cat([part.square().sum(dim=1) for part in points.split(max(1, _HELD // points.shape[1]))])

    def candidates(self, queries: Tensor, k: int, error: Tensor, limit: int) -> Candidates:
        """All pairs that may be among the k nearest.

        Args:
            queries: (B, d) float32, at least one. k: at most N. error: (B,) float64 bounds on the error of v.
            limit: most candidates beyond k for a query, beyond which it is crowded.
        """
        tile = min(_TILE, len(self._points))
        group = max(1, min(_GROUP, len(self._points) // (_LOOKS * k)))
        tile = -(-tile // group) * group
        tiles = -(-len(self._points) // tile)
        step = min(_ROWS, max(1, _HELD // (tiles * tile)), len(queries))
        values = self._points.new_full((tiles, step, tile), torch.inf)  # so it stays beyond the last point
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
        """Rows, points and values (P,) of the pairs with v <= v_k + ``slack`` and of some others; which queries have
        them in more than ``limit`` groups, and get none. ``values`` and ``minima`` are room to work in."""
        count, tile = len(self._points), values.shape[2]
        groups = minima.shape[2]
        for i, first in enumerate(range(0, count, tile)):
            points = self._points[first : first + tile]
            out = values[i, :, : len(points)]
            torch.addmm(self._squared[first : first + tile], queries, points.T, alpha=-2, out=out)
            # A group is every tile/32-th point: minima over the outer of two dimensions are many times as fast.
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
    """(count, W >= width) the values (P,) of each row, in their order, filled up; ``rows`` (P,) int64 ascending."""
    sizes = rows.bincount(minlength=count)
    out = values.new_full((count, max(width, int(sizes.max()))), fill)
    out[rows, torch.arange(len(rows), device=rows.device) - (sizes.cumsum(0) - sizes)[rows]] = values
    return out


def smallest(distances: Tensor, indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k smallest of each row, ascending; of equal ones, those with the lowest index first."""
    by_index = indices.argsort(dim=1)
    distances, indices = distances.gather(1, by_index), indices.gather(1, by_index)
    order = distances.argsort(dim=1, stable=True)[:, :k]
    return distances.gather(1, order), indices.gather(1, order)
