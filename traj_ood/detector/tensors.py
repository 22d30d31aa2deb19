"""Tensors in a detector's folder: what they must look like, and short digests of images."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from traj_ood.errors import TrajOODError


def specs_of(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """JSON-able dtype and shape by name."""
    return {key: {"dtype": str(t.dtype), "shape": list(t.shape)} for key, t in tensors.items()}


def read_tensors(
    path: Path,
    specs: Mapping[str, Any],
    required: Mapping[str, tuple[torch.dtype, int]] | None = None,
    finite: bool = True,
) -> dict[str, Tensor]:
    """The tensors of a safetensors file, which must be those that were written.

    Args:
        specs: :func:`specs_of` by the file's name. required: dtype and number of dimensions by tensor name.
        finite: refuse NaN and infinite values.
    Raises:
        TrajOODError: unreadable, or names, dtypes, shapes or values that are not as expected.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except Exception as error:  # safetensors has error classes of its own
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise TrajOODError(
            f"{path}: expected a safetensors file ({reason}): copy or save the detector again"
        ) from error
    found, expected = specs_of(tensors), specs.get(path.name)
    if found != expected:
        known = expected if isinstance(expected, dict) else {}
        key = next((k for k in sorted(found.keys() | known.keys()) if found.get(k) != known.get(k)), "-")
        raise TrajOODError(
            f"{path}: tensor {key[:60]}: expected {str(known.get(key))[:100]}, got {found.get(key)}: damaged"
        )
    for key, (dtype, dimensions) in (required or {}).items():
        if key not in tensors or tensors[key].dtype != dtype or tensors[key].ndim != dimensions:
            raise TrajOODError(f"{path}: tensor {key}: expected {dtype} of {dimensions} dimension(s): damaged")
    bad = [k for k, t in tensors.items() if finite and t.is_floating_point() and not bool(t.isfinite().all())]
    if bad:
        raise TrajOODError(f"{path}: tensor {bad[0]} holds NaN or infinite values: damaged, or fitted on such data")
    return tensors


def digests_of(images: Tensor) -> Tensor:
    """(B,) int64: the first 8 bytes of the sha256 of each image's float32 pixels, to know an image again."""
    rows = images.detach().cpu().float().contiguous()
    words = [hashlib.sha256(row.numpy().tobytes()).digest()[:8] for row in rows]
    return torch.tensor([int.from_bytes(word, "little", signed=True) for word in words], dtype=torch.int64)
