"""What scorers of a linear classifier over a backbone's features share."""

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
    """Reads the backbone's features h, the logits of the pass, and learns the head: logits = W h + b."""

    def needs(self) -> Needs:
        return Needs(features=frozenset({"backbone"}), logits=True, head=True)

    def head_of(self, train: Evidence) -> tuple[Tensor, Tensor]:
        """W (C, n) and b (C,) float64 on the CPU.

        Raises:
            TrajOODError: the pass kept none.
        """
        if train.head is None:
            raise TrajOODError(f"scorer {self.label}: expected the classifier's weight and bias, got none")
        weight, bias = (part.detach().cpu().double() for part in train.head)
        return weight, bias

    def features(self, evidence: Evidence) -> Tensor:
        """(B, n) features of the backbone, on the CPU."""
        return evidence.features["backbone"].cpu()


@dataclass
class ShapedEnergy(HeadScorer):
    """−log Σ_c exp(W s(h) + b)_c: the energy of logits that the classifier gives for shaped features s(h)."""

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


def check_percentile(scorer: str, percentile: float) -> None:
    """Raises TrajOODError unless 0 <= percentile < 100."""
    if not 0 <= percentile < 100:
        raise TrajOODError(f"scorer {scorer}: percentile must be at least 0 and below 100, got {percentile}")


def largest(features: Tensor, percentile: float) -> tuple[Tensor, Tensor]:
    """Values and places (chunk, k) of the features of each row that are not among its lowest ``percentile`` %.

    At least one stays: of 4 features no 90 % can be dropped.
    """
    width = features.shape[1]
    kept = max(1, width - round(width * percentile / 100))
    found = features.topk(kept, dim=1)
    return found.values, found.indices


_MAX_SLOPE = 500.0
"""exp of more does not fit into float64."""


def sharpening(features: Tensor, kept: Tensor) -> Tensor:
    """(chunk, 1) exp(s1 / s2): s1 the sum of all features of a row, s2 that of those ``kept`` (chunk, k).

    The papers' features come from a ReLU, so that s1 / s2 >= 1. A row without any activation has the ratio 1, and no
    ratio counts as more than 500, which features of both signs may have.
    """
    whole, part = features.sum(dim=1), kept.sum(dim=1)
    ratio = torch.where(part == 0, 1.0, whole / torch.where(part == 0, 1.0, part))
    return ratio.clamp(-_MAX_SLOPE, _MAX_SLOPE).exp()[:, None]
