"""NeighborIndex: exact Euclidean distances to the nearest of many points, near zero and in high dimension.

‖x‖² + ‖y‖² − 2x·y, the form that FAISS, BLAS and ``cdist`` use, cancels when x is close to y: in float32 at
d = 151,296 and ‖x‖ ≈ 400 a true distance of 0.01 comes out as 0.085. Here that form only proposes candidates, on
centred points, with a bound on its rounding error; distances that the bound cannot vouch for are computed again by
direct difference in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from traj_ood.errors import TrajOODError, unknown_name

Backend = Literal["auto", "faiss", "torch"]

_UNIT = 2.0**-24  # float32 rounding
_ERROR_FACTOR = 4.0  # measured errors of the float32 form stay under 1 · _UNIT · (‖x‖ + ‖y‖)²; see tests/test_index.py
_RELATIVE = 1e-5  # squared distances whose rounding bound is larger than this share are computed again in float64
_GROUP_RADIUS = 5e-3  # of the points' RMS distance to their mean: far above rounding, far below any score
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
        if not len(queries):
            return Neighbors(torch.empty(0, 1, dtype=torch.float64), torch.empty(0, 1, dtype=torch.int64))
        rows, leaders, distances = self._candidate_leaders(queries, centred, error)
        best = torch.full((len(queries),), torch.inf, dtype=torch.float64, device=self.device)
        best.scatter_reduce_(0, rows, distances, "amin")
        first = torch.zeros(len(queries), dtype=torch.int64, device=self.device)
        winner = distances == best[rows]
        first[rows[winner]] = self._leaders[leaders[winner]]
        opened = (self._sizes[leaders] > 1) & (distances - self._radii[leaders] < best[rows])
        self._open_groups(queries, rows[opened], leaders[opened], best, first)
        return Neighbors(best[:, None], first[:, None])

    def search(self, queries: Tensor, k: int) -> Neighbors:
        """The k nearest points of each query (B, d).

        Raises:
            TrajOODError: k outside 1 … N, wrong dimension, non-finite queries.
        """
        if not 1 <= k <= len(self):
            raise TrajOODError(f"k: expected 1 to {len(self)} (the number of indexed points), got {k}")
        queries, centred, error = self._prepare(queries)
        if self._all is None:
            self._all = self._make_flat(self._points - self._mean)
        # A few spare candidates, so that a point misplaced by rounding around rank k is still seen.
        squared, indices = self._all.topk(centred, min(len(self), k + 8))
        distances = squared.double().clamp(min=0).sqrt()
        rows, columns = (error[:, None] > _RELATIVE * squared).nonzero(as_tuple=True)
        distances[rows, columns] = self._exact(queries, rows, indices[rows, columns])
        order = distances.argsort(dim=1, stable=True)[:, :k]
        return Neighbors(distances.gather(1, order), indices.gather(1, order))

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
        step = max(1, 2**24 // self._points.shape[1])  # 128 MiB of float64 differences at a time
        for i in range(0, len(rows), step):
            part = slice(i, i + step)
            difference = queries[rows[part]].double() - self._points[points[part]]
            out[part] = difference.square_().sum(dim=1).sqrt_()
        return out

    def _candidate_leaders(self, queries: Tensor, centred: Tensor, error: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pairs (row, leader) that may hold the nearest point, with their exact distances: three (P,) tensors."""
        todo = torch.arange(len(queries), device=self.device)
        pairs: list[tuple[Tensor, Tensor]] = []
        width = min(8, self.groups)
        while True:
            squared, leaders = self._flat.topk(centred[todo], width)
            squared, slack = squared.double(), error[todo, None]
            # The nearest point is no farther than the nearest leader; only groups that reach closer can hold it.
            reach = (squared - slack).clamp(min=0).sqrt() - self._radii[leaders]
            limit = (squared[:, :1] + slack).clamp(min=0).sqrt()
            # Leaders beyond the last one listed are at least as far, and no radius exceeds the largest.
            unseen = (squared[:, -1:] - slack).clamp(min=0).sqrt() - self._max_radius
            settled = (unseen > limit)[:, 0] if width < self.groups else torch.ones_like(todo, dtype=torch.bool)
            rows, columns = ((reach <= limit) & settled[:, None]).nonzero(as_tuple=True)
            pairs.append((todo[rows], leaders[rows, columns]))
            todo = todo[~settled]
            if not len(todo):
                break
            width = min(8 * width, self.groups)
        rows, leaders = torch.cat([p[0] for p in pairs]), torch.cat([p[1] for p in pairs])
        return rows, leaders, self._exact(queries, rows, self._leaders[leaders])

    def _open_groups(self, queries: Tensor, rows: Tensor, groups: Tensor, best: Tensor, first: Tensor) -> None:
        """Compare the paired queries with every member of their group; lowers ``best`` and ``first`` in place.

        Both sides are taken relative to the leader before the product, which makes it exact at the group's own scale.
        """
        order = groups.argsort()
        rows, groups = rows[order], groups[order]
        present, counts = groups.unique_consecutive(return_counts=True)
        for group, part in zip(present.tolist(), rows.split(counts.tolist()), strict=True):
            members, offsets, squared_norms = self._members(group)
            local = queries[part].double() - self._points[self._leaders[group]]
            squared = local.square().sum(dim=1, keepdim=True) + squared_norms - 2 * local @ offsets.T
            nearest, which = squared.min(dim=1)
            nearest = nearest.clamp(min=0).sqrt()
            closer = nearest < best[part]
            best[part[closer]] = nearest[closer]
            first[part[closer]] = members[which[closer]]

    def _members(self, group: int) -> tuple[Tensor, Tensor, Tensor]:
        """Indices (M,), float64 offsets from the leader (M, d) and their squared norms (M,) of one group."""
        members = self._order[self._starts[group] : self._starts[group + 1]]
        offsets = self._points[members].double() - self._points[self._leaders[group]]
        return members, offsets, offsets.square().sum(dim=1)

    def _build_groups(self, centred: Tensor) -> None:
        radius = _GROUP_RADIUS * float(centred.norm(dim=1).square().mean().sqrt())
        leaders, assigned = greedy_leaders(centred, radius)
        self._leaders = leaders
        # Without a single group the copy of (for ViT-MAE base) 1.2 GB is saved.
        self._flat = self._make_flat(centred if len(leaders) == len(self) else centred[leaders])
        self._order = assigned.argsort(stable=True)
        self._sizes = torch.bincount(assigned, minlength=len(leaders))
        self._starts = [0, *self._sizes.cumsum(0).tolist()]
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
    assigned: list[int] = []
    leaders: list[int] = []
    for start in range(0, count, 1024):
        block = torch.arange(start, min(start + 1024, count), device=device)
        known = torch.tensor(leaders + block.tolist(), device=device)
        squared = squared_norms[block, None] + squared_norms[known] - 2 * points[block] @ points[known].T
        near = (squared <= radius**2).cpu()
        old = len(leaders)
        columns = list(range(old))  # columns of `near` that belong to leaders, in the leaders' order
        for i in range(len(block)):
            hits = near[i, columns].nonzero()
            if len(hits):
                assigned.append(int(hits[0, 0]))
            else:
                assigned.append(len(leaders))
                leaders.append(start + i)
                columns.append(old + i)
    return torch.tensor(leaders, device=device), torch.tensor(assigned, device=device)


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
