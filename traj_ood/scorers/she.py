"""SHE: inner product with the stored pattern of the predicted class (Zhang et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from traj_ood.errors import TrajOODError
from traj_ood.scorers.base import Evidence, Needs, Scorer
from traj_ood.scorers.labels import labels_of
from traj_ood.scorers.registry import register


@register
@dataclass
class SHE(Scorer):
    """Negated inner product −h · S_ŷ with the pattern of the predicted class ŷ.

    The pattern S_c is the mean feature of the training images of class c that the classifier predicts correctly.
    Simplified Hopfield energy (Zhang et al., ICLR 2023). Equals pytorch-ood's ``SHE``, and OpenOOD's ``she`` negated.
    The pattern of a class without such images is 0, which after a ReLU gives the largest possible score.

    Args:
        patterns: ``correct`` (default, the paper's) needs labels numbered as the classifier's logits, or names that
            have the same order (see :func:`traj_ood.scorers.labels.class_order`). ``predicted`` averages all training
            images by their predicted class, for images without labels or with other classes.
        metric: ``inner_product`` (default, the paper's), ``euclidean`` or ``cosine``, as in OpenOOD.
    """

    name: ClassVar[str] = "she"
    summary: ClassVar[str] = "inner product with the mean feature of the predicted class (Zhang et al. 2023)"
    suite: ClassVar[dict[str, int]] = {"patterns=predicted": 700}
    patterns: Literal["correct", "predicted"] = "correct"
    metric: Literal["inner_product", "euclidean", "cosine"] = "inner_product"

    def needs(self) -> Needs:
        return Needs(features=frozenset({"backbone"}), logits=True, labels=self.patterns == "correct")

    def learn(self, train: Evidence) -> dict[str, Tensor]:
        features, logits = train.features["backbone"].cpu().double(), train.class_logits()
        count, predicted = logits.shape[1], logits.argmax(dim=1)
        if self.patterns == "correct":
            labels = labels_of(self.label, train, len(features))
            right = labels == predicted
            others = int(labels.max()) >= count
            if others or float(right.double().mean()) <= 1 / count:
                got = "labels that are no numbers of these" if others else f"{int(right.sum())} of {len(labels)} right"
                raise TrajOODError(
                    f"scorer {self.label}: expected labels that number the classifier's {count} classes, got {got}: "
                    "give the labels in the classifier's order, or use patterns=predicted"
                )
            features, predicted = features[right], predicted[right]
        sums = torch.zeros(count, features.shape[1], dtype=torch.float64).index_add_(0, predicted, features)
        return {"patterns": sums / predicted.bincount(minlength=count).clamp(min=1)[:, None]}

    def score(self, evidence: Evidence) -> Tensor:
        features = evidence.features["backbone"].cpu().double()
        own = self.state["patterns"][evidence.class_logits().argmax(dim=1)]
        if self.metric == "euclidean":
            return (features - own).norm(dim=1)
        if self.metric == "cosine":
            return -torch.cosine_similarity(features, own, dim=1)
        return -(features * own).sum(dim=1)
