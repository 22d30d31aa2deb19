"""Signature: how unusual the curves of step lengths and distances along a path are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from traj_ood.autoencoders import View
from traj_ood.scorers.base import Evidence, Needs, Scorer
from traj_ood.scorers.gaussians import distances_to_gaussians, learn_gaussians
from traj_ood.scorers.path import HORIZON, finite_rows, log_distances, log_lengths, pad_with_last
from traj_ood.scorers.registry import register


@register
@dataclass
class Signature(Scorer):
    """Mahalanobis distance of the path's log step lengths and log distances to a Gaussian of ID paths.

    score = sqrt((s − μ)ᵀ Σ⁻¹ (s − μ)) with s = (log ‖z_{t+1} − z_t‖, log d(z_t, Z*_train)) for t < H.

    Reason: the paper's mean distance is one-sided. Simple inputs may end up nearer to attractors than training images
    do, and then rank as ID. A density of the whole curve is two-sided: too near and too fast counts as OOD like too
    far. Logarithms, because both curves fall geometrically.

    μ and Σ (Ledoit–Wolf) are fitted to the training images' own paths, with distances to the attractors of the *other*
    training images, as for a new image. A sample that converges before H keeps its last step and distance; a step or
    distance below the float32 rounding of z counts as that rounding.

    Cost: ``horizon`` evaluations of f, fewer for samples that converge before; fitting computes the training
    trajectories a second time.

    Args:
        view: view of the distances. Default ``tokens``, as in the trajectory score.
        horizon: H. Default 16, that of the trajectory score's fixed variant.
    """

    name: ClassVar[str] = "signature"
    summary: ClassVar[str] = "two-sided: Gaussian of ID paths over the log-lengths of steps and log-distances"
    suite: ClassVar[dict[str, int]] = {"": 140}
    bears_rounding: ClassVar[bool] = False  # logarithms of the last steps before convergence amplify rounding
    view: View = "tokens"
    at_least: ClassVar = {"horizon": 1}
    horizon: int = HORIZON

    def needs(self) -> Needs:
        return Needs(
            features=frozenset({"tokens"}), distances=frozenset({self.view}), steps=self.horizon, train_path=True
        )

    def learn(self, train: Evidence) -> dict[str, Tensor]:
        return learn_gaussians(finite_rows(self.label, self._curves(train)))

    def score(self, evidence: Evidence) -> Tensor:
        return distances_to_gaussians(self.state, self._curves(evidence))[:, 0]

    def _curves(self, evidence: Evidence) -> Tensor:
        """The curves s, (B, 2H) float64."""
        path = evidence.path()
        columns = (log_lengths(path), log_distances(path, self.view))
        return torch.cat([pad_with_last(c, self.horizon) for c in columns], dim=1)
