"""Conversion of transformers' image processors (``preprocessor_config.json``) to :class:`traj_ood.Preprocessing`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from PIL import Image
from torch import Tensor

from traj_ood.data.preprocessing import Interpolation, Preprocessing, largest_difference
from traj_ood.errors import TrajOODError

LARGEST_DIFFERENCE = 2.0
"""Largest allowed difference from the library's pixels on the trial images, in 1/255, as both round resized bytes. The
pixels equal those of transformers' Pillow backend. Its torchvision backend itself differs from that with a bicubic
filter: by 2/255 for enlarged noise, by 31/255 for thin lines shrunk more in height than in width."""
_READ = {
    *("do_resize", "size", "resample", "do_center_crop", "crop_size", "crop_pct"),
    *("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"),
}
_IRRELEVANT = {  # settings that do not change the pixels
    *("image_processor_type", "feature_extractor_type", "processor_class", "do_convert_rgb", "default_to_square"),
    *("return_tensors", "data_format", "input_data_format", "device", "_valid_processor_keys", "image_seq_length"),
}
_UNCROPPED_SIDE = 384  # ConvNeXt's processor resizes directly from this side on, and crops below it
_DEFAULTS: dict[str, Any] = {  # of ViTImageProcessor
    "do_resize": True,
    "size": 224,
    "resample": Image.Resampling.BILINEAR,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": 0.5,
    "image_std": 0.5,
}


def from_processor(settings: Mapping[str, Any], shape: tuple[int, int, int], where: str) -> Preprocessing:
    """The preprocessing, to ``shape`` (C, H, W), that an image processor with these settings applies to an image.

    ``settings`` are the contents of ``preprocessor_config.json``, or a processor's ``to_dict()``; missing ones have the
    defaults of ``ViTImageProcessor``, and one that is not supported is an error.
    """
    complete = {**_DEFAULTS, **{k: v for k, v in settings.items() if v is not None}}
    unknown = sorted(k for k, v in complete.items() if k not in _READ | _IRRELEVANT and v)
    if unknown:
        raise _refused(where, unknown[0], complete[unknown[0]], "no such setting")
    resize, side, short_side = _geometry(complete, where)
    if side is not None and side != shape[1:]:
        raise TrajOODError(
            f"{where}: expected images of {shape[1]} x {shape[2]}, as the network takes, got {side[0]} x {side[1]}: "
            "correct size and crop_size"
        )
    channels = shape[0]
    normalises = bool(complete["do_normalize"])
    mean, std = (_statistic(complete[f"image_{key}"], channels, where) if normalises else () for key in ("mean", "std"))
    try:
        return Preprocessing(
            shape=shape,
            mean=mean,
            std=std,
            resize=resize,  # type: ignore[arg-type]
            interpolation=interpolation_of(complete["resample"]),
            short_side=short_side,
            offset="floor",
            rescale=float(complete["rescale_factor"]) if complete["do_rescale"] else 1.0,
        )
    except (TrajOODError, TypeError, ValueError) as error:
        raise TrajOODError(f"{where}: {error}") from error


def to_processor(preprocessing: Preprocessing) -> dict[str, Any]:
    """The settings of a ``ViTImageProcessor``, which cannot crop, that applies ``preprocessing``; the inverse of
    :func:`from_processor`."""
    _, height, width = preprocessing.shape
    if preprocessing.resize == "crop":
        raise TrajOODError(
            "preprocessing: expected resize 'direct' or 'none', which a ViT-MAE's processor supports, got 'crop'"
        )
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": preprocessing.resize == "direct",
        "size": {"height": height, "width": width},
        "resample": int(Image.Resampling[preprocessing.interpolation.upper()]),
        "do_rescale": preprocessing.rescale != 1,
        "rescale_factor": preprocessing.rescale,
        "do_normalize": True,
        "image_mean": list(preprocessing.mean),
        "image_std": list(preprocessing.std),
    }


def check_agreement(preprocessing: Preprocessing, transform: Callable[[Image.Image], Tensor], where: str) -> None:
    """Check that a declared preprocessing agrees with the library's own transform on trial images."""
    found = largest_difference(preprocessing, transform)
    if not found <= LARGEST_DIFFERENCE + 1e-3:
        raise TrajOODError(
            f"{where}: the library's own transform differs from the one made from its settings by {found:.3g}/255 of a "
            "pixel's range, so a setting is not supported: use traj_ood.backbones.CallableBackbone with that transform"
        )


def interpolation_of(value: Any) -> Interpolation:
    """The name of a Pillow filter, from its number or name."""
    text = str(getattr(value, "value", value)).lower()
    try:
        name = Image.Resampling(int(text)).name if text.isdigit() else Image.Resampling[text.upper()].name
    except (ValueError, KeyError) as error:
        raise TrajOODError(f"interpolation: expected one of Pillow's filters, got {value!r}") from error
    return name.lower()  # type: ignore[return-value]


def _geometry(settings: Mapping[str, Any], where: str) -> tuple[str, tuple[int, int] | None, int | None]:
    """The kind of resize, (height, width) of the result (None: the network's), and the short side before a crop."""
    crop = _sides(settings.get("crop_size"), where) if settings.get("do_center_crop") else None
    if not settings["do_resize"]:
        if crop is not None:
            raise _refused(where, "do_center_crop", True, "do_resize with it, since images have any size")
        return "none", None, None
    size = settings["size"]
    short = size.get("shortest_edge") if isinstance(size, Mapping) else None
    if short is None:
        if crop is not None and crop != _sides(size, where):
            raise _refused(where, "crop_size", settings["crop_size"], "a resize of the shortest edge before a crop")
        return "direct", _sides(size, where), None
    if any(v for k, v in size.items() if k != "shortest_edge"):
        raise _refused(where, "size", dict(size), "shortest_edge alone")
    if settings.get("crop_pct"):
        if short >= _UNCROPPED_SIDE:
            return "direct", (short, short), None
        return "crop", (short, short), int(short / settings["crop_pct"])
    if crop is None:
        raise _refused(where, "size", dict(size), "do_center_crop with shortest_edge: images of one size")
    return "crop", crop, int(short)


def _sides(size: Any, where: str) -> tuple[int, int]:
    """A size setting as (height, width)."""
    if isinstance(size, int) and not isinstance(size, bool):
        return size, size
    if isinstance(size, list | tuple) and len(size) == 2:
        return int(size[0]), int(size[1])
    if isinstance(size, Mapping) and size.get("height") and size.get("width"):
        if any(v for k, v in size.items() if k not in ("height", "width")):
            raise _refused(where, "size", dict(size), "height and width alone")
        return int(size["height"]), int(size["width"])
    raise _refused(where, "size", size, "height and width, or shortest_edge with a crop")


def _statistic(value: Any, channels: int, where: str) -> tuple[float, ...]:
    values = list(value) if isinstance(value, list | tuple) else [value] * channels
    if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        raise TrajOODError(f"{where}: expected numbers image_mean and image_std, got {value!r}")
    return tuple(float(v) for v in values)


def _refused(where: str, key: str, value: Any, expected: str) -> TrajOODError:
    return TrajOODError(
        f"{where}: {key}: expected {expected}, got {value!r}, which is not supported: wrap the model with a transform "
        "of your own"
    )
