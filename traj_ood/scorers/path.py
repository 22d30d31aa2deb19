"""Statistics of the first steps of a path, and helpers that handle samples which converge within them."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from traj_ood.dynamics.trajectory import Trajectory
from traj_ood.errors import TrajOODError
from traj_ood.scorers.base import WHOLE_PATH, Evidence, Needs, Scorer

HORIZON = 16
"""Default number of steps read, that of the trajectory score's fixed variant in the suite ``all``."""
_ROUNDING = 2.0**-24  # float32 rounding: a step or distance below this share of ‖z‖ cannot be measured


def parse_steps(scorer: str, text: str, least: int) -> tuple[int, ...]:
    """Parse step numbers joined by +, such as ``1+4``.

    Raises:
        TrajOODError: not increasing whole numbers >= ``least``.
    """
    try:
        steps = tuple(int(part) for part in text.split("+"))
    except ValueError:
        steps = ()
    if not steps or steps[0] < least or list(steps) != sorted(set(steps)):
        raise TrajOODError(
            f"scorer {scorer}: steps must be increasing whole numbers >= {least} joined by +, such as 1+4, got {text!r}"
        )
    return steps


def pad_with_last(values: Tensor, width: int) -> Tensor:
    """The first ``width`` columns of a table (B, W), where a sample that ended before repeats its last value; NaN where
    it has none."""
    own = values[:, :width].isfinite().sum(dim=1)
    column = torch.minimum(torch.arange(width), (own - 1).clamp(min=0)[:, None])
    return values.gather(1, column)


def log_lengths(path: Trajectory) -> Tensor:
    """Log step lengths log ‖z_{t+1} − z_t‖, (B, T), NaN past a sample's end; at least the log rounding of z_t."""
    norms = path.measure("norm")[:, : path.residuals.shape[1]]
    return torch.log(torch.maximum(path.residuals.sqrt(), smallest_length(norms)))


def log_distances(path: Trajectory, view: str) -> Tensor:
    """Log distances log d(z_t, Z*_train), (B, T + 1), in a latent view; bounded below as in :func:`log_lengths`."""
    return torch.log(torch.maximum(path.measure(f"distance/{view}"), smallest_length(path.measure("norm"))))


def smallest_length(norms: Tensor) -> Tensor:
    """The float32 rounding of points with these norms; NaN where there is no point."""
    return (_ROUNDING * norms).clamp(min=torch.finfo(torch.float64).tiny)


@dataclass
class PathStatistic(Scorer):
    """A scorer that computes one statistic s of the first ``horizon`` steps.

    Args:
        horizon: number of steps read, fewer for a sample that converges before. None reads the whole path.
        two_sided: score |s − mean of s over ID training images| instead of s, for models on which OOD samples converge
            faster or move less than ID samples. Fitting then computes the training trajectories a second time.
    """

    at_least: ClassVar = {"horizon": 2}
    horizon: int | None = HORIZON
    two_sided: bool = False

    @abstractmethod
    def statistic(self, path: Trajectory) -> Tensor:
        """The statistic s, (B,) float64; higher = more OOD unless ``two_sided``."""

    def needs(self) -> Needs:
        steps = WHOLE_PATH if self.horizon is None else self.horizon
        return Needs(frozenset({"tokens"} if self.two_sided else ()), steps=steps, train_path=self.two_sided)

    def learn(self, train: Evidence) -> dict[str, Tensor]:
        if not self.two_sided:
            return {}
        values = self.statistic(train.path())
        return {"centre": finite_rows(self.label, values[:, None]).mean(dim=0)}

    def score(self, evidence: Evidence) -> Tensor:
        values = self.statistic(evidence.path())
        return (values - self.state["centre"]).abs() if self.two_sided else values


def finite_rows(scorer: str, values: Tensor) -> Tensor:
    """The rows of ``values`` (N, n), one per training image, that are finite.

    Raises:
        TrajOODError: fewer than 2 are.
    """
    kept = values[values.isfinite().all(dim=1)]
    if len(kept) < 2:
        raise TrajOODError(
            f"scorer {scorer}: expected finite trajectories of at least 2 training images, got {len(kept)} of "
            f"{len(values)}: check the model"
        )
    return kept
