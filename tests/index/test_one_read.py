"""The search on accelerators, on a CPU that is taken for one: exact against float64, with one read for all queries."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
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
from torch.utils._python_dispatch import TorchDispatchMode

from traj_ood.attractors import NearestAttractor
from traj_ood.attractors.dictionary import NearestOther
from traj_ood.dynamics.device import exact_products, set_tf32
from traj_ood.dynamics.host import to_host
from traj_ood.dynamics.iterate import iterate
from traj_ood.dynamics.observers import Norm
from traj_ood.errors import TrajOODError
from traj_ood.index import NeighborIndex, one_read, search


@pytest.fixture(autouse=True)
def _accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "_waits_for", lambda device: True)


def index_of(points: Tensor) -> NeighborIndex:
    index = NeighborIndex(points, backend="torch")
    assert index.groups
    assert index._one_read is not None
    return index


class NoWaiting(TorchDispatchMode):
    """Refuses operations that a host would have to wait for: of a value, or of a size that values decide."""

    WAITS = frozenset(
        [
            *("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "bincount"),
            *("_unique2", "unique_dim", "unique_consecutive"),
        ]
    )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split("::")[1].split(".")[0]
        assert name not in self.WAITS, name
        if name in ("index", "index_put", "index_put_"):
            assert all(i is None or i.dtype == torch.int64 for i in args[1]), "a mask's places are counted first"
        if name == "repeat_interleave":
            assert (kwargs or {}).get("output_size") is not None
        return func(*args, **(kwargs or {}))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Reads of the host, through the function that all of them go through: whose each was."""
    found: list[str] = []
    for name in ("traj_ood.index.one_read", "traj_ood.dynamics.iterate"):

        def counted(values: list[Tensor], name: str = name) -> list[Tensor]:
            found.append(name)
            return to_host(values)

        monkeypatch.setattr(f"{name}.to_host", counted)
    return found


# ---------------------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize(("dimension", "count"), [(3, 60), (96, 60), (5000, 60)])
def test_distances_near_points_of_norm_400(dimension: int, count: int) -> None:
    points = gaussian(count, dimension)
    queries, truth = around(points)
    assert_exact(index_of(points).nearest(queries), points, truth)


@pytest.mark.parametrize(("dimension", "groups", "members", "spread"), COLLAPSED[:-2])
def test_collapsed_attractors(dimension: int, groups: int, members: int, spread: float) -> None:
    points = clusters(groups, members, dimension, spread)
    queries, truth = around(points)
    assert_exact(index_of(points).nearest(queries), points, truth)


@pytest.mark.parametrize("seed", range(20))
def test_random_geometries(seed: int) -> None:
    draw = torch.Generator().manual_seed(2000 + seed)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=draw))

    dimension, groups, members = integer(1, 200), integer(1, 30), integer(1, 20)
    points = clusters(groups, members, dimension, 10.0 ** integer(-6, 3), seed) * 10.0 ** integer(-3, 3)
    points = points + 10.0 ** integer(-2, 3) * torch.randn(dimension, generator=draw)  # far from the origin
    points = points[torch.randperm(len(points), generator=draw)]
    if seed % 3 == 0:
        points = points.double()
    picked = points[torch.randint(len(points), (12,), generator=draw)]
    queries = torch.cat([moved(picked, 10.0 ** integer(-6, 3), seed), picked[:2], 3 * points[:1]])
    truth = brute(points, queries)
    index = index_of(points)
    assert_exact(index.nearest(queries), points, truth)
    if len(points) > 1:
        own = truth.argmin(dim=1)
        own[::2] = -1
        found = index.nearest(queries, own)
        left = truth.scatter(1, own.clamp(min=0)[:, None], torch.where(own < 0, truth[:, 0], torch.inf)[:, None])
        left[own < 0] = truth[own < 0]
        assert_exact(found, points, left)


def test_what_is_collapsed_away_from_its_leader_far_away_or_the_same() -> None:
    core = clusters(1, 40, 96, 1e-5)
    points = torch.cat([core[:1] + 0.05, core, gaussian(5, 96, 900.0, 9)])
    queries = torch.cat([core[:9], moved(core[:9], 1e-3), 40 * gaussian(9, 96)])
    assert_exact(index_of(points).nearest(queries), points, brute(points, queries))
    ties = clusters(3, 10, 96, 1e-2).repeat(3, 1)
    found = index_of(ties).nearest(ties)
    assert found.indices[:, 0].tolist() == list(range(30)) * 3
    assert not found.distances.any()
    other = index_of(ties).nearest(ties, torch.arange(90))  # a copy of it is not left out with it
    assert other.indices[:, 0].tolist() == [*range(30, 60), *range(30), *range(30)]
    assert not other.distances.any()


