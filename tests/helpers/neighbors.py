"""Points whose distances are known, and what every search for neighbours promises of them."""

from __future__ import annotations

import torch
from torch import Tensor

from traj_ood.index import NeighborIndex, Neighbors

DISTANCES = (0.0, 1e-4, 1e-3, 1e-2, 1.0, 400.0)


def brute(points: Tensor, queries: Tensor) -> Tensor:
    """(B, N) float64 distances, one query at a time by direct difference."""
    exact = points.double()
    return torch.stack([(exact - q.double()).norm(dim=1) for q in queries])


def assert_exact(found: Neighbors, points: Tensor, truth: Tensor, k: int = 1) -> None:
    """The k smallest of the true distances (B, N), and indices that belong to them.

    The absolute tolerance, 1e-6 for points of norm 400, is far below their float32 spacing (1e-5 at d = 150,000).
    """
    atol = 2.5e-9 * float(points.norm(dim=1).max())
    assert found.distances.shape == found.indices.shape == (len(truth), k)
    assert found.distances.dtype == torch.float64
    torch.testing.assert_close(found.distances, truth.sort(dim=1).values[:, :k], rtol=1e-5, atol=atol)
    torch.testing.assert_close(truth.gather(1, found.indices), found.distances, rtol=1e-5, atol=atol)
    assert all(len(set(row)) == k for row in found.indices.tolist())


def gaussian(count: int, dimension: int, norm: float = 400.0, seed: int = 0) -> Tensor:
    points = torch.randn(count, dimension, generator=torch.Generator().manual_seed(seed))
    return points * (norm / dimension**0.5)


def moved(points: Tensor, distance: float, seed: int = 1) -> Tensor:
    step = torch.randn(points.shape, generator=torch.Generator().manual_seed(seed)).double()
    return (points.double() + distance * step / step.norm(dim=1, keepdim=True)).float()


def clusters(groups: int, members: int, dimension: int, spread: float, seed: int = 0) -> Tensor:
    """``groups`` attractors far apart, each with ``members`` end points within about ``spread``."""
    centres = gaussian(groups, dimension, seed=seed).repeat_interleave(members, dim=0)
    radii = torch.rand(groups * members, 1, generator=torch.Generator().manual_seed(seed + 7))
    step = torch.randn(centres.shape, generator=torch.Generator().manual_seed(seed + 8))
    return centres + spread * radii * step / step.norm(dim=1, keepdim=True)


def around(points: Tensor, distances: tuple[float, ...] = DISTANCES) -> tuple[Tensor, Tensor]:
    """One query at each distance from points spread over the dictionary, and the true distances to all points."""
    picked = points[torch.linspace(0, len(points) - 1, len(distances)).long()]
    queries = torch.cat([moved(p[None], d, seed) for seed, (p, d) in enumerate(zip(picked, distances, strict=True))])
    return queries, brute(points, queries)


COLLAPSED = [
    (dimension, groups, members, spread)
    for dimension, groups, members in [(3, 5, 12), (96, 5, 40), (5000, 3, 40)]
    for spread in (1e-3, 1e-2, 1.0)
] + [(150_000, 2, 12, 1e-3), (150_000, 2, 12, 1e-2)]


def assert_independent_of_the_batch(built: NeighborIndex, queries: Tensor) -> None:
    """Alone, in another order, and in batches on both sides of FAISS's switch to BLAS."""
    together = built.nearest(queries)
    order = torch.randperm(len(queries), generator=torch.Generator().manual_seed(5))
    shuffled = built.nearest(queries[order])
    torch.testing.assert_close(shuffled.distances, together.distances[order], rtol=1e-12, atol=0)
    assert torch.equal(shuffled.indices, together.indices[order])
    for size in (1, 19):
        parts = [built.nearest(part) for part in queries.split(size)]
        joined = torch.cat([p.distances for p in parts])
        torch.testing.assert_close(joined, together.distances, rtol=1e-9, atol=0)
        assert torch.equal(torch.cat([p.indices for p in parts]), together.indices)
