"""Image statistics that depend on how a file was made; a control, not a detector.

Resolution, scaling and compression leave traces in the power spectrum and at the borders of JPEG blocks. A score made
of these traces alone shows how much of a result the file format may explain.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

NAMES = ("slope", "roughness", "blockiness", "size")
_BLOCK = 8
_TINY = 1e-12


def image_statistics(image: Image.Image) -> np.ndarray:
    """Four statistics of an image, computed on grey levels from 0 to 1; returns (4,) float64:

    * ``slope``: log power against log frequency, fitted by least squares over rings of the Fourier plane up to Nyquist
      (about −2 for natural photographs, 0 for white noise, steeper after blur or enlargement);
    * ``roughness``: log of the mean power in the upper half of these frequencies;
    * ``blockiness``: log of the mean step across the borders of 8 × 8 blocks over the mean step elsewhere (0 without
      blocks);
    * ``size``: log of the shorter side in pixels.
    """
    grey = np.asarray(image.convert("L"), dtype=np.float64) / 255
    side = min(grey.shape)
    top, left = (grey.shape[0] - side) // 2, (grey.shape[1] - side) // 2
    square = grey[top : top + side, left : left + side]
    power, rings = _ring_power(square - square.mean())
    logs = np.log(power + _TINY)
    slope = float(np.polyfit(np.log(rings), logs, 1)[0]) if len(rings) > 1 else 0.0
    rough = float(np.log(power[rings >= side / 4].mean() + _TINY)) if side >= 4 else 0.0
    return np.array([slope, rough, _blockiness(grey), np.log(side)])


def _ring_power(square: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean power in each ring 1 … side / 2 of the Fourier plane of a windowed square, and the radii of the rings."""
    side = len(square)
    window = np.hanning(side + 2)[1:-1]  # without it, the jump at the image's border adds its own slope
    power = np.abs(np.fft.fft2(square * window[:, None] * window)) ** 2
    frequency = np.fft.fftfreq(side) * side
    radius = np.rint(np.hypot(frequency[:, None], frequency)).astype(int)
    sums = np.bincount(radius.ravel(), power.ravel())
    counts = np.bincount(radius.ravel())
    rings = np.arange(1, max(2, side // 2 + 1))
    rings = rings[rings < len(sums)]
    return sums[rings] / counts[rings] / side**2, rings.astype(np.float64)


def _blockiness(grey: np.ndarray) -> float:
    border, inner = [], []
    for steps in (np.abs(np.diff(grey, axis=1)), np.abs(np.diff(grey, axis=0)).T):
        at_border = np.arange(steps.shape[1]) % _BLOCK == _BLOCK - 1
        if at_border.any() and (~at_border).any():
            border.append(steps[:, at_border].mean())
            inner.append(steps[:, ~at_border].mean())
    if not border:
        return 0.0
    floor = 1 / 255 / 100  # a hundredth of a grey level, so that flat images count as having no blocks
    return float(np.log((np.mean(border) + floor) / (np.mean(inner) + floor)))
