"""Residuals of principal component analysis, in feature space and in the space of a Gaussian kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from traj_ood.errors import TrajOODError
from traj_ood.scorers.base import Evidence, UnitFeatureScorer
from traj_ood.scorers.principal import principal_axes
from traj_ood.scorers.registry import register
from traj_ood.scorers.rows import in_rows

_MEDIAN_IMAGES = 1000  # training images whose mutual distances give the kernel's width
_SAME_DISTANCE = 1e-6  # largest distance between unit vectors that are equal up to float32 rounding


@register
@dataclass
class PCAResidual(UnitFeatureScorer):
    """PCA residual ‖(I − P Pᵀ)(z − μ)‖, where P are the leading principal axes of the training features.

    Args:
        view: Default ``mean``. ``tokens`` works, but stores one vector of the latent's size per axis.
        share: share of the variance in the axes; at least one direction of variance is always left out. Default 0.9,
            the usual choice.
        normalize: whether to L2-normalise features first, which gives the cosine kernel PCA ("CoP") of Fang et al.
            (2024), who find the plain residual weak on classifiers. Default false.
    """

    name: ClassVar[str] = "pca-residual"
    summary: ClassVar[str] = "length of the feature outside the training features' principal subspace"
    suite: ClassVar[dict[str, int]] = {"": 350, "normalize=true": 351}
    above_0: ClassVar = ("share",)
    below: ClassVar = {"share": 1}
    share: float = 0.9
    normalize: bool = False

    def learn(self, train: Evidence) -> dict[str, Tensor]:
        found = principal_axes(self.label, self.features(train).cpu(), self.share)
        return {"mean": found.mean, "axes": found.axes}

    def score(self, evidence: Evidence) -> Tensor:
        return in_rows(lambda part: _residual(self.state, part), self.features(evidence).cpu())


@register
@dataclass
class KernelPCA(UnitFeatureScorer):
    """Kernel PCA residual ‖(I − P Pᵀ)(φ(z) − μ)‖ in the space of a Gaussian kernel of normalised features ("CoRP").

    Kernel PCA for OOD detection (Fang et al. 2024): the reconstruction error of PCA on random Fourier features
    φ(z) = sqrt(2/M) cos(W z̄ + b) of the kernel exp(−γ ‖a − b‖²), drawn by scikit-learn's ``RBFSampler``; z̄ = z/‖z‖.
    The authors' scripts set γ (0.5 … 3) and the share (0.5 … 0.8) for each network. Here nothing is tuned.

    Args:
        view: Default ``mean``.
        share: share of the variance of φ in the axes P. Default 0.8, the authors' for a ResNet-18 on CIFAR-10.
        gamma: γ. None (default) is the median heuristic: γ = 1 / median ‖z̄_i − z̄_j‖² over training images. Features
            of an autoencoder share a large common component, so the authors' γ would leave the kernel almost linear.
        components: M. Default 2048, the authors' for CIFAR-10.
        seed: seed of W and b.
    """

    name: ClassVar[str] = "kernel-pca"
    summary: ClassVar[str] = "reconstruction error of cosine-Gaussian kernel PCA (Fang et al. 2024, CoRP)"
    suite: ClassVar[dict[str, int]] = {"": 360, "view=cls": 450}
    at_least: ClassVar = {"components": 1}
    above_0: ClassVar = ("share", "gamma")
    below: ClassVar = {"share": 1}
    share: float = 0.8
    gamma: float | None = None
    components: int = 2048
    seed: int = 0

    def learn(self, train: Evidence) -> dict[str, Tensor]:
        from sklearn.kernel_approximation import RBFSampler

        features = self.features(train).cpu()
        gamma = self._width(features) if self.gamma is None else self.gamma
        sampler = RBFSampler(gamma=gamma, n_components=self.components, random_state=self.seed)
        sampler.fit(features[:1].double().numpy())
        state = {
            "weights": torch.from_numpy(sampler.random_weights_).double(),
            "offset": torch.from_numpy(sampler.random_offset_).double(),
        }
        mapped = in_rows(lambda part: _fourier(state, part), features)
        found = principal_axes(self.label, mapped, self.share)
        return state | {"mean": found.mean, "axes": found.axes}

    def score(self, evidence: Evidence) -> Tensor:
        def errors(part: Tensor) -> Tensor:
            return _residual(self.state, _fourier(self.state, part))

        return in_rows(errors, self.features(evidence).cpu())

    def _width(self, features: Tensor) -> float:
        some = normalize(features[:: -(-len(features) // _MEDIAN_IMAGES)].double(), dim=1)
        first, second = torch.triu_indices(len(some), len(some), 1)
        squared = (2 - 2 * some @ some.T)[first, second]
        median = float(squared.median())
        if median <= _SAME_DISTANCE**2:
            raise TrajOODError(
                f"scorer {self.label}: expected training features of different directions, got mostly equal ones: set "
                "gamma, or check the model"
            )
        return 1 / median


def _fourier(state: dict[str, Tensor], features: Tensor) -> Tensor:
    """Random Fourier features φ, (chunk, M) float64."""
    phases = features.double() @ state["weights"] + state["offset"]
    return phases.cos() * (2 / len(state["offset"])) ** 0.5


def _residual(state: dict[str, Tensor], features: Tensor) -> Tensor:
    """Lengths of the features outside the axes, (chunk,) float64."""
    offsets = features.double() - state["mean"]
    return (offsets - offsets @ state["axes"] @ state["axes"].T).norm(dim=1)
