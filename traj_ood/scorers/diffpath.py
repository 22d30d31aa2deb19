"""DiffPath: sums of powers of the score and of its change along a path (Heng et al. 2024), carried over to f."""

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
    """−log density of six numbers: Σ v, Σ v², Σ v³ and Σ ∂v, Σ (∂v)², Σ (∂v)³ over steps and coordinates.

    DiffPath-6D (Heng, Thiery and Soh, NeurIPS 2024), as the authors' code sums a diffusion model's ε_t along its ODE,
    with v_t in the place of ε_t, and ∂v = T · (v_{t+1} − v_t), T the number of steps. BIC chooses the mixture's
    components where they use cross-validation.
    """

    name: ClassVar[str] = "diffpath"
    summary: ClassVar[str] = "density of powers of the field and of its change (DiffPath, Heng et al. 2024, for f)"
    suite: ClassVar[dict[str, int]] = {"": 181}

    def statistics(self, field: Tensor) -> Tensor:
        change = self.steps * field.diff(dim=1)
        each = [part.flatten(1).pow(power).sum(dim=1) for part in (field, change) for power in (1, 2, 3)]
        return torch.stack(each, dim=1)
