"""ReAct, rectified activations: the energy after activations are clipped at a percentile (Sun et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from traj_ood.scorers.base import Evidence
from traj_ood.scorers.head import ShapedEnergy
from traj_ood.scorers.registry import register


@register
@dataclass
class ReAct(ShapedEnergy):
    """Energy of clipped features: −log Σ_c exp(W min(h, τ) + b)_c, τ a percentile of all training activations.

    ReAct (Sun et al., NeurIPS 2021). Equals the energy of pytorch-ood's ReAct and, negated, of OpenOOD's ``react``.
    OpenOOD takes τ from ID validation images; the paper takes it from training images, as here.

    Args:
        percentile: percentile τ of the activations. Default 90, the paper's.
    """

    name: ClassVar[str] = "react"
    summary: ClassVar[str] = "energy after activations are cut off at a percentile of ID activations (Sun et al. 2021)"
    suite: ClassVar[dict[str, int]] = {"": 640}
    at_least: ClassVar = {"percentile": 0}
    below: ClassVar = {"percentile": 100}
    percentile: float = 90.0

    def learn(self, train: Evidence) -> dict[str, Tensor]:
        threshold = np.percentile(self.features(train).double().numpy(), self.percentile)
        return super().learn(train) | {"threshold": torch.tensor([float(threshold)], dtype=torch.float64)}

    def shaped(self, features: Tensor) -> Tensor:
        return torch.minimum(features, self.state["threshold"])
