"""Images of any kind that a detector or a scorer set takes, a batch at a time in the model's own units."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from traj_ood.data.decoding import AS_STORED, Reading, decode, open_image
from traj_ood.data.encoded import EncodedImages
from traj_ood.data.images import FileImages, ImageSource
from traj_ood.data.preprocessing import Normalised, Pixels, TakesPictures, check_images, prepare
from traj_ood.errors import TrajOODError, check_word

Images: TypeAlias = "Pixels | ImageSource | Sequence[Image.Image | str | Path | Tensor | np.ndarray] | Any"
"""Pixels in memory (uint8, or floats in [0, 1]; tensors or arrays, (B, C, H, W) or one (C, H, W)), an ImageSource, a
list of Pillow images, paths or single images of pixels, a ``torch.utils.data`` Dataset of images or of tuples that
begin with one, a DataLoader of such, or :class:`traj_ood.Normalised`."""
OnError = Literal["raise", "skip"]
IMAGE_KEYS = ("image", "img", "pixel_values", "data")
"""Where the items of a data set that are mappings hold the image; the first that is there."""
LABEL_KEYS = ("label", "labels", "target")
_MAX_BYTES = 2**27  # of pixels at a time; the latents of usual models are of about that size, too
_MAX_IMAGES = 1024
_DECODING = threading.Lock()


@dataclass(frozen=True)
class Batch:
    """Images that could be read.

    Attributes:
        ids: B names: an ImageSource's ids, paths as they were given, else numbers.
        rows: B places in what was given; all of them unless images were skipped.
        images: (B, C, H, W) float32 in the model's units; B may be 0.
        failures: {id, error} of each image that was skipped.
        labels: B classes, where a data set or loader gives them with the images; else empty.
    """

    ids: tuple[str, ...]
    rows: tuple[int, ...]
    images: Tensor
    failures: list[dict[str, str]] = field(default_factory=list)
    labels: tuple[Any, ...] = ()


def count_of(images: Images) -> int:
    """How many images these are.

    Raises:
        TrajOODError: nothing that a detector takes, such as a single path.
    """
    if isinstance(images, Tensor | np.ndarray):
        return 1 if images.ndim == 3 else len(images) if images.ndim else 0
    if isinstance(images, str | bytes | Path | Image.Image):
        raise TrajOODError(
            f"images: expected many, got one {type(images).__name__}: put it into a list, or read a folder with "
            "traj_ood.data.read_folder"
        )
    try:
        if isinstance(images, torch.utils.data.DataLoader):
            whole = images.drop_last and images.batch_size
            return len(images) * images.batch_size if whole else len(images.sampler)  # type: ignore[operator, arg-type]
        indexed = hasattr(images, "__getitem__") and not isinstance(images, Mapping)
        if indexed or isinstance(images, Normalised) or _is_source(images):
            return len(images)
    except TypeError as error:
        raise TrajOODError(f"images: expected a number of images that is known, got {error}: make a list") from error
    raise TrajOODError(
        "images: expected pixels (B, C, H, W), an ImageSource, a Dataset or DataLoader, or a list of PIL images or "
        f"paths, got {type(images).__name__}: make a list of it"
    )


def has_own_labels(images: Images) -> bool:
    """Whether images may come with a class each, as the items of a Dataset or DataLoader do."""
    known = Tensor | np.ndarray | Normalised | list | tuple
    return not isinstance(images, known) and not _is_source(images)


def batches(
    autoencoder: TakesPictures,
    images: Images,
    size: int | None = None,
    workers: int = 2,
    on_error: OnError = "raise",
    reading: Reading = AS_STORED,
) -> Iterator[Batch]:
    """Read and prepare images, one batch ahead of the caller; no more than two batches are in memory.

    Args:
        size: most images at a time. Default: 128 MiB of pixels, at most 1,024 images. Results do not depend on it. A
            DataLoader's batches are as it makes them.
        workers: threads that read. Default 2. A Dataset is read by one, since its code need not be made for more.
        on_error: ``raise`` (default) or ``skip`` images that cannot be read, which are then in ``failures``. It is
            about reading: a tensor of the wrong shape or with NaN is always an error.
        reading: how paths and Pillow images become pixels. Image files of a source have to be read so, too.
    Raises:
        TrajOODError: what cannot be read, or is no image.
    """
    count = count_of(images)
    images = images.to_list() if hasattr(images, "to_list") else images  # a column of paths, whatever its index
    check_word("value of on_error", on_error, OnError)
    for name, value in (("batch size", size), ("workers", workers)):
        if value is not None and value < 1:
            raise TrajOODError(f"{name}: expected at least 1, got {value}")
    if isinstance(images, FileImages | EncodedImages) and Reading(images.exif, images.bit_depth) != reading:
        raise TrajOODError(
            f"images: expected files read with {reading}, as the detector's training images were, got "
            f"exif={images.exif}, bit_depth={images.bit_depth}: read them in the same way"
        )
    step = size or _default_size(autoencoder)
    ranges = parts_of(count, step)
    if isinstance(images, Tensor | np.ndarray | Normalised):
        return _slices(autoencoder, images, ranges)
    if isinstance(images, torch.utils.data.DataLoader):
        return _loaded(autoencoder, images)
    if on_error == "raise" and _is_source(images):
        missing = cast("ImageSource", images).missing()
        if missing:
            raise TrajOODError(
                f"images: {len(missing)} of {count} files are absent or empty, first {missing[0]}: restore them, or "
                "leave them out with on_error='skip' (--on-error skip)"
            )
    return _read(autoencoder, images, ranges, workers, on_error, reading)


def parts_of(count: int, size: int) -> list[range]:
    """The places 0 … count − 1 in parts of ``size``, the last of what is left."""
    return [range(i, min(i + size, count)) for i in range(0, count, size)]


def read_rows(
    model: TakesPictures, images: ImageSource, rows: range, workers: int = 2, on_error: OnError = "raise"
) -> Batch:
    """The images ``rows`` of a source as one batch; see :func:`batches`."""
    return next(read_parts(model, images, [rows], workers, on_error))


def read_parts(
    model: TakesPictures, images: ImageSource, parts: list[range], workers: int = 2, on_error: OnError = "raise"
) -> Iterator[Batch]:
    """:func:`read_rows` of each part, one ahead of the caller."""
    return _read(model, images, parts, workers, on_error, AS_STORED)


def _default_size(autoencoder: TakesPictures) -> int:
    channels, height, width = autoencoder.input_shape
    most = min(_MAX_IMAGES, _MAX_BYTES // (4 * channels * height * width))
    return max(1, most // autoencoder.chunk) * autoencoder.chunk


def _slices(autoencoder: TakesPictures, images: Pixels, ranges: list[range]) -> Iterator[Batch]:
    if isinstance(images, np.ndarray | Tensor) and images.ndim == 3:
        images = images[None]
    rest = images.images if isinstance(images, Normalised) else images
    if not ranges:
        made = prepare(autoencoder, images)
        check_images(autoencoder.name, made, autoencoder.input_shape, "autoencoder.transform")
    for rows in ranges:
        part: Any = rest[rows.start : rows.stop]
        made = prepare(autoencoder, Normalised(part) if isinstance(images, Normalised) else part)
        yield Batch(tuple(map(str, rows)), tuple(rows), made)


def _loaded(autoencoder: TakesPictures, loader: Any) -> Iterator[Batch]:
    """The batches of a DataLoader: images, or tuples and mappings that hold images and perhaps labels."""
    start = 0
    for item in loader:
        pixels, labels = _parts(item, "the loader's batch")
        if not isinstance(pixels, Tensor | np.ndarray) or pixels.ndim != 4:
            raise TrajOODError(
                f"images: expected a loader's batches to be pixels (B, C, H, W), got {_what(pixels)}: its data set "
                "needs a transform to tensors, such as torchvision's ToTensor"
            )
        rows = range(start, start + len(pixels))
        start = rows.stop
        own = labels.tolist() if hasattr(labels, "tolist") else list(labels) if labels is not None else []
        yield Batch(tuple(map(str, rows)), tuple(rows), prepare(autoencoder, pixels), labels=tuple(own))


def _read(
    autoencoder: TakesPictures, images: Any, ranges: list[range], workers: int, on_error: OnError, reading: Reading
) -> Iterator[Batch]:
    foreign = has_own_labels(images)

    def one(index: int) -> tuple[Tensor, Any] | TrajOODError:
        try:
            item, label = _item(images, index, foreign, reading)
            if isinstance(item, Image.Image):
                return autoencoder.transform(item), label
            return prepare(autoencoder, item)[0], label
        except TrajOODError as error:
            if on_error == "raise":
                raise
            return error

    with ThreadPoolExecutor(1 if foreign else workers) as pool:
        ahead = pool.map(one, ranges[0]) if ranges else iter(())
        for number, rows in enumerate(ranges):
            outcomes = dict(zip(rows, ahead, strict=True))
            if number + 1 < len(ranges):
                ahead = pool.map(one, ranges[number + 1])
            good = {i: o for i, o in outcomes.items() if not isinstance(o, TrajOODError)}
            failures = [{"id": _name(images, i), "error": str(outcomes[i])} for i in outcomes if i not in good]
            stack = [pixels for pixels, _ in good.values()]
            labels = tuple(label for _, label in good.values())
            yield Batch(
                ids=tuple(_name(images, i) for i in good),
                rows=tuple(good),
                images=torch.stack(stack) if stack else torch.empty(0, *autoencoder.input_shape),
                failures=failures,
                labels=() if any(label is None for label in labels) else labels,
            )


def _is_source(images: object) -> bool:
    return all(hasattr(images, name) for name in ("load", "ids", "missing"))


def _item(images: Any, index: int, foreign: bool, reading: Reading) -> tuple[Image.Image | Tensor | np.ndarray, Any]:
    """Image ``index``, decoded, and its label where it has one."""
    if _is_source(images):
        return images.load(index), None
    label = None
    if foreign:
        try:
            item, label = _parts(images[index], f"item {index} of {type(images).__name__}")
        except TrajOODError:
            raise
        except Exception as error:  # a data set's code may be anybody's
            raise TrajOODError(f"images: item {index} of {type(images).__name__} cannot be read: {error!r}") from error
    else:
        item = images[index]
    if isinstance(item, str | Path):
        return open_image(Path(item), reading), label
    if isinstance(item, Image.Image):
        with _DECODING:  # the same picture may be in a list twice
            return decode(item, f"images: the one at place {index}", reading), label
    if isinstance(item, Tensor | np.ndarray):
        if item.ndim != 3:
            raise TrajOODError(f"images: expected one image (C, H, W), got shape {tuple(item.shape)} at place {index}")
        return item, label
    raise TrajOODError(f"images: expected PIL images, paths or pixels, got {type(item).__name__} at place {index}")


def _name(images: Any, index: int) -> str:
    if _is_source(images):
        return str(images.ids[index])
    if isinstance(images, list | tuple) and isinstance(images[index], str | Path):
        return str(images[index])
    return str(index)


def _parts(item: Any, where: str) -> tuple[Any, Any]:
    """The image (or images) and the label of what a data set or loader gives."""
    if isinstance(item, Mapping):
        key = next((k for k in IMAGE_KEYS if k in item), None)
        if key is None:
            raise TrajOODError(f"images: {where}: expected a key of {', '.join(IMAGE_KEYS)}, got {_what(item)}")
        return item[key], next((item[k] for k in LABEL_KEYS if k in item), None)
    if isinstance(item, tuple | list) and len(item):
        label = item[1] if len(item) > 1 else None
        return item[0], label.item() if isinstance(label, Tensor) and label.ndim == 0 else label
    return item, None


def _what(item: Any) -> str:
    if isinstance(item, Tensor | np.ndarray):
        return f"shape {tuple(item.shape)}"
    return f"keys {', '.join(map(str, item))}"[:80] if isinstance(item, Mapping) else f"a {type(item).__name__}"
