"""Mahalanobis distance to one Gaussian of the training features, or to one per class (Lee et al. 2018)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from traj_ood.autoencoders import VIEWS
from traj_ood.errors import TrajOODError
from traj_ood.scorers.base import Evidence, Needs, UnitFeatureScorer
from traj_ood.scorers.covariance import is_upper, times_upper
from traj_ood.scorers.gaussians import distances_to_gaussians, learn_classes, learn_gaussians, to_nearest
from traj_ood.scorers.labels import classes_of
from traj_ood.scorers.registry import register
from traj_ood.scorers.rows import in_rows

_TRIANGULAR_ROWS = 512  # rows at a time: products with narrow blocks of a factor need more rows to be efficient


@register
@dataclass
class Mahalanobis(UnitFeatureScorer):
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
        features, shrink = self.features(train).cpu(), self.covariance == "ledoit-wolf"
        if self.view == "grid":
            return learn_gaussians(features, shrink)
        classes = classes_of(self.label, train, len(features)) if self.classes else None
        means, factor = learn_classes(self.label, features, classes, shrink=shrink)
        centre = means.mean(dim=0)
        return {"centre": centre, "factor": factor, "means": (means - centre) @ factor}

    def score(self, evidence: Evidence) -> Tensor:
        features = self.features(evidence).cpu()
        if self.view == "grid":
            return distances_to_gaussians(self.state, features).mean(dim=1)
        if torch.compiler.is_compiling() or not is_upper(self.state["factor"]):
            return in_rows(partial(self._distances, torch.matmul), features)
        return in_rows(partial(self._distances, times_upper), features, _TRIANGULAR_ROWS)

    def _distances(self, product: Callable[[Tensor, Tensor], Tensor], features: Tensor) -> Tensor:
        """Distances (chunk,) to the nearest class mean, with whitening by ``product``."""
        white = product(features.double() - self.state["centre"], self.state["factor"])
        return to_nearest(white, self.state["means"]).norm(dim=1)
