"""Joint density of a sample's position and its first displacements under f."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from traj_ood.autoencoders import FeatureView
from traj_ood.scorers.base import Evidence, Needs, Scorer
from traj_ood.scorers.gaussians import distances_to_gaussians, learn_gaussians
from traj_ood.scorers.path import parse_steps
from traj_ood.scorers.registry import register


@register
@dataclass
class EarlyPath(Scorer):
    """Mahalanobis distance of position and first displacements together, averaged over the cells of the image.

    Mean over cells of sqrt((v − μ)ᵀ Σ⁻¹ (v − μ)), where v = [z_0, z_{t1} − z_0, z_{t2} − z_{t1}, …] of one cell. By
    default v is the position z_0 and the field f(z_0) − z_0 (see ``field`` for why Theorem 1 is no reason). μ and Σ are
    one Ledoit–Wolf Gaussian per cell, as in PaDiM (Defard et al. 2021), because normal values differ between positions
    in the image.

    Cost: as many evaluations of f as the last step, 1 by default.

    Args:
        view: ``grid`` (default, at most 4 × 4 cells), ``mean`` or ``cls``.
        steps: t1+t2+…, such as ``1+4``. Default ``1``. z_t is the end point for a sample that converges before t.
        shuffled: control, default false: the Gaussians are fitted to z_0 of one training image with the displacements
            of another, so they describe each part but not how the parts belong together.
        seed: seed of the shuffling.
    """

    name: ClassVar[str] = "early-path"
    summary: ClassVar[str] = "Mahalanobis distance of z0 and its first displacement together, one Gaussian per cell"
    suite: ClassVar[dict[str, int]] = {"": 110, "shuffled=true": 111}
    views: ClassVar[tuple[str, ...]] = ("grid", "mean", "cls")
    view: FeatureView = "grid"
    steps: str = "1"
    shuffled: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._steps = parse_steps(self.name, self.steps, 1)

    def needs(self) -> Needs:
        points: frozenset[tuple[FeatureView, int]] = frozenset((self.view, t) for t in self._steps)
        return Needs(features=frozenset({self.view}), points=points, steps=self._steps[-1])

    def learn(self, train: Evidence) -> dict[str, Tensor]:
        start, *displacements = self._parts(train)
        if self.shuffled:
            order = torch.randperm(len(start), generator=torch.Generator().manual_seed(self.seed))
            other = torch.empty_like(order)
            other[order] = order.roll(1)  # a random cycle: no image keeps its own displacements
            displacements = [d[other] for d in displacements]
        return learn_gaussians(torch.cat([start, *displacements], dim=-1))

    def score(self, evidence: Evidence) -> Tensor:
        return distances_to_gaussians(self.state, torch.cat(self._parts(evidence), dim=-1)).mean(dim=1)

    def _parts(self, evidence: Evidence) -> list[Tensor]:
        """z_0 and the displacements, each (B, cells, d) or (B, d)."""
        points = [evidence.features[self.view].cpu(), *(evidence.points[self.view, t] for t in self._steps)]
        return [points[0], *(b - a for a, b in pairwise(points))]
