"""Reconstruction error: how far D(E(x)) is from x."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from traj_ood.scorers.base import Evidence, Needs, Scorer
from traj_ood.scorers.registry import register


@register
@dataclass
class Reconstruction(Scorer):
    """Mean squared reconstruction error ‖x − D(E(x))‖² per pixel, in the model's normalised units (a Table 1 baseline).

    Args:
        masked: false (default) reconstructs the whole image. True measures the masked autoencoder's own task: the error
            on hidden patches only, averaged over four fixed masks of 75 %, the same for every image.
    """

    name: ClassVar[str] = "reconstruction"
    summary: ClassVar[str] = "mean squared error between the image and its reconstruction"
    suite: ClassVar[dict[str, int]] = {"": 395, "masked=true": 500}
    masked: bool = False

    def needs(self) -> Needs:
        return Needs(reconstruction=frozenset({"masked" if self.masked else "plain"}))

    def score(self, evidence: Evidence) -> Tensor:
        return evidence.reconstruction["masked" if self.masked else "plain"].double()
