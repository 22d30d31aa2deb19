"""The trajectory score at a few early points, against attractors or what might stand in for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from traj_ood.autoencoders import View
from traj_ood.index import NeighborIndex
from traj_ood.scorers.bank import SearchingScorer
from traj_ood.scorers.base import Evidence, Needs
from traj_ood.scorers.covariance import class_means, ledoit_wolf, moments, whitening
from traj_ood.scorers.path import parse_steps
from traj_ood.scorers.registry import register
from traj_ood.scorers.rows import in_rows


@register
@dataclass
class EarlyTrajectory(SearchingScorer):
    """1/|T| · Σ_{t∈T} min_{r∈R} ‖(z_t − r) F‖ over a few steps T: the trajectory score of §4.2 at a few points.

    Reason: it separates what the paper's score is made of. With R = Z*_train it is that score on a few points; with R
    the training features, or their k-means centroids, the same path is measured against points that know nothing of
    the dynamics. Compare the three: a claim about attractors is their difference. With F the whitening of the training
    features (Ledoit–Wolf), instead of the identity, no direction counts more because latents vary more along it.

    Cost: as many evaluations of f as the last step, fewer for samples that settle before.

    Args:
        reference: R: ``attractors`` (default), ``features`` (z_0 of the training images) or ``centroids`` of those, as
            many as there are attractors that differ in this view (see :attr:`traj_ood.NeighborIndex.groups`). Where all
            differ there are as many centroids as training images, and hence the features again.
        whiten: Default false.
        view: Default ``mean``.
        steps: T. Default ``0+1+2+4+8+16``: steps shrink about geometrically, so later points lie close together.
        seed: of k-means.
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
            together = torch.zeros(len(features), dtype=torch.int64)
            mean = class_means(features, together, 1)
            state |= {"mean": mean, "factor": whitening(ledoit_wolf(moments(features, mean, together)))}
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
        kmeans = KMeans(count, n_init=1, random_state=self.seed).fit(features.double().numpy())
        return torch.from_numpy(kmeans.cluster_centers_)

    def _metric(self, points: Tensor) -> Tensor:
        """(B, d) in the coordinates in which the Euclidean distance is the one to measure."""
        if not self.whiten:
            return points
        mean, factor = self.state["mean"], self.state["factor"]
        return in_rows(lambda part: ((part.double() - mean) @ factor).to(points.dtype), points)
