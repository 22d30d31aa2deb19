"""NeighborIndex: exact Euclidean distances to the nearest of many points, near zero and in high dimension.

‖x‖² + ‖y‖² − 2x·y, the form that FAISS, BLAS and ``cdist`` use, cancels when x is close to y: in float32 at
d = 151,296 and ‖x‖ ≈ 400 a true distance of 0.01 comes out as 0.085. Here that form only proposes candidates, on
centred points, with a bound on its rounding error; distances that the bound cannot vouch for are computed again by
direct difference in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from traj_ood.errors import TrajOODError, unknown_name

Backend = Literal["auto", "faiss", "torch"]

_UNIT = 2.0**-24  # float32 rounding
# Errors of the float32 form reach 15 · _UNIT · (‖x‖ + ‖y‖)² at d = 150,000; tests/test_index.py measures them.
_ERROR_FACTOR = 32.0
# Squared distances whose rounding bound is a larger share than this are computed again in float64. Actual errors are
# several times smaller than the bound: float32 distances that stay agree with float64 to 1e-5.
_RELATIVE = 1e-4
_GROUP_RADIUS = 5e-3  # of the points' RMS distance to their mean: far above rounding, far below any score
_BLOCK = 2**24  # float64 differences held at a time: 128 MiB
_MAX_CANDIDATES = 256  # more neighbours than that are found faster by one float64 product
_FAISS_GPU_MAX_K = 2048


@dataclass(frozen=True)
class Neighbors:
    """``distances`` (B, k) float64 ascending (plain, not squared) and ``indices`` (B, k) int64 into the points."""

    distances: Tensor
    indices: Tensor


class NeighborIndex:
    """Nearest points by Euclidean distance.

    Points closer together than a small radius (trajectories that ended on the same attractor) form a group around one
    of them. :meth:`nearest` searches the groups' leaders first and opens only groups that the triangle inequality
    cannot exclude, so a dictionary of 2,000 end points on 200 attractors costs little more than 200 points, and the
    members of a group are told apart exactly because their differences are taken before any product.

    Args:
        points: (N, d), finite. Kept as float32 on ``device``.
        backend: ``auto`` (default) takes FAISS where it is installed and suits the device, else torch; both give the
            same distances. ``faiss`` runs on the GPU when the points are there and FAISS sees one.
        device: where queries will come from. Default: where the points are.
    Raises:
        TrajOODError: no points, not (N, d), or non-finite points.
    """

    def __init__(self, points: Tensor, *, backend: Backend = "auto", device: torch.device | str | None = None) -> None:
        if points.ndim != 2 or not len(points):
            raise TrajOODError(f"index: expected at least one point of shape (N, d), got {tuple(points.shape)}")
        _refuse_non_finite(points.norm(dim=1), "points")
        device = torch.device(device or points.device)
        if device.type == "mps":  # no float64 there
            device = torch.device("cpu")
        self.device = device
        self._points = points.to(device, torch.float32)
        self._mean = self._points.mean(dim=0, dtype=torch.float64).float()
        centred = self._points - self._mean
        self._norm = float(centred.norm(dim=1).max())
        self._make_flat = _flat_backend(backend, device)
        self.backend = self._make_flat.name
        self._all: Any = None
        self._build_groups(centred)

    def __len__(self) -> int:
        return len(self._points)

    @property
    def groups(self) -> int:
        """How many groups of (nearly) coinciding points there are."""
        return len(self._leaders)

    def nearest(self, queries: Tensor) -> Neighbors:
        """The nearest point of each query (B, d), exact down to the float32 spacing of the inputs.

        Raises:
            TrajOODError: wrong dimension, or a non-finite query (it would come back as infinitely far).
        """
        queries, centred, error = self._prepare(queries)
        return self._in_blocks(self._nearest_block, queries, centred, error, self._points.shape[1])

    def search(self, queries: Tensor, k: int) -> Neighbors:
        """The k nearest points of each query (B, d).

        Raises:
            TrajOODError: k outside 1 … N, wrong dimension, non-finite queries.
        """
        if not 1 <= k <= len(self):
            raise TrajOODError(f"k: expected 1 to {len(self)} (the number of indexed points), got {k}")
        queries, centred, error = self._prepare(queries)
        return self._in_blocks(partial(self._search_block, k), queries, centred, error, len(self))

    def _in_blocks(
        self, search: Callable[..., tuple[Tensor, Tensor]], queries: Tensor, centred: Tensor, error: Tensor, width: int
    ) -> Neighbors:
        """Search a few queries at a time, so that no intermediate of ``width`` float64 per query exceeds 128 MiB."""
        step = max(1, _BLOCK // width)
        blocks = zip(queries.split(step), centred.split(step), error.split(step), strict=True)
        found = [search(*block) for block in blocks]
        return Neighbors(torch.cat([f[0] for f in found]), torch.cat([f[1] for f in found]))

    def _search_block(self, k: int, queries: Tensor, centred: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
        """Distances and indices (B, k). Float32 proposes; queries that its rounding bound cannot settle, as happens
        among collapsed points, and wide searches are computed in float64."""
        width = k + 8  # a few spare candidates settle nearly every query
        if width > min(_MAX_CANDIDATES, len(self)) or not len(queries):
            return self._dense(queries, k)
        if self._all is None:
            self._all = self._make_flat(self._points - self._mean)
        squared, indices = self._all.topk(centred, width)
        distances = squared.double().clamp(min=0).sqrt()
        rows, columns = (error[:, None] > _RELATIVE * squared).nonzero(as_tuple=True)
        distances[rows, columns] = self._exact(queries, rows, indices[rows, columns])
        order = distances.argsort(dim=1, stable=True)[:, :k]
        distances, indices = distances.gather(1, order), indices.gather(1, order)
        unseen = squared[:, -1].double() - error  # no point that is not listed can be closer than this, squared
        unsettled = unseen < distances[:, -1].square()
        if bool(unsettled.any()):
            distances[unsettled], indices[unsettled] = self._dense(queries[unsettled], k)
        return distances, indices

    def _dense(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Distances and indices (B, k) by the expansion in float64; by direct difference where even that cancels."""
        centred = queries.double() - self._mean
        own = centred.square().sum(dim=1, keepdim=True)
        parts = []
        for points in self._points.split(max(1, _BLOCK // self._points.shape[1])):
            other = points.double() - self._mean
            parts.append(torch.addmm(other.square().sum(dim=1) + own, centred, other.T, alpha=-2))
        squared, indices = torch.cat(parts, dim=1).clamp_(min=0).topk(k, dim=1, largest=False)
        distances = squared.sqrt()
        bound = _ERROR_FACTOR * 2.0**-53 * (own.sqrt() + self._norm).square()
        rows, columns = (bound > _RELATIVE * squared).nonzero(as_tuple=True)
        distances[rows, columns] = self._exact(queries, rows, indices[rows, columns])
        order = distances.argsort(dim=1, stable=True)
        return distances.gather(1, order), indices.gather(1, order)

    def _prepare(self, queries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, d) as float32, the same less the mean, and (B,) float64 bounds on the rounding error of
        ‖x‖² + ‖y‖² − 2x·y over all points y."""
        if queries.ndim != 2 or queries.shape[1] != self._points.shape[1]:
            raise TrajOODError(f"queries: expected (B, {self._points.shape[1]}), got {tuple(queries.shape)}")
        queries = queries.to(self.device, torch.float32)
        centred = queries - self._mean
        norms = centred.norm(dim=1)
        _refuse_non_finite(norms, "queries")  # a NaN or infinite coordinate makes the norm so, too
        return queries, centred, (_ERROR_FACTOR * _UNIT) * (norms + self._norm).double().square()

    def _exact(self, queries: Tensor, rows: Tensor, points: Tensor) -> Tensor:
        """(P,) float64 distances of the pairs, by direct difference of the original coordinates."""
        out = torch.empty(len(rows), dtype=torch.float64, device=self.device)
        step = max(1, _BLOCK // self._points.shape[1])
        for i in range(0, len(rows), step):
            part = slice(i, i + step)
            difference = queries[rows[part]].double() - self._points[points[part]]
            out[part] = difference.square_().sum(dim=1).sqrt_()
        return out

    def _nearest_block(self, queries: Tensor, centred: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
        """Distances (B, 1) float64 and indices (B, 1) of the nearest points."""
        if not len(queries):
            return torch.empty(0, 1, dtype=torch.float64), torch.empty(0, 1, dtype=torch.int64)
        rows, groups = self._candidate_groups(centred, error)
        squared, members, doubt = self._closest_members(queries, rows, groups, torch.float32)
        unsure = doubt > _RELATIVE * squared  # many times closer to a member than to the leader
        if bool(unsure.any()):
            squared[unsure], members[unsure], _ = self._closest_members(
                queries, rows[unsure], groups[unsure], torch.float64
            )
        best = torch.full((len(queries),), torch.inf, dtype=torch.float64, device=self.device)
        best.scatter_reduce_(0, rows, squared, "amin")
        won = squared == best[rows]
        first = torch.empty(len(queries), dtype=torch.int64, device=self.device)
        first[rows[won]] = members[won]
        return best.sqrt_()[:, None], first[:, None]

    def _closest_members(
        self, queries: Tensor, rows: Tensor, groups: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        """For pairs ordered by group: squared distance (P,) float64 to the group's closest member, that member's index
        (P,), and a bound (P,) on the error of the former were ``dtype`` float32.

        Both sides are taken relative to the leader l before any product, so that the product's rounding error is of
        the group's own scale: ‖q − p‖² = ‖q − l‖² + ‖p − l‖² − 2 (q − l)·(p − l).
        """
        local = queries[rows].to(dtype) - self._points[self._leaders[groups]]
        from_leader = local.square().sum(dim=1)
        squared, places = from_leader.double(), self._starts[groups]
        present, counts = groups.unique_consecutive(return_counts=True)
        nearest = []  # of each group's pairs: what the closest member changes, and its place in the group
        for group, part in zip(present.tolist(), local.split(counts.tolist()), strict=True):
            if self._shared[group]:  # else its only member is its leader
                offsets, norms = self._members(group, dtype)
                nearest.append(torch.addmm(norms, part, offsets, alpha=-2).min(dim=1))
        if nearest:
            shared = self._sizes[groups] > 1
            squared[shared] += torch.cat([n.values for n in nearest])
            places[shared] += torch.cat([n.indices for n in nearest])
        # The first term is a sum of squares, in which nothing cancels; the product's error is that of any product.
        length, radius = from_leader.double().sqrt(), self._radii[groups]
        doubt = _UNIT * (4 * length.square() + _ERROR_FACTOR * radius * (2 * length + radius))
        return squared.clamp_(min=0), self._order[places], doubt

    def _candidate_groups(self, centred: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
        """Pairs (row, group) that may hold the nearest point, ordered by group: two (P,) tensors."""
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
            settled = (unseen > limit)[:, 0] if width < self.groups else torch.ones_like(todo, dtype=torch.bool)
            rows, columns = ((reach <= limit) & settled[:, None]).nonzero(as_tuple=True)
            pairs.append((todo[rows], groups[rows, columns]))
            todo = todo[~settled]
            width = min(8 * width, self.groups)
        rows, groups = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        order = groups.argsort(stable=True)
        return rows[order], groups[order]

    def _members(self, group: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Offsets of a group's members from its leader (d, M), and their squared norms (M,); kept if small."""
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

    def _build_groups(self, centred: Tensor) -> None:
        radius = _GROUP_RADIUS * float(centred.norm(dim=1).square().mean().sqrt())
        leaders, assigned = greedy_leaders(centred, radius)
        self._leaders = leaders
        # Without a single group the copy of (for ViT-MAE base) 1.2 GB is saved.
        self._flat = self._make_flat(centred if len(leaders) == len(self) else centred[leaders])
        self._order = assigned.argsort(stable=True)
        self._sizes = torch.bincount(assigned, minlength=len(leaders))
        self._starts = self._sizes.cumsum(0) - self._sizes
        self._shared = (self._sizes > 1).tolist()
        self._cache: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]] = {}
        distances = self._exact(self._points, torch.arange(len(self), device=self.device), leaders[assigned])
        self._radii = torch.zeros(len(leaders), dtype=torch.float64, device=self.device)
        self._radii.scatter_reduce_(0, assigned, distances, "amax")
        self._max_radius = float(self._radii.max())


