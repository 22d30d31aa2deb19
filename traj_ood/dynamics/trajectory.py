"""Trajectory: the record of a batch of trajectories z_0, z_1 = f(z_0), …, z_N under the self-map f = E∘D."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import torch
from torch import Tensor

from traj_ood.errors import TrajOODError, check_whole


class Status(IntEnum):
    """Why a trajectory ended. Not converging is data, not an exception.

    ``OK`` is used only by detectors, for scorers that read a fixed number of steps, if the path has that many.
    """

    CONVERGED = 0
    STEP_LIMIT = 1
    NON_FINITE = 2
    OK = 3


def check_stopping(tol: float, max_steps: int) -> None:
    """Raise ``TrajOODError`` unless ``tol`` is a finite number >= 0 and ``max_steps`` a whole one >= 1."""
    if isinstance(tol, bool) or not isinstance(tol, int | float) or not 0 <= tol < math.inf:
        raise TrajOODError(f"tol: expected a finite squared residual >= 0, got {tol!r}")
    check_whole("max_steps", max_steps)


def join_tables(tables: Sequence[Tensor], width: int | None = None) -> Tensor:
    """Stack tables (n_i, t_i) of values by step into one (Σ n_i, width), padded with NaN.

    Args:
        tables: at least one.
        width: number of columns. Default: that of the widest table.
    """
    width = max(table.shape[1] for table in tables) if width is None else width
    return torch.cat([torch.nn.functional.pad(t, (0, width - t.shape[1]), value=torch.nan) for t in tables])


@dataclass(frozen=True)
class Trajectory:
    """The record of B trajectories: scalars per step and the end points, without the points in between.

    The trajectory of sample b has the N_b + 1 points z_0 … z_{N_b} with N_b = ``steps[b]``; columns past its own length
    hold NaN.

    Attributes:
        steps: (B,) int64, number N of steps, that is, evaluations of f.
        status: (B,) int64, a :class:`Status` per sample.
        residuals: (B, T) float64, the squared residuals ‖z_{t+1} − z_t‖² for t = 0 … N−1.
        final: (B, *L) in the type of the starts, the end point z_N; for a non-finite trajectory its last finite point,
            or its start if that is not finite.
        measures: name → (B, T+1) float64 values that observers recorded at z_0 … z_N, such as the distance to the
            nearest attractor in a latent view (``distance/tokens``) or the latent norm (``norm``).
        max_steps: the step limit.
    """

    steps: Tensor
    status: Tensor
    residuals: Tensor
    final: Tensor
    measures: Mapping[str, Tensor] = field(default_factory=dict)
    max_steps: int = 500

    def __len__(self) -> int:
        return len(self.steps)

    def select(self, rows: Tensor) -> Trajectory:
        """The trajectories of ``rows``, (n,) int64 or (B,) bool."""
        measures = {name: values[rows] for name, values in self.measures.items()}
        final = self.final[rows.to(self.final.device)]
        return Trajectory(self.steps[rows], self.status[rows], self.residuals[rows], final, measures, self.max_steps)

    @property
    def converged(self) -> Tensor:
        """Whether the residual fell below the tolerance, (B,) bool."""
        return self.status == Status.CONVERGED

    @property
    def last_residuals(self) -> Tensor:
        """Squared residual of the last step, (B,) float64; NaN for a trajectory without a step."""
        return self.residuals.gather(1, (self.steps - 1).clamp(min=0)[:, None])[:, 0]

    def measure(self, name: str) -> Tensor:
        """The values (B, T+1) recorded under ``name``.

        Raises:
            TrajOODError: nothing was recorded under that name.
        """
        if name not in self.measures:
            raise TrajOODError(
                f"the trajectory has no measure {name!r}, only {sorted(self.measures)}: pass its observer to iterate"
            )
        return self.measures[name]

    def mean_over_path(self, name: str, horizon: int | None = None) -> Tensor:
        """Mean of a measure over the points of each path, (B,) float64; NaN for a trajectory without a finite point.

        Args:
            name: the measure, recorded at z_0 … z_N.
            horizon: None averages over the sample's own N + 1 points, as §4.2 sums over the sample's own trajectory. A
                number H averages over z_0 … z_H for every sample; a sample that ended before H counts its end point for
                the remaining steps (after convergence they would be shorter than √tol).
        Raises:
            TrajOODError: no such measure, or a negative horizon.
        """
        values = self.measure(name)
        if horizon is None:
            return total_of(values) / (~values.isnan()).sum(dim=1)
        if horizon < 0:
            raise TrajOODError(f"horizon: expected a number of steps >= 0, got {horizon}")
        head = values[:, : horizon + 1]
        own = head.isfinite().sum(dim=1)
        rest = (horizon + 1 - own).clamp(min=0)
        last = self.at_end(name).nan_to_num(nan=0.0)
        total = total_of(head) + rest * last
        return torch.where(own > 0, total / (horizon + 1), torch.nan)

    def at_end(self, name: str) -> Tensor:
        """The measure at the end point z_N, (B,) float64; NaN where nothing was recorded."""
        return self.measure(name).gather(1, self.steps[:, None])[:, 0]


def total_of(values: Tensor) -> Tensor:
    """Row sums (B,) float64 of padded values (B, T), with NaN as zero, added one after the other.

    ``nansum`` adds in an order that depends on T, and hence on the longest path in the batch, which changes the last
    bit.
    """
    return torch.where(values.isnan(), 0.0, values).cumsum(dim=1)[:, -1]
