"""NCI: alignment of the feature with the weight vector of its predicted class (Liu and Qin 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from traj_ood.scorers.base import Evidence
from traj_ood.scorers.head import HeadScorer
from traj_ood.scorers.registry import register

_TINY = torch.finfo(torch.float64).tiny


@register
@dataclass
class NCI(HeadScorer):
    """−(w_ŷ · (h − μ) / ‖h − μ‖ + α ‖h‖₁), with ŷ the predicted class, w_ŷ its weights and μ the mean training feature.

    Detection by neural collapse (Liu and Qin, CVPR 2025). Equals pytorch-ood's ``NCI``, and OpenOOD's ``nci`` negated.

    Args:
        alpha: α. Default 0.0001, OpenOOD's; the paper chooses it per network on validation outliers.
    """

    name: ClassVar[str] = "nci"
    summary: ClassVar[str] = "nearness of the feature to its class's weights, and its length (Liu and Qin 2025)"
    suite: ClassVar[dict[str, int]] = {"": 680}
    at_least: ClassVar = {"alpha": 0}
    alpha: float = 1e-4

    def learn(self, train: Evidence) -> dict[str, Tensor]:
        return {"weight": self.head_of(train)[0], "mean": self.features(train).double().mean(dim=0)}

    def score(self, evidence: Evidence) -> Tensor:
        features = self.features(evidence).double()
        offsets = features - self.state["mean"]
        own = self.state["weight"][evidence.class_logits().argmax(dim=1)]
        near = (own * offsets).sum(dim=1) / offsets.norm(dim=1).clamp(min=_TINY)
        return -(near + self.alpha * features.abs().sum(dim=1))
