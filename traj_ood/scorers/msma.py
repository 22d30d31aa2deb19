"""MSMA: norms of the score at several scales (Mahmood et al. 2021), adapted to the field of f."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from traj_ood.scorers.registry import register
from traj_ood.scorers.relatives import FieldStatistics

_MIN_RELATIVE_STD = 1e-2


@register
@dataclass
class MSMA(FieldStatistics):
    """−log density of the norms (‖v_0‖, …, ‖v_{T−1}‖): multiscale score matching analysis with v_t for s(x, σ_t).

    Mahmood, Oliva and Styner (ICLR 2021) fit a Gaussian mixture with full covariances to the standardised norms of a
    noise-conditional score network at ten noise levels. Here the norms are those of the field along the path
    (:class:`FieldStatistics`), and the number of components is chosen by BIC instead of cross-validation.
    """

    name: ClassVar[str] = "msma"
    summary: ClassVar[str] = "density of the field's lengths at ten steps (MSMA, Mahmood et al. 2021, for f)"
    suite: ClassVar[dict[str, int]] = {"": 180}

    def statistics(self, field: Tensor) -> Tensor:
        return field.norm(dim=2)

    def deviations(self, values: Tensor) -> Tensor:
        found = super().deviations(values)
        # At a step by which all images have converged only rounding is left, which must not weigh as much as the
        # others.
        return found.clamp(min=_MIN_RELATIVE_STD * float(found.max()))
