"""The trajectory score at a few early points, with attractors or, as controls, other reference points."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from traj_ood.autoencoders import View
from traj_ood.index import NeighborIndex
from traj_ood.scorers.bank import SearchingScorer
from traj_ood.scorers.base import Evidence, Needs
from traj_ood.scorers.covariance import gaussian, whitening
from traj_ood.scorers.path import parse_steps
from traj_ood.scorers.registry import register
from traj_ood.scorers.rows import in_rows


@register
@dataclass
class EarlyTrajectory(SearchingScorer):
    """Mean distance of a few early points z_t to the nearest reference point: §4.2's trajectory score at few points.

    score = 1/|T| · Σ_{t∈T} min_{r∈R} ‖(z_t − r) F‖ for steps T and reference points R; F is the identity or a
    whitening.

    Reason: it isolates what attractors contribute to the paper's score. With R = Z*_train it is that score at a few
    points. With R the training features or their k-means centroids, the same path is measured against points that do
    not depend on the dynamics; the difference between these variants is what attractors contribute.

    Cost: as many evaluations of f as the last step, fewer for samples that converge before.

    Args:
        reference: R: ``attractors`` (default), ``features`` (z_0 of the training images) or ``centroids`` of these, as
            many as there are distinct attractors in this view (see :attr:`traj_ood.NeighborIndex.groups`). If all
            attractors are distinct there is one centroid per training image, so the centroids are the features.
        whiten: whether F whitens the training features (Ledoit–Wolf), so that directions of large variance do not
            dominate. Default false.
        view: latent view. Default ``mean``.
        steps: T. Default ``0+1+2+4+8+16``: steps shrink about geometrically, so later points lie close together.
        seed: seed of k-means.
    """

    name: ClassVar[str] = "early-trajectory"
    summary: ClassVar[str] = "mean distance of a few early points to attractors; control: to features or centroids"
    suite: ClassVar[dict[str, int]] = {
        "": 130,
        "whiten=true": 131,
        "reference=features": 132,
        "reference=centroids": 133,
    }
    reference: Literal["attractors", "features", "centroids"] = "attractors"
    whiten: bool = False
    view: View = "mean"
    steps: str = "0+1+2+4+8+16"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._steps = parse_steps(self.name, self.steps, 0)

    def needs(self) -> Needs:
        return Needs(
            features=frozenset({self.view}),
            points=frozenset((self.view, t) for t in self._steps if t),
            steps=self._steps[-1],
            attractors=frozenset({self.view} if self.reference != "features" else ()),
        )

    def learn(self, train: Evidence) -> dict[str, Tensor]:
        features = train.features[self.view].cpu()
        state = {"reference": self._reference(train, features).to(features.dtype)}
        if self.whiten:
            mean, covariance = gaussian(features, shrink=True)
            state |= {"mean": mean[None], "factor": whitening(covariance)}
        return state

    def points(self) -> Tensor:
        return self._metric(self.state["reference"])

    def score(self, evidence: Evidence) -> Tensor:
        start = evidence.features[self.view].cpu()
        index = self.index(start.device)
        points = [evidence.points[self.view, t] if t else start for t in self._steps]
        distances = [index.nearest(self._metric(p)).distances[:, 0] for p in points]
        return torch.stack(distances, dim=1).mean(dim=1)

    def _reference(self, train: Evidence, features: Tensor) -> Tensor:
        if self.reference == "features":
            return features
        attractors = train.attractors[self.view].cpu()
        if self.reference == "attractors":
            return attractors
        from sklearn.cluster import KMeans

        count = min(NeighborIndex(attractors).groups, len(features.unique(dim=0)))
        options: dict[str, Any] = {"n_init": 1, "random_state": self.seed}  # scikit-learn has no types
        kmeans = KMeans(count, **options).fit(features.double().numpy())
        return torch.from_numpy(kmeans.cluster_centers_)

    def _metric(self, points: Tensor) -> Tensor:
        """(B, d) whitened if ``whiten``: coordinates in which distances are Euclidean."""
        if not self.whiten:
            return points
        mean, factor = self.state["mean"], self.state["factor"]
        return in_rows(lambda part: ((part.double() - mean) @ factor).to(points.dtype), points)
