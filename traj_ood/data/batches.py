"""Batches of preprocessed images from every kind of input that a detector or a scorer set accepts."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import sampler as samplers

from traj_ood.data.benchmark import Split, reading_of
from traj_ood.data.decoding import AS_STORED, Reading, decode, open_image
from traj_ood.data.images import ImageSource
from traj_ood.data.preprocessing import ImageModel, Normalised, Pixels, check_images, prepare
from traj_ood.errors import TrajOODError, UnreadableImageError, check_word

Images: TypeAlias = "Pixels | ImageSource | Sequence[Image.Image | str | Path | Tensor | np.ndarray] | Any"
"""Accepted inputs: pixels in memory (tensor or array, uint8 or float in [0, 1], (B, C, H, W) or one (C, H, W)); an
ImageSource; a list of Pillow images, paths or (C, H, W) pixels; a ``torch.utils.data`` Dataset of images or of tuples
that begin with an image; a DataLoader of such a Dataset; :class:`traj_ood.Normalised`."""
OnError = Literal["raise", "skip"]
IMAGE_KEYS = ("image", "img", "pixel_values", "data")
"""Keys under which the image is looked for when the items of a data set are mappings; the first one present counts."""
LABEL_KEYS = ("label", "labels", "target")
_MAX_BYTES = 2**27  # of pixels in a batch; the latents of common models take about as much again
_MAX_IMAGES = 1024  # in a batch
_DECODING = threading.Lock()


@dataclass(frozen=True)
class Batch:
    """A batch of B preprocessed images, where B may be 0.

    Attributes:
        ids: B ids: those of the ImageSource, the paths as given, or else the positions in the input.
        rows: B positions in the input, without those of skipped images.
        images: (B, C, H, W) float32 in the model's units.
        failures: ``{id, error}`` of each skipped image.
        labels: B class labels, if a Dataset or DataLoader yields them with the images, else empty.
    """

    ids: tuple[str, ...]
    rows: tuple[int, ...]
    images: Tensor
    failures: list[dict[str, str]] = field(default_factory=list)
    labels: tuple[Any, ...] = ()


def count_of(images: Images) -> int:
    """The number of images, if ``images`` is an accepted input of known length."""
    if isinstance(images, Tensor | np.ndarray):
        return 1 if images.ndim == 3 else len(images) if images.ndim else 0
    if isinstance(images, str | bytes | Path | Image.Image):
        raise TrajOODError(
            f"images: expected many, got one {type(images).__name__}: put it into a list, or read a folder with "
            "traj_ood.data.read_folder"
        )
    if isinstance(images, torch.utils.data.IterableDataset):
        raise _unknown_number(images)
    try:
        if isinstance(images, torch.utils.data.DataLoader):
            own: Any = images.batch_sampler
            if isinstance(own, samplers.BatchSampler) and own.drop_last:
                return len(images) * own.batch_size  # len(own) fails over an IterableDataset
            sampler: Any = getattr(own, "sampler", images.sampler)
            return sum(map(len, own)) if isinstance(own, list | tuple) else len(sampler)
        indexed = hasattr(images, "__getitem__") and not isinstance(images, Mapping)
        if indexed or isinstance(images, Normalised) or _is_source(images):
            return len(images)
    except TypeError as error:
        raise _unknown_number(images) from error
    remedy = "pass its .images" if isinstance(images, Split) else "make a list of it"
    raise TrajOODError(
        "images: expected pixels (B, C, H, W), an ImageSource, a Dataset or DataLoader, or a list of PIL images or "
        f"paths, got {type(images).__name__}: {remedy}"
    )


def _unknown_number(images: Any) -> TrajOODError:
    data = images.dataset if isinstance(images, torch.utils.data.DataLoader) else images
    kind = type(images).__name__ + ("" if data is images else f" over {type(data).__name__}")
    return TrajOODError(
        f"images: expected images of known number, got {kind}, which does not say how many: make a list of its images, "
        "or score batch by batch"
    )


def shuffles(images: Images) -> bool:
    """Whether the input is a DataLoader that draws the order of its images."""
    random = samplers.RandomSampler | samplers.SubsetRandomSampler | samplers.WeightedRandomSampler
    used = (getattr(loader, "sampler", None) for loader in (images, getattr(images, "batch_sampler", None)))
    return any(isinstance(own, random) or getattr(own, "shuffle", False) is True for own in used)  # a distributed one


def has_own_labels(images: Images) -> bool:
    """Whether the input may yield class labels with its images, as a Dataset or DataLoader does."""
    known = Tensor | np.ndarray | Normalised | list | tuple
    return not isinstance(images, known) and not _is_source(images)


def batches(
    autoencoder: ImageModel,
    images: Images,
    size: int | None = None,
    workers: int = 2,
    on_error: OnError = "raise",
    reading: Reading = AS_STORED,
) -> Iterator[Batch]:
    """Iterate over batches of preprocessed images. The next batch is read in the background, so two are in memory.

    Args:
        autoencoder: the model whose ``transform`` is applied.
        images: any accepted input, see :data:`Images`.
        size: images per batch. Default: 128 MiB of pixels, at most 1,024 images. Results do not depend on it. The
            batches of a DataLoader keep their size.
        workers: threads that read images. Default 2. A Dataset is read by one thread, as it may not be thread-safe.
        on_error: ``raise`` (default), or ``skip`` images that cannot be read and list them in ``failures``. A batch in
            memory or of a DataLoader that has the wrong shape or NaN is always an error.
        reading: how paths and Pillow images are decoded; image files of a source must have the same setting.
    Raises:
        TrajOODError: an image cannot be read, or an item is no image.
    """
    count = count_of(images)
    to_list = getattr(images, "to_list", None)
    images = images if to_list is None else to_list()  # a pandas column, whatever its index
    check_word("value of on_error", on_error, OnError)
    for name, value in (("batch size", size), ("workers", workers)):
        if value is not None and value < 1:
            raise TrajOODError(f"{name}: expected at least 1, got {value}")
    files = reading_of(images) or reading
    if files != reading:
        raise TrajOODError(
            f"images: expected files read with {reading}, as the detector's training images were, got "
            f"exif={files.exif}, bit_depth={files.bit_depth}: read them in the same way"
        )
    channels, height, width = autoencoder.input_shape
    most = min(_MAX_IMAGES, _MAX_BYTES // (4 * channels * height * width))
    ranges = ranges_of(count, size or max(1, most // autoencoder.chunk) * autoencoder.chunk)
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
    return read_parts(autoencoder, images, ranges, workers, on_error, reading)


def ranges_of(count: int, size: int) -> list[range]:
    """The positions 0 … count − 1 as ranges of ``size``; the last one may be shorter."""
    return [range(i, min(i + size, count)) for i in range(0, count, size)]


def read_rows(
    model: ImageModel, images: ImageSource, rows: range, workers: int = 2, on_error: OnError = "raise"
) -> Batch:
    """Read the images at ``rows`` of a source as one batch; see :func:`batches`."""
    return next(read_parts(model, images, [rows], workers, on_error))


def _slices(autoencoder: ImageModel, images: Pixels, ranges: list[range]) -> Iterator[Batch]:
    if isinstance(images, np.ndarray | Tensor) and images.ndim == 3:
        images = images[None]
    rest = images.images if isinstance(images, Normalised) else images
    if not ranges or not isinstance(rest, np.ndarray | Tensor):  # the latter is refused
        made = prepare(autoencoder, images)
        check_images(autoencoder.name, made, autoencoder.input_shape, "autoencoder.transform")
    for rows in ranges:
        part: Any = rest[rows.start : rows.stop]
        made = prepare(autoencoder, Normalised(part) if isinstance(images, Normalised) else part)
        yield Batch(tuple(map(str, rows)), tuple(rows), made)


def _loaded(autoencoder: ImageModel, loader: Any) -> Iterator[Batch]:
    """The batches of a DataLoader, which are images, or tuples or mappings of images and labels."""
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


def read_parts(
    autoencoder: ImageModel,
    images: Any,
    parts: list[range],
    workers: int = 2,
    on_error: OnError = "raise",
    reading: Reading = AS_STORED,
) -> Iterator[Batch]:
    """:func:`read_rows` for each part of images that are read one by one; the next is read in the background."""
    foreign = has_own_labels(images)

    def one(index: int) -> tuple[Tensor, Any] | TrajOODError:
        try:
            item, label = _item(images, index, foreign, reading)
            if isinstance(item, Image.Image):
                try:
                    return autoencoder.transform(item), label
                except TrajOODError as error:
                    raise TrajOODError(f"{_name(images, index)}: {error}") from error
            return prepare(autoencoder, item)[0], label
        except TrajOODError as error:
            if on_error == "raise":
                raise UnreadableImageError(error) from error
            return error

    with ThreadPoolExecutor(1 if foreign else workers) as pool:
        ahead = pool.map(one, parts[0]) if parts else iter(())
        for rows, following in zip_longest(parts, parts[1:], fillvalue=range(0)):
            outcomes = dict(zip(rows, ahead, strict=True))
            ahead = pool.map(one, following)
            good = {i: o for i, o in outcomes.items() if not isinstance(o, TrajOODError)}
            failures = [{"id": _name(images, i), "error": str(outcomes[i])} for i in outcomes if i not in good]
            stack = [pixels for pixels, _ in good.values()]
            labels = tuple(label for _, label in good.values())
            yield Batch(
                ids=tuple(_name(images, i) for i in good),
                rows=tuple(good),
                images=torch.stack(stack) if stack else torch.empty(0, *autoencoder.input_shape, dtype=torch.float32),
                failures=failures,
                labels=() if any(label is None for label in labels) else labels,
            )


def _is_source(images: object) -> bool:
    return all(hasattr(images, name) for name in ("load", "ids", "missing"))


def _item(images: Any, index: int, foreign: bool, reading: Reading) -> tuple[Image.Image | Tensor | np.ndarray, Any]:
    """Image ``index``, decoded, and its label or None."""
    if _is_source(images):
        return images.load(index), None
    label = None
    if foreign:
        try:
            item, label = _parts(images[index], f"item {index} of {type(images).__name__}")
        except TrajOODError:
            raise
        except Exception as error:  # user code may raise anything
            raise TrajOODError(f"images: item {index} of {type(images).__name__} cannot be read: {error!r}") from error
    else:
        item = images[index]
    if isinstance(item, str | Path):
        return open_image(Path(item), reading), label
    if isinstance(item, Image.Image):
        with _DECODING:  # a list may contain the same Pillow image twice, and decoding it is not thread-safe
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
    """The image (or images) and the label (or labels) in an item of a Dataset or DataLoader."""
    if isinstance(item, Mapping):
        key = next((k for k in IMAGE_KEYS if k in item), None)
        if key is None:
            raise TrajOODError(f"images: {where}: expected a key of {', '.join(IMAGE_KEYS)}, got {_what(item)}")
        return item[key], next((item[k] for k in LABEL_KEYS if k in item), None)
    if isinstance(item, tuple | list) and len(item):
        image, *more = item
        label = more[0] if more else None
        return image, label.item() if isinstance(label, Tensor) and label.ndim == 0 else label
    return item, None


def _what(item: Any) -> str:
    if isinstance(item, Tensor | np.ndarray):
        return f"shape {tuple(item.shape)}"
    return f"keys {', '.join(map(str, item))}"[:80] if isinstance(item, Mapping) else f"a {type(item).__name__}"
