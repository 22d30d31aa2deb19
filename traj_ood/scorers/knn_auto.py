"""k nearest neighbours with k chosen on ID training images alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from traj_ood.index import NeighborIndex
from traj_ood.scorers.bank import BankScorer
from traj_ood.scorers.base import Evidence, Scorer, UnitFeatureScorer
from traj_ood.scorers.knn import KNN
from traj_ood.scorers.registry import register

CANDIDATES = (1, 5, 10, 20, 50, 100, 200)
_REFERENCES = 1000  # reference samples: with as many training images the standard error of an AUROC is below 0.015


@register
@dataclass
class KNNAuto(BankScorer, UnitFeatureScorer):
    """The scorer ``knn`` with k chosen from 1, 5, 10, 20, 50, 100, 200 on ID training images alone.

    score = ‖z̄ − z̄_(k)‖ with z̄ = z/‖z‖ (Sun et al. 2022, eq. 2). Sun et al. and OpenOOD choose k on OOD validation
    images. Here k is the candidate with the highest AUROC of leave-one-out scores of the training images against
    samples of a reference: a Gaussian with the training features' mean and covariance, projected to the sphere. In the
    framework of Steinwart, Hush and Scovel (2005) the ranking that best separates data from a known reference measure
    is that of the density relative to it, so no outliers are needed. The reference is a Gaussian fitted to the data
    (Hempstalk et al. 2008) rather than uniform, because in hundreds of dimensions every k separates a uniform one; a
    fitted Gaussian tests what k-NN adds to a Mahalanobis distance. Likelihoods of k-NN densities cannot be compared
    instead, because these densities do not integrate to one.

    If AUROCs are equal, the smallest k is chosen. Candidates with k >= N, the number of training images, are skipped.

    Args:
        view: Default ``mean``, as ``knn``.
        seed: seed of the reference samples.
    """

    name: ClassVar[str] = "knn-auto"
    summary: ClassVar[str] = "knn with k chosen on ID data: leave-one-out against a Gaussian reference"
    suite: ClassVar[dict[str, int]] = {"": 320}
    seed: int = 0

    def learn(self, train: Evidence) -> dict[str, Tensor]:
        from sklearn.metrics import roc_auc_score

        state = super().learn(train)
        bank = state["bank"]
        candidates = [k for k in CANDIDATES if k < len(bank)]
        index = NeighborIndex(bank)
        own = index.search(bank, candidates[-1] + 1).distances[:, 1:]  # the first is the image itself
        reference = index.search(self._reference(bank), candidates[-1]).distances
        truth = [0] * len(own) + [1] * len(reference)
        aurocs = [roc_auc_score(truth, torch.cat([own, reference])[:, k - 1].numpy()) for k in candidates]
        return state | {"k": torch.tensor([candidates[aurocs.index(max(aurocs))]])}

    def score(self, evidence: Evidence) -> Tensor:
        return self.kth_distance(self.features(evidence), int(self.state["k"]))

    def graph_form(self, steps: int) -> Scorer:
        chosen = KNN(view=self.view, k=int(self.state["k"]))  # a graph cannot depend on the value of a tensor
        return chosen.with_state({"bank": self.state["bank"]})

    def _reference(self, bank: Tensor) -> Tensor:
        """Reference samples, (1000, d) unit vectors. Gaussian combinations of the centred features have the covariance
        of the features, whatever d."""
        draw = torch.Generator().manual_seed(self.seed)
        weights = torch.randn(_REFERENCES, len(bank), generator=draw, dtype=bank.dtype) / len(bank) ** 0.5
        mean = bank.mean(dim=0)
        return normalize(mean + weights @ (bank - mean), dim=1)
