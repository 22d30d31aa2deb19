"""Between the device that computes and the host that decides: every read of the engine goes through :func:`to_host`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_host(values: Sequence[Tensor]) -> list[Tensor]:
    """Float64 copies on the CPU, of what may be on a device: one transfer, for which the host waits once.

    On CUDA it goes through page-locked memory, so that nothing else is waited for than what the values need.
    """
    if all(value.device.type == "cpu" for value in values):
        return [value.double() for value in values]
    flat = torch.cat([value.flatten() for value in values])
    if flat.device.type == "cuda":
        pinned = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
        pinned.copy_(flat, non_blocking=True)
        torch.cuda.current_stream(flat.device).synchronize()
        flat = pinned
    parts = flat.cpu().double().split([value.numel() for value in values])
    return [part.view(value.shape) for part, value in zip(parts, values, strict=True)]


def to_device(places: Tensor, device: torch.device) -> Tensor:
    """Indices on the device; from page-locked memory on CUDA, so that nobody waits."""
    if device.type == "cuda":
        return places.pin_memory().to(device, non_blocking=True)
    return places.to(device)


def where(mask: Tensor, device: torch.device) -> Tensor:
    """Indices on the device of what a mask (n,) on the CPU says. A mask on the device would be counted there first, and
    the host would wait for the count."""
    return to_device(mask.nonzero()[:, 0], device)
