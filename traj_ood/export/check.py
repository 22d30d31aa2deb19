"""Does an exported file say what the detector says, and how fast?"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from traj_ood.autoencoders import Autoencoder
from traj_ood.data.fashion import PHOTO_SIDES, PHOTOS, TEXTURE_SIDES, TEXTURES, crops
from traj_ood.export.formats import Runner

ALLOWED = 1e-4
"""Largest relative difference: float32 rounds at 6e-8, other kernels in another order, and steps of f pass it on."""
_SIDE = 96  # of the crops, before the model's own transform
_PHOTOS, _TEXTURES = 20, 10
_SECONDS, _REPEATS = 1.0, 20  # of one timing, at most


@dataclass(frozen=True)
class Agreement:
    """Of a file with the detector.

    Attributes:
        images: how many were compared. difference: the largest of :func:`relative_difference`.
        one, many: medians of milliseconds per call, for one image and for all of them: (file, detector) each.
    """

    images: int
    difference: float
    one: tuple[float, float]
    many: tuple[float, float]


def real_images(autoencoder: Autoencoder) -> Tensor:
    """(32, C, H, W) float32 in [0, 1]: crops of scikit-image's photographs and textures, one black, one white.

    Raises:
        TrajOODError: scikit-image's files are not there.
    """
    photos = crops(PHOTOS, PHOTO_SIDES, "photos", scaled_to=_SIDE, mode="RGB")
    textures = crops(TEXTURES, TEXTURE_SIDES, "textures", scaled_to=_SIDE, mode="RGB")
    images = [photos.load(i) for i in range(_PHOTOS)] + [textures.load(i) for i in range(_TEXTURES)]
    images += [Image.new("RGB", (_SIDE, _SIDE), shade) for shade in ("black", "white")]
    preprocessing = autoencoder.preprocessing
    assert preprocessing is not None  # a module has been made
    return torch.stack([preprocessing.pixels(image) for image in images]).float() / 255


def relative_difference(got: Tensor, expected: Tensor) -> float:
    """max |a − b| / max(|b|, median |b|): a score that happens to be near zero, as two-sided ones and logarithms may,
    is not held to more digits than it has. Infinite where only one is finite, or both are not and differ."""
    both = got.isfinite() & expected.isfinite()
    same = both | (got == expected)
    if got.shape != expected.shape or not bool(same.all()):
        return float("inf")
    sizes = expected[both].abs()
    if not len(sizes):
        return 0.0
    scale = sizes.clamp(min=float(sizes.median())).clamp(min=torch.finfo(torch.float64).tiny)
    return float(((got[both] - expected[both]).abs() / scale).max())


def agreement(file: Runner, detector: Runner, pixels: Tensor) -> Agreement:
    """Compare what a file says of pixels (B, C, H, W) with what the detector says of them, as one batch and alone, and
    time both."""
    expected = detector(pixels)
    alone = torch.cat([file(pixels[:1]), expected[1:]])
    difference = max(relative_difference(file(pixels), expected), relative_difference(alone, expected))
    one, many = ((_median_time(file, pixels[:n]), _median_time(detector, pixels[:n])) for n in (1, len(pixels)))
    return Agreement(len(pixels), difference, one, many)


def _median_time(run: Runner, images: Tensor) -> float:
    """Milliseconds of a call, after one to warm up."""
    run(images)
    taken: list[float] = []
    while len(taken) < _REPEATS and (sum(taken) < 1000 * _SECONDS or len(taken) < 3):
        start = time.perf_counter()
        run(images)
        taken.append(1000 * (time.perf_counter() - start))
    return sorted(taken)[len(taken) // 2]
