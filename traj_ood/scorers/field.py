"""How far a sample and the vector field at it lie from those of training images, and how unusual that distance is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from traj_ood.autoencoders import FeatureView
from traj_ood.errors import TrajOODError
from traj_ood.scorers.base import Evidence, Needs, Scorer
from traj_ood.scorers.folds import folds
from traj_ood.scorers.gaussians import distances_to_gaussians, learn_gaussians
from traj_ood.scorers.path import smallest_length
from traj_ood.scorers.registry import register

_VIEWS: tuple[FeatureView, ...] = ("grid", "mean")
_FOLDS = 2
_MIN_IMAGES = 8
_TINY = 1e-12
_BOTH = "both"  # (z_0, v), whose distance is a and no length of b


@register
@dataclass
class Field(Scorer):
    """score = a / E[a] + b / E[b], from one step of f; expectations over ID training images.

    With the field v = f(z_0) − z_0, in each view one Ledoit–Wolf Gaussian for each cell (see ``early-path``):

    * a is the distance of (z_0, v) to its Gaussians: large where a sample or the field at it lies far out;
    * b is the Mahalanobis distance of the logarithms of five lengths, those of z_0 and of v to their Gaussians in the
      views ``grid`` and ``mean``, and ‖v‖: large also where they are unusually *small*.

    Reason: v says how the model corrects the sample. That it approximates the score ∇ log p of the latent density
    (Theorem 1, §3.1) explains little of it: a gradient has a symmetric Jacobian, and that of f is far from it on
    the bundled model (the antisymmetric part has 0.7 of the length of the symmetric one, of a random matrix 1; not
    recorded). Distances alone miss images simpler than the training images (blurred, smooth, one colour): they lie
    nearer to the mean than any training image, where a high-dimensional Gaussian has its mode and next to none of
    its mass. b, being a density of distances, sees both sides.

    Each half of the training images is measured by the Gaussians of the other half, as a new image will be; a score is
    the mean over both. The halves are drawn at random, whatever the order of the images: lists are often sorted by
    class, or alternate between the two kinds of a pair. The form (one step, equal weights) was chosen on self-made
    outliers of ID validation images (blends, jigsaws, rotations, inversions, blurs, CutMix), see results/README.md.

    With fewer than about 20 training images b drowns a, because its mean over the images it was learnt from is then far
    below that of new ones: ``early-path`` is the better choice there (docs/choices.md).

    Cost: one evaluation of f, and 16 · (2d)² numbers for latents of d dimensions a token.

    Args:
        start_only: control, default false: the same form without the field, a from z_0 alone and b from its two
            distances. It costs no evaluation of f; what ``field`` detects beyond it is owed to v. That it looks at
            both sides is not.
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
                f"scorer {self.label}: expected at least {_MIN_IMAGES} training images, got {count}: each half of them "
                "measures the other"
            )

    def learn(self, train: Evidence) -> dict[str, Tensor]:
        parts = _Parts.of(train, self.start_only)
        self.check_training_size(len(parts))
        fold = folds(parts.vectors["grid/start"], _FOLDS)
        state: dict[str, Tensor] = {}
        for k in range(_FOLDS):
            for name, vectors in parts.vectors.items():
                learnt = learn_gaussians(vectors[fold == k])
                state |= {f"{k}/{name}/{key}": value for key, value in learnt.items()}
            held_out = parts.select(fold != k)
            far, lengths = _distances(state, k, held_out)
            learnt = learn_gaussians(lengths)
            state |= {f"{k}/lengths/{key}": value for key, value in learnt.items()}
            odd = distances_to_gaussians(learnt, lengths)[:, 0]
            state[f"{k}/scale"] = torch.stack([far.mean(), odd.mean()]).clamp(min=_TINY)
        return state

    def score(self, evidence: Evidence) -> Tensor:
        return self.terms(evidence).sum(dim=1)

    def terms(self, evidence: Evidence) -> Tensor:
        """(B, 2) float64: a / E[a] and b / E[b], means over both halves."""
        parts, halves = _Parts.of(evidence, self.start_only), []
        for k in range(_FOLDS):
            far, lengths = _distances(self.state, k, parts)
            odd = distances_to_gaussians(_under(self.state, f"{k}/lengths"), lengths)[:, 0]
            halves.append(torch.stack([far, odd], dim=1) / self.state[f"{k}/scale"])
        return torch.stack(halves).mean(dim=0)


@dataclass(frozen=True)
class _Parts:
    """What is measured of B images.

    Attributes:
        vectors: name → (B, cells, d), or (B, d); by their distance to their Gaussians.
        far: the one of them whose distance is a.
        length: (B,) float64 ‖v‖, at least the rounding of z_0; None where the field is left out.
    """

    vectors: dict[str, Tensor]
    far: str
    length: Tensor | None

    @staticmethod
    def of(evidence: Evidence, start_only: bool) -> _Parts:
        grid = evidence.features["grid"]
        # The views of a latent of one token are the same, and say nothing twice.
        views = _VIEWS if grid.ndim == 3 and grid.shape[1] > 1 else _VIEWS[:1]
        vectors = {f"{view}/start": evidence.features[view].cpu() for view in views}
        if start_only:
            return _Parts(vectors, "grid/start", None)
        for view in views:
            vectors[f"{view}/field"] = evidence.points[view, 1].cpu() - vectors[f"{view}/start"]
        vectors[_BOTH] = torch.cat([vectors["grid/start"], vectors["grid/field"]], dim=-1)
        start, field = (vectors[f"grid/{name}"].double().flatten(1).norm(dim=1) for name in ("start", "field"))
        return _Parts(vectors, _BOTH, torch.maximum(field, smallest_length(start)))

    def __len__(self) -> int:
        return len(self.vectors["grid/start"])

    def select(self, rows: Tensor) -> _Parts:
        vectors = {name: v[rows] for name, v in self.vectors.items()}
        return _Parts(vectors, self.far, None if self.length is None else self.length[rows])


def _distances(state: dict[str, Tensor], fold: int, parts: _Parts) -> tuple[Tensor, Tensor]:
    """a (B,), and the logarithms of the lengths (B, n), by the Gaussians of one fold."""
    found = {
        name: distances_to_gaussians(_under(state, f"{fold}/{name}"), vectors).mean(dim=1)
        for name, vectors in parts.vectors.items()
    }
    lengths = [length for name, length in found.items() if name != _BOTH]
    lengths += [] if parts.length is None else [parts.length]
    return found[parts.far], torch.stack(lengths, dim=1).clamp(min=_TINY).log()


def _under(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key: state[f"{prefix}/{key}"] for key in ("means", "factors")}
