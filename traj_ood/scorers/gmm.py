"""Negative log-likelihood under a Gaussian mixture of the training features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from traj_ood.errors import TrajOODError
from traj_ood.scorers.base import Evidence, FeatureScorer
from traj_ood.scorers.covariance import gaussian, whitening
from traj_ood.scorers.mixture import learn_mixture, mixture_energies
from traj_ood.scorers.principal import principal_axes
from traj_ood.scorers.registry import register
from traj_ood.scorers.rows import in_rows


@register
@dataclass
class GMM(FeatureScorer):
    """−log Σ_c π_c N(y; μ_c, Σ_c) + ½ (M² − Σ_j y_j² / λ_j), where y = Pᵀ(z − μ) in the leading principal axes P.

    The mixture (scikit-learn's, with full covariances) is fitted in the principal axes only, because a few thousand
    images do not determine several full covariances in hundreds of dimensions. The orthogonal complement, where many
    outliers lie, is modelled by a single Gaussian: the second term is the part of the squared Mahalanobis distance M²
    that lies outside the axes, whose shrunk variances are λ. With one component the ranking is that of ``mahalanobis``.

    The number of components is the one of 1, 2, 4, 8, 16 with the lowest BIC (Schwarz 1978) on the training features,
    among those that leave at least 10 images per component.

    Args:
        view: Default ``mean``. As for ``mahalanobis``, ``tokens`` would need a covariance of the whole latent.
        share: share of the variance in the principal axes. Default 0.9, as in ``pca-residual``.
        seed: seed of the k-means initialisation.
    """

    name: ClassVar[str] = "gmm"
    summary: ClassVar[str] = "negative log-likelihood of a Gaussian mixture in principal axes, components by BIC"
    suite: ClassVar[dict[str, int]] = {"": 340, "view=cls": 440}
    above_0: ClassVar = ("share",)
    below: ClassVar = {"share": 1}
    share: float = 0.9
    seed: int = 0

    def learn(self, train: Evidence) -> dict[str, Tensor]:
        features = self.features(train).cpu()
        found = principal_axes(self.label, features, self.share)
        if not len(found.variances):
            raise TrajOODError(
                f"scorer {self.label}: expected training features that vary in at least 2 directions, got one"
            )
        _, covariance = gaussian(features, shrink=True)
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
        """The score of features (chunk, d), (chunk,) float64."""
        inside, outside = _split(self.state, features)
        return outside / 2 + mixture_energies(self.state, inside)


def _split(state: dict[str, Tensor], features: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates in the axes (chunk, q) and squared Mahalanobis distance outside them (chunk,), float64."""
    offsets = features.double() - state["mean"]
    inside = offsets @ state["axes"]
    whole = (offsets @ state["whitening"]).square().sum(dim=1)
    return inside, whole - (inside.square() / state["variances"]).sum(dim=1)
