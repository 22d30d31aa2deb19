"""The paper's trajectory score: mean distance of a trajectory's points to the nearest training attractor (§4.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from traj_ood.autoencoders import View
from traj_ood.scorers.base import WHOLE_PATH, Evidence, Needs, Scorer
from traj_ood.scorers.registry import register


@register
@dataclass
class TrajectoryScore(Scorer):
    """Mean Euclidean distance of a trajectory's points to their nearest attractor (§4.2).

    score(z) = 1/(N+1) · Σ_{t=0…N} d(z_t, Z*_train). §4.2 writes 1/N and does not say whether the sum begins at z_0;
    here it is the mean over the N + 1 points z_0 … z_N.

    Args:
        view: latent view in which distances are measured; the dynamics always run on the whole latent. Default
            ``tokens``, the whole latent: only there is z* a fixed point.
        horizon: None (default) averages over the sample's own N + 1 points, as §4.2 sums over the sample's trajectory.
            A number H averages over z_0 … z_H for every sample, so that fast and slow samples are compared on the same
            part of the path; one that ends earlier stays at its end point (see
            :meth:`traj_ood.Trajectory.mean_over_path`).
    """

    name: ClassVar[str] = "trajectory"
    summary: ClassVar[str] = "mean distance of the trajectory's points to the nearest training attractor (§4.2)"
    suite: ClassVar[dict[str, int]] = {"": 120, "horizon=16": 121, "view=mean": 400, "view=cls": 401}
    view: View = "tokens"
    at_least: ClassVar = {"horizon": 0}
    horizon: int | None = None

    def needs(self) -> Needs:
        return Needs(distances=frozenset({self.view}), steps=WHOLE_PATH if self.horizon is None else self.horizon)

    def score(self, evidence: Evidence) -> Tensor:
        return evidence.path().mean_over_path(f"distance/{self.view}", self.horizon)
