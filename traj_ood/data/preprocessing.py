"""Preprocessing of images for a network: resize, crop and normalise, declared once per model.

Image files and Pillow images go through the model's :class:`Preprocessing`; tensors and arrays of pixels through
:func:`prepare`. Tensors that are already normalised are passed as :class:`Normalised`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
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
Transform: TypeAlias = Callable[[Image.Image], Tensor]
PIXEL_SLACK = 1e-3
"""How far outside [0, 1] a float pixel may be, for rounding. Values from filters that overshoot have to be clamped."""
_BYTE = 1 / 255
_TRIAL_SIZES = ((320, 281), (191, 260))  # width and height of the images on which two preprocessings are compared
_RECORDED_VALUES = 64  # values that represent the output of a user's transform on one image


@dataclass(frozen=True)
class Preprocessing:
    """Resize, crop and normalisation that turn a Pillow image into a network's input.

    >>> Preprocessing((3, 32, 32), mean=(0.5,) * 3, std=(0.5,) * 3)(Image.new("RGB", (64, 48), "white"))[:, 0, 0]
    tensor([1., 1., 1.])

    Attributes:
        shape: (C, H, W) of the network's input. C = 1 is grey (ITU-R 601 luma, Pillow's mode L), C = 3 is RGB.
        mean, std: per channel, of the rescaled pixels. Default: 0 and 1, no normalisation.
        resize: ``direct``: to W × H (default, as in ViT-MAE's image processor); ``crop``: the shorter side to
            ``short_side``, then the centre W × H; ``none``: images must be W × H already.
        interpolation: Pillow's filter. Default ``bilinear``, as in ViT-MAE's image processor.
        short_side: side in pixels for ``crop``; at least as long as the crop.
        offset: rounding of the crop's position if the margin is odd: ``round`` (torchvision, timm, OpenOOD) or
            ``floor`` (transformers).
        rescale: factor on the values 0 … 255. Default 1/255.
    Raises:
        TrajOODError: a value is invalid, or the values do not fit together.
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
        if self.resize != "crop":  # it has no effect then, and equal preprocessings must compare equal
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
                f"preprocessing: expected short_side with resize 'crop' only, got {self.short_side} with "
                f"{self.resize!r}"
            )
        if self.short_side is not None and self.short_side < max(shape[1:]):
            raise TrajOODError(
                f"preprocessing: expected a short side of at least the crop {shape[1:]}, got {self.short_side}"
            )

    def __call__(self, image: Image.Image) -> Tensor:
        """Preprocess a Pillow image of mode L or RGB to (C, H, W) float32.

        Raises:
            TrajOODError: ``resize`` is ``none`` and the image has another size.
        """
        return self.normalise(self.pixels(image))

    def pixels(self, image: Image.Image) -> Tensor:
        """The resized and cropped image, (C, H, W) uint8; raises as :meth:`__call__`."""
        channels, height, width = self.shape
        image = self._resized(image.convert(self.mode), width, height)
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(height, width, channels)
        return pixels.permute(2, 0, 1)

    def normalise(self, pixels: Tensor) -> Tensor:
        """Normalise pixels, (*, C, H, W) uint8 or floats in [0, 1], to float32 in the network's units."""
        scaled = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels.float()
        if self.rescale != _BYTE:
            scaled = scaled * (255 * self.rescale)
        # In float32, whatever torch's default type is.
        mean, std = (pixels.new_tensor(v, dtype=torch.float32).view(-1, 1, 1) for v in (self.mean, self.std))
        return (scaled - mean) / std

    def unnormalise(self, images: Tensor) -> Tensor:
        """The inverse of :meth:`normalise`: images (*, C, H, W) in the network's units, such as D(z), to [0, 1]."""
        offset, scale = (images.new_tensor(v, dtype=torch.float32).view(-1, 1, 1) for v in self.affine)
        return images * scale + offset

    @property
    def mode(self) -> Literal["L", "RGB"]:
        """The mode of Pillow images that the network takes.

        Raises:
            TrajOODError: the model has neither 1 nor 3 channels.
        """
        if self.shape[0] not in (1, 3):
            raise TrajOODError(f"preprocessing: expected a model of 1 or 3 channels, got {self.shape[0]}")
        return "L" if self.shape[0] == 1 else "RGB"

    @property
    def affine(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """(offset, scale) per channel: pixels p in [0, 1] become the network's input (p − offset) / scale."""
        unit = 255 * self.rescale
        if self.rescale == _BYTE:
            return self.mean, self.std
        return tuple(v / unit for v in self.mean), tuple(v / unit for v in self.std)

    @property
    def is_plain(self) -> bool:
        """Whether all attributes but shape, mean and std have their defaults."""
        return self == Preprocessing(self.shape, self.mean, self.std)

    def as_dict(self) -> dict[str, Any]:
        """The attributes as JSON data."""
        return {**asdict(self), "shape": list(self.shape), "mean": list(self.mean), "std": list(self.std)}

    def _resized(self, image: Image.Image, width: int, height: int) -> Image.Image:
        if self.resize == "none" and image.size != (width, height):
            raise TrajOODError(
                f"expected an image of {width} x {height} pixels, as this model does not resize, got {image.width} x "
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
    """Marks images as already preprocessed, in the model's own units.

    >>> detector.score(Normalised(batch))                               # doctest: +SKIP

    Attributes:
        images: (B, C, H, W) floats, as ``autoencoder.transform`` returns them.
    """

    images: Tensor

    def __len__(self) -> int:
        return len(self.images)


Pixels: TypeAlias = "Tensor | np.ndarray | Normalised"
"""Images in memory: uint8, or floats in [0, 1], of shape (B, C, H, W) or (C, H, W); or :class:`Normalised`."""


class ImageModel(Protocol):
    """The part of an autoencoder or backbone that prepares its input images."""

    name: str
    input_shape: tuple[int, int, int]
    chunk: int

    @property
    def preprocessing(self) -> Preprocessing | None: ...

    def transform(self, image: Image.Image) -> Tensor: ...


class Preprocessed:
    """Base class of models with a declared preprocessing; :meth:`transform` applies it and may be overridden."""

    name: str
    input_shape: tuple[int, int, int]
    preprocessing: Preprocessing | None = None
    _own_transform: Callable[[Image.Image], Tensor] | None = None  # user code in place of a preprocessing

    def transform(self, image: Image.Image) -> Tensor:
        """Preprocess a Pillow image to (C, H, W) float32 in the network's units."""
        if self._own_transform is not None:
            made = self._own_transform(image)
            if isinstance(made, Tensor) and tuple(made.shape) != tuple(self.input_shape):
                raise TrajOODError(
                    f"{self.name}: transform: expected shape {tuple(self.input_shape)}, got {tuple(made.shape)} of an "
                    f"image in mode {image.mode}: let it convert every image, as with image.convert('RGB')"
                )
            return made
        if self.preprocessing is None:
            raise TrajOODError(f"{self.name}: declares no preprocessing: set it, or override transform")
        return self.preprocessing(image)

    def declared_options(self) -> dict[str, Any]:
        """The preprocessing as an entry of the model's options, if it is declared and not the default."""
        known = self.preprocessing
        return {} if known is None or known == Preprocessing(known.shape) else {"preprocessing": known.as_dict()}


def prepare(model: ImageModel, images: Pixels) -> Tensor:
    """Preprocess images in memory to (B, C, H, W) in the model's own units.

    Pixels with the model's input shape are only normalised. Pixels of another size or number of channels are treated
    like a file: converted to 8 bits per channel and passed to ``model.transform``. So are all pixels if the transform
    is user code. NumPy arrays may have their channels last, as Pillow's do.
    """
    if isinstance(images, Normalised):
        if not isinstance(images.images, Tensor) or not images.images.is_floating_point():
            found = getattr(images.images, "dtype", type(images.images).__name__)
            raise TrajOODError(f"{model.name}: Normalised: expected a float tensor, got {found}: convert it")
        return images.images
    pixels = as_pixels(model.name, images, model.input_shape)
    if model.preprocessing is not None and tuple(pixels.shape[1:]) == tuple(model.input_shape):
        return model.preprocessing.normalise(pixels)
    _check_pictures(model, pixels)
    return torch.stack([model.transform(as_picture(row)) for row in pixels])


def as_pixels(name: str, images: Tensor | np.ndarray, shape: tuple[int, ...] = ()) -> Tensor:
    """Convert pixels in memory, see :data:`Pixels`, to (B, C, H, W) uint8 or float32 in [0, 1]. Arrays of the model's
    ``shape`` (C, H, W) have their channels first, whatever their sizes."""
    wanted = "uint8 or float pixels in [0, 1] of shape (B, C, H, W) or (C, H, W)"
    if isinstance(images, np.ndarray):
        images = _channels_first(images, shape)
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
            "clamp values that a filter overshot, or, if they are in the model's units, pass "
            "traj_ood.Normalised(images)"
        )
    return pixels.float()


def _check_pictures(model: ImageModel, pixels: Tensor) -> None:
    """Refuse pixels (B, C, H, W), of another shape than the model's, that cannot be treated like files."""
    own, shape = f"(B, {', '.join(map(str, model.input_shape))})", tuple(pixels.shape)
    if not len(pixels):
        raise TrajOODError(
            f"{model.name}: expected images {own}, got shape {shape} without an image to resize: give an empty batch "
            "the model's shape, or leave it out"
        )
    if model.preprocessing is not None and model.input_shape[0] not in (1, 3):
        raise TrajOODError(
            f"{model.name}: expected images {own}, got shape {shape}: put channels first, and resize the images, which "
            "is only done here for 1 or 3 channels"
        )
    if shape[1] not in (1, 3):
        raise TrajOODError(
            f"{model.name}: expected images of 1 or 3 channels, got shape {shape[1:]}: put channels first, as in "
            f"{own}, and keep 1 or 3 of them"
        )
    if not pixels.numel():
        raise TrajOODError(f"{model.name}: expected images with pixels, got shape {shape[1:]}: leave empty ones out")


def as_picture(pixels: Tensor) -> Image.Image:
    """Convert pixels, (C, H, W) uint8 or floats in [0, 1] with C of 1 or 3, to a Pillow image of 8 bits per channel."""
    if pixels.dtype != torch.uint8:
        pixels = (pixels * 255).round().clamp(0, 255).to(torch.uint8)
    array = pixels.permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(np.ascontiguousarray(array[..., 0] if pixels.shape[0] == 1 else array))


def _channels_first(array: np.ndarray, shape: tuple[int, ...]) -> Tensor:
    """The array as a tensor; (…, H, W, C) is transposed if only the last axis can be the channels; ``shape`` is not."""
    if array.dtype.kind not in "uf" or array.ndim not in (3, 4):
        raise TrajOODError(
            f"images: expected an array of uint8 or float pixels (B, C, H, W), (B, H, W, C) or without B, got "
            f"{array.dtype} of shape {array.shape}"
        )
    if array.shape[-3:] != tuple(shape) and array.shape[-1] in (1, 3) and array.shape[-3] not in (1, 3):
        array = np.moveaxis(array, -1, -3)
    if array.dtype == np.uint8:
        return torch.from_numpy(array.copy())
    if array.dtype.kind == "u":
        raise TrajOODError(f"images: expected uint8 or float pixels, got {array.dtype}: scale them to 8 bits")
    return torch.from_numpy(array.astype(np.float32))  # also from long doubles and other byte orders


def check_finite(name: str, images: Tensor) -> None:
    """Raise a ``TrajOODError`` if images (B, C, H, W) have NaN or infinite pixels; it names the first row."""
    bad = (~images.flatten(1).isfinite().all(dim=1)).nonzero()[:, 0] if images.numel() else images.new_empty(0)
    if len(bad):
        raise TrajOODError(f"{name}: {len(bad)} image(s) have NaN or infinite pixels, first at row {bad[0]}")


def check_images(name: str, images: Tensor, shape: tuple[int, int, int], prepare: str) -> None:
    """Check that ``images`` is a finite float batch (B, C, H, W) with (C, H, W) = ``shape``; ``prepare`` names the
    function that makes one."""
    if images.ndim != 4 or tuple(images.shape[1:]) != shape or not images.is_floating_point():
        raise TrajOODError(
            f"{name}: expected float images (B, {', '.join(map(str, shape))}), got {images.dtype} "
            f"of shape {tuple(images.shape)}: prepare them with {prepare}"
        )
    check_finite(name, images)


def network_input(name: str, images: Tensor, shape: tuple[int, int, int], prepare: str, module: nn.Module) -> Tensor:
    """Check images and convert them to the device and dtype of a module's weights: unchanged for a module without
    weights, and float32, as transforms return, for one with weights of several dtypes."""
    types = float_types(parts_of(module))
    if types and images.is_floating_point():
        images = images.to(types.pop() if len(types) == 1 else torch.float32)
    first = next(module.parameters(), None)
    if first is not None:
        images = images.to(first.device)
    check_images(name, images, shape, prepare)
    return images


def check_statistics(name: str, channels: int, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """Check that there is a finite mean and a positive standard deviation for each channel."""
    finite = all(math.isfinite(value) for value in (*mean, *std))
    if len(mean) != channels or len(std) != channels or not finite or not all(s > 0 for s in std):
        raise TrajOODError(
            f"{name}: expected a mean and a positive standard deviation for each of {channels} channels, got "
            f"mean {list(mean)} and std {list(std)}"
        )


def declared_preprocessing(
    name: str, shape: tuple[int, int, int], preprocessing: Preprocessing | None, transform: Transform | None
) -> Preprocessing | None:
    """The preprocessing of a model made of callables: the given one, else a direct resize; None with a
    ``transform``."""
    if transform is None:
        return fitting_preprocessing(name, shape, preprocessing)
    if preprocessing is not None:
        raise TrajOODError(f"{name}: expected either a preprocessing or a transform, got both")
    check_repeats(name, transform)
    return None


def check_repeats(name: str, transform: Transform) -> None:
    """Refuse a transform that makes different tensors of one image, such as an augmentation of training."""
    for picture in trial_pictures("RGB"):
        try:
            first, *others = (transform(picture.copy()) for _ in range(4))
        except Exception:  # user code may raise anything; it does so again for the first image that it cannot take
            continue
        if isinstance(first, Tensor) and any(not torch.equal(first, other) for other in others):
            raise TrajOODError(
                f"{name}: transform draws random numbers: expected the same tensor of one image each time, got "
                "different ones: give the transform of evaluation, without augmentation"
            )


def fitting_preprocessing(
    name: str, shape: tuple[int, int, int], preprocessing: Preprocessing | None = None
) -> Preprocessing:
    """The given preprocessing, which must be to ``shape``, else a direct resize to pixels in [0, 1]."""
    if preprocessing is not None and preprocessing.shape != tuple(shape):
        raise TrajOODError(f"{name}: expected a preprocessing to {tuple(shape)}, got one to {preprocessing.shape}")
    return preprocessing or Preprocessing(shape)


# ---------------------------------------------------------------------- comparison of preprocessings


def trial_pictures(mode: str) -> list[Image.Image]:
    """Two fixed images, wide and tall, of waves with noise, on which any two filters, shifts or scales differ."""
    draw = np.random.Generator(np.random.PCG64(0))
    pictures = []
    for width, height in _TRIAL_SIZES:
        x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
        waves = [np.sin(9 * x * (1 + y)), np.cos(13 * y + 5 * x * x), np.sin(7 * (x - y) ** 2 + 40 * x)]
        noise = draw.random((height, width, 3)) * 2 - 1
        pixels = (127.5 * (1 + (np.stack(waves, axis=2) + noise) / 2)).astype(np.uint8)
        pictures.append(Image.fromarray(pixels).convert(mode))
    return pictures


def largest_difference(preprocessing: Preprocessing, transform: Any) -> float:
    """The largest difference between a preprocessing and another transform on :func:`trial_pictures`, in 1/255 of a
    pixel's range; infinite if the outputs have different shapes."""
    worst = 0.0
    scale = torch.tensor(preprocessing.affine[1]).view(-1, 1, 1)
    for picture in trial_pictures(preprocessing.mode):
        own, other = preprocessing(picture), transform(picture).float()
        if own.shape != other.shape:
            return math.inf
        worst = max(worst, float(((own - other) * scale).abs().max()) * 255)
    return worst


def preprocessing_record(model: ImageModel) -> dict[str, Any]:
    """The preprocessing of a model as JSON data; for a user's own transform, some values of its output."""
    if model.preprocessing is not None:
        return model.preprocessing.as_dict()
    mode = "L" if model.input_shape[0] == 1 else "RGB"
    made = torch.stack([model.transform(picture).double().flatten() for picture in trial_pictures(mode)])
    places = torch.linspace(0, made.shape[1] - 1, min(_RECORDED_VALUES, made.shape[1])).long()
    return {"own": [[float(f"{v:.6g}") for v in row] for row in made[:, places].tolist()]}


def preprocessing_differences(expected: Mapping[str, Any], model: ImageModel) -> list[str]:
    """Entries of :func:`preprocessing_record` in which ``model`` differs from ``expected``; a user's transform may
    differ by 1e-3."""
    found = preprocessing_record(model)
    if "own" not in expected or "own" not in found:
        return sorted(k for k in expected.keys() | found.keys() if expected.get(k) != found.get(k))
    before, now = (np.asarray(record["own"], dtype=float) for record in (expected, found))
    same = before.shape == now.shape and np.allclose(before, now, rtol=1e-3, atol=1e-3)
    return [] if same else ["the transform"]
