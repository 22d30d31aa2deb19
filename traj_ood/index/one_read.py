"""OneReadSearch: the nearest of N points for queries on an accelerator, with a single read by the host.

A search over groups of points reads counts repeatedly, and at every read the host waits for the device. Here all points
are compared in one float32 product, on whose shape no result depends; the host reads once how many pairs its rounding
leaves undecided, and float64 differences decide among these.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from traj_ood.dynamics.host import to_host
from traj_ood.errors import TrajOODError

_BLOCK_VALUES = 2**24  # float64 values held at a time: 128 MiB


class OneReadSearch:
    """Searches points (N, d) that are grouped around leaders, with bounds on float32 rounding.

    For a query q and a point p = l + o of the group with leader l, all relative to the points' mean,
    ‖q − p‖² − ‖q‖² = (‖l‖² − 2 q·l) + (‖o‖² + 2 l·o − 2 q·o). The error of the first term is relative to the points'
    norms; that of the second is relative to ‖o‖, so that it distinguishes members of a group however near they are. A
    pair is excluded only if another member of its group is certainly nearer by the second term, or any point by both;
    no nearest point is missed.

    Args:
        points: (N, d) float32 or float64, on their device.
        mean: (d,) mean of the points.
        leaders: (G,) int64 indices of the leaders.
        assigned: (N,) int64 index into ``leaders`` of each point's leader.
        unit: bound on the rounding error of a product, relative to ‖x‖ · ‖y‖.
    """

    def __init__(self, points: Tensor, mean: Tensor, leaders: Tensor, assigned: Tensor, unit: float) -> None:
        self._leaders, self._assigned, self._unit = leaders, assigned, unit
        self._rows = points.new_empty(points.shape, dtype=torch.float32)  # leaders, and offsets from them
        scalars = points.new_empty((3, len(points)), dtype=torch.float64)
        everyone = torch.arange(len(points), device=points.device)
        for some in everyone.split(max(1, _BLOCK_VALUES // points.shape[1])):
            own = leaders[assigned[some]]
            centres, offsets = points[own].double() - mean, points[some].double() - points[own]
            self._rows[some] = torch.where((own == some)[:, None], centres, offsets).float()
            norms, lengths = centres.norm(dim=1), offsets.norm(dim=1)
            shift = lengths.square() + 2 * (centres * offsets).sum(dim=1)
            is_leader = own == some
            scalars[:, some] = torch.stack([torch.where(is_leader, norms.square(), shift), lengths, norms])
        self._shift, self._lengths, self._norms = scalars

    def nearest(
        self,
        queries: Tensor,
        centred: Tensor,
        error: Tensor,
        other_than: Tensor | None,
        exact: Callable[[Tensor, Tensor, Tensor], Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Distances and indices (B, 1) of the nearest points; of equally near points the first.

        Args:
            queries: (B, d).
            centred: the queries minus the mean, float32.
            error: (B,) float64 bounds on the error of the first term.
            other_than: (B,) int64 index of a point to leave out for each query, or −1.
            exact: (queries, rows, points) → float64 distances of the pairs.
        Raises:
            TrajOODError: queries that are not finite.
        """
        count = len(self._rows)
        if not len(queries):
            return torch.empty(0, 1, dtype=torch.float64), torch.empty(0, 1, dtype=torch.int64)
        lengths = centred.norm(dim=1)
        finite = lengths.isfinite()
        step = max(1, _BLOCK_VALUES // count)
        left_open = []
        for i in range(0, len(queries), step):
            part = slice(i, i + step)
            own = None if other_than is None else other_than[part]
            left_open.append(self._left_open(centred[part], lengths[part], error[part], own).flatten())
        numbers = torch.stack([(~finite).sum(), finite.int().argmin(), *(mask.sum() for mask in left_open)])
        bad, first, *counts = (int(value) for value in to_host([numbers])[0].tolist())
        if bad:
            raise TrajOODError(f"index queries: {bad} of {len(queries)} rows are not finite, first at row {first}")
        # A stable descending sort of the mask puts the true elements first, in their order.
        pairs = torch.cat(
            [
                mask.to(torch.uint8).argsort(descending=True, stable=True)[:found] + number * step * count
                for number, (mask, found) in enumerate(zip(left_open, counts, strict=True))
            ]
        )
        rows, points = pairs // count, pairs % count
        best, indices = first_of_nearest(exact(queries, rows, points), rows, points, len(queries), count)
        return best[:, None], indices[:, None]

    def _left_open(self, centred: Tensor, lengths: Tensor, error: Tensor, other_than: Tensor | None) -> Tensor:
        """The pairs that float32 does not exclude, (B, N) bool."""
        product = (centred @ self._rows.T).double()
        to_leader = (self._shift - 2 * product)[:, self._leaders]  # (B, G)
        within = (self._shift - 2 * product).index_fill_(1, self._leaders, 0.0)
        if other_than is not None:
            places = torch.arange(len(self._rows), device=centred.device)
            within.masked_fill_(places == other_than[:, None], torch.inf)
        lengths = lengths.double()[:, None]
        doubt = self._unit * self._lengths * (2 * (lengths + self._norms) + self._lengths)
        groups = self._assigned.expand_as(within)
        nearest_member = torch.full_like(to_leader, torch.inf).scatter_reduce_(1, groups, within + doubt, "amin")
        may_be = within - doubt <= nearest_member.gather(1, groups)
        squared, doubt = to_leader.gather(1, groups) + within, doubt + error[:, None]
        return may_be & (squared - doubt <= (squared + doubt).amin(dim=1, keepdim=True))


def first_of_nearest(
    distances: Tensor, rows: Tensor, points: Tensor, queries: int, count: int
) -> tuple[Tensor, Tensor]:
    """Smallest distance of each query (infinite without a pair), and the first point at that distance; no host reads.

    Args:
        distances: (P,) distances of pairs.
        rows: (P,) queries of the pairs.
        points: (P,) points of the pairs.
        queries: number of queries.
        count: number of points.
    """
    best = torch.full((queries,), torch.inf, dtype=torch.float64, device=distances.device)
    best.scatter_reduce_(0, rows, distances, "amin")
    first = torch.full((queries,), count, device=distances.device)
    first.scatter_reduce_(0, rows, points.masked_fill(distances != best[rows], count), "amin")
    return best, first
