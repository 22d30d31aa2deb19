"""Group points that (nearly) coincide around a leader: many trajectories end at the same attractor."""

from __future__ import annotations

import torch
from torch import Tensor

from traj_ood.index.flat import CELL_SAMPLE, COPIED_COORDINATES, SEED, cell_count, take_rows

_BLOCK_POINTS = 1024  # points compared with all leaders at a time


def greedy_leaders(points: Tensor, radius: float) -> tuple[Tensor, Tensor]:
    """Group points (N, d) greedily, in order: a point joins the first earlier leader within ``radius``, or becomes one.

    Returns:
        leaders (G,) int64, the indices of the leaders, and assigned (N,) int64, each point's position in ``leaders``.
    """
    count, device = len(points), points.device
    # In blocks: a copy of all points (1.2 GB for 2,000 attractors of ViT-MAE base) would set the peak memory.
    step = max(1, COPIED_COORDINATES // points.shape[1])
    norms = torch.cat([part.square().sum(dim=1) for part in points.split(step)])
    assigned = torch.full((count,), -1, dtype=torch.int64, device=device)
    leaders = torch.empty(0, dtype=torch.int64, device=device)

    def near(some: Tensor, others: Tensor) -> Tensor:
        """Whether pairs are within the radius, (S, O) bool."""
        squared = [
            torch.cat(
                [norms[s, None] + norms[o] - 2 * rows @ take_rows(points, o).T for o in others.split(step)], dim=1
            )
            for s in some.split(step)
            for rows in [take_rows(points, s)]
        ]
        return torch.cat(squared) <= radius**2

    for block in torch.arange(count, device=device).split(_BLOCK_POINTS):
        if len(leaders):
            places = torch.arange(len(leaders), device=device, dtype=torch.int32)
            first = torch.where(near(block, leaders), places, len(leaders)).min(dim=1).values
            joined = first < len(leaders)
            assigned[block[joined]] = first[joined].long()
            block = block[~joined]
        # Within a block points are assigned one after the other, in their order.
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


def leaders_in_cells(points: Tensor, radius: float) -> tuple[Tensor, Tensor]:
    """:func:`greedy_leaders` within each cell of a k-means partition, which is √N times faster with N leaders.

    A group across a border is split in two, which costs search time but no accuracy. The leaders are not in the order
    of the points.
    """
    import faiss

    vectors = points.cpu().numpy()
    kmeans = faiss.Kmeans(
        vectors.shape[1], cell_count(len(points), 1), niter=10, seed=SEED, max_points_per_centroid=CELL_SAMPLE
    )
    kmeans.train(vectors)
    cells = torch.from_numpy(kmeans.index.search(vectors, 1)[1])[:, 0].to(points.device)
    assigned = torch.empty_like(cells)
    leaders: list[Tensor] = []
    count = 0
    sizes = [size for size in cells.bincount().tolist() if size]
    for members in cells.argsort(stable=True).split(sizes):
        own, places = greedy_leaders(points[members], radius)
        assigned[members] = places + count
        leaders.append(members[own])
        count += len(own)
    return torch.cat(leaders), assigned
