"""LID: local intrinsic dimension of the training features around a sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from traj_ood.scorers.bank import BankScorer
from traj_ood.scorers.base import Evidence
from traj_ood.scorers.registry import register

_DEFAULT_K = 20
_TINY = torch.finfo(torch.float64).tiny
_MAX_DIMENSION = 1e12  # returned for a sample whose neighbours are all equally far, up to rounding


@register
@dataclass
class LID(BankScorer):
    """Local intrinsic dimension (1/(k−1) · Σ_{i<k} log(r_k / r_i))⁻¹, r_i the distance to the i-th nearest training
    feature.

    The maximum-likelihood estimate of Levina and Bickel (2004, eq. 8), used as an outlier score as in Ma et al. (2018):
    away from the manifold all neighbours are about equally far, and the dimension appears high. Amsaleg et al. (2015)
    and Ma et al. divide by k, with a last term of zero; the ranking is the same. A sample that coincides with k
    training features has dimension 0.

    Args:
        view: Default ``mean``.
        k: number of neighbours. None (default) is 20, as in Ma et al., or all training images where there are fewer.
    """

    name: ClassVar[str] = "lid"
    summary: ClassVar[str] = "local intrinsic dimension, maximum likelihood (Levina and Bickel 2004; Ma et al. 2018)"
    suite: ClassVar[dict[str, int]] = {"": 380, "view=cls": 460}
    at_least: ClassVar = {"k": 2}
    k: int | None = None

    def score(self, evidence: Evidence) -> Tensor:
        k = self.k or min(_DEFAULT_K, len(self.state["bank"]))
        radii = self.neighbour_distances(self.features(evidence), k).clamp(min=_TINY)
        spread = (radii[:, -1:] / radii[:, :-1]).log().mean(dim=1)
        dimension = 1 / spread.clamp(min=1 / _MAX_DIMENSION)
        return torch.where(radii[:, -1] <= _TINY, 0.0, dimension)
