"""DiffPath: sums of powers of the score and of its change along a path (Heng et al. 2024), adapted to f."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from traj_ood.scorers.registry import register
from traj_ood.scorers.relatives import FieldStatistics


@register
@dataclass
class DiffPath(FieldStatistics):
    """−log density of the six sums Σ v, Σ v², Σ v³, Σ ∂v, Σ (∂v)², Σ (∂v)³ over steps and coordinates.

    DiffPath-6D (Heng, Thiery and Soh, NeurIPS 2024) as in the authors' code, which sums a diffusion model's ε_t along
    its ODE. Here v_t replaces ε_t, ∂v = T · (v_{t+1} − v_t) with T the number of steps, and the number of mixture
    components is chosen by BIC instead of cross-validation.
    """

    name: ClassVar[str] = "diffpath"
    summary: ClassVar[str] = "density of powers of the field and of its change (DiffPath, Heng et al. 2024, for f)"
    suite: ClassVar[dict[str, int]] = {"": 181}

    def statistics(self, field: Tensor) -> Tensor:
        change = self.steps * field.diff(dim=1)
        each = [part.flatten(1).pow(power).sum(dim=1) for part in (field, change) for power in (1, 2, 3)]
        return torch.stack(each, dim=1)