def greedy_leaders(points: Tensor, radius: float) -> tuple[Tensor, Tensor]:
    """Group points (N, d) greedily: in order, a point within ``radius`` of an earlier leader joins the first such one.

    Returns:
        leaders (G,) int64 indices of the leaders, and assigned (N,) int64, each point's position in ``leaders``.
    """
    count, device = len(points), points.device
    squared_norms = points.square().sum(dim=1)
    assigned = torch.full((count,), -1, dtype=torch.int64, device=device)
    leaders = torch.empty(0, dtype=torch.int64, device=device)
    for block in torch.arange(count, device=device).split(1024):

        def near(others: Tensor, block: Tensor = block) -> Tensor:
            cross = points[block] @ points[others].T
            return squared_norms[block, None] + squared_norms[others] - 2 * cross <= radius**2

        if len(leaders):
            places = torch.arange(len(leaders), device=device, dtype=torch.int32)
            first = torch.where(near(leaders), places, len(leaders)).min(dim=1).values
            joined = first < len(leaders)
            assigned[block[joined]] = first[joined].long()
            block = block[~joined]
        # Within a block the order decides, one point after the other.
        inside = near(block, block).cpu()
        new: list[int] = []
        places_inside: list[int] = []
        for i in range(len(block)):
            hits = inside[i, new].nonzero()[:, 0]
            places_inside.append(len(leaders) + (int(hits[0]) if len(hits) else len(new)))
            if not len(hits):
                new.append(i)
        assigned[block] = torch.tensor(places_inside, dtype=torch.int64, device=device)
        leaders = torch.cat([leaders, block[new]])
    return leaders, assigned


