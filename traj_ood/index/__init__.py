"""Exact distances to the nearest of many points, near zero and in high dimension; faiss is imported here alone."""

from traj_ood.index.flat import Approximate, Backend
from traj_ood.index.groups import greedy_leaders
from traj_ood.index.neighbors import Neighbors, Recall
from traj_ood.index.search import NeighborIndex

__all__ = [
    "Approximate",
    "Backend",
    "NeighborIndex",
    "Neighbors",
    "Recall",
    "greedy_leaders",
]
