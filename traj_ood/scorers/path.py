"""Statistics of the beginning of a path, whether or not a sample settles within it."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from traj_ood.dynamics.trajectory import Trajectory
from traj_ood.errors import TrajOODError
from traj_ood.scorers.base import WHOLE_PATH, Evidence, Needs, Scorer

HORIZON = 16
"""Steps read by default: as many as the fixed variant of the trajectory score in the default suite."""
_ROUNDING = 2.0**-24  # of a float32 coordinate: a step, or a distance, below this share of ‖z‖ has no length


def parse_steps(scorer: str, text: str, least: int) -> tuple[int, ...]:
    """Step numbers from ``1+4``: increasing, from ``least`` on.

    Raises:
        TrajOODError: anything else.
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


def check_horizon(scorer: str, horizon: int | None, least: int) -> None:
    """Raises TrajOODError for a horizon below ``least``; None, the own length, is fine."""
    if horizon is not None and horizon < least:
        raise TrajOODError(f"scorer {scorer}: horizon must be a number of steps >= {least}, got {horizon}")


def held(values: Tensor, width: int) -> Tensor:
    """(B, width) of a table (B, W): a sample that ended earlier keeps its last value; NaN where it has none."""
    own = values[:, :width].isfinite().sum(dim=1)
    column = torch.minimum(torch.arange(width), (own - 1).clamp(min=0)[:, None])
    return values.gather(1, column)


def log_lengths(path: Trajectory) -> Tensor:
    """(B, T) log ‖z_{t+1} − z_t‖, NaN past a sample's end. A step below the rounding of z_t counts as that rounding."""
    norms = path.measure("norm")[:, : path.residuals.shape[1]]
    return torch.log(torch.maximum(path.residuals.sqrt(), smallest_length(norms)))


def log_distances(path: Trajectory, view: str) -> Tensor:
    """(B, T + 1) log d(z_t, Z*_train) in a latent view; floor as in :func:`log_lengths`."""
    return torch.log(torch.maximum(path.measure(f"distance/{view}"), smallest_length(path.measure("norm"))))


def smallest_length(norms: Tensor) -> Tensor:
    """The rounding of points of these lengths; NaN where there is no point."""
    return (_ROUNDING * norms).clamp(min=torch.finfo(torch.float64).tiny)


@dataclass
class PathStatistic(Scorer):
    """One number of the first ``horizon`` steps; as it is, or its distance from what training images show.

    Args:
        horizon: steps read, fewer for a sample that settles before. None reads the sample's own length.
        two_sided: |s − mean of s over ID training images| instead of s, for models on which OOD samples are too quick
            or too calm rather than too slow. It walks the training trajectories once more.
    """

    horizon: int | None = HORIZON
    two_sided: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_horizon(self.name, self.horizon, 2)

    @abstractmethod
    def statistic(self, path: Trajectory) -> Tensor:
        """(B,) float64, higher = more OOD when read on one side."""

    def needs(self) -> Needs:
        steps = WHOLE_PATH if self.horizon is None else self.horizon
        if not self.two_sided:
            return Needs(steps=steps)
        return Needs(features=frozenset({"tokens"}), steps=steps, train_path=True)

    def learn(self, train: Evidence) -> dict[str, Tensor]:
        if not self.two_sided:
            return {}
        values = self.statistic(train.path())
        return {"centre": finite_rows(self.label, values[:, None]).mean(dim=0)}

    def score(self, evidence: Evidence) -> Tensor:
        values = self.statistic(evidence.path())
        return (values - self.state["centre"]).abs() if self.two_sided else values


def finite_rows(scorer: str, values: Tensor) -> Tensor:
    """The rows of training images whose path has finite points.

    Raises:
        TrajOODError: fewer than 2.
    """
    kept = values[values.isfinite().all(dim=1)]
    if len(kept) < 2:
        raise TrajOODError(
            f"scorer {scorer}: expected finite trajectories of at least 2 training images, got {len(kept)} of "
            f"{len(values)}: check the model"
        )
    return kept
