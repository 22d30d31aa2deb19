"""ASH: the energy after most activations are removed (Djurisic et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from traj_ood.scorers.head import ShapedEnergy, check_percentile, largest, sharpening
from traj_ood.scorers.registry import register


@register
@dataclass
class ASH(ShapedEnergy):
    """The energy of features of which each image keeps its largest and loses the rest.

    ASH (Djurisic et al., ICLR 2023); pytorch-ood's ``ASH``, and OpenOOD's ``ash`` (``variant=b``) with the sign turned.

    Args:
        variant: what becomes of the features that are kept: ``s`` (default, the paper's best on ImageNet) multiplies
            them by exp(s1 / s2), the sums before and after; ``b`` makes each s1 / k; ``p`` leaves them.
        percentile: of the features that go. Default 90, the paper's for ImageNet with ``s``, and OpenOOD's.
    """

    name: ClassVar[str] = "ash"
    summary: ClassVar[str] = "energy after each image's lowest activations are removed (Djurisic et al. 2023)"
    suite: ClassVar[dict[str, int]] = {"": 650}
    variant: Literal["s", "b", "p"] = "s"
    percentile: float = 90.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_percentile(self.name, self.percentile)

    def shaped(self, features: Tensor) -> Tensor:
        values, places = largest(features, self.percentile)
        if self.variant == "s":
            values = values * sharpening(features, values)
        elif self.variant == "b":
            values = (features.sum(dim=1, keepdim=True) / values.shape[1]).expand_as(values)
        return torch.zeros_like(features).scatter(1, places, values)
