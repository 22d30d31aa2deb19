"""NeighborIndex against float64 brute force, down to distances of 1e-4 in 150,000 dimensions."""

from __future__ import annotations

import importlib
import sys
import types
from typing import Any

import numpy as np
import pytest
import torch
from neighbors import (
    COLLAPSED,
    DISTANCES,
    around,
    assert_exact,
    assert_independent_of_the_batch,
    brute,
    clusters,
    gaussian,
    moved,
)
from torch import Tensor

from traj_ood.errors import TrajOODError
from traj_ood.index import Approximate, NeighborIndex, Recall, flat, greedy_leaders, search
from traj_ood.index.flat import SHARD_ABOVE, FaissFlat, TorchFlat, flat_backend, to_gpu
from traj_ood.index.scan import Scan
from traj_ood.index.search import ERROR_FACTOR, UNIT


def _faiss_missing() -> str:
    try:
        importlib.import_module("faiss")
    except (ImportError, RuntimeError) as error:
        return f"faiss cannot be imported ({error})"
    return ""


needs_faiss = pytest.mark.skipif(bool(_faiss_missing()), reason=_faiss_missing() or "faiss is here")
BACKENDS = ["torch", pytest.param("faiss", marks=needs_faiss)]


# ---------------------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dimension", "count"), [(3, 60), (96, 60), (5000, 60), (150_000, 16)])
def test_distances_near_points_of_norm_400(backend: str, dimension: int, count: int) -> None:
    points = gaussian(count, dimension)
    built = NeighborIndex(points, backend=backend)  # type: ignore[arg-type]
    assert built.backend == backend
    queries, truth = around(points)
    assert_exact(built.nearest(queries), points, truth)
    assert_exact(built.search(queries, 1), points, truth)
    assert_exact(built.search(queries, 7), points, truth, 7)
    # the constructed distances are what they claim, up to the spacing of float32
    spacing = 1e-7 * 400
    expected = torch.tensor(DISTANCES[:5], dtype=torch.float64)
    torch.testing.assert_close(built.nearest(queries).distances[:5, 0], expected, rtol=1e-3, atol=spacing)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dimension", "groups", "members", "spread"), COLLAPSED)
def test_nearest_of_collapsed_attractors(
    backend: str, dimension: int, groups: int, members: int, spread: float
) -> None:
    points = clusters(groups, members, dimension, spread)
    queries, truth = around(points)
    assert_exact(NeighborIndex(points, backend=backend).nearest(queries), points, truth)  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dimension", "groups", "members", "spread"), COLLAPSED)
def test_search_among_collapsed_attractors(
    backend: str, dimension: int, groups: int, members: int, spread: float
) -> None:
    points = clusters(groups, members, dimension, spread)
    queries, truth = around(points)
    built = NeighborIndex(points, backend=backend)  # type: ignore[arg-type]
    assert_exact(built.search(queries, 1), points, truth, 1)
    assert_exact(built.search(queries, 5), points, truth, 5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_collapsed_attractor_far_from_the_origin(backend: str) -> None:
    points = clusters(1, 50, 5000, 1e-3)
    built = NeighborIndex(points, backend=backend)  # type: ignore[arg-type]
    queries, truth = around(points)
    assert_exact(built.nearest(queries), points, truth)
    assert_exact(built.search(queries, 3), points, truth, 3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_identical_points_and_a_single_point(backend: str) -> None:
    point = gaussian(1, 500)
    for points in (point, point.repeat(30, 1)):
        built = NeighborIndex(points, backend=backend)  # type: ignore[arg-type]
        assert len(built) == len(points)
        queries, truth = around(points)
        assert_exact(built.nearest(queries), points, truth)
        assert_exact(built.search(queries, len(points)), points, truth, len(points))
    assert built.groups == 1
    assert built.nearest(point).distances.tolist() == [[0.0]]


@pytest.mark.parametrize("seed", range(40))
def test_random_geometries(seed: int) -> None:
    draw = torch.Generator().manual_seed(1000 + seed)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=draw))

    dimension, groups, members = integer(1, 200), integer(1, 30), integer(1, 20)
    spread = 10.0 ** integer(-6, 3)
    points = clusters(groups, members, dimension, spread, seed) * 10.0 ** integer(-3, 3)
    points = points + 10.0 ** integer(-2, 3) * torch.randn(dimension, generator=draw)  # far from the origin
    points = points[torch.randperm(len(points), generator=draw)]
    picked = points[torch.randint(len(points), (12,), generator=draw)]
    queries = torch.cat([moved(picked, 10.0 ** integer(-6, 3), seed), picked[:2], 3 * points[:1]])
    built = NeighborIndex(points, backend="torch" if seed % 2 else "auto")
    assert_exact(built.nearest(queries), points, brute(points, queries))
    assert built.groups <= len(points)


