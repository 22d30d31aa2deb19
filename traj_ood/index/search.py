"""NeighborIndex: exact Euclidean distances to the nearest of many points, accurate near zero and in high dimension.

The expansion ‖x‖² + ‖y‖² − 2x·y, which FAISS, BLAS and ``cdist`` use, cancels if x is close to y: in float32 at
d = 151,296 and ‖x‖ ≈ 400 a true distance of 0.01 comes out as 0.085. Here the expansion, on centred points, only
selects candidates, with a bound on its rounding error that guarantees that no nearest point is missed; returned
distances are direct differences in float64. Only searches for hundreds of neighbours use the expansion itself, in
float64, with direct differences where even that cancels.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from functools import partial, wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from traj_ood.dynamics.device import exact_products, standard_settings
from traj_ood.dynamics.host import to_device
from traj_ood.errors import TrajOODError, check_whole
from traj_ood.index.flat import Approximate, Backend, FaissApproximate, TorchFlat, check_approximate, flat_backend
from traj_ood.index.groups import greedy_leaders, leaders_in_cells
from traj_ood.index.neighbors import Neighbors, Recall, check_left_out, check_table
from traj_ood.index.one_read import OneReadSearch, first_of_nearest
from traj_ood.index.scan import Scan, smallest, table

# Number of groups (distinct attractors) from which an approximate index is used if requested. With fewer, the exact
# search (one product with 100,000 points) is so short that losing recall is not worthwhile.
APPROXIMATE_FROM = 100_000

UNIT = 2.0**-24  # float32 rounding
# Errors of the float32 form reach 15 · UNIT · (‖x‖ + ‖y‖)² at d = 150,000; tests/index/test_index.py measures them.
ERROR_FACTOR = 32.0
# Squared distances from a float64 product are computed again by direct difference if the relative rounding bound
# exceeds this: the rounding depends on the number of queries, and distances must not depend on it by more than 1e-9.
_RELATIVE = 1e-9
_GROUP_RADIUS = 5e-3  # of the points' RMS distance to their mean: far above rounding, far below any score
_BLOCK = 2**24  # float64 differences held at a time: 128 MiB
_CACHED = 2**18  # float64 differences that fit into the cache of a CPU core, 2 MiB: takes a fourth of the time
_MAX_CANDIDATES = 256  # more neighbours than this are found faster by one float64 product
_SPARE = 8  # candidates beyond k, which suffice for nearly every query
_FEW = 16  # candidate groups, or a 16th of all: searching more of them costs more than a float64 product
_CROWD = 4  # members of a group left open by float32: more direct differences cost more than a float64 product


_Method = TypeVar("_Method", bound=Callable[..., Any])
_SEARCHING = threading.RLock()


def _alone(method: _Method) -> _Method:
    """Decorator that allows one search at a time, under torch's standard settings and without TF32, which the bounds on
    rounding do not cover. One at a time, because indices are built lazily, FAISS has process-wide settings, and its GPU
    indices are not thread-safe; a single search uses all cores."""

    @wraps(method)
    def guarded(*args: Any, **options: Any) -> Any:
        with _SEARCHING, standard_settings(), exact_products():
            return method(*args, **options)

    return cast("_Method", guarded)


class NeighborIndex:
    """An index of points for exact nearest-neighbour search by Euclidean distance.

    Points within a small radius (trajectories that ended at the same attractor) form a group around a leader.
    :meth:`nearest` first searches the leaders, and then only the groups that the triangle inequality cannot exclude, so
    2,000 end points on 200 attractors cost little more than 200 points. Members of a group are distinguished exactly,
    because their differences are taken before any product. Distances of a query do not depend on other queries beyond
    1e-9 relative, whether the index is approximate or not.

    Args:
        points: (N, d), finite, not to be changed later; kept on ``device`` as float32, or as float64 if they are.
        backend: backend of :meth:`nearest`; both give the same distances. ``auto`` (default) uses FAISS on the CPU if
            it is installed, and torch on an accelerator, where the host then waits only once for all queries. ``faiss``
            runs on the GPU if the points are there and FAISS finds one, and in shards on all GPUs if the points exceed
            ``SHARD_ABOVE`` bytes; queries then pass through the host. :meth:`search` and :meth:`kth` always use torch.
        device: device of the queries. Default: the device of the points.
        approximate: whether :meth:`nearest` may miss points. Default ``none``: exact, as the paper's score is defined.
            ``ivf`` searches the cells of a k-means partition that are nearest to the query, ``hnsw`` walks a neighbour
            graph; both are FAISS's, on the CPU, over the leaders of the groups. They only select groups, which are
            searched exactly: a nearest point may be missed (:meth:`recall` measures how many are), but the distance to
            the point found is exact. With fewer than ``APPROXIMATE_FROM`` groups the search stays exact, which is
            hardly slower; the attribute ``approximate`` is the kind in use. Both builds are deterministic for a given
            version of FAISS; ``ivf`` is recommended, because only a single thread can build ``hnsw`` so, which takes
            long. :meth:`search` is always exact.
    Raises:
        TrajOODError: no points, not (N, d), non-finite points, or an approximate index without FAISS.
    """

    @_alone
    def __init__(
        self,
        points: Tensor,
        *,
        backend: Backend = "auto",
        device: torch.device | str | None = None,
        approximate: Approximate = "none",
    ) -> None:
        check_table("index: expected at least one point of shape (N, d)", points, least=1)
        _refuse_non_finite(points.norm(dim=1), "points")
        device = torch.device(device or points.device)
        if device.type == "mps":  # has no float64
            device = torch.device("cpu")
        self.device = device
        self._points = points.detach().to(device, torch.float64 if points.dtype == torch.float64 else torch.float32)
        self._mean = self._points.mean(dim=0)  # any point near the middle would do
        self._norm = math.nan
        self._make_flat = flat_backend(backend, device)
        self.backend = self._make_flat.name
        self._scan: Scan | None = None
        check_approximate(approximate, backend)
        self._permitted: Approximate = approximate
        self._grouped = False
        self._reads_once = _waits_for(device) and self._make_flat is TorchFlat
        self._one_read: OneReadSearch | None = None

    def __len__(self) -> int:
        return len(self._points)

    @property
    @_alone
    def groups(self) -> int:
        """Number of groups of (nearly) coinciding points."""
        self._ensure_groups()
        return len(self._leaders)

    @property
    @_alone
    def approximate(self) -> Approximate:
        """The approximation that :meth:`nearest` uses: the one requested, or ``none`` with too few groups."""
        self._ensure_groups()
        return self._approximate

    @_alone
    def nearest(self, queries: Tensor, other_than: Tensor | None = None) -> Neighbors:
        """The nearest point of each query, exact down to the spacing of the inputs' type; of equally near points the
        first.

        Args:
            queries: (B, d).
            other_than: (B,) int64 on the CPU, index of a point to leave out for each query; −1 leaves out none.
                Default: none.
        Raises:
            TrajOODError: wrong dimension, a non-finite query (it would come back as infinitely far), or no other point.
        """
        if other_than is not None:
            check_left_out(other_than, len(queries), len(self))
        self._ensure_groups()
        if self._one_read is not None:
            queries, centred, lengths = self._centre(queries)
            own = None if other_than is None else to_device(other_than, self.device)
            return Neighbors(*self._one_read.nearest(queries, centred, self._error(lengths), own, self._exact))
        if other_than is not None:
            found = self.search(queries, 2)
            mine = found.indices[:, 0] == other_than.to(found.indices.device)
            return Neighbors(*(torch.where(mine, v[:, 1], v[:, 0])[:, None] for v in (found.distances, found.indices)))
        queries, centred, error = self._prepare(queries)
        width = max(self._points.shape[1], self._largest)
        return self._in_blocks(self._nearest_block, queries, centred, error, width)

    @_alone
    def recall(self, queries: Tensor) -> Recall:
        """Compare :meth:`nearest` for queries (B, d) with a float64 search over all points.

        It is slow, so use a sample; take it from ID and OOD trajectories, because recall depends on the queries.

        Raises:
            TrajOODError: no query, or what :meth:`nearest` refuses.
        """
        found = self.nearest(queries).distances[:, 0]
        if not len(found):
            raise TrajOODError("recall: expected at least one query, got none")
        queries = self._prepare(queries)[0]
        nearest = self._dense(queries, 1)[1][:, 0]
        true = self._exact(queries, torch.arange(len(queries), device=self.device), nearest)
        excess = torch.where(found > true, (found - true) / true, 0.0)
        return Recall(
            queries=len(queries),
            recall=float((excess == 0).double().mean()),
            mean_excess=float(excess.mean()),
            max_excess=float(excess.max()),
        )

    @_alone
    def search(self, queries: Tensor, k: int) -> Neighbors:
        """The k nearest points of each query (B, d).

        Raises:
            TrajOODError: k outside 1 … N, wrong dimension, non-finite queries.
        """
        return self._search(queries, k, self._nearest_k)

    @_alone
    def kth(self, queries: Tensor, k: int) -> Tensor:
        """Distances (B,) float64 of queries (B, d) to their k-th nearest point: the last column of :meth:`search`, in a
        fraction of the time, because float32 nearly always decides which other points are nearer.

        Raises:
            TrajOODError: as :meth:`search`.
        """
        return self._search(queries, k, self._kth_alone).distances[:, -1]

    def _search(self, queries: Tensor, k: int, look: Callable[..., tuple[Tensor, Tensor]]) -> Neighbors:
        check_whole("k", k, 1, len(self), "(the number of indexed points)")
        is_wide = k + _SPARE > min(_MAX_CANDIDATES, len(self))
        if not is_wide:
            self._all()
        elif math.isnan(self._norm):
            self._centred()
        queries, centred, error = self._prepare(queries)
        if not len(queries):
            return Neighbors(torch.empty(0, k, dtype=torch.float64), torch.empty(0, k, dtype=torch.int64))
        # For so many neighbours direct differences would be slower.
        way = (lambda q, *_: self._dense(q, k)) if is_wide else partial(look, k)
        return self._in_blocks(way, queries, centred, error, self._points.shape[1])

    def _in_blocks(
        self, search: Callable[..., tuple[Tensor, Tensor]], queries: Tensor, centred: Tensor, error: Tensor, width: int
    ) -> Neighbors:
        """Search in blocks of queries, so that no intermediate of ``width`` float64 per query exceeds 128 MiB."""
        step = max(1, _BLOCK // width)
        blocks = zip(queries.split(step), centred.split(step), error.split(step), strict=True)
        found = [search(*block) for block in blocks]
        return Neighbors(torch.cat([f[0] for f in found]), torch.cat([f[1] for f in found]))

    def _nearest_k(self, k: int, queries: Tensor, centred: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
        """Distances and indices (B, k) by direct differences to all candidates."""
        found = self._all().candidates(centred, k, error, _MAX_CANDIDATES)
        exact = self._exact(queries, found.rows, found.points)
        distances, indices = smallest(
            table(found.rows, exact, len(queries), torch.inf, k),
            table(found.rows, found.points, len(queries), len(self), k),
            k,
        )
        if bool(found.crowded.any()):
            distances[found.crowded], indices[found.crowded] = self._nearest_of_crowd(queries[found.crowded], k)
        return distances, indices

    def _kth_alone(self, k: int, queries: Tensor, centred: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
        """Distances (B, 1) to the k-th nearest, by direct differences to the points that may be it; indices (B, 0)."""
        found = self._all().candidates(centred, k, error, _MAX_CANDIDATES)
        nearer = found.rows[found.certain].bincount(minlength=len(queries))
        rows, points = found.rows[~found.certain], found.points[~found.certain]
        open_ones = table(rows, self._exact(queries, rows, points), len(queries), torch.inf, 1).sort(dim=1).values
        distances = open_ones.gather(1, torch.where(found.crowded, 0, k - 1 - nearer)[:, None])
        if bool(found.crowded.any()):
            distances[found.crowded] = self._nearest_of_crowd(queries[found.crowded], k)[0][:, -1:]
        return distances, torch.empty(len(queries), 0, dtype=torch.int64)

    def _nearest_of_crowd(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Distances and indices (B, k) if float32 leaves too many candidates, as among collapsed points: float64
        selects them, and direct differences give the distances."""
        _, indices = self._dense(queries, min(k + _SPARE, len(self)))
        rows = torch.arange(len(queries), device=self.device).repeat_interleave(indices.shape[1])
        return smallest(self._exact(queries, rows, indices.flatten()).view_as(indices), indices, k)

    def _dense(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Distances and indices (B, k) by the expansion in float64, with direct differences where even that cancels."""
        found = [self._dense_block(part, k) for part in queries.split(max(1, _BLOCK // len(self)))]
        return torch.cat([f[0] for f in found]), torch.cat([f[1] for f in found])

    def _dense_block(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        centred = queries.double() - self._mean
        own = centred.square().sum(dim=1, keepdim=True)
        parts = []
        for points in self._points.split(max(1, _BLOCK // self._points.shape[1])):
            other = points.double() - self._mean
            parts.append(other.square().sum(dim=1) + own - 2 * centred @ other.T)
        squared, indices = torch.cat(parts, dim=1).clamp_(min=0).topk(k, dim=1, largest=False)
        distances = squared.sqrt()
        bound = ERROR_FACTOR * 2.0**-53 * (own.sqrt() + self._norm).square()
        rows, columns = (bound > _RELATIVE * squared).nonzero(as_tuple=True)
        distances[rows, columns] = self._exact(queries, rows, indices[rows, columns])
        order = distances.argsort(dim=1, stable=True)
        return distances.gather(1, order), indices.gather(1, order)

    def _prepare(self, queries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, d) in the points' type, the queries minus the mean in float32, and bounds (B,) float64 on the
        rounding error of ‖x‖² + ‖y‖² − 2x·y over all points y."""
        queries, centred, norms = self._centre(queries)
        _refuse_non_finite(norms, "queries")  # a NaN or infinite coordinate makes the norm NaN or infinite
        return queries, centred, self._error(norms)

    def _centre(self, queries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, d) of the points' type, the same less the mean in float32, and its (B,) norms."""
        width = self._points.shape[1]
        check_table(f"queries: expected (B, {width})", queries, width)
        queries = queries.detach().to(self._points)
        centred = (queries - self._mean).float()
        return queries, centred, centred.norm(dim=1)

    def _error(self, norms: Tensor) -> Tensor:
        return (ERROR_FACTOR * UNIT) * (norms + self._norm).double().square()

    def _exact(self, queries: Tensor, rows: Tensor, points: Tensor) -> Tensor:
        """Distances (P,) float64 of pairs of queries and points, by direct difference of the original coordinates."""
        out = torch.empty(len(rows), dtype=torch.float64, device=self.device)
        step = max(1, min(_BLOCK, _CACHED if self.device.type == "cpu" else _BLOCK) // self._points.shape[1])
        for i in range(0, len(rows), step):
            part = slice(i, i + step)
            difference = queries[rows[part]].double() - self._points[points[part]]
            out[part] = difference.norm(dim=1)
        return out

    def _nearest_block(self, queries: Tensor, centred: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
        """Distances (B, 1) float64 and indices (B, 1) of the nearest points."""
        if not len(queries):
            return torch.empty(0, 1, dtype=torch.float64), torch.empty(0, 1, dtype=torch.int64)
        rows, groups = self._candidate_groups(centred, error)
        many = rows.bincount(minlength=len(queries)) > max(_FEW, self.groups // _FEW)
        if bool(many.any()):
            return self._nearest_of_many(queries, centred, error, many)
        pieces = -(-len(rows) * queries.shape[1] // (4 * _BLOCK))
        if pieces > 1 and len(queries) > 1:  # there is one row of offsets from a leader per pair
            step = -(-len(queries) // min(pieces, len(queries)))
            blocks = zip(queries.split(step), centred.split(step), error.split(step), strict=True)
            found = [self._nearest_block(*block) for block in blocks]
            return torch.cat([f[0] for f in found]), torch.cat([f[1] for f in found])
        rows, points = self._closest_members(queries, rows, groups)
        distances = self._exact(queries, rows, points)
        best, first = (v[:, None] for v in first_of_nearest(distances, rows, points, len(queries), len(self)))
        lost = best[:, 0].isinf()  # an approximate index may return no group
        if bool(lost.any()):
            best[lost], first[lost] = self._dense(queries[lost], 1)
        return best, first

    def _nearest_of_many(self, queries: Tensor, centred: Tensor, error: Tensor, many: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`_nearest_block` if for the queries ``many`` (B,) bool groups exclude little, as far away from
        collapsed points: for these float64 searches all points, and direct differences decide among the closest."""
        distances = torch.empty(len(queries), 1, dtype=torch.float64, device=self.device)
        indices = torch.empty(len(queries), 1, dtype=torch.int64, device=self.device)
        few = ~many
        distances[few], indices[few] = self._nearest_block(queries[few], centred[few], error[few])
        distances[many], indices[many] = self._nearest_of_crowd(queries[many], 1)
        return distances, indices

    def _closest_members(
        self, queries: Tensor, rows: Tensor, groups: Tensor, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        """Pairs (row, point) that may be the nearest, two (C,) tensors, from pairs (row, group) ordered by group.

        Queries and points are taken relative to the leader l before any product, so that rounding errors are relative
        to the member's offset: ‖q − p‖² = ‖q − l‖² + ‖p − l‖² − 2 (q − l)·(p − l). Usually a single pair per row
        remains; the caller decides among several. If float32 leaves more than a few (members collapsed onto one another
        away from their leader), float64 is used.
        """
        unit = torch.finfo(dtype).eps / 2
        wide = torch.promote_types(dtype, self._points.dtype)
        local = (queries[rows].to(wide) - self._points[self._leaders[groups]]).to(dtype)
        from_leader = local.square().sum(dim=1)
        sizes = self._sizes[groups]
        pairs = torch.arange(len(rows), device=self.device).repeat_interleave(sizes)  # (M,) the pair of each member
        before = (sizes.cumsum(0) - sizes)[pairs]
        places = self._starts[groups][pairs] + torch.arange(len(pairs), device=self.device) - before
        gain = torch.zeros(len(pairs), dtype=dtype, device=self.device)  # ‖q − p‖² − ‖q − l‖²: zero for the leader
        present, counts = groups.unique_consecutive(return_counts=True)
        parts = [
            torch.addmm(norms, part, offsets, alpha=-2).flatten()
            for group, part in zip(present.tolist(), local.split(counts.tolist()), strict=True)
            if self._shared[group]
            for offsets, norms in [self._members(group, dtype)]
        ]
        if parts:
            gain[(sizes > 1)[pairs]] = torch.cat(parts)
        squared, radius = from_leader.double()[pairs], self._offsets[places]
        doubt = (unit * ERROR_FACTOR) * radius * (2 * squared.sqrt() + radius)  # the bound of any such product
        kept = _may_be_smallest(gain, doubt, pairs, len(rows))  # the first term is the same for all members
        pairs, places = pairs[kept], places[kept]
        # The first term is a sum of squares, in which nothing cancels.
        squared, doubt = squared[kept] + gain[kept], doubt[kept] + 4 * unit * squared[kept]
        kept = _may_be_smallest(squared, doubt, rows[pairs], len(queries))
        pairs, places = pairs[kept], places[kept]
        crowded = pairs.bincount(minlength=len(rows)) > _CROWD
        if dtype == torch.float64 or not bool(crowded.any()):
            return rows[pairs], self._order[places]
        finer = self._closest_members(queries, rows[crowded], groups[crowded], torch.float64)
        kept = ~crowded[pairs]
        return torch.cat([rows[pairs[kept]], finer[0]]), torch.cat([self._order[places[kept]], finer[1]])

    def _candidate_groups(self, centred: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
        """Pairs (row, group) that may hold the nearest point, ordered by group: two (P,) tensors. With an approximate
        index, only among the groups it returns."""
        todo = torch.arange(len(centred), device=self.device)
        pairs: list[tuple[Tensor, Tensor]] = []
        width = min(8, self.groups)
        while len(todo):
            squared, groups = self._flat.topk(centred[todo], width)
            squared, slack = squared.double(), error[todo, None]
            # The nearest point is no farther than the nearest leader; only groups that reach closer can hold it.
            reach = (squared - slack).clamp(min=0).sqrt() - self._radii[groups]
            limit = (squared[:, :1] + slack).clamp(min=0).sqrt()
            # Leaders beyond the last one listed are at least as far, and no radius exceeds the largest.
            unseen = (squared[:, -1:] - slack).clamp(min=0).sqrt() - self._max_radius
            settled = (unseen > limit)[:, 0]
            if width == self.groups or self._approximate != "none":
                settled = torch.ones_like(settled)
            # FAISS pads the results of an approximate index with −1.
            rows, columns = ((reach <= limit) & settled[:, None] & (groups >= 0)).nonzero(as_tuple=True)
            pairs.append((todo[rows], groups[rows, columns]))
            todo = todo[~settled]
            width = min(8 * width, self.groups)
        rows, groups = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        order = groups.argsort(stable=True)
        return rows[order], groups[order]

    def _members(self, group: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Offsets of a group's members from its leader (d, M), and their squared norms (M,); cached if small."""
        key = group, dtype
        if key in self._cache:
            return self._cache[key]
        start = int(self._starts[group])
        members = self._order[start : start + int(self._sizes[group])]
        offsets = self._points[members].double() - self._points[self._leaders[group]]
        found = offsets.T.contiguous().to(dtype), offsets.square().sum(dim=1).to(dtype)
        if self._points.numel() <= _BLOCK:
            self._cache[key] = found
        return found

    def _ensure_groups(self) -> None:
        """Group the points before the first :meth:`nearest`. :meth:`search` needs no groups, and for 50,000 distinct
        points the N² comparisons take a hundred times as long as adding them to FAISS."""
        if not self._grouped:
            self._build_groups(self._permitted)
            self._grouped = True

    def _all(self) -> Scan:
        """The index over all points that :meth:`search` uses."""
        if self._scan is None:
            self._scan = Scan(self._centred())
        return self._scan

    def _centred(self) -> Tensor:
        """The points minus their mean; also sets the norm that bounds rounding errors."""
        centred = (self._points - self._mean).float()
        self._norm = float(centred.norm(dim=1).max())
        return centred

    def _build_groups(self, approximate: Approximate) -> None:
        centred = self._centred()
        radius = _GROUP_RADIUS * float(centred.norm(dim=1).square().mean().sqrt())
        if approximate != "none" and len(self) >= APPROXIMATE_FROM:
            leaders, assigned = leaders_in_cells(centred, radius)
        else:
            leaders, assigned = greedy_leaders(centred, radius)
        self._leaders = leaders
        self._approximate: Approximate = approximate if len(leaders) >= APPROXIMATE_FROM else "none"
        self._flat: Any
        if self._reads_once and self._approximate == "none":
            del centred
            unit = 2 * ERROR_FACTOR * UNIT  # a product alone may have all of the expansion's error
            self._one_read = OneReadSearch(self._points, self._mean, leaders, assigned, unit)
            return
        if self._approximate == "none":
            del centred  # frees memory before the index makes its own copy
            self._flat = self._make_flat(self._points, self._mean, leaders)
        else:
            self._flat = FaissApproximate(centred[leaders], self._approximate)
        everyone = torch.arange(len(self), device=self.device)
        distances = self._exact(self._points, everyone, leaders[assigned])
        # Exact copies of a leader are left out: they cannot be nearer than the leader.
        members = ((distances > 0) | (leaders[assigned] == everyone)).nonzero()[:, 0]
        self._order = members[assigned[members].argsort(stable=True)]
        self._offsets = distances[self._order]
        self._sizes = torch.bincount(assigned[members], minlength=len(leaders))
        self._starts = self._sizes.cumsum(0) - self._sizes
        self._shared, self._largest = (self._sizes > 1).tolist(), int(self._sizes.max())
        self._cache: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]] = {}
        self._radii = torch.zeros(len(leaders), dtype=torch.float64, device=self.device)
        self._radii.scatter_reduce_(0, assigned, distances, "amax")
        self._max_radius = float(self._radii.max())


def _waits_for(device: torch.device) -> bool:
    """Whether the host waits for this device when it reads of it."""
    return device.type != "cpu"


def _may_be_smallest(values: Tensor, doubt: Tensor, groups: Tensor, count: int) -> Tensor:
    """Whether each of the values (P,), known up to ± ``doubt``, may be the smallest of its group (P,); (P,) bool."""
    limit = torch.full((count,), torch.inf, dtype=torch.float64, device=values.device)
    limit.scatter_reduce_(0, groups, values + doubt, "amin")
    return values - doubt <= limit[groups]


def _refuse_non_finite(values: Tensor, what: str) -> None:
    bad = (~values.isfinite()).nonzero()[:, 0]
    if len(bad):
        raise TrajOODError(f"index {what}: {len(bad)} of {len(values)} rows are not finite, first at row {int(bad[0])}")
