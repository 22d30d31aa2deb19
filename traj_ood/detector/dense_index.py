"""Nearest neighbours as tensor operations alone, for a graph that is recorded once and runs elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from traj_ood.index import Neighbors

_DIRECT = 2**20
"""Coordinates of a query's candidates up to which their distances are computed again by direct difference: 8 MiB."""


class DenseIndex:
    """Exact search among points (N, d) float32 without a branch that depends on the data.

    :class:`traj_ood.NeighborIndex` looks at groups of points and at FAISS's candidates; a graph can do neither. Here
    ‖x‖² + ‖y‖² − 2 x·y in float64 chooses the neighbours, and a direct difference gives their distance, so that a point
    next to an attractor has the distance it has and not the rounding of two large squares.

    Args:
        points: (N, d) float32.
        prepared: what another index over the same points has ``prepared``: their float64 copy and squared lengths.
    """

    def __init__(self, points: Tensor, prepared: tuple[Tensor, Tensor] | None = None) -> None:
        self._points = points
        if prepared is None:
            wide = points.double()
            prepared = wide, wide.square().sum(dim=1)
        self.prepared = self._wide, self._squared = prepared

    def __len__(self) -> int:
        return len(self._points)

    def nearest(self, queries: Tensor) -> Neighbors:
        """One nearest neighbour of each query (B, d); of points equally near, any."""
        indices = self._squares(queries).argmin(dim=1, keepdim=True)
        return Neighbors(self._direct(queries, indices), indices)

    def search(self, queries: Tensor, k: int) -> Neighbors:
        """The k nearest of each query (B, d), ascending up to rounding."""
        squares = self._squares(queries)
        # Not topk(sorted=False): the k-th is asked for.
        squared, indices = squares.topk(k, dim=1, largest=False)
        if k * self._points.shape[1] <= _DIRECT:
            return Neighbors(self._direct(queries, indices), indices)
        return Neighbors(squared.clamp(min=0).sqrt(), indices)

    def kth(self, queries: Tensor, k: int) -> Tensor:
        """(B,) float64 distances of each query (B, d) to its k-th nearest."""
        return self.search(queries, k).distances[:, -1]

    def _squares(self, queries: Tensor) -> Tensor:
        """(B, N) float64."""
        wide = queries.double()
        own = wide.square().sum(dim=1, keepdim=True)
        return own + self._squared - 2 * (wide @ self._wide.T)

    def _direct(self, queries: Tensor, indices: Tensor) -> Tensor:
        """(B, k) float64 distances to the points ``indices`` (B, k)."""
        chosen = torch.nn.functional.embedding(indices, self._points)  # a gather of whole rows
        return (queries[:, None].double() - chosen.double()).square().sum(dim=2).sqrt()
