"""Scores in float64 without a float64 copy of all features."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

ROWS = 128


def in_rows(function: Callable[[Tensor], Tensor], inputs: Tensor, rows: int = ROWS) -> Tensor:
    """``function`` on ``inputs`` (B, …), at most ``rows`` rows at a time.

    While a graph is recorded for export B is a symbol and cannot be cut into rows: ``function`` then sees all of them.
    """
    if torch.compiler.is_compiling() or len(inputs) <= rows:
        return function(inputs)
    return torch.cat([function(part) for part in inputs.split(rows)])
