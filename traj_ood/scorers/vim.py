"""ViM: virtual-logit matching (Wang et al. 2022), features and logits together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from traj_ood.errors import TrajOODError, warn
from traj_ood.scorers.base import Evidence, Needs, Scorer
from traj_ood.scorers.covariance import moments
from traj_ood.scorers.registry import register
from traj_ood.scorers.rows import in_rows

# A residual below this share of the features' length is rounding: it is the square root of an eigenvalue near 0.
_NO_RESIDUAL = 1e-6


@register
@dataclass
class ViM(Scorer):
    """α ‖(x − u) R‖ − log Σ_c exp f_c, all in float64.

    x are the features of the frozen backbone and f its logits. The origin u = −W⁺b is where the classifier's logits
    vanish; R spans the residual space, what is orthogonal to the ``dim`` principal directions of the training features
    around u; α = Σ max_c f_c / Σ ‖(x − u) R‖ over the training images brings the virtual logit to the scale of the
    others. Equals pytorch-ood's ``ViM``, and OpenOOD's ``vim`` with the sign turned, of the same ``dim``.

    Where the training images' largest logits are negative on average, as classifiers trained with a binary
    cross-entropy may have them, the published α is negative and a large residual counts as ID: a warning says so.

    Args:
        dim: of the principal space. None (default) is the rule of the authors' code by the n features of the backbone:
            1,000 where n >= 2,048, 512 where n >= 768, else n / 2. OpenOOD's own setting is 256.
    """

    name: ClassVar[str] = "vim"
    summary: ClassVar[str] = "virtual-logit matching: residual of the backbone's features and energy (Wang et al. 2022)"
    suite: ClassVar[dict[str, int]] = {"": 630}
    dim: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dim is not None and self.dim < 1:
            raise TrajOODError(f"scorer {self.name}: dim must be at least 1, got {self.dim}")

    def needs(self) -> Needs:
        return Needs(features=frozenset({"backbone"}), logits=True, head=True)

    def learn(self, train: Evidence) -> dict[str, Tensor]:
        if train.head is None:
            raise TrajOODError(f"scorer {self.label}: expected the classifier's weight and bias, got none")
        features = train.features["backbone"].cpu()
        weight, bias = (t.detach().cpu().double() for t in train.head)
        origin = -torch.linalg.pinv(weight) @ bias
        together = torch.zeros(len(features), dtype=torch.int64)
        _, vectors = torch.linalg.eigh(moments(features, origin[None], together).covariance)  # ascending
        residual = vectors[:, : features.shape[1] - self._principal(features.shape[1])].contiguous()
        state = {"origin": origin, "residual": residual}
        lengths, whole = _lengths(state, features), _lengths({"origin": origin}, features)
        if float(lengths.mean()) <= _NO_RESIDUAL * float(whole.mean()):
            dim = features.shape[1] - residual.shape[1]
            raise TrajOODError(
                f"scorer {self.label}: the {len(features)} training images lie in their {dim} principal directions and "
                "leave no residual: use more training images or a smaller dim"
            )
        alpha = train.class_logits().amax(dim=1).mean() / lengths.mean()
        if alpha <= 0:
            warn(
                f"scorer {self.label}: the training images' largest logit is negative on average, so ViM's alpha is "
                f"({float(alpha):.3g}) and far from the principal space counts as ID",
                stacklevel=2,
            )
        return state | {"alpha": alpha[None]}

    def score(self, evidence: Evidence) -> Tensor:
        virtual = self.state["alpha"] * _lengths(self.state, evidence.features["backbone"].cpu())
        return virtual - evidence.class_logits().logsumexp(dim=1)

    def _principal(self, width: int) -> int:
        if self.dim is None:
            return 1000 if width >= 2048 else 512 if width >= 768 else width // 2
        if self.dim >= width:
            raise TrajOODError(f"scorer {self.label}: dim must be below the {width} features, got {self.dim}")
        return self.dim


def _lengths(state: dict[str, Tensor], features: Tensor) -> Tensor:
    """(B,) float64 lengths of features (B, n) less the origin, in the residual space where ``state`` has one."""

    def length(part: Tensor) -> Tensor:
        offsets = part.double() - state["origin"]
        return (offsets @ state["residual"] if "residual" in state else offsets).norm(dim=1)

    return in_rows(length, features)
