"""Compare the scores and the speed of an exported file with the detector's."""

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
"""Largest accepted relative difference. float32 rounds at 6e-8, other kernels add in another order, and steps of f
amplify the difference."""
_SIDE = 96  # of the crops in pixels, before the model's transform
_PHOTOS, _TEXTURES = 20, 10  # numbers of crops
_SECONDS, _REPEATS = 1.0, 20  # limits of one timing


@dataclass(frozen=True)
class Agreement:
    """Comparison of an exported file with the detector."""

    images: int  # compared
    difference: float  # largest :func:`relative_difference` of their scores
    one: tuple[float, float]  # median milliseconds per call for one image: of the file, of the detector
    many: tuple[float, float]  # likewise for all images


def real_images(autoencoder: Autoencoder) -> Tensor:
    """(32, C, H, W) float32 pixels in [0, 1]: crops of scikit-image's photographs and textures, one black, one
    white."""
    photos = crops(PHOTOS, PHOTO_SIDES, "photos", scaled_to=_SIDE, mode="RGB")
    textures = crops(TEXTURES, TEXTURE_SIDES, "textures", scaled_to=_SIDE, mode="RGB")
    images = [photos.load(i) for i in range(_PHOTOS)] + [textures.load(i) for i in range(_TEXTURES)]
    images += [Image.new("RGB", (_SIDE, _SIDE), shade) for shade in ("black", "white")]
    preprocessing = autoencoder.preprocessing
    assert preprocessing is not None  # as_module has checked it
    return torch.stack([preprocessing.pixels(image) for image in images]).float() / 255


def relative_difference(got: Tensor, expected: Tensor) -> float:
    """max |a − b| / max(|b|, median |b|) over scores a = ``got`` and b = ``expected``, (B,) each.

    The median keeps scores near zero, which two-sided scores and logarithms can have, from needing more digits than
    they have. Infinite if only one of a and b is finite, or if neither is and they differ.
    """
    both = got.isfinite() & expected.isfinite()
    same = both | (got == expected)
    if got.shape != expected.shape or not bool(same.all()):
        return float("inf")
    sizes = expected[both].abs()
    if not len(sizes):
        return 0.0
    scale = sizes.clamp(min=float(sizes.median())).clamp(min=torch.finfo(torch.float64).tiny)
    return float(((got[both] - expected[both]).abs() / scale).max())


def agreement(file: Runner, detector: Runner, few: Runner, pixels: Tensor) -> Agreement:
    """Compare and time a file and a detector on pixels (B, C, H, W), as one batch and one image alone.

    ``detector`` calls the model in whole chunks, from which scores may differ least; ``few`` as
    :meth:`traj_ood.Detector.score` does, which is what takes a user's time.
    """
    expected = detector(pixels)
    alone = torch.cat([file(pixels[:1]), expected[1:]])
    difference = max(relative_difference(file(pixels), expected), relative_difference(alone, expected))
    one, many = ((_median_time(file, pixels[:n]), _median_time(few, pixels[:n])) for n in (1, len(pixels)))
    return Agreement(len(pixels), difference, one, many)


def _median_time(run: Runner, images: Tensor) -> float:
    """Median milliseconds of a call, after one to warm up."""
    run(images)
    taken: list[float] = []
    while len(taken) < _REPEATS and (sum(taken) < 1000 * _SECONDS or len(taken) < 3):
        start = time.perf_counter()
        run(images)
        taken.append(1000 * (time.perf_counter() - start))
    return sorted(taken)[len(taken) // 2]