class _TorchFlat:
    """Top-k by the float32 expansion, in blocks."""

    name = "torch"

    def __init__(self, points: Tensor) -> None:
        self._points, self._squared = points, points.square().sum(dim=1)

    def topk(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        step = max(1, 2**25 // len(self._points))
        parts = []
        for block in queries.split(step):
            squared = block.square().sum(dim=1, keepdim=True) + self._squared - 2 * block @ self._points.T
            parts.append(squared.topk(k, dim=1, largest=False))
        return torch.cat([p.values for p in parts]), torch.cat([p.indices for p in parts])


class _FaissFlat:
    """FAISS IndexFlatL2 (squared distances), on the GPU when the points are there."""

    name = "faiss"

    def __init__(self, points: Tensor) -> None:
        import faiss

        self._device = points.device
        self._index: Any = faiss.IndexFlatL2(points.shape[1])
        if points.device.type == "cuda":
            resources = faiss.StandardGpuResources()
            self._index = faiss.index_cpu_to_gpu(resources, points.device.index or 0, self._index)
        self._index.add(points.cpu().numpy())
        self._fallback = points if points.device.type == "cuda" else None

    def topk(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        if self._fallback is not None and k > _FAISS_GPU_MAX_K:
            return _TorchFlat(self._fallback).topk(queries, k)
        squared, indices = self._index.search(queries.cpu().numpy(), k)
        return torch.from_numpy(squared).to(self._device), torch.from_numpy(indices).to(self._device)


def _flat_backend(backend: Backend, device: torch.device) -> type[_TorchFlat] | type[_FaissFlat]:
    if backend not in ("auto", "faiss", "torch"):
        raise unknown_name("index backend", backend, ("auto", "faiss", "torch"))
    if backend == "torch":
        return _TorchFlat
    try:
        import faiss
    except (ImportError, RuntimeError) as error:  # faiss-gpu without its CUDA libraries raises RuntimeError
        if backend == "faiss":
            raise TrajOODError(
                f"index backend 'faiss' is not importable ({error}): pip install 'traj_ood[faiss-cpu]' or, with an "
                "NVIDIA GPU, 'traj_ood[faiss-gpu]'; or use backend 'torch'"
            ) from error
        return _TorchFlat
    # The only safe gate: StandardGpuResources exists even without a GPU.
    if device.type == "cuda" and not (hasattr(faiss, "get_num_gpus") and faiss.get_num_gpus() > 0):
        return _TorchFlat
    return _FaissFlat


def _refuse_non_finite(values: Tensor, what: str) -> None:
    bad = (~values.isfinite()).nonzero()[:, 0]
    if len(bad):
        raise TrajOODError(f"index {what}: {len(bad)} of {len(values)} rows are not finite, first at row {int(bad[0])}")
