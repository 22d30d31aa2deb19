"""Angle between the field f(z) − z at a sample and the direction to its nearest attractor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from traj_ood.autoencoders import FeatureView, View
from traj_ood.scorers.bank import SearchingScorer
from traj_ood.scorers.base import Evidence, Needs
from traj_ood.scorers.registry import register


@register
@dataclass
class Alignment(SearchingScorer):
    """Negated cosine −cos(f(z_0) − z_0, a − z_0), where a is the attractor nearest to z_0.

    Reason: the field f(z) − z points up the latent density (Theorem 1, §3.1). For an in-distribution sample it leads to
    the nearby attractor; elsewhere it is an extrapolation of the network and points past the attractor. The cosine does
    not depend on distances, so it complements scores that do. A field or direction of length zero counts as orthogonal.

    Cost: 1 evaluation of f.

    Args:
        view: latent view of all points. Default ``mean``.
        target: ``attractor`` (default), or ``mean``: a is the mean training feature, and no attractors are needed.
    """

    name: ClassVar[str] = "alignment"
    summary: ClassVar[str] = "negated cosine between the first step and the direction to the nearest attractor"
    suite: ClassVar[dict[str, int]] = {"": 150}
    view: View = "mean"
    target: Literal["attractor", "mean"] = "attractor"

    def needs(self) -> Needs:
        view: frozenset[FeatureView] = frozenset({self.view})
        attractors: frozenset[FeatureView] = view if self.target == "attractor" else frozenset()
        return Needs(features=view, points=frozenset({(self.view, 1)}), steps=1, attractors=attractors)

    def learn(self, train: Evidence) -> dict[str, Tensor]:
        if self.target == "attractor":
            return {"targets": train.attractors[self.view].cpu()}
        features = train.features[self.view].cpu()
        return {"targets": features.mean(dim=0, keepdim=True, dtype=torch.float64).to(features.dtype)}

    def points(self) -> Tensor:
        return self.state["targets"]

    def score(self, evidence: Evidence) -> Tensor:
        start = evidence.features[self.view].cpu()
        nearest = self.state["targets"][self.index(start.device).nearest(start).indices[:, 0]]
        field = evidence.points[self.view, 1].double() - start.double()
        direction = nearest.double() - start.double()
        lengths = field.norm(dim=1) * direction.norm(dim=1)
        return -(field * direction).sum(dim=1) / lengths.clamp(min=torch.finfo(torch.float64).tiny)
