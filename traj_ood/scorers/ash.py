"""ASH, activation shaping: the energy after most activations are removed (Djurisic et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from traj_ood.scorers.head import ShapedEnergy, largest, sharpening
from traj_ood.scorers.registry import register


@register
@dataclass
class ASH(ShapedEnergy):
    """Energy of the logits computed from each image's k largest features; all others are set to zero.

    ASH (Djurisic et al., ICLR 2023). Equals pytorch-ood's ``ASH`` and, negated, OpenOOD's ``ash`` (``variant=b``).

    Args:
        variant: how the k kept features are changed. ``s`` (default, the paper's best on ImageNet) multiplies them by
            exp(s1 / s2), where s1 and s2 are the sums of the features before and after the removal; ``b`` sets each to
            s1 / k; ``p`` leaves them unchanged.
        percentile: percentage of the features that are removed. Default 90, the paper's for ImageNet with ``s``, and
            OpenOOD's.
    """

    name: ClassVar[str] = "ash"
    summary: ClassVar[str] = "energy after each image's lowest activations are removed (Djurisic et al. 2023)"
    suite: ClassVar[dict[str, int]] = {"": 650}
    variant: Literal["s", "b", "p"] = "s"
    at_least: ClassVar = {"percentile": 0}
    below: ClassVar = {"percentile": 100}
    percentile: float = 90.0

    def shaped(self, features: Tensor) -> Tensor:
        values, places = largest(features, self.percentile)
        if self.variant == "s":
            values = values * sharpening(features, values)
        elif self.variant == "b":
            values = (features.sum(dim=1, keepdim=True) / values.shape[1]).expand_as(values)
        return torch.zeros_like(features).scatter(1, places, values)
