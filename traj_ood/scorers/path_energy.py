"""Path energy: the sum of squared steps of a sample's path."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from traj_ood.dynamics.trajectory import Trajectory, total_of
from traj_ood.scorers.path import PathStatistic
from traj_ood.scorers.registry import register


@register
@dataclass
class PathEnergy(PathStatistic):
    """Log energy of the path's first H steps: log Σ_{t<H} ‖z_{t+1} − z_t‖².

    Reason: an in-distribution sample starts near the attractors that training formed, so the field moves it little.
    Unlike the mean distance, this needs no attractors. The logarithm keeps the ranking and makes ``two_sided`` a ratio.

    Cost: ``horizon`` evaluations of f, fewer for samples that converge before. Default 16, as for ``contraction-rate``.
    """

    name: ClassVar[str] = "path-energy"
    summary: ClassVar[str] = "sum of squared steps along the beginning of the path, as a logarithm"
    suite: ClassVar[dict[str, int]] = {"": 170, "two_sided=true": 171}

    def statistic(self, path: Trajectory) -> Tensor:
        own = path.residuals[:, : self.horizon]
        total = total_of(own).clamp(min=torch.finfo(torch.float64).tiny).log()
        return torch.where(own[:, 0].isfinite(), total, torch.nan)
