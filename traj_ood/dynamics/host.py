"""Transfers between device and host. Every read of the engine goes through :func:`to_host`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_host(values: Sequence[Tensor]) -> list[Tensor]:
    """Float64 copies, on the CPU, of tensors on a device or on the CPU, in a single transfer, for which the host waits
    once.

    On CUDA the transfer uses page-locked memory, so that the host waits only for the computation of these values.
    """
    held = [value for value in values if value.device.type != "cpu"]
    if not held:
        return [value.double() for value in values]
    flat = torch.cat([value.flatten() for value in held])
    if flat.device.type == "cuda":
        pinned = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
        pinned.copy_(flat, non_blocking=True)
        torch.cuda.current_stream(flat.device).synchronize()
        flat = pinned
    parts = iter(flat.cpu().double().split([value.numel() for value in held]))
    return [value.double() if value.device.type == "cpu" else next(parts).view(value.shape) for value in values]


def to_device(indices: Tensor, device: torch.device) -> Tensor:
    """Copy indices to the device; on CUDA from page-locked memory, so that the host does not wait."""
    if device.type == "cuda":
        return indices.pin_memory().to(device, non_blocking=True)
    return indices.to(device)


def where(mask: Tensor, device: torch.device) -> Tensor:
    """Indices, on the device, of the true elements of a mask (n,) on the CPU. With a mask on the device the host would
    wait for their number."""
    return to_device(mask.nonzero()[:, 0], device)
