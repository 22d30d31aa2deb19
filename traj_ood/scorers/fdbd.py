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
    """Negated mean distance to the decision boundaries of the classes c ≠ ŷ, divided by ‖h − μ‖.

    The distance is |f_ŷ − f_c| / ‖w_ŷ − w_c‖ with f the logits, ŷ the predicted class and μ the mean training feature.
    Fast decision boundary based detector (Liu and Qin, ICML 2024). Equals pytorch-ood's ``fDBD`` and, negated and
    divided by C − 1, OpenOOD's ``fdbd``.

    Args:
        regularizer: the divisor: ``distance`` (default, the paper's) is ‖h − μ‖, ``norm`` is ‖h‖, which OpenOOD uses
            where its validation set prefers it.
    """

    name: ClassVar[str] = "fdbd"
    summary: ClassVar[str] = "distance of the feature to the classifier's decision boundaries (Liu and Qin 2024)"
    suite: ClassVar[dict[str, int]] = {"": 670}
    regularizer: Literal["distance", "norm"] = "distance"

    def learn(self, train: Evidence) -> dict[str, Tensor]:
        weight, _ = self.head_of(train)
        if len(weight) < 2:
            raise TrajOODError(f"scorer {self.label}: expected a classifier of at least 2 classes, got {len(weight)}")
        between = torch.stack([(weight - own).norm(dim=1) for own in weight])  # direct differences: nothing cancels
        if bool((between.fill_diagonal_(1) == 0).any()):
            raise TrajOODError(
                f"scorer {self.label}: expected a different weight vector for each class, got two equal ones, which "
                "have no boundary between them"
            )
        return {"between": between, "mean": self.features(train).double().mean(dim=0)}

    def score(self, evidence: Evidence) -> Tensor:
        logits, features = evidence.class_logits(), self.features(evidence).double()
        lead, predicted = logits.max(dim=1, keepdim=True)
        far = ((lead - logits) / self.state["between"][predicted[:, 0]]).sum(dim=1) / (logits.shape[1] - 1)
        offsets = features - self.state["mean"] if self.regularizer == "distance" else features
        return -far / offsets.norm(dim=1).clamp(min=_TINY)
