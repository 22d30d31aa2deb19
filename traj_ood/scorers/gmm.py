"""A Gaussian mixture of the training features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from traj_ood.errors import TrajOODError
from traj_ood.scorers.base import Evidence, FeatureScorer
from traj_ood.scorers.covariance import ledoit_wolf, moments, whitening
from traj_ood.scorers.mixture import learn_mixture, mixture_energies
from traj_ood.scorers.principal import check_share, principal_axes
from traj_ood.scorers.registry import register
from traj_ood.scorers.rows import in_rows

CANDIDATES = (1, 2, 4, 8, 16)
_IMAGES_PER_COMPONENT = 10  # training images per component


@register
@dataclass
class GMM(FeatureScorer):
    """−log Σ_c π_c N(y; μ_c, Σ_c) + ½ (M² − Σ_j y_j² / λ_j), y = Pᵀ(z − μ) in the leading principal axes P.

    Few images do not fill several full covariances in hundreds of dimensions, so the mixture (scikit-learn's, full
    covariances) lives where most of the variance is. What is outside is not forgotten, as outliers are often there:
    there it is one Gaussian, whose share of the squared Mahalanobis distance M² is what the axes, of shrunk variances
    λ, leave of it. So one component is the scorer ``mahalanobis`` again, and more are a refinement of it.

    The number of components is the one of 1, 2, 4, 8, 16 with the lowest BIC (Schwarz 1978) on the training features,
    among those that leave each component 10 images.

    Args:
        view: Default ``mean``. As for ``mahalanobis``, ``tokens`` would need a covariance of the whole latent.
        share: of the variance in the principal axes. Default 0.9, as in ``pca-residual``.
        seed: of the fit's k-means start.
    """

    name: ClassVar[str] = "gmm"
    summary: ClassVar[str] = "negative log-likelihood of a Gaussian mixture in principal axes, components by BIC"
    suite: ClassVar[dict[str, int]] = {"": 340, "view=cls": 440}
    share: float = 0.9
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self.name, self.share)

    def learn(self, train: Evidence) -> dict[str, Tensor]:
        features = self.features(train).cpu()
        found = principal_axes(self.label, features, self.share)
        if not len(found.variances):
            raise TrajOODError(f"scorer {self.label}: expected training features that vary in 2 directions, got one")
        together = torch.zeros(len(features), dtype=torch.int64)
        covariance = ledoit_wolf(moments(features, found.mean[None], together))
        state = {
            "mean": found.mean,
            "axes": found.axes,
            "variances": (covariance @ found.axes * found.axes).sum(dim=0),
            "whitening": whitening(covariance),
        }
        inside = in_rows(lambda part: _split(state, part)[0], features)
        floor = 1e-6 * float(found.variances.mean())  # scikit-learn's regularisation, in units of the features
        return state | learn_mixture(inside, self.seed, floor)

    def score(self, evidence: Evidence) -> Tensor:
        return in_rows(self._energies, self.features(evidence).cpu())

    def _energies(self, features: Tensor) -> Tensor:
        """(chunk,) float64."""
        inside, outside = _split(self.state, features)
        return outside / 2 + mixture_energies(self.state, inside)


def _split(state: dict[str, Tensor], features: Tensor) -> tuple[Tensor, Tensor]:
    """(chunk, q) coordinates in the axes and (chunk,) squared Mahalanobis distance outside them, float64."""
    offsets = features.double() - state["mean"]
    inside = offsets @ state["axes"]
    whole = (offsets @ state["whitening"]).square().sum(dim=1)
    return inside, whole - (inside.square() / state["variances"]).sum(dim=1)
