"""Base classes of scorers that read a linear classifier over a backbone's features."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from traj_ood.errors import TrajOODError
from traj_ood.scorers.base import Evidence, Needs, Scorer
from traj_ood.scorers.rows import in_rows


@dataclass
class HeadScorer(Scorer):
    """A scorer that reads the backbone's features h, the logits, and while fitting the head: logits = W h + b."""

    def needs(self) -> Needs:
        return Needs(features=frozenset({"backbone"}), logits=True, head=True)

    def head_of(self, train: Evidence) -> tuple[Tensor, Tensor]:
        """The head's weight W (C, n) and bias b (C,), float64 on the CPU.

        Raises:
            TrajOODError: the evidence holds no head.
        """
        if train.head is None:
            raise TrajOODError(f"scorer {self.label}: expected the classifier's weight and bias, got none")
        weight, bias = (part.detach().cpu().double() for part in train.head)
        return weight, bias

    def features(self, evidence: Evidence) -> Tensor:
        """The backbone's features, (B, n) on the CPU."""
        return evidence.features["backbone"].cpu()


@dataclass
class ShapedEnergy(HeadScorer):
    """Energy of the logits computed from shaped features s(h): −log Σ_c exp(W s(h) + b)_c."""

    def learn(self, train: Evidence) -> dict[str, Tensor]:
        weight, bias = self.head_of(train)
        return {"weight": weight, "bias": bias}

    @abstractmethod
    def shaped(self, features: Tensor) -> Tensor:
        """s(h): (chunk, n) float64 → (chunk, n)."""

    def score(self, evidence: Evidence) -> Tensor:
        def energies(part: Tensor) -> Tensor:
            logits = self.shaped(part.double()) @ self.state["weight"].T + self.state["bias"]
            return -logits.logsumexp(dim=1)

        return in_rows(energies, self.features(evidence))


def largest(features: Tensor, percentile: float) -> tuple[Tensor, Tensor]:
    """Values and indices (chunk, k) of each row's features above its lowest ``percentile`` %; at least one is kept."""
    width = features.shape[1]
    kept = max(1, width - round(width * percentile / 100))
    found = features.topk(kept, dim=1)
    return found.values, found.indices


_MAX_EXPONENT = 500.0
"""exp overflows in float64 not far above this."""


def sharpening(features: Tensor, kept: Tensor) -> Tensor:
    """exp(s1 / s2), (chunk, 1): s1 is the sum of all features of a row, s2 the sum of those ``kept`` (chunk, k).

    After a ReLU, as in the papers, s1 / s2 >= 1. The ratio is 1 for a row without activation, and is clamped to ±500,
    which features of both signs may exceed.
    """
    whole, part = features.sum(dim=1), kept.sum(dim=1)
    ratio = torch.where(part == 0, 1.0, whole / torch.where(part == 0, 1.0, part))
    return ratio.clamp(-_MAX_EXPONENT, _MAX_EXPONENT).exp()[:, None]
