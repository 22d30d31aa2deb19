"""SCALE: the energy after activations are scaled by how concentrated they are (Xu et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from traj_ood.scorers.head import ShapedEnergy, largest, sharpening
from traj_ood.scorers.registry import register


@register
@dataclass
class SCALE(ShapedEnergy):
    """Energy of scaled features: −log Σ_c exp(exp(s1 / s2) W h + b)_c.

    s1 is the sum of all features of the image, s2 the sum of those above the percentile. SCALE (Xu et al., ICLR 2024).
    Equals pytorch-ood's ``SCALE``, and OpenOOD's ``scale`` negated.

    Args:
        percentile: percentage of the features that s2 leaves out. Default 85, the paper's.
    """

    name: ClassVar[str] = "scale"
    summary: ClassVar[str] = "energy after activations are scaled by the share of the largest ones (Xu et al. 2024)"
    suite: ClassVar[dict[str, int]] = {"": 660}
    at_least: ClassVar = {"percentile": 0}
    below: ClassVar = {"percentile": 100}
    percentile: float = 85.0

    def shaped(self, features: Tensor) -> Tensor:
        return features * sharpening(features, largest(features, self.percentile)[0])
