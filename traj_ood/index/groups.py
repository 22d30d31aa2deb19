"""Points that (nearly) coincide, as groups around one of them each: many trajectories end at one attractor."""

from __future__ import annotations

import torch
from torch import Tensor

from traj_ood.index.flat import CELL_SAMPLE, SEED, cell_count


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


def leaders_in_cells(points: Tensor, radius: float) -> tuple[Tensor, Tensor]:
    """:func:`greedy_leaders` within each cell of a k-means partition: √N times faster with N leaders. A group on a
    border is cut into two, which costs time later but no exactness; leaders are not in the order of the points."""
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
    for members in cells.argsort(stable=True).split(
        cells.sort().values.unique_consecutive(return_counts=True)[1].tolist()
    ):
        own, places = greedy_leaders(points[members], radius)
        assigned[members] = places + count
        leaders.append(members[own])
        count += len(own)
    return torch.cat(leaders), assigned
