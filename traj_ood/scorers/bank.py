"""Base classes of scorers that search for nearest neighbours among points learnt from training images."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from traj_ood.index import NeighborIndex, Neighbors
from traj_ood.scorers.base import Evidence, FeatureScorer, Scorer

_S = TypeVar("_S", bound="SearchingScorer")


class Index(Protocol):
    """The methods of an index that scorers call; implemented by :class:`traj_ood.NeighborIndex`."""

    def nearest(self, queries: Tensor) -> Neighbors: ...

    def search(self, queries: Tensor, k: int) -> Neighbors: ...

    def kth(self, queries: Tensor, k: int) -> Tensor: ...


class _FiniteQueries:
    """Wraps an index to return NaN distances for non-finite queries: one bad image must not stop the whole batch."""

    def __init__(self, index: NeighborIndex) -> None:
        self._index = index

    def nearest(self, queries: Tensor) -> Neighbors:
        return self._answer(queries, self._index.nearest)

    def search(self, queries: Tensor, k: int) -> Neighbors:
        return self._answer(queries, lambda finite: self._index.search(finite, k))

    def kth(self, queries: Tensor, k: int) -> Tensor:
        def kth(finite: Tensor) -> Neighbors:
            distances = self._index.kth(finite, k)[:, None]
            return Neighbors(distances, torch.empty_like(distances, dtype=torch.int64))

        return self._answer(queries, kth).distances[:, 0]

    def _answer(self, queries: Tensor, search: Callable[[Tensor], Neighbors]) -> Neighbors:
        finite = queries.isfinite().all(dim=1)
        if bool(finite.all()):
            return search(queries)
        found = search(torch.where(finite[:, None], queries, 0.0))
        non_finite = (~finite).to(found.distances.device)
        return replace(found, distances=found.distances.masked_fill(non_finite[:, None], torch.nan))


@dataclass
class SearchingScorer(Scorer):
    """A scorer with an index over :meth:`points`, built when a learnt state is first searched."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._index: tuple[dict[str, Tensor], Index] | None = None  # with the state that it was built from

    @abstractmethod
    def points(self) -> Tensor:
        """The points that distances are measured to, (N, d) float32, from the learnt state."""

    def index(self, device: torch.device) -> Index:
        """The index over :meth:`points`; the first call builds it on ``device``."""
        if self._index is None or self._index[0] is not self.state:
            self._index = self.state, _FiniteQueries(NeighborIndex(self.points().to(device)))
        return self._index[1]

    def with_index(self: _S, index: Index) -> _S:
        """A copy that searches ``index``, another index over :meth:`points`."""
        other = copy.copy(self)
        other._index = self.state, index
        return other


@dataclass
class BankScorer(SearchingScorer, FeatureScorer):
    """A static scorer whose index holds the training features."""

    def learn(self, train: Evidence) -> dict[str, Tensor]:
        return {"bank": self.features(train).cpu()}

    def points(self) -> Tensor:
        return self.state["bank"]

    def neighbour_distances(self, queries: Tensor, k: int) -> Tensor:
        """Distances to the k nearest training features, (B, k) float64, ascending, on the CPU."""
        return self.index(queries.device).search(queries, k).distances.cpu()

    def kth_distance(self, queries: Tensor, k: int) -> Tensor:
        """Distances to the k-th nearest training feature, (B,) float64, on the CPU."""
        return self.index(queries.device).kth(queries, k).cpu()
