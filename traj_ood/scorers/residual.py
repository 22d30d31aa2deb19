"""Residual: the part of a feature outside the principal space of the training features (Wang et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from traj_ood.errors import TrajOODError
from traj_ood.scorers.base import Evidence
from traj_ood.scorers.covariance import moments
from traj_ood.scorers.head import HeadScorer
from traj_ood.scorers.registry import register
from traj_ood.scorers.rows import in_rows

# A residual below this share of the features' length is rounding: it is the square root of an eigenvalue near 0.
_NO_RESIDUAL = 1e-6


@dataclass
class ResidualSpace(HeadScorer):
    """Features seen from u = −W⁺b, where the logits vanish, in the space that their principal directions leave over.

    Args:
        dim: of the principal space. None (default) is the rule of the ViM authors' code by the n features of the
            backbone: 1,000 where n >= 2,048, 512 where n >= 768, else n / 2.
    """

    at_least: ClassVar = {"dim": 1}
    dim: int | None = None

    def residual_space(self, train: Evidence) -> dict[str, Tensor]:
        """``origin`` u (n,) and ``residual`` R (n, n − dim), float64.

        Raises:
            TrajOODError: no head, too wide a principal space, or training features that lie within it.
        """
        weight, bias = self.head_of(train)
        features = self.features(train)
        origin = -torch.linalg.pinv(weight) @ bias
        together = torch.zeros(len(features), dtype=torch.int64)
        _, vectors = torch.linalg.eigh(moments(features, origin[None], together).covariance)  # ascending
        residual = vectors[:, : features.shape[1] - self._principal(features.shape[1])].contiguous()
        state = {"origin": origin, "residual": residual}
        lengths, whole = residual_lengths(state, features), residual_lengths({"origin": origin}, features)
        if float(lengths.mean()) <= _NO_RESIDUAL * float(whole.mean()):
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
    """(B,) float64 lengths of features (B, n) less the origin, in the residual space where ``state`` has one."""

    def length(part: Tensor) -> Tensor:
        offsets = part.double() - state["origin"]
        return (offsets @ state["residual"] if "residual" in state else offsets).norm(dim=1)

    return in_rows(length, features)


@register
@dataclass
class Residual(ResidualSpace):
    """‖(h − u) R‖: OpenOOD's ``residual`` of the same ``dim`` with the sign turned, the residual alone of ViM (Wang et
    al. 2022).

    OpenOOD learns R from ID validation images; here, as ViM does, from those of the fit.

    Args:
        dim: see :class:`ResidualSpace`. OpenOOD's own setting is 512.
    """

    name: ClassVar[str] = "residual"
    summary: ClassVar[str] = "length of the backbone's feature outside its principal space (Wang et al. 2022)"
    suite: ClassVar[dict[str, int]] = {"": 635}

    def learn(self, train: Evidence) -> dict[str, Tensor]:
        return self.residual_space(train)

    def score(self, evidence: Evidence) -> Tensor:
        return residual_lengths(self.state, self.features(evidence))
