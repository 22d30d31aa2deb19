"""Mahalanobis distance to one Gaussian over the training features (Lee et al. 2018, without class labels)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from traj_ood.postprocessors.base import Evidence, FeatureScorer
from traj_ood.postprocessors.registry import register


@register
@dataclass
class Mahalanobis(FeatureScorer):
    """sqrt((z − μ)ᵀ Σ⁻¹ (z − μ)) with the Ledoit–Wolf shrinkage estimate of Σ, in float64.

    One Gaussian, because an autoencoder has no class labels. Shrinkage, because a few thousand images do not fill a
    covariance of several hundred dimensions; Ledoit–Wolf sets its strength from the data, so nothing is tuned.

    Args:
        view: Default ``mean``: pooled patch tokens. ``tokens`` would need a covariance of the whole latent.
    """

    name: ClassVar[str] = "mahalanobis"
    summary: ClassVar[str] = "Mahalanobis distance to one Gaussian of the training features, Ledoit-Wolf shrinkage"

    def learn(self, train: Evidence) -> dict[str, Tensor]:
        from sklearn.covariance import LedoitWolf

        features = self.features(train).cpu().double().numpy()
        estimate = LedoitWolf().fit(features)
        precision = torch.from_numpy(estimate.precision_).double()
        return {"mean": torch.from_numpy(estimate.location_).double(), "precision": precision}

    def score(self, evidence: Evidence) -> Tensor:
        offset = self.features(evidence).cpu().double() - self.state["mean"]
        return ((offset @ self.state["precision"]) * offset).sum(dim=1).clamp(min=0).sqrt()
