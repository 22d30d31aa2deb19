"""How fast this machine multiplies: what times are set against, so that they can be compared between machines."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


def product_rate(
    size: int,
    repeats: int = 5,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    clock: Callable[[], float] = time.process_time,
) -> float:
    """Floating-point operations a second of a product of two square matrices of ``size``; median of the repeats.

    ``clock`` is CPU time by default: that of one thread hardly depends on what else the machine does.
    """
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(repeats + 1):  # the first warms up
        wait_for(device)
        began = clock()
        left @ right
        wait_for(device)
        seconds.append(clock() - began)
    return 2 * size**3 / statistics.median(seconds[1:])


def wait_for(device: torch.device | str) -> None:
    """Until a GPU has done what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
