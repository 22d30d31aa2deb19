"""From a picture to what a network takes: one declared :class:`Preprocessing` for each model; what counts as pixels.

Pictures enter as files or Pillow images, which the model's preprocessing resizes, crops and normalises, or as tensors
and arrays of pixels (:func:`prepare`). Tensors that are normalised already say so (:class:`Normalised`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from traj_ood.errors import TrajOODError, check_word
from traj_ood.io.weights import float_types, parts_of

Resize = Literal["direct", "crop", "none"]
Interpolation = Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]
Offset = Literal["round", "floor"]
PIXEL_SLACK = 1e-3
"""How far outside [0, 1] a float pixel may lie: rounding. A filter that overshoots needs a clamp."""
_BYTE = 1 / 255
_TRIALS = ((320, 281), (191, 260))  # width and height of the images on which two preprocessings are compared
_OWN_NUMBERS = 64


@dataclass(frozen=True)
class Preprocessing:
    """What a model does to a picture before its network sees it.

    Attributes:
        shape: (C, H, W) of the network's input. C = 1 is grey (ITU-R 601 luma, Pillow's mode L), C = 3 is RGB.
        mean, std: per channel, of the rescaled pixels. Default: 0 and 1, which leave them as they are.
        resize: ``direct`` to W × H (default: what ViT-MAE's image processor does); ``crop``: the shorter side to
            ``short_side``, then the centre W × H; ``none``: pictures have to be W × H already.
        interpolation: Pillow's filter. Default ``bilinear``, as in ViT-MAE's image processor.
        short_side: of ``crop``; at least as long as the crop.
        offset: where the crop begins when the rest is odd: ``round`` (torchvision, timm, OpenOOD) or ``floor``
            (transformers).
        rescale: factor on 0 … 255. Default 1/255.
    Raises:
        TrajOODError: values that fit neither each other nor any picture.
    """

    shape: tuple[int, int, int]
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    resize: Resize = "direct"
    interpolation: Interpolation = "bilinear"
    short_side: int | None = None
    offset: Offset = "round"
    rescale: float = _BYTE

    def __post_init__(self) -> None:
        shape = tuple(self.shape)
        if len(shape) != 3 or not all(isinstance(n, int) and n >= 1 for n in shape):
            raise TrajOODError(f"preprocessing: expected a shape (C, H, W), got {shape}")
        object.__setattr__(self, "shape", shape)
        if self.resize != "crop":  # it says nothing then, and equal preprocessings shall compare equal
            object.__setattr__(self, "offset", "round")
        for key, default in (("mean", 0.0), ("std", 1.0)):
            values = tuple(float(v) for v in getattr(self, key)) or (default,) * shape[0]
            object.__setattr__(self, key, values)
        check_statistics("preprocessing", shape[0], self.mean, self.std)
        for key, known in (("resize", Resize), ("interpolation", Interpolation), ("offset", Offset)):
            check_word(f"preprocessing: {key}", getattr(self, key), known)
        if not (math.isfinite(self.rescale) and self.rescale > 0):
            raise TrajOODError(f"preprocessing: rescale: expected a positive factor, got {self.rescale}")
        if (self.short_side is not None) != (self.resize == "crop"):
            raise TrajOODError(
                f"preprocessing: expected short_side with resize 'crop' alone, got {self.short_side} with "
                f"{self.resize!r}"
            )
        if self.short_side is not None and self.short_side < max(shape[1:]):
            raise TrajOODError(
                f"preprocessing: expected a short side of at least the crop {shape[1:]}, got {self.short_side}"
            )

    def __call__(self, image: Image.Image) -> Tensor:
        """A Pillow image of any mode that :mod:`traj_ood.data` hands out → (C, H, W) float32, normalised.

        Raises:
            TrajOODError: a picture of another size, where nothing is resized.
        """
        return self.normalise(self.pixels(image))

    def pixels(self, image: Image.Image) -> Tensor:
        """(C, H, W) uint8, resized and cropped; raises as :meth:`__call__`."""
        channels, height, width = self.shape
        image = self._resized(image.convert(self.mode), width, height)
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(height, width, channels)
        return pixels.permute(2, 0, 1)

    def normalise(self, pixels: Tensor) -> Tensor:
        """Pixels (*, C, H, W), uint8 or floats in [0, 1] → float32 in the network's units."""
        scaled = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels.float()
        if self.rescale != _BYTE:
            scaled = scaled * (255 * self.rescale)
        mean, std = (torch.tensor(v, device=pixels.device).view(-1, 1, 1) for v in (self.mean, self.std))
        return (scaled - mean) / std

    def unnormalise(self, images: Tensor) -> Tensor:
        """Images (*, C, H, W) in the network's units, such as D's output → floats, in [0, 1] where they are pixels."""
        offset, scale = (torch.tensor(v, device=images.device).view(-1, 1, 1) for v in self.affine)
        return images * scale + offset

    @property
    def mode(self) -> Literal["L", "RGB"]:
        """Of the Pillow image.

        Raises:
            TrajOODError: a model of other than 1 or 3 channels, which takes no picture.
        """
        if self.shape[0] not in (1, 3):
            raise TrajOODError(f"preprocessing: expected a model of 1 or 3 channels, got {self.shape[0]}")
        return "L" if self.shape[0] == 1 else "RGB"

    @property
    def affine(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """(offset, scale) per channel: the network's input is (p − offset) / scale of pixels p in [0, 1]."""
        unit = 255 * self.rescale
        if self.rescale == _BYTE:
            return self.mean, self.std
        return tuple(v / unit for v in self.mean), tuple(v / unit for v in self.std)

    @property
    def is_plain(self) -> bool:
        """Whether only shape, mean and std are other than the defaults."""
        return self == Preprocessing(self.shape, self.mean, self.std)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {**asdict(self), "shape": list(self.shape), "mean": list(self.mean), "std": list(self.std)}

    def _resized(self, image: Image.Image, width: int, height: int) -> Image.Image:
        if self.resize == "none" and image.size != (width, height):
            raise TrajOODError(
                f"expected a picture of {width} x {height} pixels, since this model resizes none, got {image.width} x "
                f"{image.height}"
            )
        resample = Image.Resampling[self.interpolation.upper()]
        if self.short_side is None:
            return image if image.size == (width, height) else image.resize((width, height), resample)
        short = min(image.size)
        size = [self.short_side if side == short else int(self.short_side * side / short) for side in image.size]
        if image.size != (size[0], size[1]):
            image = image.resize((size[0], size[1]), resample)
        rests = (size[0] - width, size[1] - height)
        left, top = (round(rest / 2) if self.offset == "round" else rest // 2 for rest in rests)
        return image.crop((left, top, left + width, top + height))


@dataclass(frozen=True)
class Normalised:
    """Images in the model's own units, which its preprocessing must not touch again.

    >>> detector.score(Normalised(batch))                               # doctest: +SKIP

    Attributes:
        images: (B, C, H, W) floats, as ``autoencoder.transform`` makes them.
    """

    images: Tensor

    def __len__(self) -> int:
        return len(self.images)


Pixels: TypeAlias = "Tensor | np.ndarray | Normalised"
"""Images in memory: uint8, or floats in [0, 1], of shape (B, C, H, W) or (C, H, W); or :class:`Normalised`."""


class TakesPictures(Protocol):
    """What :func:`prepare` and :func:`traj_ood.data.batches.batches` read of an autoencoder or backbone."""

    name: str
    input_shape: tuple[int, int, int]
    chunk: int

    @property
    def preprocessing(self) -> Preprocessing | None: ...

    def transform(self, image: Image.Image) -> Tensor: ...


class Preprocessed:
    """What shows pictures to a network: :meth:`transform` is its :attr:`preprocessing`, unless overridden."""

    name: str
    preprocessing: Preprocessing | None = None

    def transform(self, image: Image.Image) -> Tensor:
        """PIL image → (C, H, W) float32 in the network's normalised units.

        Raises:
            TrajOODError: no preprocessing is declared.
        """
        if self.preprocessing is None:
            raise TrajOODError(f"{self.name}: declares no preprocessing: set it, or override transform")
        return self.preprocessing(image)


def prepare(model: TakesPictures, images: Pixels) -> Tensor:
    """Images in memory → (B, C, H, W) in the model's own units.

    Pixels of the model's own shape are normalised and nothing else: they have been resized and cropped. Pixels of
    another size or number of channels go the way of a file, as 8 bits a channel through ``model.transform``; so do all
    where the transform is the user's own code. NumPy arrays may have their channels last, as Pillow makes them.

    Raises:
        TrajOODError: another type or number of axes, values outside of [0, 1], NaN, or pictures that the model's
            transform refuses.
    """
    if isinstance(images, Normalised):
        if not isinstance(images.images, Tensor) or not images.images.is_floating_point():
            raise TrajOODError(f"{model.name}: Normalised: expected a float tensor, got {type(images.images).__name__}")
        return images.images
    pixels = as_pixels(model.name, images)
    if model.preprocessing is not None and tuple(pixels.shape[1:]) == tuple(model.input_shape):
        return model.preprocessing.normalise(pixels)
    if not len(pixels):
        raise TrajOODError(
            f"{model.name}: expected images (B, {', '.join(map(str, model.input_shape))}), got shape "
            f"{tuple(pixels.shape)}"
        )
    return torch.stack([model.transform(as_picture(model.name, row)) for row in pixels])


def as_pixels(name: str, images: Tensor | np.ndarray) -> Tensor:
    """(B, C, H, W) uint8, or float32 in [0, 1], of a tensor or array that holds images as :data:`Pixels` says.

    Raises:
        TrajOODError: as :func:`prepare`; ``name`` is the model's, for the message.
    """
    wanted = "uint8 or float pixels in [0, 1] of shape (B, C, H, W) or (C, H, W)"
    if isinstance(images, np.ndarray):
        images = _channels_first(images)
    if not isinstance(images, Tensor):
        raise TrajOODError(f"{name}: expected {wanted}, got {type(images).__name__}")
    pixels = images.as_subclass(Tensor)
    if pixels.ndim == 3:
        pixels = pixels[None]
    if pixels.ndim != 4 or not (pixels.dtype == torch.uint8 or pixels.is_floating_point()):
        raise TrajOODError(f"{name}: expected {wanted}, got {images.dtype} of shape {tuple(images.shape)}")
    if pixels.dtype == torch.uint8:
        return pixels
    check_finite(name, pixels)
    low, high = (float(pixels.min()), float(pixels.max())) if pixels.numel() else (0.0, 1.0)
    if low < -PIXEL_SLACK or high > 1 + PIXEL_SLACK:
        raise TrajOODError(
            f"{name}: expected float pixels in [0, 1], got values from {low:.4g} to {high:.4g}: divide 0 … 255 by 255, "
            "clamp what a filter overshoots, or say that they are in the model's units: traj_ood.Normalised(images)"
        )
    return pixels.float()


def as_picture(name: str, pixels: Tensor) -> Image.Image:
    """(C, H, W) uint8, or floats in [0, 1], as a Pillow image of 8 bits a channel.

    Raises:
        TrajOODError: other than 1 or 3 channels, or no pixels.
    """
    if pixels.shape[0] not in (1, 3) or not pixels.numel():
        raise TrajOODError(f"{name}: expected images of 1 or 3 channels, got shape {tuple(pixels.shape)}")
    if pixels.dtype != torch.uint8:
        pixels = (pixels * 255).round().clamp(0, 255).to(torch.uint8)
    array = pixels.permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(np.ascontiguousarray(array[..., 0] if pixels.shape[0] == 1 else array))


def _channels_first(array: np.ndarray) -> Tensor:
    """As a tensor; (…, H, W, C) is turned where only its last axis can be the channels."""
    if array.dtype.kind not in "uf" or array.ndim not in (3, 4):
        raise TrajOODError(
            f"images: expected an array of uint8 or float pixels (B, C, H, W), (B, H, W, C) or without B, got "
            f"{array.dtype} of shape {array.shape}"
        )
    if array.shape[-1] in (1, 3) and array.shape[-3] not in (1, 3):
        array = np.moveaxis(array, -1, -3)
    if array.dtype == np.uint8:
        return torch.from_numpy(array.copy())
    if array.dtype.kind == "u":
        raise TrajOODError(f"images: expected uint8 or float pixels, got {array.dtype}: scale them to 8 bits")
    return torch.from_numpy(array.astype(np.float32))  # also of long doubles and other byte orders


def check_finite(name: str, images: Tensor) -> None:
    """Refuse NaN and infinite pixels of (B, C, H, W); names the first row."""
    bad = (~images.flatten(1).isfinite().all(dim=1)).nonzero()[:, 0] if images.numel() else images.new_empty(0)
    if len(bad):
        raise TrajOODError(f"{name}: {len(bad)} image(s) hold NaN or infinite pixels, first at row {bad[0]}")


def check_images(name: str, images: Tensor, shape: tuple[int, int, int], prepare: str) -> None:
    """Refuse what is not a finite float batch (B, C, H, W) of ``shape``; ``prepare`` says how to make one.

    Raises:
        TrajOODError: names the model, what it expected and what arrived.
    """
    if images.ndim != 4 or tuple(images.shape[1:]) != shape or not images.is_floating_point():
        raise TrajOODError(
            f"{name}: expected float images (B, {', '.join(map(str, shape))}), got {images.dtype} "
            f"of shape {tuple(images.shape)}: prepare them with {prepare}"
        )
    check_finite(name, images)


def network_input(name: str, images: Tensor, shape: tuple[int, int, int], prepare: str, module: nn.Module) -> Tensor:
    """Images as ``module`` takes them: checked, on its device, and of the type of its weights, since float64 or float16
    images are images of its shape, too. A module without weights says nothing of types, so they stay as they are; one
    with weights of several types takes float32, which is what transforms make.

    Raises:
        TrajOODError: as :func:`check_images`, numbers beyond the range of the weights' type included.
    """
    types = float_types(parts_of(module))
    if types and images.is_floating_point():
        images = images.to(types.pop() if len(types) == 1 else torch.float32)
    first = next(module.parameters(), None)
    if first is not None:
        images = images.to(first.device)
    check_images(name, images, shape, prepare)
    return images


def check_statistics(name: str, channels: int, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """Refuse means and deviations that do not belong to the model's channels.

    Raises:
        TrajOODError: another number than ``channels``, one that is not finite, or a deviation that is not positive.
    """
    finite = all(math.isfinite(value) for value in (*mean, *std))
    if len(mean) != channels or len(std) != channels or not finite or not all(s > 0 for s in std):
        raise TrajOODError(
            f"{name}: expected a mean and a positive standard deviation for each of {channels} channels, got "
            f"mean {list(mean)} and std {list(std)}"
        )


def declared_preprocessing(
    name: str, shape: tuple[int, int, int], preprocessing: Preprocessing | None, transform: object
) -> Preprocessing | None:
    """Of a model that is made of callables: what was given, else pixels in [0, 1]; None beside a ``transform``.

    Raises:
        TrajOODError: both are given, or a preprocessing to another shape.
    """
    if transform is None:
        return fitting_preprocessing(name, shape, preprocessing)
    if preprocessing is not None:
        raise TrajOODError(f"{name}: expected either a preprocessing or a transform, got both")
    return None


def fitting_preprocessing(
    name: str, shape: tuple[int, int, int], preprocessing: Preprocessing | None = None
) -> Preprocessing:
    """What was given, else a direct resize to pixels in [0, 1].

    Raises:
        TrajOODError: a preprocessing to another shape.
    """
    if preprocessing is not None and preprocessing.shape != tuple(shape):
        raise TrajOODError(f"{name}: expected a preprocessing to {tuple(shape)}, got one to {preprocessing.shape}")
    return preprocessing or Preprocessing(shape)


# ---------------------------------------------------------------------- is it the same one?


def trial_pictures(mode: str) -> list[Image.Image]:
    """Two pictures, wide and tall, on which every filter, shift and scale shows: noise on waves; always the same."""
    draw = np.random.Generator(np.random.PCG64(0))
    pictures = []
    for width, height in _TRIALS:
        x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
        waves = [np.sin(9 * x * (1 + y)), np.cos(13 * y + 5 * x * x), np.sin(7 * (x - y) ** 2 + 40 * x)]
        noise = draw.random((height, width, 3)) * 2 - 1
        pixels = (127.5 * (1 + (np.stack(waves, axis=2) + noise) / 2)).astype(np.uint8)
        pictures.append(Image.fromarray(pixels).convert(mode))
    return pictures


def largest_difference(preprocessing: Preprocessing, transform: Any) -> float:
    """Between what ``preprocessing`` and another transform of Pillow images make, in 1/255 of a pixel's range; infinite
    where their shapes differ."""
    worst = 0.0
    scale = torch.tensor(preprocessing.affine[1]).view(-1, 1, 1)
    for picture in trial_pictures(preprocessing.mode):
        own, other = preprocessing(picture), transform(picture).float()
        if own.shape != other.shape:
            return math.inf
        worst = max(worst, float(((own - other) * scale).abs().max()) * 255)
    return worst


def preprocessing_record(model: TakesPictures) -> dict[str, Any]:
    """JSON-able: the preprocessing a model declares; of a transform that is the user's own code, numbers it makes."""
    if model.preprocessing is not None:
        return model.preprocessing.as_dict()
    mode = "L" if model.input_shape[0] == 1 else "RGB"
    made = torch.stack([model.transform(picture).double().flatten() for picture in trial_pictures(mode)])
    places = torch.linspace(0, made.shape[1] - 1, min(_OWN_NUMBERS, made.shape[1])).long()
    return {"own": [[float(f"{v:.6g}") for v in row] for row in made[:, places].tolist()]}


def preprocessing_differences(expected: Mapping[str, Any], model: TakesPictures) -> list[str]:
    """Entries of :func:`preprocessing_record` in which ``model`` is not as ``expected``; own code to 1e-3."""
    found = preprocessing_record(model)
    if "own" not in expected or "own" not in found:
        return sorted(k for k in expected.keys() | found.keys() if expected.get(k) != found.get(k))
    pairs = [(np.asarray(v, dtype=float) for v in (expected["own"], found["own"]))]
    same = all(a.shape == b.shape and bool(np.allclose(a, b, rtol=1e-3, atol=1e-3)) for a, b in pairs)
    return [] if same else ["the transform"]
