"""Grids of points in the plane, and the part of the plane that is worth looking at."""

from __future__ import annotations

import torch
from torch import Tensor

_MARGIN = 0.5  # of the support's extent, on each side of the box
_SHARE = 0.005  # of the codes that may lie outside the support, at each end of each axis


def plane(low: Tensor, high: Tensor, side: int) -> Tensor:
    """(side², 2) float64 points of a grid between two corners (2,), the first coordinate running fastest."""
    xs, ys = (torch.linspace(float(a), float(b), side, dtype=torch.float64) for a, b in zip(low, high, strict=True))
    return torch.stack([xs.repeat(side), ys.repeat_interleave(side)], dim=1)


def box(codes: Tensor, reach: float) -> tuple[Tensor, Tensor]:
    """Two opposite corners (2,) of the square box: [−reach, reach]², or for reach 0 one fitted to ``codes`` (B, 2).

    The fit spans the central 99 % of the codes and half of that on each side, and is never empty.
    """
    if reach > 0:
        return torch.full((2,), -reach), torch.full((2,), reach)
    codes = codes.double().cpu()
    low, high = (torch.quantile(codes, share, dim=0) for share in (_SHARE, 1 - _SHARE))
    half = max(float((high - low).max()) / 2 * (1 + 2 * _MARGIN), 1e-6 * float(codes.abs().max()), 1e-12)
    centre = (low + high) / 2
    return centre - half, centre + half
