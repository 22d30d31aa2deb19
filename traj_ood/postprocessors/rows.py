"""Products on a fixed number of rows: one shape, one rounding, whatever the batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from traj_ood.engine import apply_in_chunks

ROWS = 128
"""Rows of every product of a scorer."""


def in_rows(function: Callable[[Tensor], Tensor], inputs: Tensor, rows: int = ROWS) -> Tensor:
    """``function`` on ``inputs`` (B, …), exactly ``rows`` at a time.

    While a graph is recorded for export B is a symbol and cannot be cut into rows: ``function`` then sees all of
    them, and the graph's scores follow the batch as far as rounding goes.
    """
    if torch.compiler.is_compiling():
        return function(inputs)
    return apply_in_chunks(function, inputs, rows)
