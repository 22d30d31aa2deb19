"""Backends that search the k nearest points in float32: torch or FAISS, exact or approximate."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from traj_ood.errors import TrajOODError, unknown_name

Backend = Literal["auto", "faiss", "torch"]
Approximate = Literal["none", "ivf", "hnsw"]

# Bytes of points above which they are split among several GPUs: a third of a 24 GB card, which holds the points twice
# (torch's copy and FAISS's) in addition to the model. It is 14,000 attractors of ViT-MAE base.
SHARD_ABOVE = 8 * 2**30
SEED = 0
"""Seed of k-means."""
CELL_SAMPLE = 64
"""Points per cell in the k-means training sample: FAISS recommends at least 39, and the time grows with it."""
COPIED_COORDINATES = 2**24
"""Coordinates copied at a time: 64 MiB."""

_FAISS_GPU_MAX_K = 2048
_INSTALL = "pip install 'traj_ood[faiss-cpu]' or, with an NVIDIA GPU, 'traj_ood[faiss-gpu]'"
_PROBED_CELLS = 32  # of 4·√N cells: 2.5 % at 100,000 points
_HNSW_LINKS, _HNSW_BUILD, _HNSW_SEARCH = 32, 80, 64  # wider than FAISS's defaults (40, 16), which miss more points


def flat_backend(backend: Backend, device: torch.device) -> type[TorchFlat] | type[FaissFlat]:
    """The class of the exact backend; ``auto`` takes FAISS on the CPU if it is installed, else torch.

    Raises:
        TrajOODError: an unknown name, or ``faiss`` where it cannot be imported.
    """
    if backend not in ("auto", "faiss", "torch"):
        raise unknown_name("index backend", backend, ("auto", "faiss", "torch"))
    if backend == "torch" or (backend == "auto" and device.type != "cpu"):  # FAISS takes queries from the host
        return TorchFlat
    try:
        import faiss
    except (ImportError, RuntimeError) as error:  # faiss-gpu without its CUDA libraries raises RuntimeError
        if backend == "faiss":
            raise TrajOODError(
                f"index backend 'faiss' is not importable ({error}): {_INSTALL}; or use backend 'torch'"
            ) from error
        return TorchFlat
    # The only safe test: StandardGpuResources exists even without a GPU.
    if device.type == "cuda" and not (hasattr(faiss, "get_num_gpus") and faiss.get_num_gpus() > 0):
        return TorchFlat
    return FaissFlat


def check_approximate(approximate: Approximate, backend: Backend) -> None:
    """Check that the approximate index is available, at any number of points: a run must not fail only once its
    dictionary is large.

    Raises:
        TrajOODError: an unknown name, the backend torch, or FAISS cannot be imported.
    """
    if approximate == "none":
        return
    if approximate not in ("ivf", "hnsw"):
        raise unknown_name("approximate index", approximate, ("none", "ivf", "hnsw"))
    if backend == "torch":
        raise TrajOODError(
            f"approximate index {approximate!r} is part of FAISS, but the index backend is 'torch': use backend 'auto' "
            "or 'faiss', or approximate 'none'"
        )
    try:
        import faiss  # noqa: F401
    except (ImportError, RuntimeError) as error:
        raise TrajOODError(
            f"approximate index {approximate!r} needs faiss, which is not importable ({error}): {_INSTALL}; or use "
            "approximate 'none'"
        ) from error


def _blocks(points: Tensor, centre: Tensor | None, chosen: Tensor | None) -> Iterator[Tensor]:
    """The points ``chosen``, minus ``centre``, in float32 and in blocks: beside FAISS's own copy of 2,000 attractors of
    ViT-MAE base (1.2 GB) there may be no memory for another. All points at once if there is nothing to change."""
    if centre is None and chosen is None:
        yield points
        return
    rows = torch.arange(len(points), device=points.device) if chosen is None else chosen
    for part in rows.split(max(1, COPIED_COORDINATES // points.shape[1])):
        some = take_rows(points, part)
        yield (some if centre is None else some - centre).float()


def take_rows(points: Tensor, rows: Tensor) -> Tensor:
    """``points[rows]``, without a copy if ``rows`` (n,) are consecutive."""
    if len(rows) and bool((rows.diff() == 1).all()):
        return points[int(rows[0]) : int(rows[-1]) + 1]
    return points[rows]


class TorchFlat:
    """Exhaustive search by the expansion ‖x‖² + ‖y‖² − 2x·y in float32.

    Args:
        points: (N, d).
        centre: (d,) subtracted from the points; None subtracts nothing.
        chosen: (n,) int64 indices of the points to search; None searches all.
    """

    name = "torch"

    def __init__(self, points: Tensor, centre: Tensor | None = None, chosen: Tensor | None = None) -> None:
        parts = list(_blocks(points, centre, chosen))
        self._points = torch.cat(parts) if len(parts) > 1 else parts[0]
        self._squared = torch.cat([part.square().sum(dim=1) for part in parts])

    def topk(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        step = max(1, 2**25 // len(self._points))
        parts = []
        for block in queries.split(step):
            squared = block.square().sum(dim=1, keepdim=True) + self._squared - 2 * block @ self._points.T
            parts.append(squared.topk(k, dim=1, largest=False))
        return torch.cat([p.values for p in parts]), torch.cat([p.indices for p in parts])


class FaissFlat:
    """Exhaustive search by FAISS's IndexFlatL2, on the GPU if the points are there. Arguments as for TorchFlat."""

    name = "faiss"

    def __init__(self, points: Tensor, centre: Tensor | None = None, chosen: Tensor | None = None) -> None:
        import faiss

        self._device = points.device
        index: Any = faiss.IndexFlatL2(points.shape[1])
        count = len(points) if chosen is None else len(chosen)
        index.codes.resize(count * index.code_size)  # allocated once: growing would copy the array, at twice the memory
        index.codes.resize(0)
        for block in _blocks(points, centre, chosen):
            index.add(block.cpu().numpy())
        self._fallback: TorchFlat | None = None
        if points.device.type == "cuda":
            self._fallback = TorchFlat(points, centre, chosen)
            index = to_gpu(index, points.device.index or 0, count * points.shape[1] * 4)
        self._index = index

    def topk(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        if self._fallback is not None and k > _FAISS_GPU_MAX_K:
            return self._fallback.topk(queries, k)
        squared, indices = self._index.search(queries.cpu().numpy(), k)
        return torch.from_numpy(squared).to(self._device), torch.from_numpy(indices).to(self._device)


def to_gpu(index: Any, gpu: int, size: int) -> Any:
    """Move a flat index of ``size`` bytes to one GPU, or in shards to all of them if it exceeds ``SHARD_ABOVE``.

    Whole copies on every GPU would only speed up batches far larger than a chunk of trajectories. With several
    processes each uses its own GPU.
    """
    import faiss

    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    if alone and faiss.get_num_gpus() > 1 and size > SHARD_ABOVE:
        options = faiss.GpuMultipleClonerOptions()
        options.shard = True
        return faiss.index_cpu_to_all_gpus(index, co=options)
    return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), gpu, index)


