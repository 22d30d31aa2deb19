"""Grids of points in the plane, and the box of the plane that figures show."""

from __future__ import annotations

import torch
from torch import Tensor

_MARGIN = 0.5  # margin on each side, relative to the support's extent
_TAIL = 0.005  # share of the codes cut off at each end of each axis


def plane(low: Tensor, high: Tensor, side: int) -> Tensor:
    """The points of a square grid between two corners (2,), (side², 2) float64; the first coordinate varies fastest."""
    xs, ys = (torch.linspace(float(a), float(b), side, dtype=torch.float64) for a, b in zip(low, high, strict=True))
    return torch.stack([xs.repeat(side), ys.repeat_interleave(side)], dim=1)


def box(codes: Tensor, reach: float) -> tuple[Tensor, Tensor]:
    """Two opposite corners (2,) of a square box: [−reach, reach]², or if ``reach`` is 0 one fitted to ``codes`` (B, 2).

    The fitted box spans the central 99 % of the codes plus half of that extent on each side, and is never empty.
    """
    if reach > 0:
        return torch.full((2,), -reach), torch.full((2,), reach)
    codes = codes.double().cpu()
    low, high = (torch.quantile(codes, share, dim=0) for share in (_TAIL, 1 - _TAIL))
    half = max(float((high - low).max()) / 2 * (1 + 2 * _MARGIN), 1e-6 * float(codes.abs().max()), 1e-12)
    centre = (low + high) / 2
    return centre - half, centre + half
