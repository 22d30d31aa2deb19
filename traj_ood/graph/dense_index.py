"""Exact nearest-neighbour search in plain tensor operations, for exported graphs."""

from __future__ import annotations

import torch
from torch import Tensor

from traj_ood.index import Neighbors

_DIRECT = 2**20
"""Largest k · d for which distances are recomputed as direct differences: 8 MiB per query."""


class DenseIndex:
    """Exact search among points (N, d) float32, without branches that depend on the data.

    An exported graph can use neither the groups nor the FAISS candidates of :class:`traj_ood.NeighborIndex`. Neighbours
    are chosen by ‖x‖² + ‖y‖² − 2 x·y in float64; their distances are then recomputed as direct differences, because
    close to a point the difference of two large squares would be mostly rounding error. ``prepared`` is that of another
    index over the same points: their float64 copy and squared lengths.
    """

    def __init__(self, points: Tensor, prepared: tuple[Tensor, Tensor] | None = None) -> None:
        self._points = points
        if prepared is None:
            wide = points.double()
            prepared = wide, wide.square().sum(dim=1)
        self.prepared = self._wide, self._squared = prepared

    def nearest(self, queries: Tensor) -> Neighbors:
        """The nearest neighbour of each query (B, d); any of them in case of a tie."""
        indices = self._squares(queries).argmin(dim=1, keepdim=True)
        return Neighbors(self._direct(queries, indices), indices)

    def search(self, queries: Tensor, k: int) -> Neighbors:
        """The k nearest neighbours of each query (B, d), in ascending order up to rounding."""
        squares = self._squares(queries)
        # Sorted, because kth() takes the last one.
        squared, indices = squares.topk(k, dim=1, largest=False)
        if k * self._points.shape[1] <= _DIRECT:
            return Neighbors(self._direct(queries, indices), indices)
        return Neighbors(squared.clamp(min=0).sqrt(), indices)

    def kth(self, queries: Tensor, k: int) -> Tensor:
        """(B,) float64 distances of queries (B, d) to their k-th nearest neighbour."""
        return self.search(queries, k).distances[:, -1]

    def _squares(self, queries: Tensor) -> Tensor:
        """(B, N) float64 squared distances."""
        wide = queries.double()
        own = wide.square().sum(dim=1, keepdim=True)
        return own + self._squared - 2 * (wide @ self._wide.T)

    def _direct(self, queries: Tensor, indices: Tensor) -> Tensor:
        """(B, k) float64 distances to the points ``indices`` (B, k)."""
        chosen = torch.nn.functional.embedding(indices, self._points)  # gathers whole rows
        return (queries[:, None].double() - chosen.double()).square().sum(dim=2).sqrt()
