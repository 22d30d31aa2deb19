"""Control scorers: single parts of the trajectory score, for measuring what the rest of the path adds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from traj_ood.autoencoders import View
from traj_ood.scorers.base import WHOLE_PATH, Evidence, Needs, Scorer
from traj_ood.scorers.registry import register


@register
@dataclass
class StartDistance(Scorer):
    """Distance d(z_0, Z*_train) of the start to the nearest attractor: the trajectory score without a trajectory.

    Args:
        view: latent view. Default ``tokens``, as in the trajectory score.
    """

    name: ClassVar[str] = "start-distance"
    summary: ClassVar[str] = "control: distance of z0 to the nearest attractor, no iteration"
    suite: ClassVar[dict[str, int]] = {"": 200, "view=mean": 410}
    view: View = "tokens"

    def needs(self) -> Needs:
        return Needs(distances=frozenset({self.view}))

    def score(self, evidence: Evidence) -> Tensor:
        return evidence.path().measure(f"distance/{self.view}")[:, 0]


@register
@dataclass
class EndDistance(Scorer):
    """Distance d(z_N, Z*_train) of the end point to the nearest attractor; small if it ends at a training attractor.

    Args:
        view: latent view. Default ``tokens``, as in the trajectory score.
    """

    name: ClassVar[str] = "end-distance"
    summary: ClassVar[str] = "control: distance of the end point to the nearest attractor"
    suite: ClassVar[dict[str, int]] = {"": 210}
    bears_rounding: ClassVar[bool] = False  # at an attractor the distance is as small as rounding
    view: View = "tokens"

    def needs(self) -> Needs:
        return Needs(distances=frozenset({self.view}), steps=WHOLE_PATH)

    def score(self, evidence: Evidence) -> Tensor:
        return evidence.path().at_end(f"distance/{self.view}")


@register
@dataclass
class FirstResidual(Scorer):
    """Length ‖f(z_0) − z_0‖ of the vector field at the sample; one evaluation of f."""

    name: ClassVar[str] = "first-residual"
    summary: ClassVar[str] = "control: length of the first step, ‖f(z0) − z0‖"
    suite: ClassVar[dict[str, int]] = {"": 220}

    def needs(self) -> Needs:
        return Needs(steps=1)

    def score(self, evidence: Evidence) -> Tensor:
        return evidence.path().residuals[:, 0].sqrt()


@register
@dataclass
class Steps(Scorer):
    """Number of steps to convergence, or the step limit for samples that do not converge."""

    name: ClassVar[str] = "steps"
    summary: ClassVar[str] = "control: number of steps until convergence"
    suite: ClassVar[dict[str, int]] = {"": 230}
    graph_obstacle: ClassVar = "it counts the steps until convergence, and a fixed graph always takes the same number"

    def needs(self) -> Needs:
        return Needs(steps=WHOLE_PATH)

    def score(self, evidence: Evidence) -> Tensor:
        path = evidence.path()
        return torch.where(path.converged, path.steps, path.max_steps).double()
