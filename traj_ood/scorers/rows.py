"""Apply a function to a few rows at a time, for float64 scores without a float64 copy of all features."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

ROWS = 128


def in_rows(function: Callable[[Tensor], Tensor], inputs: Tensor, rows: int = ROWS) -> Tensor:
    """Apply ``function`` to ``inputs`` (B, …), at most ``rows`` rows at a time, and concatenate the results.

    While a graph is traced for export B is symbolic and cannot be split: ``function`` then gets all rows at once.
    """
    if torch.compiler.is_compiling() or len(inputs) <= rows:
        return function(inputs)
    return torch.cat([function(part) for part in inputs.split(rows)])
