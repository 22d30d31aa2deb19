"""Mahalanobis distance to one Gaussian of the training features, or to one per class (Lee et al. 2018)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from traj_ood.autoencoders import VIEWS
from traj_ood.errors import TrajOODError
from traj_ood.scorers.base import Evidence, FeatureScorer, Needs
from traj_ood.scorers.covariance import class_means, is_upper, ledoit_wolf, moments, times_upper, whitening
from traj_ood.scorers.gaussians import distances_to_gaussians, learn_gaussians
from traj_ood.scorers.labels import classes_of
from traj_ood.scorers.registry import register
from traj_ood.scorers.rows import in_rows

_TRIANGULAR_ROWS = 512  # rows at a time: products with narrow blocks of a factor need more rows to be efficient


@register
@dataclass
class Mahalanobis(FeatureScorer):
    """Mahalanobis distance to the nearest class mean: min over classes c of sqrt((z − μ_c)ᵀ Σ⁻¹ (z − μ_c)).

    Σ is the covariance of the features minus their class means, shared by all classes; computed in float64.
    ``classes=true:covariance=empirical`` ranks as OpenOOD's ``mds``, whose score is the negative square, and as
    pytorch-ood's ``Mahalanobis``, whose score is the square divided by 2N for N training features (it does not divide
    its scatter matrix by N, and adds 1e-6 to the diagonal).

    Args:
        view: Default ``mean``: pooled patch tokens. ``grid`` fits one Gaussian per cell of the image, as PaDiM (Defard
            et al. 2021), and averages the cells' distances. ``tokens`` would need a covariance of the whole latent.
        classes: false (default) treats all features as one class, because images for an autoencoder need no labels.
            True needs the class of every training image; classes without images are left out.
        covariance: ``ledoit-wolf`` (default; Ledoit and Wolf 2004) shrinks Σ, because a few thousand images do not
            determine a covariance in several hundred dimensions; the shrinkage follows from the data, so nothing is
            tuned. ``empirical`` does not shrink. If Σ is singular its pseudo-inverse is used, as in OpenOOD, and
            directions that the training features do not span are ignored: use it with many more images than dimensions.
        normalize: whether to L2-normalise features first, as Mahalanobis++ does (Müller and Hein 2025), which was
            designed for classifiers, whose features vary in length. Mahalanobis++ itself is
            ``classes=true:normalize=true``; without classes it is ``ssd`` (Sehwag et al. 2021) up to the shrinkage.
            Default false: Lee et al.'s form, and the better one on pooled MAE tokens.
    """

    name: ClassVar[str] = "mahalanobis"
    summary: ClassVar[str] = "Mahalanobis distance to the Gaussian(s) of the training features, Ledoit-Wolf shrinkage"
    suite: ClassVar[dict[str, int]] = {"": 300, "normalize=true": 301, "view=cls": 430, "view=grid": 431}
    views: ClassVar[tuple[str, ...]] = (*VIEWS, "backbone", "grid")
    classes: bool = False
    covariance: Literal["ledoit-wolf", "empirical"] = "ledoit-wolf"
    normalize: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.classes and self.view == "grid":
            raise TrajOODError(
                f"scorer {self.name}: view=grid does not support classes=true: use view=mean or classes=false"
            )

    def needs(self) -> Needs:
        return super().needs() | Needs(labels=self.classes)

    def learn(self, train: Evidence) -> dict[str, Tensor]:
        features = self.features(train).cpu()
        if self.view == "grid":
            return learn_gaussians(features, shrink=self.covariance == "ledoit-wolf")
        classes = self._classes(train, len(features))
        means = class_means(features, classes, int(classes.max()) + 1)
        sample = moments(features, means, classes, fourth=self.covariance == "ledoit-wolf")
        if len(means) > 1 and not float(sample.covariance.trace()) > 0:
            raise TrajOODError(
                f"scorer {self.label}: the training features do not vary within their classes ({len(means)} classes of "
                f"{len(features)} images), so no distance can be measured: use more images of each class"
            )
        factor = whitening(ledoit_wolf(sample) if self.covariance == "ledoit-wolf" else sample.covariance)
        centre = means.mean(dim=0)
        return {"centre": centre, "factor": factor, "means": (means - centre) @ factor}

    def score(self, evidence: Evidence) -> Tensor:
        features = self.features(evidence).cpu()
        if self.view == "grid":
            return distances_to_gaussians(self.state, features).mean(dim=1)
        if torch.compiler.is_compiling() or not is_upper(self.state["factor"]):
            return in_rows(partial(self._distances, torch.matmul), features)
        return in_rows(partial(self._distances, times_upper), features, _TRIANGULAR_ROWS)

    def features(self, evidence: Evidence) -> Tensor:
        features = super().features(evidence)
        return normalize(features, dim=-1) if self.normalize else features

    def _distances(self, product: Callable[[Tensor, Tensor], Tensor], features: Tensor) -> Tensor:
        """Distances (chunk,) to the nearest class mean, with whitening by ``product``. The expanded square finds the
        class, where its cancellation does no harm; the difference to that class mean gives the distance."""
        means = self.state["means"]
        white = product(features.double() - self.state["centre"], self.state["factor"])
        nearest = torch.addmm(means.square().sum(dim=1), white, means.T, alpha=-2).argmin(dim=1)
        return (white - means[nearest]).norm(dim=1)

    def _classes(self, train: Evidence, count: int) -> Tensor:
        """Class indices (N,) int64 of the training images; all 0 without classes."""
        if not self.classes:
            return torch.zeros(count, dtype=torch.int64)
        return classes_of(self.label, train, count)
