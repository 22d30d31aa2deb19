"""Scores of a classifier's logits f (B, C) alone: maximum softmax probability, maximum logit and energy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from traj_ood.errors import TrajOODError
from traj_ood.scorers.base import Evidence, Needs, Scorer
from traj_ood.scorers.registry import register


@dataclass
class LogitScorer(Scorer):
    """A scorer that reads the logits alone."""

    def needs(self) -> Needs:
        return Needs(logits=True)

    def rivals(self, evidence: Evidence) -> Tensor:
        """The logits, (B, classes >= 2) float64 on the CPU.

        Raises:
            TrajOODError: there is a single class.
        """
        logits = evidence.class_logits()
        if logits.shape[1] < 2:
            raise TrajOODError(f"scorer {self.name}: expected logits of at least 2 classes, got {logits.shape[1]}")
        return logits


@register
@dataclass
class MaxSoftmax(LogitScorer):
    """Maximum softmax probability p (Hendrycks and Gimpel 2017), as negative log-odds log((1 − p) / p).

    Computed as the logsumexp of the other logits minus the largest logit. The ranking is that of OpenOOD's and
    pytorch-ood's score, p = 1 / (1 + exp(score)). 1 − p itself would round to zero, and lose the order, for every logit
    that leads by more than 37 (17 in float32).
    """

    name: ClassVar[str] = "msp"
    summary: ClassVar[str] = "maximum softmax probability of the classifier (Hendrycks and Gimpel 2017), as log-odds"
    suite: ClassVar[dict[str, int]] = {"": 600}

    def score(self, evidence: Evidence) -> Tensor:
        logits = self.rivals(evidence)
        largest, winner = logits.max(dim=1, keepdim=True)
        others = logits.scatter(1, winner, -torch.inf)
        return others.logsumexp(dim=1) - largest[:, 0]


@register
@dataclass
class MaxLogit(LogitScorer):
    """Negated maximum logit −max_c f_c (Hendrycks et al. 2022); pytorch-ood's score, and OpenOOD's ``mls`` negated."""

    name: ClassVar[str] = "max-logit"
    summary: ClassVar[str] = "largest logit of the classifier, negated (Hendrycks et al. 2022)"
    suite: ClassVar[dict[str, int]] = {"": 610}

    def score(self, evidence: Evidence) -> Tensor:
        return -evidence.class_logits().amax(dim=1)


@register
@dataclass
class Energy(LogitScorer):
    """Free energy −T · log Σ_c exp(f_c / T) (Liu et al. 2020, eq. 4); pytorch-ood's score, and OpenOOD's ``ebo``
    negated.

    Args:
        temperature: T. Default 1, which Liu et al. find best, so that the score has no parameter.
    """

    name: ClassVar[str] = "energy"
    summary: ClassVar[str] = "free energy of the classifier's logits (Liu et al. 2020)"
    suite: ClassVar[dict[str, int]] = {"": 620}
    above_0: ClassVar = ("temperature",)
    temperature: float = 1.0

    def score(self, evidence: Evidence) -> Tensor:
        return -self.temperature * (evidence.class_logits() / self.temperature).logsumexp(dim=1)
