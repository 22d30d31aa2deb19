"""Identifies a callable by its outputs for fixed inputs, if it has no weights, options or files to identify it by."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor

_SIZES = ((61, 47), (300, 411))  # width and height: below and above usual network inputs, and not square
_PROJECTIONS = 8
_TOLERANCE = 0.01  # relative: devices and TF32 differ by 1e-3, different functions by the whole value


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


def answers(function: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> list[float | None]:
    """A few numbers that characterise a function: inner products of its output for one fixed image with fixed waves.

    Compare them with :func:`agree`, because devices round differently.

    Args:
        function: images (1, \\*shape) → tensor.
        shape: shape of the image.
    Returns:
        8 numbers, None in place of non-finite ones.
    """
    place = torch.arange(math.prod(shape), dtype=torch.float64)
    image = torch.sin(0.37 * place + (0.011 * place).square()).float().reshape(1, *shape)
    made = function(image).detach().cpu().double().flatten()
    waves = torch.sin(torch.outer(torch.arange(1, _PROJECTIONS + 1).double(), torch.arange(len(made)).double() + 1))
    return [v if math.isfinite(v) else None for v in (waves @ made / math.sqrt(len(made))).tolist()]


def agree(expected: object, found: Sequence[float | None]) -> bool:
    """Whether two lists of :func:`answers` agree up to rounding, relative to the largest value."""
    if not isinstance(expected, list) or len(expected) != len(found):
        return False
    scale = max((abs(value) for value in found if value is not None), default=0.0)
    for one, other in zip(expected, found, strict=True):
        if one is None or other is None:
            if one is not other:
                return False
        elif not isinstance(one, (int, float)) or not abs(one - other) <= _TOLERANCE * scale:
            return False
    return True
