"""SSD: Mahalanobis distance to clusters of normalised features (Sehwag et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from traj_ood.errors import TrajOODError
from traj_ood.scorers.base import Evidence, FeatureScorer, Needs
from traj_ood.scorers.gaussians import learn_gaussians
from traj_ood.scorers.labels import classes_of
from traj_ood.scorers.registry import register
from traj_ood.scorers.rows import in_rows

_TINY = 1e-10  # added to the standard deviations, as in the authors' code


@register
@dataclass
class SSD(FeatureScorer):
    """Squared Mahalanobis distance to the nearest cluster of unit features: min over m of (z̄ − μ_m)ᵀ Σ_m⁺ (z̄ − μ_m).

    z̄ is the L2-normalised, then standardised feature; each cluster m has its own Σ_m. SSD (Sehwag et al., ICLR 2021)
    as in the authors' code, on features of any network. With one cluster it is the square of
    ``mahalanobis:normalize=true:covariance=empirical``, which the literature also calls the class-free form of
    Mahalanobis++. OpenOOD's ``ssd`` is one Gaussian of features that are not normalised:
    ``mahalanobis:covariance=empirical``.

    Args:
        view: Default ``mean``.
        clusters: number of k-means clusters. Default 1, which the paper finds best.
        classes: whether the classes of the training images are the clusters (SSD+). Default false.
        covariance: ``empirical`` (default, the authors') or ``ledoit-wolf``.
        seed: seed of k-means.
    """

    name: ClassVar[str] = "ssd"
    summary: ClassVar[str] = "squared Mahalanobis distance to clusters of unit features (Sehwag et al. 2021)"
    suite: ClassVar[dict[str, int]] = {"": 302}
    at_least: ClassVar = {"clusters": 1}
    bears_rounding: ClassVar[bool] = False  # a cluster's covariance is estimated from few images and not regularised
    clusters: int = 1
    classes: bool = False
    covariance: Literal["empirical", "ledoit-wolf"] = "empirical"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.classes and self.clusters > 1:
            raise TrajOODError(
                f"scorer {self.name}: expected clusters or classes=true, got both: with classes=true the classes are "
                "the clusters, so leave one out"
            )

    def needs(self) -> Needs:
        return super().needs() | Needs(labels=self.classes)

    def check_training_size(self, count: int) -> None:
        if self.clusters > count:
            raise TrajOODError(
                f"scorer {self.label}: {self.clusters} clusters, but only {count} training images: use more images or "
                "fewer clusters"
            )

    def learn(self, train: Evidence) -> dict[str, Tensor]:
        features = normalize(self.features(train).cpu().double(), dim=1)
        mean = features.mean(dim=0)
        std = features.std(dim=0, correction=0) + _TINY
        features = (features - mean) / std
        groups = self._groups(features, train)
        learnt = []
        for group in range(int(groups.max()) + 1):
            own = features[groups == group]
            if len(own) < 2 or bool((own == own[:1]).all()):
                raise TrajOODError(
                    f"scorer {self.label}: one of {int(groups.max()) + 1} clusters holds {len(own)} of {len(features)} "
                    "training images, all alike, so no distance can be measured: use more images, or fewer clusters"
                )
            learnt.append(learn_gaussians(own, shrink=self.covariance == "ledoit-wolf"))
        return {"mean": mean, "std": std} | {key: torch.cat([g[key] for g in learnt]) for key in ("means", "factors")}

    def score(self, evidence: Evidence) -> Tensor:
        return in_rows(self._nearest, self.features(evidence).cpu())

    def _nearest(self, features: Tensor) -> Tensor:
        """Squared distances (chunk,) to the nearest cluster."""
        white = (normalize(features.double(), dim=1) - self.state["mean"]) / self.state["std"]
        offsets = white - self.state["means"][:, None]  # (clusters, chunk, d)
        return (offsets @ self.state["factors"]).square().sum(dim=2).amin(dim=0)

    def _groups(self, features: Tensor, train: Evidence) -> Tensor:
        if self.classes:
            return classes_of(self.label, train, len(features))
        if self.clusters == 1:
            return torch.zeros(len(features), dtype=torch.int64)
        from sklearn.cluster import KMeans

        options: dict[str, Any] = {"n_init": 10, "random_state": self.seed}  # scikit-learn has no types
        found = KMeans(self.clusters, **options).fit(features.numpy()).labels_
        return torch.from_numpy(found).long().unique(return_inverse=True)[1]
