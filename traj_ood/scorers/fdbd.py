"""fDBD: distance of the feature to the classifier's decision boundaries (Liu and Qin 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from traj_ood.errors import TrajOODError
from traj_ood.scorers.base import Evidence
from traj_ood.scorers.head import HeadScorer
from traj_ood.scorers.registry import register

_TINY = torch.finfo(torch.float64).tiny


@register
@dataclass
class FDBD(HeadScorer):
    """−mean over classes c ≠ ŷ of |f_ŷ − f_c| / ‖w_ŷ − w_c‖, over ‖h − μ‖; μ the mean training feature.

    Fast decision boundary based detector (Liu and Qin, ICML 2024): pytorch-ood's ``fDBD``, and OpenOOD's ``fdbd`` over
    C − 1 with the sign turned. ŷ is the predicted class, f are the logits.

    Args:
        regularizer: what the distances are divided by: ``distance`` (default, the paper's) to the mean training
            feature, or ``norm``, ‖h‖, which OpenOOD chooses where its validation set prefers it.
    """

    name: ClassVar[str] = "fdbd"
    summary: ClassVar[str] = "distance of the feature to the classifier's decision boundaries (Liu and Qin 2024)"
    suite: ClassVar[dict[str, int]] = {"": 670}
    regularizer: Literal["distance", "norm"] = "distance"

    def learn(self, train: Evidence) -> dict[str, Tensor]:
        weight, _ = self.head_of(train)
        if len(weight) < 2:
            raise TrajOODError(f"scorer {self.label}: expected a classifier of at least 2 classes, got {len(weight)}")
        between = torch.stack([(weight - own).norm(dim=1) for own in weight])  # of differences: no squares cancel
        if bool((between.fill_diagonal_(1) == 0).any()):
            raise TrajOODError(
                f"scorer {self.label}: expected classes of different weights, got two that are the same: no boundary "
                "lies between them"
            )
        return {"between": between, "mean": self.features(train).double().mean(dim=0)}

    def score(self, evidence: Evidence) -> Tensor:
        logits, features = evidence.class_logits(), self.features(evidence).double()
        lead, predicted = logits.max(dim=1, keepdim=True)
        far = ((lead - logits) / self.state["between"][predicted[:, 0]]).sum(dim=1) / (logits.shape[1] - 1)
        offsets = features - self.state["mean"] if self.regularizer == "distance" else features
        return -far / offsets.norm(dim=1).clamp(min=_TINY)
