"""NNGuide: the energy, guided by the nearest training features (Park et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import normalize

from traj_ood.scorers.base import Evidence, Needs, Scorer
from traj_ood.scorers.registry import register
from traj_ood.scorers.rows import in_rows


@register
@dataclass
class NNGuide(Scorer):
    """−E · mean of the k largest h̄ · (E_i h̄_i) over training images i, with h̄ = h / ‖h‖ and E the logsumexp of the
    logits.

    Nearest neighbour guidance (Park et al., ICCV 2023). Equals pytorch-ood's ``NNGuide``, and OpenOOD's ``nnguide``
    negated. The paper's bank holds a share of the training images (1 % of ImageNet's); here it holds all images of the
    fit.

    Args:
        k: number of neighbours. Default 10, the paper's for ImageNet; OpenOOD's is 100.
    """

    name: ClassVar[str] = "nnguide"
    summary: ClassVar[str] = "energy guided by similar training features and their energies (Park et al. 2023)"
    suite: ClassVar[dict[str, int]] = {"": 690}
    at_least: ClassVar = {"k": 1}
    k: int = 10

    def needs(self) -> Needs:
        return Needs(features=frozenset({"backbone"}), logits=True)

    def learn(self, train: Evidence) -> dict[str, Tensor]:
        return {"guide": self._directions(train) * train.class_logits().logsumexp(dim=1, keepdim=True)}

    def score(self, evidence: Evidence) -> Tensor:
        def guidance(part: Tensor) -> Tensor:
            return (part @ self.state["guide"].T).topk(self.k, dim=1).values.mean(dim=1)

        return -in_rows(guidance, self._directions(evidence)) * evidence.class_logits().logsumexp(dim=1)

    def _directions(self, evidence: Evidence) -> Tensor:
        return normalize(evidence.features["backbone"].cpu().double(), dim=1)
