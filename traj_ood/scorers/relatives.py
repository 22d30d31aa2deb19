"""Base class of diffusion-model scores adapted to the field of f: densities of statistics of v_t = z_{t+1} − z_t."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from traj_ood.scorers.base import Evidence, Needs, Scorer
from traj_ood.scorers.mixture import learn_mixture, mixture_energies

_FLOOR = 1e-6  # added to the covariance's diagonal, for standardised statistics: scikit-learn's default
_TINY = 1e-12


@dataclass
class FieldStatistics(Scorer):
    """−log density of a few statistics of the field along the first steps, under a Gaussian mixture.

    The mixture is fitted to the standardised statistics of ID training images; see :mod:`.mixture` for the number of
    components. A diffusion model's score s(x, σ) is evaluated at several noise levels σ; f has a single level, and
    reaches smoother points by iteration, so step t takes the place of the t-th level. The view is ``grid``: latents
    pooled to at most 4 × 4 cells.

    Args:
        steps: number of levels. Default 10, as in the papers.
        seed: seed of the mixture's initialisation.
    """

    bears_rounding: ClassVar[bool] = False  # steps of a nearly converged sample are as small as rounding
    at_least: ClassVar = {"steps": 2}
    steps: int = 10
    seed: int = 0

    @abstractmethod
    def statistics(self, field: Tensor) -> Tensor:
        """The statistics, (B, q) float64, of the field (B, steps, n) float64."""

    def deviations(self, values: Tensor) -> Tensor:
        """Standard deviations (q,) by which the statistics (N, q) are divided."""
        return values.std(dim=0, correction=0).clamp(min=_TINY)

    def needs(self) -> Needs:
        points = frozenset(("grid", t) for t in range(1, self.steps + 1))
        return Needs(features=frozenset({"grid"}), points=points, steps=self.steps)  # type: ignore[arg-type]

    def learn(self, train: Evidence) -> dict[str, Tensor]:
        values = self._read(train)
        mean, std = values.mean(dim=0), self.deviations(values)
        return {"mean": mean, "std": std} | learn_mixture((values - mean) / std, self.seed, _FLOOR)

    def score(self, evidence: Evidence) -> Tensor:
        return mixture_energies(self.state, (self._read(evidence) - self.state["mean"]) / self.state["std"])

    def _read(self, evidence: Evidence) -> Tensor:
        points = [evidence.features["grid"], *(evidence.points["grid", t] for t in range(1, self.steps + 1))]
        path = torch.stack([p.cpu().double().flatten(1) for p in points], dim=1)
        return self.statistics(path.diff(dim=1))
