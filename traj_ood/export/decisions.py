"""The module of a calibrated detector: scores, p-values and decisions."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from traj_ood.detector.conformal import Calibration
from traj_ood.detector.decision import INVALID, OK, OOD, REASONS
from traj_ood.graph import DetectorModule, HasScorers, PinnedTensors

OK_CODE, OOD_CODE, INVALID_CODE = map(REASONS.index, (OK, OOD, INVALID))


class Exportable(HasScorers, Protocol):
    """The part of a :class:`traj_ood.Detector` that a file is made from."""

    @property
    def calibration(self) -> Calibration | None: ...


class DecisionModule(nn.Module):
    """Maps pixels, as for :class:`DetectorModule`, to scores, p-values (B,) float64 and decisions (B,) int64.

    A decision is 0 (ok), 1 (ood) or 2 (invalid: a pixel is NaN or outside [0, 1]; score and p-value are NaN then).
    P-values and decisions equal those of :class:`traj_ood.detector.conformal.Calibration` for these scores, exactly.
    """

    def __init__(self, scored: DetectorModule, calibration: Calibration) -> None:
        super().__init__()
        self.scored = scored
        groups = calibration.groups
        sizes = torch.tensor([len(group) for group in groups])
        ends = sizes.cumsum(0)
        self.calibration = PinnedTensors(
            {
                "scores": torch.cat([group.scores for group in groups]),
                "last": ends - 1,  # of each class; the count up to "before", the end of the previous one, is subtracted
                "before": (ends - sizes - 1).clamp(min=0),
                "is_first": (ends == sizes).long(),
                "sizes": sizes.double(),
            }
        )
        self._threshold = calibration.threshold

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scores = self.scored(images)
        known = self.calibration.all()
        running = (known["scores"] >= scores.cpu()[:, None]).long().cumsum(dim=1)
        before = running[:, known["before"]] * (1 - known["is_first"])
        at_least = running[:, known["last"]] - before
        p_values = ((1 + at_least).double() / (known["sizes"] + 1)).amax(dim=1).to(scores.device)
        valid = ~scores.isnan()
        decisions = torch.where(scores > self._threshold, OOD_CODE, OK_CODE)
        return scores, torch.where(valid, p_values, torch.nan), torch.where(valid, decisions, INVALID_CODE)
