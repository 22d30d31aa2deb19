"""k nearest neighbours in feature space: Sun et al. (2022), and the paper's adaptation of it (§4.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from traj_ood.autoencoders import FeatureView
from traj_ood.scorers.bank import BankScorer
from traj_ood.scorers.base import Evidence, UnitFeatureScorer
from traj_ood.scorers.registry import register


@register
@dataclass
class KNN(BankScorer, UnitFeatureScorer):
    """Distance to the k-th nearest training feature: ‖z̄ − z̄_(k)‖ with z̄ = z/‖z‖ (Sun et al. 2022, eq. 2).

    Args:
        view: Default ``mean``: pooled patch tokens, the usual image feature of an MAE and the better baseline.
        k: rank of the neighbour; None is the number of training images. Default 10: Sun et al. use k = 50 for the
            50,000 images of CIFAR-10 (0.1 %) and k = 10 for their 1 % subset of ImageNet (12,812 images), the published
            setting nearest to 2,000 training images.
        reduce: ``kth`` (default) for the k-th distance, ``mean`` for the mean of the k smallest.
        normalize: whether to L2-normalise features first. Default true: Sun et al. find this step decisive.
    """

    name: ClassVar[str] = "knn"
    summary: ClassVar[str] = "distance to the k-th nearest L2-normalised training feature (Sun et al. 2022)"
    suite: ClassVar[dict[str, int]] = {"": 310, "view=cls": 420, "view=tokens": 421}
    view: FeatureView = "mean"
    at_least: ClassVar = {"k": 1}
    k: int | None = 10
    reduce: Literal["kth", "mean"] = "kth"
    normalize: bool = True

    def score(self, evidence: Evidence) -> Tensor:
        features, k = self.features(evidence), self.k or len(self.state["bank"])
        if self.reduce == "kth":
            return self.kth_distance(features, k)
        return self.neighbour_distances(features, k).mean(dim=1)


@register
@dataclass
class PaperKNN(KNN):
    """The paper's baseline: mean Euclidean distance to the K = 2,000 nearest of 2,000 training features (§4.2).

    With K equal to the number of training images this is the mean distance to all of them, a weak baseline that is
    included to reproduce the paper's table. Defaults: ``k`` = all; ``normalize`` = false and ``view`` = tokens, the
    latent that the trajectory uses, because §4.2 specifies neither.
    """

    name: ClassVar[str] = "knn-paper"
    summary: ClassVar[str] = "mean distance to all training features: the paper's KNN with K = 2,000 of 2,000 (§4.2)"
    suite: ClassVar[dict[str, int]] = {"": 330}
    view: FeatureView = "tokens"
    k: int | None = None
    reduce: Literal["kth", "mean"] = "mean"
    normalize: bool = False
