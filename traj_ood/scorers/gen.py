"""GEN: generalised entropy of the softmax (Liu et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from traj_ood.scorers.base import Evidence
from traj_ood.scorers.logits import LogitScorer
from traj_ood.scorers.registry import register


@register
@dataclass
class GEN(LogitScorer):
    """Generalised entropy Σ p^γ (1 − p)^γ over the M largest softmax probabilities p.

    GEN (Liu et al., CVPR 2023). Equals OpenOOD's ``gen`` negated, and M times pytorch-ood's, which averages. For the
    largest p, 1 − p is computed from the other logits, because it would round to zero once a logit leads by more than
    37.

    Args:
        gamma: γ. Default 0.1, the paper's.
        top: M; all classes are used where there are fewer. Default 100, the paper's for ImageNet.
    """

    name: ClassVar[str] = "gen"
    summary: ClassVar[str] = "generalised entropy of the largest softmax probabilities (Liu et al. 2023)"
    suite: ClassVar[dict[str, int]] = {"": 615}
    at_least: ClassVar = {"top": 1}
    above_0: ClassVar = ("gamma",)
    gamma: float = 0.1
    top: int = 100

    def score(self, evidence: Evidence) -> Tensor:
        ordered = self.rivals(evidence).sort(dim=1, descending=True).values
        logs = ordered.log_softmax(dim=1)
        rest = torch.log1p(-logs[:, 1:].exp())  # accurate for all but the largest p: these are at most 1/2
        first = logs[:, 1:].logsumexp(dim=1, keepdim=True)
        terms = self.gamma * (logs + torch.cat([first, rest], dim=1))
        return terms[:, : self.top].exp().sum(dim=1)
