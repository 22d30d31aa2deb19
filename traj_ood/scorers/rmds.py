"""RMDS: relative Mahalanobis distance (Ren et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from traj_ood.scorers.base import Evidence, Needs, UnitFeatureScorer
from traj_ood.scorers.covariance import gaussian, whitening
from traj_ood.scorers.gaussians import learn_classes, to_nearest
from traj_ood.scorers.labels import classes_of
from traj_ood.scorers.registry import register
from traj_ood.scorers.rows import in_rows


@register
@dataclass
class RMDS(UnitFeatureScorer):
    """Squared Mahalanobis distance to the nearest class minus that to the Gaussian of all features.

    min over classes c of (z − μ_c)ᵀ Σ⁻¹ (z − μ_c) − (z − μ)ᵀ Σ₀⁻¹ (z − μ) (Ren et al. 2021). Equals OpenOOD's ``rmds``
    negated, and 1/N of pytorch-ood's ``RMD``, which does not divide its scatter matrices by the N training features.

    Args:
        view: Default ``mean``.
        covariance: ``empirical`` (default, the paper's and OpenOOD's), with the pseudo-inverse where it is singular.
            ``ledoit-wolf`` shrinks both covariances, for few images.
        normalize: whether to L2-normalise features first, as Mahalanobis++ does. Default false, as published.
    """

    name: ClassVar[str] = "rmds"
    summary: ClassVar[str] = "Mahalanobis distance to the nearest class less that to all features (Ren et al. 2021)"
    covariance: Literal["empirical", "ledoit-wolf"] = "empirical"
    normalize: bool = False

    def needs(self) -> Needs:
        return super().needs() | Needs(labels=True)

    def learn(self, train: Evidence) -> dict[str, Tensor]:
        features, shrink = self.features(train).cpu(), self.covariance == "ledoit-wolf"
        classes = classes_of(self.label, train, len(features))
        means, factor = learn_classes(self.label, features, classes, shrink=shrink)
        mean, matrix = gaussian(features, shrink=shrink)
        return {"mean": mean, "whole": whitening(matrix), "factor": factor, "means": (means - mean) @ factor}

    def score(self, evidence: Evidence) -> Tensor:
        return in_rows(self._relative, self.features(evidence).cpu())

    def _relative(self, features: Tensor) -> Tensor:
        offsets = features.double() - self.state["mean"]
        own = to_nearest(offsets @ self.state["factor"], self.state["means"]).square().sum(dim=1)
        return own - (offsets @ self.state["whole"]).square().sum(dim=1)
