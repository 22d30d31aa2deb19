"""k nearest neighbours with k chosen on ID training images alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from traj_ood.index import NeighborIndex
from traj_ood.scorers.bank import BankScorer
from traj_ood.scorers.base import Evidence
from traj_ood.scorers.registry import register

CANDIDATES = (1, 5, 10, 20, 50, 100, 200)
_REFERENCES = 1000  # beside as many training images the standard error of an AUROC is below 0.015


@register
@dataclass
class KNNAuto(BankScorer):
    """‖z̄ − z̄_(k)‖ with z̄ = z/‖z‖ (Sun et al. 2022, eq. 2), k the best of 1, 5, 10, 20, 50, 100, 200 on ID data.

    Sun et al. and OpenOOD choose k on OOD validation images. Here k is the one whose scores best tell training images,
    each with itself left out, from samples of a reference: a Gaussian of the training features' mean and covariance,
    put back on the sphere. To compare detectors by how they part data from a known reference measure is the framework
    of Steinwart, Hush and Scovel (2005): the ranking that does so best is that of the density relative to the
    reference, and no outlier is needed. A Gaussian fitted to the data (Hempstalk et al. 2008) rather than a uniform
    reference, because in hundreds of dimensions any k tells the latter; the former asks k for what a Mahalanobis
    distance does not know. Likelihoods of k-NN densities do not compare: those densities do not integrate to one.

    Of equal AUROC the smallest k; a k that leaves no neighbour (k >= N) is no candidate.

    Args:
        view: Default ``mean``, as ``knn``.
        seed: of the reference samples.
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
        strange = index.search(self._reference(bank), candidates[-1]).distances
        truth = [0] * len(own) + [1] * len(strange)
        aurocs = [roc_auc_score(truth, torch.cat([own, strange])[:, k - 1].numpy()) for k in candidates]
        return state | {"k": torch.tensor([candidates[aurocs.index(max(aurocs))]])}

    def score(self, evidence: Evidence) -> Tensor:
        return self.kth_distance(self.features(evidence), int(self.state["k"]))

    def features(self, evidence: Evidence) -> Tensor:
        return normalize(super().features(evidence), dim=1)

    def _reference(self, bank: Tensor) -> Tensor:
        """(1000, d) unit vectors. Gaussian weights of the centred features have their covariance, whatever d."""
        draw = torch.Generator().manual_seed(self.seed)
        weights = torch.randn(_REFERENCES, len(bank), generator=draw, dtype=bank.dtype) / len(bank) ** 0.5
        mean = bank.mean(dim=0)
        return normalize(mean + weights @ (bank - mean), dim=1)
