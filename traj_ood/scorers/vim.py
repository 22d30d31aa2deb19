"""ViM: virtual-logit matching, which combines features and logits (Wang et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from traj_ood.errors import warn
from traj_ood.scorers.base import Evidence
from traj_ood.scorers.registry import register
from traj_ood.scorers.residual import ResidualSpace, residual_lengths


@register
@dataclass
class ViM(ResidualSpace):
    """Virtual logit plus energy: α ‖(h − u) R‖ − log Σ_c exp f_c, in float64.

    h are the features of the frozen backbone and f its logits. The logits vanish at the origin u = −W⁺b; R spans the
    residual space, the orthogonal complement of the ``dim`` principal directions of the training features around u;
    α = Σ max_c f_c / Σ ‖(h − u) R‖ over the training images scales the virtual logit to the other logits. Equals
    pytorch-ood's ``ViM``, and OpenOOD's ``vim`` negated, of the same ``dim``.

    If the training images' largest logits are negative on average, as in classifiers trained with a binary
    cross-entropy, the published α is negative and a large residual counts as ID; a warning is issued.

    Args:
        dim: dimension of the principal space. None (default) follows the authors' code: for n features, 1,000 if
            n >= 2,048, 512 if n >= 768, else n / 2. OpenOOD's own setting is 256.
    """

    name: ClassVar[str] = "vim"
    summary: ClassVar[str] = "virtual-logit matching: residual of the backbone's features and energy (Wang et al. 2022)"
    suite: ClassVar[dict[str, int]] = {"": 630}

    def learn(self, train: Evidence) -> dict[str, Tensor]:
        state = super().learn(train)
        lengths = residual_lengths(state, self.features(train))
        alpha = train.class_logits().amax(dim=1).mean() / lengths.mean()
        if alpha <= 0:
            warn(
                f"scorer {self.label}: the training images' largest logit is negative on average, so ViM's alpha is "
                f"negative ({float(alpha):.3g}) and a large residual counts as ID",
                stacklevel=2,
            )
        return state | {"alpha": alpha[None]}

    def score(self, evidence: Evidence) -> Tensor:
        virtual = self.state["alpha"] * residual_lengths(self.state, self.features(evidence))
        return virtual - evidence.class_logits().logsumexp(dim=1)
