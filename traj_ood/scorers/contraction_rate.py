"""Contraction rate: how fast the steps shrink along the path."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from traj_ood.dynamics.trajectory import Trajectory
from traj_ood.scorers.path import PathStatistic, log_lengths
from traj_ood.scorers.registry import register


@register
@dataclass
class ContractionRate(PathStatistic):
    """Mean log ratio of successive steps, in nats per step, similar to a Lyapunov exponent.

    λ = 1/(n−1) · Σ_{t=1…n−1} log(‖r_t‖ / ‖r_{t−1}‖) = (log ‖r_{n−1}‖ − log ‖r_0‖) / (n − 1), with r_t = z_{t+1} − z_t
    and n steps; λ = 0 for a path of a single step.

    Reason: near an attractor the steps shrink by the spectral radius of f's Jacobian, so λ measures without derivatives
    how strongly f contracts along the path. Where training placed no attractor, the contraction is weak.

    Cost: ``horizon`` evaluations of f, fewer for samples that converge before. Default 16, the ``horizon`` of the
    trajectory score's fixed variant.
    """

    name: ClassVar[str] = "contraction-rate"
    summary: ClassVar[str] = "mean log ratio of successive steps along the path (Lyapunov-like)"
    suite: ClassVar[dict[str, int]] = {"": 160, "two_sided=true": 161}

    def statistic(self, path: Trajectory) -> Tensor:
        lengths = log_lengths(path)[:, : self.horizon]
        last = (lengths.isfinite().sum(dim=1) - 1).clamp(min=0)
        return (lengths.gather(1, last[:, None])[:, 0] - lengths[:, 0]) / last.clamp(min=1)
