"""MSMA: lengths of the score at several scales (Mahmood et al. 2021), carried over to the field of f."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from traj_ood.scorers.registry import register
from traj_ood.scorers.relatives import FieldStatistics

_LEAST = 1e-2


@register
@dataclass
class MSMA(FieldStatistics):
    """−log density of (‖v_0‖, …, ‖v_{T−1}‖): multiscale score matching analysis with v_t in the place of s(x, σ_t).

    Mahmood, Oliva and Styner (ICLR 2021) fit a Gaussian mixture of full covariances to the lengths of a noise-
    conditional score network at ten noise levels, standardised. Here the lengths are those of the field along the path
    (:class:`FieldStatistics`), and BIC chooses the components where they use cross-validation.
    """

    name: ClassVar[str] = "msma"
    summary: ClassVar[str] = "density of the field's lengths at ten steps (MSMA, Mahmood et al. 2021, for f)"
    suite: ClassVar[dict[str, int]] = {"": 180}

    def statistics(self, field: Tensor) -> Tensor:
        return field.norm(dim=2)

    def deviations(self, values: Tensor) -> Tensor:
        found = super().deviations(values)
        # Of a step at which all images have settled only rounding is left, which must not count as much as the others.
        return found.clamp(min=_LEAST * float(found.max()))
