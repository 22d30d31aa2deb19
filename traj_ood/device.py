"""Where to compute, and how exactly."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from traj_ood.errors import TrajOODError


def resolve_device(name: str = "auto", *, tf32: bool = False) -> torch.device:
    """``auto`` takes CUDA, then MPS, then the CPU; any other name must be a device that is there.

    Args:
        name: auto, cpu, cuda, cuda:1, mps.
        tf32: whether CUDA may round the factors of fp32 products to TF32; see :func:`set_tf32`, which is called for
            CUDA devices only.
    Raises:
        TrajOODError: unknown device name, or one this machine lacks.
    """
    device = _find(name)
    if device.type == "cuda":
        set_tf32(tf32)
    return device


def _find(name: str) -> torch.device:
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps", "xpu"):
            raise RuntimeError("it computes nothing")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise TrajOODError(f"device {name!r} is not available here ({reason}): use auto, cpu, cuda or mps") from error
    return device


def set_tf32(allowed: bool) -> None:
    """Allow or forbid TF32 in matrix products and convolutions, for the whole process.

    Off is traj_ood's default and not torch's, which lets cuDNN's convolutions use it (a ViT's patch embedding is
    one): TF32 keeps 10 bits of a factor's mantissa, and steps as short as the paper's tolerance need more.

    Torch 2.9 brought a second way to say so (``fp32_precision``), and raises in the older getters once the two
    disagree. Setting both, the older first, leaves them agreed whatever was set before.
    """
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed
    for operation in ("conv", "rnn"):
        setting = getattr(torch.backends.cudnn, operation, None)  # None before torch 2.9
        if setting is not None:
            setting.fp32_precision = "tf32" if allowed else "ieee"


def bfloat16_map(self_map: Callable[[Tensor], Tensor], device: torch.device | str) -> Callable[[Tensor], Tensor]:
    """``self_map`` (n, *L) → (n, *L) under bfloat16 autocast, for :class:`traj_ood.engine.LowPrecision`.

    Matrix products and convolutions round their factors to 8 bits; softmax, LayerNorm and the weights stay fp32, and
    so does the type of what comes out. On its own it never meets the paper's tolerance.

    Args:
        self_map: f on fp32 latents.
        device: where f runs.
    Raises:
        TrajOODError: neither the CPU nor a CUDA device with bfloat16.
    """
    kind = torch.device(device).type
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not torch.cuda.is_bf16_supported()):
        raise TrajOODError(f"bfloat16 steps: expected the CPU or a CUDA device with bfloat16, got {device}: use fp32")

    def low(latents: Tensor) -> Tensor:
        # No cache of cast weights: f uses each weight once, and a cache would outlive this call in an outer autocast.
        with torch.autocast(kind, dtype=torch.bfloat16, cache_enabled=False):
            return self_map(latents).to(latents.dtype)

    return low
