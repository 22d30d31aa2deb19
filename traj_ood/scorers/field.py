"""Field: how far a sample and its first step f(z_0) − z_0 lie from training images, and how unusual that is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from traj_ood.autoencoders import FeatureView
from traj_ood.errors import TrajOODError
from traj_ood.scorers.base import Evidence, Needs, Scorer
from traj_ood.scorers.folds import folds
from traj_ood.scorers.gaussians import distances_to_gaussians, learn_gaussians, named, under
from traj_ood.scorers.path import smallest_length
from traj_ood.scorers.registry import register

_VIEWS: tuple[FeatureView, ...] = ("grid", "mean")
_FOLDS = 2
_MIN_IMAGES = 8
_TINY = 1e-12
_BOTH = "both"  # name of the vectors (z_0, v): their distance is a, and is not one of the lengths in b


@register
@dataclass
class Field(Scorer):
    """Distance and typicality of z_0 and the field v = f(z_0) − z_0: score = a / E[a] + b / E[b].

    Expectations are over ID training images. In each view there is one Ledoit–Wolf Gaussian per cell (see
    ``early-path``):

    * a is the Mahalanobis distance of (z_0, v) to its Gaussians, large where a sample or its field is far from those of
      training images;
    * b is the Mahalanobis distance of the logarithms of five lengths: the distances of z_0 and of v to their Gaussians
      in the views ``grid`` and ``mean``, and ‖v‖. b is also large where these are unusually *small*.

    Reason: v shows how the model corrects the sample. That v approximates the score ∇ log p of the latent density
    (Theorem 1, §3.1) explains little of this: a gradient has a symmetric Jacobian, and that of f is far from symmetric
    (docs/choices.md). Distances alone miss images that are simpler than the training images (blurred, smooth, one
    colour): they lie nearer to the mean than any training image, where a high-dimensional Gaussian has its mode but
    almost no mass. b is a density of distances and detects both.

    The fit is cross-fitted: each half of the training images is measured with the Gaussians of the other half, as a new
    image will be, and a score is the mean over the two fits. The halves are drawn at random whatever the order of the
    images. results/README.md says how the form (one step, equal weights) was chosen.

    With fewer than about 20 training images b dominates a, because its mean over the images it was fitted to is then
    far below its mean over new ones: use ``early-path`` there (docs/choices.md).

    Cost: one evaluation of f, and 16 · (2d)² numbers for latents of d dimensions per token.

    Args:
        start_only: control without the field, default false: a is the distance of z_0 alone, and b uses its two
            distances. It needs no evaluation of f, so it shows what v contributes to ``field``.
    """

    name: ClassVar[str] = "field"
    summary: ClassVar[str] = "distance and typicality of z0 and the vector field f(z0) - z0, one evaluation of f"
    suite: ClassVar[dict[str, int]] = {"": 100, "start_only=true": 101}

    start_only: bool = False

    def needs(self) -> Needs:
        if self.start_only:
            return Needs(features=frozenset(_VIEWS))
        return Needs(features=frozenset(_VIEWS), points=frozenset((view, 1) for view in _VIEWS), steps=1)

    def check_training_size(self, count: int) -> None:
        if count < _MIN_IMAGES:
            raise TrajOODError(
                f"scorer {self.label}: expected at least {_MIN_IMAGES} training images, got {count}: add images, since "
                "the fit splits them into two halves"
            )

    def learn(self, train: Evidence) -> dict[str, Tensor]:
        vectors = self._vectors(train)
        fold = folds(vectors["grid/start"], _FOLDS)
        state: dict[str, Tensor] = {}
        for k in range(_FOLDS):
            for name, values in vectors.items():
                state |= named(f"{k}/{name}", learn_gaussians(values[fold == k]))
            far, lengths = _distances(state, k, {name: values[fold != k] for name, values in vectors.items()})
            learnt = learn_gaussians(lengths)
            odd = distances_to_gaussians(learnt, lengths)[:, 0]
            state |= named(f"{k}/lengths", learnt)
            state[f"{k}/scale"] = torch.stack([far.mean(), odd.mean()]).clamp(min=_TINY)
        return state

    def score(self, evidence: Evidence) -> Tensor:
        return self.terms(evidence).sum(dim=1)

    def terms(self, evidence: Evidence) -> Tensor:
        """The two terms a / E[a] and b / E[b], (B, 2) float64, as means over the two fits."""
        vectors, halves = self._vectors(evidence), []
        for k in range(_FOLDS):
            far, lengths = _distances(self.state, k, vectors)
            odd = distances_to_gaussians(under(f"{k}/lengths", self.state), lengths)[:, 0]
            halves.append(torch.stack([far, odd], dim=1) / self.state[f"{k}/scale"])
        return torch.stack(halves).mean(dim=0)

    def _vectors(self, evidence: Evidence) -> dict[str, Tensor]:
        """The vectors whose distances are measured, name → (B, cells, d) or (B, d), each with its own Gaussians."""
        grid = evidence.features["grid"]
        # With a latent of one token the two views are equal: one is enough.
        views = _VIEWS if grid.ndim == 3 and grid.shape[1] > 1 else _VIEWS[:1]
        vectors = {f"{view}/start": evidence.features[view].cpu() for view in views}
        if not self.start_only:
            for view in views:
                vectors[f"{view}/field"] = evidence.points[view, 1].cpu() - vectors[f"{view}/start"]
            vectors[_BOTH] = torch.cat([vectors["grid/start"], vectors["grid/field"]], dim=-1)
        return vectors


def _distances(state: dict[str, Tensor], fold: int, vectors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """a (B,) and the logarithms of the lengths (B, n), measured with the Gaussians of one fold."""
    found = {
        name: distances_to_gaussians(under(f"{fold}/{name}", state), values).mean(dim=1)
        for name, values in vectors.items()
    }
    lengths = [length for name, length in found.items() if name != _BOTH]
    if _BOTH in found:
        start, field = (vectors[f"grid/{name}"].double().flatten(1).norm(dim=1) for name in ("start", "field"))
        lengths.append(torch.maximum(field, smallest_length(start)))
    return found.get(_BOTH, found["grid/start"]), torch.stack(lengths, dim=1).clamp(min=_TINY).log()
