"""Residual: the norm of a feature outside the principal space of the training features (Wang et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from traj_ood.errors import TrajOODError
from traj_ood.scorers.base import Evidence
from traj_ood.scorers.covariance import covariance
from traj_ood.scorers.head import HeadScorer
from traj_ood.scorers.registry import register
from traj_ood.scorers.rows import in_rows

# A mean residual below this share of the features' length is rounding: the square root of an eigenvalue near 0.
_MIN_RESIDUAL = 1e-6


@dataclass
class ResidualSpace(HeadScorer):
    """Base class of scorers that use the residual space of ViM, the complement of the principal space of the features.

    The principal space is spanned by the ``dim`` principal directions of the training features around the origin
    u = −W⁺b, where the classifier's logits vanish.

    Args:
        dim: dimension of the principal space. None (default) follows the ViM authors' code: for n features, 1,000 if
            n >= 2,048, 512 if n >= 768, else n / 2.
    """

    at_least: ClassVar = {"dim": 1}
    dim: int | None = None

    def learn(self, train: Evidence) -> dict[str, Tensor]:
        """Fit ``origin`` u (n,) and ``residual`` R (n, n − dim), an orthonormal basis of the residual space; float64.

        Raises:
            TrajOODError: no head, dim >= n, or training features that lie within the principal space.
        """
        weight, bias = self.head_of(train)
        features = self.features(train)
        origin = -torch.linalg.pinv(weight) @ bias
        _, vectors = torch.linalg.eigh(covariance(features, origin[None], shrink=False))  # ascending
        residual = vectors[:, : features.shape[1] - self._principal(features.shape[1])].contiguous()
        state = {"origin": origin, "residual": residual}
        lengths, whole = residual_lengths(state, features), residual_lengths({"origin": origin}, features)
        if float(lengths.mean()) <= _MIN_RESIDUAL * float(whole.mean()):
            dim = features.shape[1] - residual.shape[1]
            raise TrajOODError(
                f"scorer {self.label}: the {len(features)} training images lie in their {dim} principal directions and "
                "leave no residual: use more training images or a smaller dim"
            )
        return state

    def _principal(self, width: int) -> int:
        if self.dim is None:
            return 1000 if width >= 2048 else 512 if width >= 768 else width // 2
        if self.dim >= width:
            raise TrajOODError(f"scorer {self.label}: dim must be below the {width} features, got {self.dim}")
        return self.dim


def residual_lengths(state: dict[str, Tensor], features: Tensor) -> Tensor:
    """Norms ‖(h − u) R‖, (B,) float64, of features h (B, n); ‖h − u‖ if ``state`` holds no ``residual``."""

    def length(part: Tensor) -> Tensor:
        offsets = part.double() - state["origin"]
        return (offsets @ state["residual"] if "residual" in state else offsets).norm(dim=1)

    return in_rows(length, features)


@register
@dataclass
class Residual(ResidualSpace):
    """Norm ‖(h − u) R‖ of the feature in the residual space: the residual term of ViM alone (Wang et al. 2022).

    Equals OpenOOD's ``residual`` of the same ``dim``, negated, except that OpenOOD learns R from ID validation images;
    here R is learnt from the training images, as in ViM.

    Args:
        dim: see :class:`ResidualSpace`. OpenOOD's own setting is 512.
    """

    name: ClassVar[str] = "residual"
    summary: ClassVar[str] = "length of the backbone's feature outside its principal space (Wang et al. 2022)"
    suite: ClassVar[dict[str, int]] = {"": 635}

    def score(self, evidence: Evidence) -> Tensor:
        return residual_lengths(self.state, self.features(evidence))