def test_queries_do_not_depend_on_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    points = torch.cat([gaussian(100, 96), clusters(4, 20, 96, 1e-2)])
    points = torch.cat([points, points[::9]])  # with ties
    queries = torch.cat([moved(points[::20], d, 3) for d in DISTANCES])
    index = index_of(points)
    assert_independent_of_the_batch(index, queries)
    whole = index.nearest(queries)
    monkeypatch.setattr(one_read, "_BLOCK_VALUES", 3 * len(points))  # three queries at a time
    assert torch.equal(index.nearest(queries).indices, whole.indices)


@pytest.mark.parametrize("count", [1, 2])
def test_leaving_out_the_only_point_is_refused(count: int) -> None:
    for waits in (True, False):
        index = NeighborIndex(gaussian(count, 4), backend="torch")
        index._reads_once = waits
        if count == 1:
            with pytest.raises(TrajOODError, match="index: expected at least 2 points if one is left out, got 1"):
                index.nearest(torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64))
        else:
            assert index.nearest(torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64)).indices.tolist() == [[1]]


def test_queries_that_are_not_finite_are_refused() -> None:
    queries = torch.zeros(5, 4)
    queries[2, 1], queries[3, 0] = torch.nan, torch.inf
    with pytest.raises(TrajOODError, match="index queries: 2 of 5 rows are not finite, first at row 2"):
        index_of(gaussian(10, 4)).nearest(queries)
    assert index_of(gaussian(10, 4)).nearest(queries[:0]).distances.shape == (0, 1)


# ---------------------------------------------------------------------------------------------- reads of the host


@pytest.mark.parametrize("spread", [0.0, 1e-4, 1e-2, 10.0])
@pytest.mark.parametrize("count", [1, 7, 200])
def test_the_host_reads_once_for_all_queries(spread: float, count: int, reads: list[str]) -> None:
    points = clusters(5, 12, 64, spread)
    index = index_of(points)
    queries = moved(points[torch.arange(count) % len(points)], 1.0)
    own = torch.arange(count) % len(points)
    reads.clear()
    with NoWaiting():
        index.nearest(queries)
        assert len(reads) == 1
        index.nearest(queries, own)
    assert len(reads) == 2


@pytest.mark.parametrize("look", [4, 8])
def test_reads_for_a_look_of_the_engine_do_not_grow_with_what_is_near(look: int, reads: list[str]) -> None:
    """One of the engine's, which brings what was measured before, and one for the points of its steps; one more where
    starts come aboard."""
    model = tiny.toy()
    counts = []
    for spread in (0.0, 1e-3, 1.0):  # one attractor, a collapsed one, and many
        points = spread * torch.randn(80, 4, generator=torch.Generator().manual_seed(0)) + 1.0
        index = index_of(points)
        calls: list[int] = []

        def f(z: Tensor, calls: list[int] = calls) -> Tensor:
            calls.append(len(z))
            return model.self_map(z)

        start = torch.randn(192, 4, generator=torch.Generator().manual_seed(1)).clamp(-1.4, 1.4)
        observers = [Norm(), NearestAttractor(model, index, "tokens")]
        reads.clear()
        path = iterate(f, start, chunk=192, tol=0.0, max_steps=40, look=look, observers=observers)
        assert len(reads) <= 2 * -(-len(calls) // look) + 3  # the start is examined and comes aboard, the last is read
        counts.append(len(reads))
        often = iterate(f, start, chunk=192, tol=0.0, max_steps=40, look=1, observers=observers)
        torch.testing.assert_close(path.measure("distance/tokens"), often.measure("distance/tokens"), rtol=1e-9, atol=0)
    assert len(set(counts)) == 1


def test_the_other_attractors_are_those_of_the_other_search(monkeypatch: pytest.MonkeyPatch) -> None:
    model, points = tiny.toy(), clusters(6, 5, 4, 1e-3)
    latents, own = moved(points, 1e-2), torch.arange(30)
    own[4] = -1
    rows = torch.arange(30).flip(0)
    found = NearestOther(model, index_of(points), "tokens", own).observe(rows * 0, rows, latents[rows])
    monkeypatch.setattr(search, "_waits_for", lambda device: False)
    index = NeighborIndex(points, backend="torch")
    expected = NearestOther(model, index, "tokens", own).observe(rows * 0, rows, latents[rows])
    assert index._one_read is None
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    truth = brute(points, latents[rows])
    known = own[rows] >= 0
    truth[known.nonzero()[:, 0], own[rows][known]] = torch.inf
    torch.testing.assert_close(found, truth.amin(dim=1), rtol=1e-9, atol=0)


def test_searches_are_without_tf32_where_it_is_allowed() -> None:
    set_tf32(True)
    try:
        with exact_products():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
        seen = []
        index = index_of(gaussian(10, 4))
        exact = index._exact
        index._exact = lambda *pairs: (seen.append(torch.get_float32_matmul_precision()), exact(*pairs))[1]  # type: ignore[method-assign]
        index.nearest(torch.zeros(2, 4))
        assert seen == ["highest"]
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        set_tf32(False)
