"""The decision on an image, in the same form from Python, the command line, the service and a cluster."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from traj_ood.data.preprocessing import Normalised
from traj_ood.dynamics.trajectory import Status
from traj_ood.errors import TrajOODError

ID, OOD = "id", "ood"
OK, ERROR = "ok", "error"
INVALID, UNCALIBRATED = "invalid", "uncalibrated"
REASONS = (OK, OOD, INVALID)
"""First words of :attr:`Decision.reason`, in the order of the codes 0, 1, 2 in ``decisions`` of an exported file."""
_RETRY_SIZE = 256  # images judged at a time after a batch was refused
INFINITIES = {math.inf: "Infinity", -math.inf: "-Infinity"}
_STATUS = {status: status.name.lower() for status in Status}


@dataclass(frozen=True)
class Judgement:
    """Scores and decisions for B images, in order; :meth:`each` gives one :class:`Decision` per image.

    Attributes:
        scores: (B,) float64, higher = more OOD. Scores that are not finite are +inf: on such an image the model's
            values become NaN or infinite, which never happens on ID images, so it counts as more OOD than any other.
        p_values: (B,) float64, see :mod:`traj_ood.detector.conformal`; None without calibration.
        decisions: (B,) bool, True = OOD; None without calibration.
        steps: (B,) int64 evaluations of f; None for scorers without iteration.
        status: (B,) int64 values of :class:`traj_ood.Status`; None for scorers without iteration. OK for scorers that
            read a fixed number of steps, such as ``field``, for which convergence is not tested. NON_FINITE with a
            finite score: the trajectory became NaN or infinite after the steps that the scorer reads.
    """

    scores: Tensor
    p_values: Tensor | None
    decisions: Tensor | None
    steps: Tensor | None
    status: Tensor | None

    def __len__(self) -> int:
        return len(self.scores)

    def each(self) -> list[Decision]:
        """One :class:`Decision` per image."""
        nothing: list[Any] = [None] * len(self)
        columns = (self.scores, self.p_values, self.decisions, self.steps, self.status)
        rows = zip(*(nothing if c is None else c.tolist() for c in columns), strict=True)
        return [_decision(*row) for row in rows]


@dataclass(frozen=True)
class Decision:
    """The decision on one image; fields that do not apply are None.

    Attributes:
        score: higher = more OOD; infinite if the model's values become NaN or infinite; None if there is no image.
        p_value: (1 + number of calibration images with at least this score) / (n + 1); None without calibration.
        decision: ``id`` or ``ood``; None without calibration.
        steps: evaluations of f; None for scorers without iteration.
        status: ``ok`` for scorers that read a fixed number of steps or none; ``converged`` or ``step_limit`` for those
            that iterate until convergence; ``non_finite`` if values became NaN or infinite; ``error`` if the image
            could not be read.
        error: one line that says why there is no score; None if there is one.
    """

    score: float | None = None
    p_value: float | None = None
    decision: str | None = None
    steps: int | None = None
    status: str = ERROR
    error: str | None = None

    @property
    def reason(self) -> str:
        """``ok``, ``ood`` or ``invalid: …``; ``uncalibrated`` for a score without a threshold."""
        return reason_of(self.score, self.decision, self.error)

    def as_dict(self) -> dict[str, Any]:
        """The record as JSON data, with the reason; an infinite score becomes the text ``Infinity``."""
        score = INFINITIES.get(self.score, self.score) if self.score is not None else None
        return {**asdict(self), "score": score, "reason": self.reason}


def reason_of(score: float | None, decision: str | None, error: str | None) -> str:
    """The reason (see :attr:`Decision.reason`) for a score, a decision and an error."""
    if error is not None or score is None:
        return f"{INVALID}: {error or 'no score'}"
    return UNCALIBRATED if decision is None else OOD if decision == OOD else OK


def decide_all(judge: Callable[[Normalised], Judgement], images: Sequence[Tensor]) -> list[Decision]:
    """:func:`decide_each` for images (C, H, W) in the model's units; too little memory is raised."""
    return decide_each(judge, Normalised(torch.stack(list(images))), len(images)) if images else []


def decide_each(judge: Callable[[Any], Judgement], images: Any, count: int, size: int | None = None) -> list[Decision]:
    """One decision for each of ``count`` images of any kind that :func:`traj_ood.data.batches` reads, in order.

    Images are judged together. If that is refused, they are divided, at last into halves, until those at fault are
    isolated.
    """
    try:
        return judge(images).each()
    except TrajOODError as error:
        if count <= 1:
            return [Decision(error=str(error).strip())] * count
        if isinstance(images, torch.utils.data.DataLoader):
            raise
    to_list = getattr(images, "to_list", None)
    images = images if to_list is None else to_list()  # a pandas column, whose parts keep its index
    step = size or _RETRY_SIZE
    if count > step:
        places = [range(start, min(start + step, count)) for start in range(0, count, step)]
    else:
        places = [range(count // 2), range(count // 2, count)]
    return [made for rows in places for made in decide_each(judge, _part(images, rows), len(rows), size)]


def _part(images: Any, rows: range) -> Any:
    """The images at ``rows``."""
    if isinstance(images, Normalised):
        return Normalised(images.images[rows.start : rows.stop])
    if isinstance(images, Tensor | np.ndarray | list | tuple):
        return images[rows.start : rows.stop]
    if hasattr(images, "select"):
        return images.select(rows)
    return torch.utils.data.Subset(images, rows)


def _decision(score: float, p_value: Any, is_ood: Any, steps: Any, status: Any) -> Decision:
    word = OK if status is None else _STATUS[Status(status)]
    word = _STATUS[Status.NON_FINITE] if math.isinf(score) else word
    return Decision(score, p_value, None if is_ood is None else OOD if is_ood else ID, steps, word)
