"""What a model does to an image before its network sees it, found by trying: every library declares it differently."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from traj_ood.autoencoders import Autoencoder, SurrogateAutoencoder
from traj_ood.errors import TrajOODError

_TRIAL = (320, 280)  # width and height
_LEVELS = (0, 85, 170, 255)
_SAME = 2.5 / 255  # pixels: libraries round a resized byte up or down
_FILTERS = {f.name.lower(): f for f in (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS)}
_LARGEST = 1.5  # short side before a centre crop, in sides of the crop: 256 / 224 and 288 / 256 are usual


@dataclass(frozen=True)
class Preprocessing:
    """From an image file to a network's input, in two parts: pixels in [0, 1], which a caller makes, and their
    normalisation, which is part of an exported graph.

    Attributes:
        shape: (C, H, W); C = 1 is grey (ITU-R 601 luma, Pillow's mode L), C = 3 is RGB.
        mean, std: per channel, of the pixels in [0, 1].
        resize: ``direct`` to W × H; ``crop``: the short side to ``short_side``, then the centre W × H; ``own``:
            neither, see ``declared``.
        filter: Pillow's, in lower case. short_side: of ``crop``.
        declared: what the model says of its transform.
    """

    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: str
    filter: str | None = None
    short_side: int | None = None
    declared: dict[str, Any] | None = None

    @property
    def mode(self) -> str:
        return "L" if self.shape[0] == 1 else "RGB"

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "mode": self.mode}

    def pixels(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in the model's units → pixels in [0, 1], up to rounding."""
        mean, std = (torch.tensor(v, dtype=torch.float64).view(-1, 1, 1) for v in (self.mean, self.std))
        return (images.cpu().double() * std + mean).float()


def find_preprocessing(autoencoder: Autoencoder) -> Preprocessing:
    """Mean, deviation and resizing of ``autoencoder.transform``, from what it makes of a few images.

    Raises:
        TrajOODError: the transform is no normalisation of each channel on its own, so no graph can take it over.
    """
    mean, std = _normalisation(autoencoder)
    declared = autoencoder.backbone.options() if isinstance(autoencoder, SurrogateAutoencoder) else {}
    found = Preprocessing(
        autoencoder.input_shape, mean, std, "own", declared=json.loads(json.dumps(declared, default=str))
    )
    trial = _trial_image(found.mode)
    made = found.pixels(autoencoder.transform(trial)[None])[0]
    for resize, name, short_side in _candidates(found.shape):
        pixels = torch.from_numpy(_resized(trial, found.shape, resize, _FILTERS[name], short_side))
        if float((pixels - made).abs().max()) <= _SAME:
            return Preprocessing(found.shape, mean, std, resize, name, short_side, found.declared)
    return found


def _normalisation(autoencoder: Autoencoder) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Per channel, from images of one colour."""
    channels = autoencoder.input_shape[0]
    mode = "L" if channels == 1 else "RGB"

    def shade(*colour: int) -> Tensor:
        image = Image.new(mode, _TRIAL, colour if mode == "RGB" else colour[0])
        return autoencoder.transform(image).double().flatten(1)

    black, white = shade(0, 0, 0).mean(dim=1), shade(255, 255, 255).mean(dim=1)
    scale = white - black
    colours = [(level, level, level) for level in _LEVELS]
    colours += [(255, 0, 0), (0, 255, 0), (0, 0, 255)] if mode == "RGB" else []
    slack = 1e-4 * scale.abs().max().clamp(min=1)
    for colour in colours:
        expected = black + scale * torch.tensor(colour[:channels], dtype=torch.float64) / 255
        if not bool(((shade(*colour) - expected[:, None]).abs() <= slack).all()) or not bool((scale != 0).all()):
            raise TrajOODError(
                f"export: expected a transform of {autoencoder.name} that maps each channel's pixels to (x - mean) / "
                "std, which a graph can hold, got another one: normalise so, or inside the network"
            )
    return tuple((-black / scale).tolist()), tuple((1 / scale).tolist())


def _candidates(shape: tuple[int, int, int]) -> Iterator[tuple[str, str, int | None]]:
    _, height, width = shape
    yield from (("direct", name, None) for name in _FILTERS)
    side = max(height, width)
    for short_side in range(side, int(_LARGEST * side) + 1):
        yield from (("crop", name, short_side) for name in _FILTERS)


def _resized(
    image: Image.Image, shape: tuple[int, int, int], resize: str, resample: Image.Resampling, short_side: int | None
) -> np.ndarray:
    """(C, H, W) float32 pixels in [0, 1]."""
    channels, height, width = shape
    if short_side is None:
        image = image.resize((width, height), resample)
    else:
        short = min(image.size)
        size = [short_side if side == short else int(short_side * side / short) for side in image.size]
        image = image.resize((size[0], size[1]), resample)
        left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
        image = image.crop((left, top, left + width, top + height))
    pixels = np.asarray(image, dtype=np.float32).reshape(height, width, channels) / 255
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _trial_image(mode: str) -> Image.Image:
    """Noise, in which every filter, shift and scale shows, on waves, which a small scale leaves over."""
    x, y = np.meshgrid(np.linspace(0, 1, _TRIAL[0]), np.linspace(0, 1, _TRIAL[1]))
    waves = np.stack([np.sin(9 * x * (1 + y)), np.cos(13 * y + 5 * x * x), np.sin(7 * (x - y) ** 2 + 40 * x)], axis=2)
    noise = np.random.default_rng(0).uniform(-1, 1, waves.shape)
    return Image.fromarray((127.5 * (1 + (waves + noise) / 2)).astype(np.uint8)).convert(mode)