class FaissApproximate:
    """Approximate search by FAISS's IVF or HNSW over points (N, d), on the CPU; results do not depend on the batch."""

    def __init__(self, points: Tensor, kind: Approximate) -> None:
        import faiss

        self._device = points.device
        vectors, dimension = points.cpu().numpy(), points.shape[1]
        self._index: Any
        if kind == "hnsw":
            self._index = faiss.IndexHNSWFlat(dimension, _HNSW_LINKS)
            self._index.hnsw.efConstruction, self._index.hnsw.efSearch = _HNSW_BUILD, _HNSW_SEARCH
            threads = faiss.omp_get_max_threads()
            faiss.omp_set_num_threads(1)  # several threads would insert points in an order that no seed determines
            try:
                self._index.add(vectors)
            finally:
                faiss.omp_set_num_threads(threads)
        else:
            self._cells = faiss.IndexFlatL2(dimension)  # kept here, because the index holds no reference to it
            self._index = faiss.IndexIVFFlat(self._cells, dimension, cell_count(len(points), 4))
            self._index.cp.seed, self._index.cp.max_points_per_centroid = SEED, CELL_SAMPLE
            self._index.nprobe = _PROBED_CELLS
            self._index.train(vectors)
            self._index.add(vectors)

    def topk(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        # No BLAS product of the whole batch: its rounding depends on the batch size, so that a query might visit other
        # cells in another batch.
        with _faiss_setting("distance_compute_blas_threshold", 2**31 - 1):
            squared, indices = self._index.search(queries.cpu().numpy(), k)
        return torch.from_numpy(squared).to(self._device), torch.from_numpy(indices).to(self._device)


@contextmanager
def _faiss_setting(name: str, value: int) -> Iterator[None]:
    """Set one of FAISS's global variables within the block."""
    import faiss

    before = getattr(faiss.cvar, name)
    setattr(faiss.cvar, name, value)
    try:
        yield
    finally:
        setattr(faiss.cvar, name, before)


def cell_count(count: int, factor: int) -> int:
    """Number of k-means cells: ``factor``·√N, or fewer if a cell would have fewer than ``CELL_SAMPLE`` points."""
    return max(1, min(int(factor * count**0.5), count // CELL_SAMPLE))
