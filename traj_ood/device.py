"""Where to compute."""

from __future__ import annotations

import torch

from traj_ood.errors import TrajOODError


def resolve_device(name: str = "auto") -> torch.device:
    """``auto`` takes CUDA, then MPS, then the CPU; any other name must be a device that is there.

    Raises:
        TrajOODError: unknown device name, or one this machine lacks.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise TrajOODError(f"device {name!r} is not available here ({reason}): use auto, cpu, cuda or mps") from error
    return device