@needs_faiss
def test_backends_agree() -> None:
    points = torch.cat([gaussian(300, 64), clusters(4, 50, 64, 1e-2)])
    queries = torch.cat([moved(points[::50], d, 3) for d in DISTANCES])
    one, other = (NeighborIndex(points, backend=b) for b in ("torch", "faiss"))
    assert (one.backend, other.backend, NeighborIndex(points).backend) == ("torch", "faiss", "faiss")
    torch.testing.assert_close(one.nearest(queries).distances, other.nearest(queries).distances, rtol=1e-9, atol=1e-6)
    torch.testing.assert_close(
        one.search(queries, 9).distances, other.search(queries, 9).distances, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k", [1, 5, 50, 120])  # float32 proposes; it proposes more; float64 does
def test_searches_do_not_depend_on_each_other(backend: str, k: int) -> None:
    points = torch.cat([gaussian(100, 96), clusters(4, 20, 96, 1e-2)])
    points = torch.cat([points, points[::9]])  # with ties
    queries = torch.cat([moved(points[::20], d, 3) for d in DISTANCES])
    built = NeighborIndex(points, backend=backend)  # type: ignore[arg-type]
    together = built.search(queries, k)
    assert bool((together.distances.diff(dim=1) >= 0).all())
    order = torch.randperm(len(queries), generator=torch.Generator().manual_seed(5))
    shuffled = built.search(queries[order], k).distances
    torch.testing.assert_close(shuffled, together.distances[order], rtol=1e-9, atol=0)
    for size in (1, 19):
        parts = [built.search(part, k) for part in queries.split(size)]
        joined = torch.cat([p.distances for p in parts])
        torch.testing.assert_close(joined, together.distances, rtol=1e-9, atol=0)
        assert torch.equal(torch.cat([p.indices for p in parts]), together.indices)


@pytest.mark.parametrize("backend", BACKENDS)
def test_queries_do_not_depend_on_each_other(backend: str) -> None:
    points = torch.cat([gaussian(100, 96), clusters(4, 20, 96, 1e-2)])
    points = torch.cat([points, points[::9]])  # with ties
    queries = torch.cat([moved(points[::20], d, 3) for d in DISTANCES])
    built = NeighborIndex(points, backend=backend)  # type: ignore[arg-type]
    assert_independent_of_the_batch(built, queries)


def test_a_single_long_query_and_several_threads() -> None:
    points = gaussian(8, 40_000)  # torch splits a sum of more than 32,768 terms if it is the only one
    queries = moved(points[:4], 300.0)
    built = NeighborIndex(points, backend="torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        together = built.nearest(queries).distances
        alone = torch.cat([built.nearest(q[None]).distances for q in queries])
        torch.testing.assert_close(alone, together, rtol=1e-12, atol=0)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_of_equal_points_the_first_is_found(backend: str) -> None:
    points = clusters(3, 10, 96, 1e-2).repeat(3, 1)
    found = NeighborIndex(points, backend=backend).nearest(points)  # type: ignore[arg-type]
    assert found.indices[:, 0].tolist() == list(range(30)) * 3
    assert not found.distances.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_members_collapsed_onto_one_another_away_from_their_leader(backend: str) -> None:
    core = clusters(1, 40, 96, 1e-5)
    points = torch.cat([core[:1] + 0.05, core, gaussian(5, 96, 900.0, 9)])
    queries = torch.cat([core[:9], moved(core[:9], 1e-3)])
    assert_exact(NeighborIndex(points, backend=backend).nearest(queries), points, brute(points, queries))  # type: ignore[arg-type]


def test_groups_make_a_collapsed_dictionary_small() -> None:
    assert NeighborIndex(clusters(6, 30, 96, 1e-3)).groups == 6
    assert NeighborIndex(gaussian(60, 96)).groups == 60


@pytest.mark.parametrize("seed", range(12))
def test_the_kth_alone_is_the_last_of_a_search(seed: int) -> None:
    """Where float32 tells the points apart, where it does not (collapsed, far from their mean), and with ties."""
    draw = torch.Generator().manual_seed(seed)
    dimension, spread = (2, 8, 300)[seed % 3], 10.0 ** (seed // 3 * 2 - 6)
    points = torch.cat([clusters(5, 60, dimension, spread, seed), gaussian(2500, dimension, 1.0, seed)])
    points = torch.cat([points, points[:40]])[torch.randperm(2840, generator=draw)]
    queries = torch.cat([moved(points[:6], 10.0 ** (seed - 8)), gaussian(6, dimension, 500.0, seed + 1)])
    built, truth = NeighborIndex(points), brute(points, queries).sort(dim=1).values
    for k in (1, 2, 9, 59, 64, 247, 2500):
        found = built.kth(queries, k)
        torch.testing.assert_close(found, built.search(queries, k).distances[:, -1], rtol=1e-9, atol=0)
        torch.testing.assert_close(found, truth[:, k - 1], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(built.kth(queries[3:4], k), found[3:4], rtol=1e-9, atol=0)
    assert built.kth(queries[:0], 9).shape == (0,)
    with pytest.raises(
        TrajOODError, match=r"k: expected a whole number from 1 to 2,840 \(the number of indexed points\), got 2841"
    ):
        built.kth(queries, 2841)


@pytest.mark.parametrize(("count", "k"), [(1, 1), (7, 3), (2047, 5), (2049, 40), (4100, 1), (6000, 100)])
def test_a_scan_leaves_out_nobody_who_may_be_near(count: int, k: int) -> None:
    points = gaussian(count, 6, 1.0, 3)
    queries = gaussian(700, 6, 1.3, 4)  # more than one block of rows
    error = torch.full((700,), 1e-3, dtype=torch.float64)  # far larger than rounding: candidates beyond the k
    found = Scan(points).candidates(queries, k, error, 256)
    squared = torch.cdist(queries.double(), points.double()).square()
    listed, certain = torch.zeros_like(squared, dtype=torch.bool), torch.zeros_like(squared, dtype=torch.bool)
    listed[found.rows, found.points] = True
    certain[found.rows, found.points] = found.certain
    limit = squared.kthvalue(k, dim=1, keepdim=True).values
    assert not found.crowded.any()
    assert (listed | (squared > limit + 1e-3)).all()
    assert not (certain & (squared >= limit)).any()
    assert (listed == (squared <= limit + 2e-3)).double().mean() > 0.999
    assert (certain == (squared < limit - 2e-3)).double().mean() > 0.999


def test_empty_query_batch() -> None:
    built = NeighborIndex(gaussian(10, 4))
    found = built.nearest(torch.empty(0, 4))
    assert found.distances.shape == found.indices.shape == (0, 1)
    found = built.search(torch.empty(0, 4), 3)
    assert found.distances.shape == found.indices.shape == (0, 3)


def test_doubles_are_taken() -> None:
    points = gaussian(10, 4)
    queries = moved(points, 1.0)
    assert_exact(NeighborIndex(points.double()).nearest(queries.double()), points, brute(points, queries))


# ---------------------------------------------------------------------------------------------- the rounding bound


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dimension", [3, 96, 5000, 150_000])
def test_rounding_stays_below_the_bound(backend: str, dimension: int) -> None:
    count = 40 if dimension < 100_000 else 12
    for seed, (scale, offset, near) in enumerate(
        [(1.0, 0.0, False), (400.0, 0.0, True), (1e-3, 5.0, False), (1.0, 100.0, True), (400.0, 400.0, True)]
    ):
        points = gaussian(count, dimension, scale, seed) + gaussian(1, dimension, offset, 99)
        queries = moved(points, 1e-3, seed) if near else gaussian(count, dimension, 2 * scale, seed + 50)
        flat = (TorchFlat if backend == "torch" else FaissFlat)(points)
        squared, indices = flat.topk(queries, count)
        truth = brute(points, queries).square().gather(1, indices)
        norms = queries.double().norm(dim=1, keepdim=True) + points.double().norm(dim=1)[indices]
        worst = float(((squared.double() - truth).abs() / (UNIT * norms.square())).max())
        assert worst <= ERROR_FACTOR, f"scale {scale}, offset {offset}: {worst:.1f} units"


# ---------------------------------------------------------------------------------------------- approximate


def crowd() -> tuple[Tensor, Tensor]:
    """3,800 points on some 2,800 attractors, most in 40 clusters, with duplicates, and 60 queries near and far."""
    centres = clusters(40, 50, 32, 100.0, 3)
    points = torch.cat([centres, gaussian(800, 32), moved(centres[:500], 1e-2, 4), centres[500:1000]])
    return points, torch.cat([moved(points[::400], d, 5) for d in DISTANCES])


@pytest.fixture
def small_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "APPROXIMATE_FROM", 1000)


@needs_faiss
@pytest.mark.usefixtures("small_is_large")
@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_an_approximate_index_loses_recall_only(kind: Approximate) -> None:
    points, queries = crowd()
    built = NeighborIndex(points, approximate=kind)
    assert built.approximate == kind
    assert 2750 < built.groups <= 2850  # groups cut by a border of cells, and close attractors
    found, truth = built.nearest(queries), brute(points, queries)
    hit = found.distances[:, 0] <= truth.min(dim=1).values * (1 + 1e-9)
    assert hit.double().mean() > 0.9
    torch.testing.assert_close(truth.gather(1, found.indices), found.distances, rtol=1e-12, atol=0)
    exact = NeighborIndex(points).nearest(queries)
    torch.testing.assert_close(found.distances[hit], exact.distances[hit], rtol=1e-12, atol=0)
    assert_exact(built.search(queries, 7), points, truth, 7)  # search stays exact
    assert_exact(built.search(queries[:2], len(points)), points, truth[:2], len(points))
    with pytest.raises(TrajOODError, match=r"k: expected a whole number from 1 to 3,800 .*, got 3801"):
        built.search(queries, 3801)
    with pytest.raises(TrajOODError, match="index queries: 1 of 60 rows are not finite, first at row 7"):
        built.nearest(bad(queries, 7, float("nan")))


@needs_faiss
@pytest.mark.usefixtures("small_is_large")
@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_an_approximate_index_is_deterministic(kind: Approximate) -> None:
    points, queries = crowd()
    one, other = (NeighborIndex(points, approximate=kind) for _ in range(2))
    import faiss

    threads, threshold = faiss.omp_get_max_threads(), faiss.cvar.distance_compute_blas_threshold
    faiss.omp_set_num_threads(2)
    try:
        third = NeighborIndex(points, approximate=kind)
        assert faiss.omp_get_max_threads() == 2
    finally:
        faiss.omp_set_num_threads(threads)
    for built in (other, third):
        torch.testing.assert_close(one.nearest(queries).distances, built.nearest(queries).distances, rtol=1e-12, atol=0)
        assert torch.equal(one.nearest(queries).indices, built.nearest(queries).indices)
    assert_independent_of_the_batch(one, queries)
    assert faiss.cvar.distance_compute_blas_threshold == threshold


@needs_faiss
@pytest.mark.usefixtures("small_is_large")
def test_recall(monkeypatch: pytest.MonkeyPatch) -> None:
    points, queries = crowd()
    assert NeighborIndex(points).recall(queries) == Recall(60, 1.0, 0.0, 0.0)
    assert NeighborIndex(points, backend="torch").recall(queries) == Recall(60, 1.0, 0.0, 0.0)
    monkeypatch.setattr(flat, "_PROBED_CELLS", 1)
    built = NeighborIndex(points, approximate="ivf")
    measured = built.recall(queries)
    assert measured == built.recall(queries)
    truth = brute(points, queries).min(dim=1).values
    found = built.nearest(queries).distances[:, 0]
    assert measured.recall == (found <= truth * (1 + 1e-12)).double().mean() < 1
    outside = truth > 0
    assert measured.max_excess >= float((found / truth - 1)[outside].max()) - 1e-9 > 0
    assert measured.mean_excess <= measured.max_excess
    with pytest.raises(TrajOODError, match="recall: expected at least one query, got none"):
        built.recall(queries[:0])


@needs_faiss
@pytest.mark.usefixtures("small_is_large")
def test_queries_for_which_nothing_is_proposed_are_searched_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    points, queries = crowd()
    built = NeighborIndex(points, approximate="ivf")

    def nothing(queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        return torch.full((len(queries), k), 3.4e38), torch.full((len(queries), k), -1)

    assert built.groups  # made now
    monkeypatch.setattr(built._flat, "topk", nothing)
    assert_exact(built.nearest(queries), points, brute(points, queries))


@needs_faiss
def test_few_attractors_are_searched_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    points, queries = crowd()
    assert NeighborIndex(points).approximate == "none"
    for limit in (len(points) + 1, 3500):  # too few points; enough of them, but on too few attractors
        monkeypatch.setattr(search, "APPROXIMATE_FROM", limit)
        built = NeighborIndex(points, approximate="ivf")
        assert built.approximate == "none"
        assert_exact(built.nearest(queries), points, brute(points, queries))


def test_approximate_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    points = gaussian(10, 4)
    with pytest.raises(TrajOODError, match="unknown approximate index 'hsnw': did you mean 'hnsw'"):
        NeighborIndex(points, approximate="hsnw")  # type: ignore[arg-type]
    with pytest.raises(TrajOODError, match="'ivf' is part of FAISS, but the index backend is 'torch': use backend"):
        NeighborIndex(points, backend="torch", approximate="ivf")
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(
        TrajOODError, match=r"approximate index 'hnsw' needs faiss, .*pip install 'traj_ood\[faiss-cpu\]'"
    ):
        NeighborIndex(points, approximate="hnsw")


# ---------------------------------------------------------------------------------------------- GPUs, with a fake FAISS


def fake_faiss(monkeypatch: pytest.MonkeyPatch, gpus: int) -> list[tuple[object, ...]]:
    """A faiss module that sees ``gpus`` GPUs, and the list of what is called on it."""
    calls: list[tuple[object, ...]] = []
    fake: Any = types.ModuleType("faiss")
    fake.get_num_gpus = lambda: gpus
    fake.StandardGpuResources = lambda: "resources"
    fake.GpuMultipleClonerOptions = types.SimpleNamespace
    fake.index_cpu_to_gpu = lambda resources, gpu, index: calls.append(("one", gpu, index))
    fake.index_cpu_to_all_gpus = lambda index, co: calls.append(("all", co.shard, index))
    monkeypatch.setitem(sys.modules, "faiss", fake)
    return calls


@pytest.mark.parametrize(
    ("gpus", "size", "expected"),
    [
        (1, SHARD_ABOVE + 1, ("one", 0, "index")),
        (2, SHARD_ABOVE, ("one", 0, "index")),
        (2, SHARD_ABOVE + 1, ("all", True, "index")),
    ],
)
def test_shards_only_large_indexes_and_only_over_several_gpus(
    monkeypatch: pytest.MonkeyPatch, gpus: int, size: int, expected: tuple[object, ...]
) -> None:
    calls = fake_faiss(monkeypatch, gpus)
    to_gpu("index", 0, size)
    assert calls == [expected]


def test_one_gpu_is_the_one_that_holds_the_points(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_faiss(monkeypatch, 4)
    to_gpu("index", 3, 10)
    assert calls == [("one", 3, "index")]


def test_among_several_processes_each_keeps_to_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_faiss(monkeypatch, 2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    to_gpu("index", 1, SHARD_ABOVE + 1)
    assert calls == [("one", 1, "index")]


def test_the_gpu_is_used_only_where_faiss_sees_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for gpus, expected in ((0, TorchFlat), (1, FaissFlat)):
        fake_faiss(monkeypatch, gpus)
        assert flat_backend("auto", torch.device("cuda")) is TorchFlat  # FAISS takes its queries from the host
        assert flat_backend("faiss", torch.device("cuda")) is expected
        assert flat_backend("auto", torch.device("cpu")) is FaissFlat


@needs_faiss
def test_more_neighbours_than_faiss_allows_on_a_gpu_are_found_by_torch() -> None:
    points = gaussian(3000, 4)
    flat = FaissFlat(points)
    flat._fallback, flat._index = TorchFlat(points), None  # as on a GPU, where FAISS would refuse
    squared, _ = flat.topk(points[:3], 2049)
    torch.testing.assert_close(squared, TorchFlat(points).topk(points[:3], 2049)[0])


# ---------------------------------------------------------------------------------------------- greedy_leaders


@pytest.mark.parametrize("seed", range(6))
def test_greedy_leaders(seed: int) -> None:
    points = torch.cat([gaussian(40, 5, 1.0, seed), clusters(5, 20, 5, 0.05, seed) / 400])
    points = points[torch.randperm(len(points), generator=torch.Generator().manual_seed(seed))]
    radius = (0.0, 0.01, 0.1, 0.5, 2.0, 100.0)[seed]
    leaders, assigned = greedy_leaders(points, radius)
    distances = brute(points, points)
    slack = 1e-3
    assert assigned.shape == (len(points),)
    assert (distances[torch.arange(len(points)), leaders[assigned]] <= radius + slack).all()
    apart = distances[leaders][:, leaders] + torch.eye(len(leaders)) * 1e9
    assert (apart >= radius - slack).all()
    assert leaders.tolist() == sorted(leaders.tolist())
    assert assigned[leaders].tolist() == list(range(len(leaders)))  # a leader leads itself
    assert leaders[0] == 0


def test_greedy_leaders_across_blocks_and_first_leader_wins() -> None:
    line = torch.arange(3000.0)[:, None] % 1500  # every place twice, the copies in another block of 1,024
    leaders, assigned = greedy_leaders(line, 0.4)
    assert leaders.tolist() == list(range(1500))
    assert torch.equal(assigned, torch.arange(3000) % 1500)
    # 0, 1, 2 at radius 1: 1 joins 0; 2 is farther than 1 from 0 and leads; 1.5 is nearer to 2 but 1.5 > 1 from 0
    leaders, assigned = greedy_leaders(torch.tensor([[0.0], [1.0], [2.0], [1.0]]), 1.0)
    assert leaders.tolist() == [0, 2]
    assert assigned.tolist() == [0, 0, 1, 0]


# ---------------------------------------------------------------------------------------------- errors


def bad(values: Tensor, row: int, value: float) -> Tensor:
    values = values.clone()
    values[row, 1] = value
    return values


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_input(value: float) -> None:
    points = gaussian(10, 4)
    with pytest.raises(TrajOODError, match="index points: 1 of 10 rows are not finite, first at row 3"):
        NeighborIndex(bad(points, 3, value))
    built = NeighborIndex(points)
    for look_up in (built.nearest, lambda q: built.search(q, 2)):
        with pytest.raises(TrajOODError, match="index queries: 1 of 10 rows are not finite, first at row 7"):
            look_up(bad(points, 7, value))


@pytest.mark.parametrize("k", [0, -1, 11, 2.5, True, None])
def test_impossible_k(k: Any) -> None:
    words = rf"k: expected a whole number from 1 to 10 \(the number of indexed points\), got {k}"
    with pytest.raises(TrajOODError, match=words):
        NeighborIndex(gaussian(10, 4)).search(torch.zeros(1, 4), k)


def test_wrong_shapes_and_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    for points in (torch.empty(0, 4), torch.zeros(4), torch.zeros(2, 3, 4)):
        with pytest.raises(TrajOODError, match=r"index: expected at least one point of shape \(N, d\), got \("):
            NeighborIndex(points)
    for other, words in (
        ([[1.0]], "list: convert it by torch.as_tensor"),
        (torch.ones(2, 1, dtype=torch.int64), "torch.int64"),
    ):
        with pytest.raises(TrajOODError, match=rf"index: expected at least one point .*, got {words}"):
            NeighborIndex(other)
    built = NeighborIndex(gaussian(10, 4))
    with pytest.raises(TrajOODError, match=r"queries: expected \(B, 4\), got ndarray: convert it by torch.as_tensor"):
        built.nearest(np.zeros((2, 4)))  # type: ignore[arg-type]
    for queries in (torch.zeros(4), torch.zeros(2, 5)):
        with pytest.raises(TrajOODError, match=r"queries: expected \(B, 4\), got \("):
            built.nearest(queries)
        with pytest.raises(TrajOODError, match=r"queries: expected \(B, 4\), got \("):
            built.search(queries, 1)
    for own in (torch.tensor([0]), torch.zeros(3), torch.tensor([0, 1, 10]), torch.tensor([0, 1, -2])):
        with pytest.raises(TrajOODError, match="other_than: expected an int64 index from -1 to 9 on the CPU for each"):
            built.nearest(torch.zeros(3, 4), own)
    points = gaussian(10, 4).requires_grad_()
    assert not NeighborIndex(points).nearest(points).distances.requires_grad
    with pytest.raises(TrajOODError, match="unknown index backend 'fais': did you mean 'faiss'"):
        NeighborIndex(gaussian(10, 4), backend="fais")  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "faiss", None)  # as on a machine without it
    assert NeighborIndex(gaussian(10, 4)).backend == "torch"
    with pytest.raises(
        TrajOODError, match=r"index backend 'faiss' is not importable .*pip install 'traj_ood\[faiss-cpu"
    ):
        NeighborIndex(gaussian(10, 4), backend="faiss")


@pytest.mark.parametrize("backend", BACKENDS)
def test_queries_far_from_collapsed_points_are_exact(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing rules a group out there: every pair of query and group at once would be gigabytes."""
    draws = torch.Generator().manual_seed(0)
    points = 1 + 1e-3 * torch.randn(600, 400, generator=draws)
    queries = 40 * torch.randn(300, 400, generator=draws)
    index = NeighborIndex(points, backend=backend)
    found = index.nearest(queries)
    assert index.groups > 500
    brute = torch.cdist(queries.double(), points.double(), compute_mode="donot_use_mm_for_euclid_dist")
    torch.testing.assert_close(found.distances, brute.amin(dim=1, keepdim=True), rtol=1e-14, atol=0)
    picked = brute.gather(1, found.indices)
    torch.testing.assert_close(picked, found.distances, rtol=1e-14, atol=0)
    alone = torch.cat([index.nearest(q[None]).distances for q in queries[:20]])
    torch.testing.assert_close(alone, found.distances[:20], rtol=1e-12, atol=0)

    nearby = points[:200] + 1e-2 * torch.randn(200, 400, generator=draws)
    whole = index.nearest(nearby)
    monkeypatch.setattr(search, "_BLOCK", 2**10)  # in pieces of a few pairs
    torch.testing.assert_close(index.nearest(nearby).distances, whole.distances, rtol=1e-12, atol=0)
    assert torch.equal(index.nearest(nearby).indices, whole.indices)
