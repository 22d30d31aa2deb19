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
_MODES = ("L", "RGB")
_PROJECTIONS = 8
_TOLERANCE = 3e-3  # relative: float32 differs by 1e-5 between processors, TF32 by 1e-3


def transform_digest(transform: Callable[[Image.Image], Tensor], shape: Sequence[int]) -> str:
    """SHA-256 (hex) of a transform's outputs for fixed grey and colour images; if it takes none of these, also for
    images of the size of ``shape`` (C, H, W), its own output's.

    If it raises an error, the error's class counts as the output. A random transform has a different digest each time.
    """
    outputs = [_output(transform, mode, size) for mode in _MODES for size in _SIZES]
    if all(content is None for _, content in outputs):
        outputs += [_output(transform, mode, (shape[2], shape[1])) for mode in _MODES]
    return hashlib.sha256(b"".join(kind.encode() + (content or b"") for kind, content in outputs)).hexdigest()


def _output(transform: Callable[[Image.Image], Tensor], mode: str, size: tuple[int, int]) -> tuple[str, bytes | None]:
    """The kind of a transform's output for an image and its bytes, or the name of its error and None."""
    pixels = (torch.arange(math.prod(size) * len(mode), dtype=torch.float64) * 0.37).sin().add(1).mul(127.5)
    image = Image.frombytes(mode, size, pixels.to(torch.uint8).numpy().tobytes())
    try:
        made = transform(image).detach().cpu().contiguous()
        return f"{made.dtype}{tuple(made.shape)}", made.numpy().tobytes()
    except Exception as error:  # a user's transform may raise anything
        return type(error).__name__, None


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
