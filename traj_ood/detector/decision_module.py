"""A detector's whole answer as tensor operations: scores, p-values and decisions from pixels, for a recorded graph."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from traj_ood.detector.module import DetectorModule
from traj_ood.detector.pinned_tensors import PinnedTensors

if TYPE_CHECKING:
    from traj_ood.data.preprocessing import Preprocessing
    from traj_ood.detector.conformal import Calibration
    from traj_ood.scorers import Scorer

OK_CODE, OOD_CODE, INVALID_CODE = 0, 1, 2
"""Places in :data:`traj_ood.detector.decision.REASONS`."""


class DecisionModule(nn.Module):
    """Pixels as of :class:`DetectorModule` → scores (B,) float64, p-values (B,) float64, decisions (B,) int64.

    A decision is 0 (ok), 1 (ood) or 2 (invalid: a NaN, or a pixel outside [0, 1]; score and p-value are NaN then).
    They are those of :class:`traj_ood.detector.conformal.Calibration` for the module's own scores, exactly.

    Args:
        scored: gives the scores. calibration: of these scores; class-wise or not.
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
                "last": ends - 1,  # of each class, and of the one before it, whose running count is taken away
                "before": (ends - sizes - 1).clamp(min=0),
                "is_first": (ends == sizes).long(),
                "sizes": sizes.double(),
            }
        )
        self._threshold = calibration.threshold

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See the class.

        Raises:
            TrajOODError: as :meth:`DetectorModule.forward`.
        """
        scores = self.scored(images)
        known = self.calibration.all()
        running = (known["scores"] >= scores.cpu()[:, None]).long().cumsum(dim=1)
        before = running[:, known["before"]] * (1 - known["is_first"])
        as_strange = running[:, known["last"]] - before
        p_values = ((1 + as_strange).double() / (known["sizes"] + 1)).amax(dim=1).to(scores.device)
        valid = ~scores.isnan()
        decisions = torch.where(scores > self._threshold, OOD_CODE, OK_CODE)
        return scores, torch.where(valid, p_values, torch.nan), torch.where(valid, decisions, INVALID_CODE)

    # What a recorder asks of the module that gives the scores.

    @property
    def preprocessing(self) -> Preprocessing:
        return self.scored.preprocessing

    @property
    def steps(self) -> int:
        return self.scored.steps

    @property
    def scorer(self) -> Scorer:
        return self.scored.scorer

    def record_loop(self, images: Tensor) -> None:
        self.scored.record_loop(images)

    def recording(self) -> AbstractContextManager[None]:
        return self.scored.recording()
