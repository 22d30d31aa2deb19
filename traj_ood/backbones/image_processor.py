"""transformers' image processors (``preprocessor_config.json``) as a :class:`traj_ood.Preprocessing`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from PIL import Image
from torch import Tensor

from traj_ood.data.preprocessing import Interpolation, Preprocessing, largest_difference
from traj_ood.errors import TrajOODError

LARGEST_DIFFERENCE = 2.0
"""Most that our pixels may differ from the library's on the trial pictures, in 1/255; both round a resized byte. They
equal those of transformers' Pillow backend. Its torchvision backend, with a bicubic filter, differs from that itself:
2/255 were seen of noise enlarged, 31/255 of thin lines shrunk more in height than in width."""
_READ = {
    *("do_resize", "size", "resample", "do_center_crop", "crop_size", "crop_pct"),
    *("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"),
}
_DECIDES_NOTHING = {
    *("image_processor_type", "feature_extractor_type", "processor_class", "do_convert_rgb", "default_to_square"),
    *("return_tensors", "data_format", "input_data_format", "device", "_valid_processor_keys", "image_seq_length"),
}
_WHOLE = 384  # ConvNeXt's processor squeezes images from this side on, and crops smaller ones
_DEFAULTS: dict[str, Any] = {  # of ViTImageProcessor, for files that leave them out
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
    """What an image processor with these settings does to one picture.

    Args:
        settings: of ``preprocessor_config.json``, or a processor's ``to_dict()``; what is left out has the defaults of
            ``ViTImageProcessor``.
        shape: (C, H, W) that the network takes.
        where: for the message.
    Raises:
        TrajOODError: a setting that is not covered here (it is named), or images of another size than the network's.
    """
    told = {**_DEFAULTS, **{k: v for k, v in settings.items() if v is not None}}
    odd = sorted(k for k, v in told.items() if k not in _READ | _DECIDES_NOTHING and v)
    if odd:
        raise _refused(where, odd[0], told[odd[0]], "a setting that is known here")
    resize, side, short_side = _geometry(told, where)
    if side is not None and side != shape[1:]:
        raise TrajOODError(
            f"{where}: its images are {side[0]} x {side[1]}, and the network takes {shape[1]} x {shape[2]}: correct "
            "size and crop_size"
        )
    channels = shape[0]
    normalises = bool(told["do_normalize"])
    mean, std = (_statistic(told[f"image_{key}"], channels, where) if normalises else () for key in ("mean", "std"))
    try:
        return Preprocessing(
            shape=shape,
            mean=mean,
            std=std,
            resize=resize,  # type: ignore[arg-type]
            interpolation=interpolation_of(told["resample"]),
            short_side=short_side,
            offset="floor",
            rescale=float(told["rescale_factor"]) if told["do_rescale"] else 1.0,
        )
    except (TrajOODError, TypeError, ValueError) as error:
        raise TrajOODError(f"{where}: {error}") from error


def to_processor(preprocessing: Preprocessing) -> dict[str, Any]:
    """``preprocessor_config.json`` of a ``ViTImageProcessor`` that does the same, which :func:`from_processor` reads.

    Raises:
        TrajOODError: a crop, which that processor does not have.
    """
    _, height, width = preprocessing.shape
    if preprocessing.resize == "crop":
        raise TrajOODError("preprocessing: a crop cannot be written for a ViT-MAE: expected resize 'direct' or 'none'")
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
    """Refuse a declared preprocessing that is not what the library itself does, tried on two pictures.

    Raises:
        TrajOODError: they differ by more than 1/255.
    """
    found = largest_difference(preprocessing, transform)
    if not found <= LARGEST_DIFFERENCE + 1e-3:
        raise TrajOODError(
            f"{where}: its library's own transform differs from what its settings say here by {found:.3g}/255 of a "
            "pixel's range: one of them is not covered; use traj_ood.backbones.CallableBackbone with that transform"
        )


def interpolation_of(value: Any) -> Interpolation:
    """Pillow's filter, by its number or name."""
    text = str(getattr(value, "value", value)).lower()
    try:
        name = Image.Resampling(int(text)).name if text.isdigit() else Image.Resampling[text.upper()].name
    except (ValueError, KeyError) as error:
        raise TrajOODError(f"interpolation: expected one of Pillow's filters, got {value!r}") from error
    return name.lower()  # type: ignore[return-value]


def _geometry(told: Mapping[str, Any], where: str) -> tuple[str, tuple[int, int] | None, int | None]:
    """How images are resized, (height, width) of the result (None: the network's own), and the short side of a crop."""
    crop = _sides(told.get("crop_size"), where) if told.get("do_center_crop") else None
    if not told["do_resize"]:
        if crop is not None:
            raise _refused(where, "do_center_crop", True, "do_resize with it, since images have any size")
        return "none", None, None
    size = told["size"]
    short = size.get("shortest_edge") if isinstance(size, Mapping) else None
    if short is None:
        if crop is not None and crop != _sides(size, where):
            raise _refused(where, "crop_size", told["crop_size"], "a resize of the shortest edge before a crop")
        return "direct", _sides(size, where), None
    if any(v for k, v in size.items() if k != "shortest_edge"):
        raise _refused(where, "size", dict(size), "shortest_edge alone")
    if told.get("crop_pct"):
        if short >= _WHOLE:
            return "direct", (short, short), None
        return "crop", (short, short), int(short / told["crop_pct"])
    if crop is None:
        raise _refused(where, "size", dict(size), "do_center_crop with shortest_edge: images of one size")
    return "crop", crop, int(short)


def _sides(size: Any, where: str) -> tuple[int, int]:
    """(height, width)."""
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
    return TrajOODError(f"{where}: {key}: expected {expected}, got {value!r}: its images cannot be made here")
