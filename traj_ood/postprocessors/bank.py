"""A static scorer that searches the training features."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from traj_ood.index import NeighborIndex
from traj_ood.postprocessors.base import Evidence, FeatureScorer, Postprocessor


@dataclass
class BankScorer(FeatureScorer):
    """Keeps the training features and an index over them, which is built from them when it is first needed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._index: NeighborIndex | None = None

    def learn(self, train: Evidence) -> dict[str, Tensor]:
        self._index = None
        return {"bank": self.features(train).cpu()}

    def load(self, path: Path) -> Postprocessor:
        self._index = None
        return super().load(path)

    def neighbour_distances(self, queries: Tensor, k: int) -> Tensor:
        """(B, k) float64 distances to the nearest training features, ascending, on the CPU."""
        if self._index is None:
            self._index = NeighborIndex(self.state["bank"].to(queries.device))
        return self._index.search(queries, k).distances.cpu()
