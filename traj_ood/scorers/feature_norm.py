"""Feature norm: the length of the feature vector as an OOD score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from traj_ood.scorers.base import Evidence, FeatureScorer
from traj_ood.scorers.registry import register


@register
@dataclass
class FeatureNorm(FeatureScorer):
    """−log ‖z‖: short features count as OOD, because networks respond less to inputs unlike their training data.

    This direction is the published one (Tack et al. 2020; Yu et al. 2023), found on classifiers. An encoder that ends
    in a LayerNorm gives every token the same length up to its learnt scale: ``tokens`` and ``cls`` then carry little
    information, and ``mean`` measures how much the tokens of an image agree.

    Args:
        view: Default ``mean``.
        two_sided: score |log ‖z‖ − mean of log ‖z‖ over training images| instead, which assumes no direction. Default
            false, as published.
    """

    name: ClassVar[str] = "feature-norm"
    summary: ClassVar[str] = "length of the feature: short is OOD (Tack et al. 2020), or two-sided"
    suite: ClassVar[dict[str, int]] = {"": 390, "two_sided=true": 391}
    two_sided: bool = False

    def learn(self, train: Evidence) -> dict[str, Tensor]:
        return {"centre": self._log_norms(train).mean(dim=0, keepdim=True)} if self.two_sided else {}

    def score(self, evidence: Evidence) -> Tensor:
        norms = self._log_norms(evidence)
        return (norms - self.state["centre"]).abs() if self.two_sided else -norms

    def _log_norms(self, evidence: Evidence) -> Tensor:
        norms = self.features(evidence).cpu().double().norm(dim=1)
        return norms.clamp(min=torch.finfo(torch.float64).tiny).log()
