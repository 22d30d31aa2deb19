"""Exact nearest-neighbour distances, accurate near zero and in high dimension. Only this room imports faiss."""

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
