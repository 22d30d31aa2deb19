"""Verify the tensors in a detector's folder; digests of images."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from traj_ood.errors import TrajOODError
from traj_ood.io.tensor_file import open_tensors
from traj_ood.io.weights import all_finite


def specs_of(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """The dtype and shape of each tensor as JSON data."""
    return {key: {"dtype": str(t.dtype), "shape": list(t.shape)} for key, t in tensors.items()}


def check_tensors(path: Path, tensors: Mapping[str, Tensor], specs: Mapping[str, Any], finite: bool = True) -> None:
    """Check that the tensors of a file have the names, dtypes and shapes of ``specs``, which are :func:`specs_of` by
    file name, and are finite, unless ``finite`` is false."""
    found, expected = specs_of(tensors), specs.get(path.name)
    if found != expected:
        known = expected if isinstance(expected, dict) else {}
        key = next((k for k in sorted(found.keys() | known.keys()) if found.get(k) != known.get(k)), "-")
        raise TrajOODError(
            f"{path}: tensor {key[:60]}: expected {str(known.get(key))[:100]}, got {found.get(key)}: damaged"
        )
    bad = [k for k, t in tensors.items() if finite and t.is_floating_point() and not all_finite(t)]
    if bad:
        raise TrajOODError(f"{path}: tensor {bad[0]} has NaN or infinite values: damaged, or fitted on such data")


def read_column(path: Path, specs: Mapping[str, Any], name: str, dtype: torch.dtype) -> Tensor:
    """Read the one-dimensional tensor ``name`` of a file."""
    with open_tensors(path, "file of a detector", "copy or save the detector again") as file:
        check_tensors(path, file.tensors, specs)
        column = file.tensors.get(name)
        if column is None or column.dtype != dtype or column.ndim != 1:
            raise TrajOODError(f"{path}: tensor {name}: expected {dtype} of 1 dimension: damaged")
        return column


def digests_of(images: Tensor) -> Tensor:
    """(B,) int64: the first 8 bytes of the sha256 of each image's float32 pixels, to recognise images."""
    rows = images.detach().cpu().float().contiguous()
    words = [hashlib.sha256(row.numpy().tobytes()).digest()[:8] for row in rows]
    numbers = [int.from_bytes(word, "little", signed=True) for word in words]
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")
