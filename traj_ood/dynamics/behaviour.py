"""Identifies a callable by its outputs for fixed inputs, if it has no weights, options or files to identify it by."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

_SIZES = ((61, 47), (300, 411))  # width and height: below and above usual network inputs, and not square
_PROJECTIONS = 8
_TOLERANCE = 3e-3  # relative: float32 differs by 1e-5 between processors, TF32 by 1e-3


def transform_digest(transform: Callable[[Image.Image], Tensor]) -> str:
    """SHA-256 (hex) of a transform's outputs for fixed grey and colour images.

    If it raises an error, the error's class counts as the output. A random transform has a different digest each time.
    """
    digest = hashlib.sha256()
    for mode, (width, height) in ((mode, size) for mode in ("L", "RGB") for size in _SIZES):
        channels = len(mode)
        pixels = (torch.arange(height * width * channels, dtype=torch.float64) * 0.37).sin().add(1).mul(127.5)
        image = Image.frombytes(mode, (width, height), pixels.to(torch.uint8).numpy().tobytes())
        try:
            made = transform(image).detach().cpu().contiguous()
            digest.update(f"{made.dtype}{tuple(made.shape)}".encode() + made.numpy().tobytes())
        except Exception as error:  # a user's transform may raise anything
            digest.update(type(error).__name__.encode())
    return digest.hexdigest()


def answers(function: Callable[[Tensor], Sequence[Tensor]], shape: tuple[int, ...]) -> list[list[float]]:
    """A few numbers that characterise a function: for each of its outputs for one fixed image, inner products with
    fixed waves.

    Compare them with :func:`agree`, because devices round differently.

    Args:
        function: images (1, \\*shape) → tensors.
        shape: shape of the image.
    Returns:
        8 numbers for each output, whose values that are not finite count as 0.
    """
    image = waves(1, math.prod(shape)).float().reshape(1, *shape)
    found = []
    for output in function(image):
        values = output.detach().cpu().double().flatten().nan_to_num(0.0, 0.0, 0.0)
        found.append((waves(_PROJECTIONS, len(values)) @ values / math.sqrt(max(1, len(values)))).tolist())
    return found


def waves(count: int, length: int) -> Tensor:
    """Waves (count, length) whose frequency grows, so that each has a share in smooth and in rough images alike."""
    place = torch.arange(length, dtype=torch.float64)
    frequencies = 0.37 * torch.arange(1, count + 1, dtype=torch.float64)[:, None]
    return torch.sin(frequencies * place + (0.011 * place).square())


def agree(expected: object, found: Sequence[Sequence[float]]) -> bool:
    """Whether two lists of :func:`answers` agree up to rounding, relative to the largest value of each output."""
    try:
        pairs = [(np.array(a, np.float64), np.array(b)) for a, b in zip(expected, found, strict=True)]  # type: ignore[call-overload]
    except (TypeError, ValueError):  # other data, or of an older version
        return False
    return all(a.shape == b.shape and bool((abs(a - b) <= _TOLERANCE * abs(b).max()).all()) for a, b in pairs)
