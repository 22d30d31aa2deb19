"""ViM: virtual-logit matching (Wang et al. 2022), features and logits together."""

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

    def learn(self, train: Evidence) -> dict[str, Tensor]:
        state = self.residual_space(train)
        lengths = residual_lengths(state, self.features(train))
        alpha = train.class_logits().amax(dim=1).mean() / lengths.mean()
        if alpha <= 0:
            warn(
                f"scorer {self.label}: the training images' largest logit is negative on average, so ViM's alpha is "
                f"({float(alpha):.3g}) and far from the principal space counts as ID",
                stacklevel=2,
            )
        return state | {"alpha": alpha[None]}

    def score(self, evidence: Evidence) -> Tensor:
        virtual = self.state["alpha"] * residual_lengths(self.state, self.features(evidence))
        return virtual - evidence.class_logits().logsumexp(dim=1)
