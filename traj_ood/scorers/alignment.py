"""Whether the field points to where training images end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from traj_ood.autoencoders import View
from traj_ood.scorers.bank import SearchingScorer
from traj_ood.scorers.base import Evidence, Needs
from traj_ood.scorers.registry import register


@register
@dataclass
class Alignment(SearchingScorer):
    """−cos(f(z_0) − z_0, a − z_0), a the attractor nearest to z_0.

    Reason: the field f(z) − z points up the latent density (Theorem 1, §3.1). For a sample in distribution the way up
    leads to the attractor next to it; elsewhere the field is whatever the network extrapolates, and points past it. A
    cosine knows nothing of distances, so it can only add to them. A field or a way of no length counts as orthogonal.

    Cost: 1 evaluation of f.

    Args:
        view: Default ``mean``.
        target: ``attractor`` (default), or ``mean``: a is the mean training feature, for which no attractor is needed.
    """

    name: ClassVar[str] = "alignment"
    summary: ClassVar[str] = "negated cosine between the first step and the way to the nearest attractor"
    suite: ClassVar[dict[str, int]] = {"": 150}
    view: View = "mean"
    target: Literal["attractor", "mean"] = "attractor"

    def needs(self) -> Needs:
        view = frozenset({self.view})
        attractors = view if self.target == "attractor" else frozenset()
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
        way = nearest.double() - start.double()
        lengths = field.norm(dim=1) * way.norm(dim=1)
        return -(field * way).sum(dim=1) / lengths.clamp(min=torch.finfo(torch.float64).tiny)
