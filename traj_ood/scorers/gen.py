"""GEN: generalised entropy of the softmax (Liu et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from traj_ood.errors import TrajOODError
from traj_ood.scorers.base import Evidence, Needs, Scorer
from traj_ood.scorers.registry import register


@register
@dataclass
class GEN(Scorer):
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

    def needs(self) -> Needs:
        return Needs(logits=True)

    def score(self, evidence: Evidence) -> Tensor:
        logits = evidence.class_logits()
        if logits.shape[1] < 2:
            raise TrajOODError(f"scorer {self.name}: expected logits of at least 2 classes, got {logits.shape[1]}")
        ordered = logits.sort(dim=1, descending=True).values
        logs = ordered.log_softmax(dim=1)
        rest = torch.log1p(-logs[:, 1:].exp())  # accurate for all but the largest p: these are at most 1/2
        first = logs[:, 1:].logsumexp(dim=1, keepdim=True)
        terms = self.gamma * (logs + torch.cat([first, rest], dim=1))
        return terms[:, : self.top].exp().sum(dim=1)
