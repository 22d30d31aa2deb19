"""Images of any kind that a detector takes, a batch at a time in the model's own units."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast, get_args

import torch
from PIL import Image
from torch import Tensor

from traj_ood.autoencoders import Autoencoder
from traj_ood.data.images import ImageSource, check_picture, open_image
from traj_ood.errors import TrajOODError, unknown_name
from traj_ood.pixels import check_images

Images: TypeAlias = "Tensor | ImageSource | Sequence[Image.Image | str | Path]"
"""(B, C, H, W) in the model's normalised units, an ImageSource, or a list of PIL images or of paths of image files."""
OnError = Literal["raise", "skip"]
_BYTES = 2**27  # of pixels at a time; the latents of usual models are of about that size, too
_MOST = 1024


@dataclass(frozen=True)
class Batch:
    """Images that could be read.

    Attributes:
        ids: B names: an ImageSource's ids, paths as they were given, else numbers.
        rows: B places in what was given; all of them unless images were skipped.
        images: (B, C, H, W) float32 in the model's units; B may be 0.
        failures: {id, error} of each image that was skipped.
    """

    ids: tuple[str, ...]
    rows: tuple[int, ...]
    images: Tensor
    failures: list[dict[str, str]] = field(default_factory=list)


def count_of(images: Images) -> int:
    """How many images these are.

    Raises:
        TrajOODError: nothing that a detector takes, such as a single path.
    """
    if isinstance(images, Tensor):
        if images.ndim != 4:
            raise TrajOODError(
                f"images: expected a tensor (B, C, H, W), got shape {tuple(images.shape)}: give a batch in the model's "
                "units (autoencoder.transform)"
            )
        return len(images)
    if isinstance(images, str | Path | Image.Image):
        raise TrajOODError(
            f"images: expected many, got one {type(images).__name__}: put it into a list, or read a folder with "
            "traj_ood.data.read_folder"
        )
    if _is_source(images) or (isinstance(images, Sequence) and not isinstance(images, bytes)):
        return len(images)
    raise TrajOODError(
        f"images: expected a tensor (B, C, H, W), an ImageSource, or a list of PIL images or paths, got "
        f"{type(images).__name__}: make a list of it"
    )


def batches(
    autoencoder: Autoencoder,
    images: Images,
    size: int | None = None,
    workers: int = 2,
    on_error: OnError = "raise",
) -> Iterator[Batch]:
    """Read and transform images, one batch ahead of the caller; no more than two batches are in memory.

    Args:
        size: most images at a time. Default: 128 MiB of pixels, at most 1,024 images. Results do not depend on it.
        workers: threads that read. Default 2.
        on_error: ``raise`` (default) or ``skip`` images that cannot be read, which are then in ``failures``. It is
            about reading: a tensor of the wrong shape or with NaN is always an error.
    Raises:
        TrajOODError: what cannot be read, or is no image.
    """
    count = count_of(images)
    if on_error not in get_args(OnError):
        raise unknown_name("value of on_error", str(on_error), get_args(OnError))
    for name, value in (("batch size", size), ("workers", workers)):
        if value is not None and value < 1:
            raise TrajOODError(f"{name}: expected at least 1, got {value}")
    step = size or _default_size(autoencoder)
    ranges = [range(i, min(i + step, count)) for i in range(0, count, step)]
    if isinstance(images, Tensor):
        return _slices(autoencoder, images, ranges)
    if on_error == "raise" and _is_source(images):
        missing = cast("ImageSource", images).missing()
        if missing:
            raise TrajOODError(
                f"images: {len(missing)} of {count} files are absent or empty, first {missing[0]}: restore them, or "
                "leave them out with on_error='skip' (--on-error skip)"
            )
    return _read(autoencoder, images, ranges, workers, on_error)


def _default_size(autoencoder: Autoencoder) -> int:
    channels, height, width = autoencoder.input_shape
    most = min(_MOST, _BYTES // (4 * channels * height * width))
    return max(1, most // autoencoder.chunk) * autoencoder.chunk


def _slices(autoencoder: Autoencoder, images: Tensor, ranges: list[range]) -> Iterator[Batch]:
    if not ranges:
        check_images(autoencoder.name, images, autoencoder.input_shape, "autoencoder.transform")
    for rows in ranges:
        yield Batch(tuple(map(str, rows)), tuple(rows), images[rows.start : rows.stop])


def _read(
    autoencoder: Autoencoder, images: Any, ranges: list[range], workers: int, on_error: OnError
) -> Iterator[Batch]:
    load, name = _source_of(images)

    def one(index: int) -> Tensor | TrajOODError:
        try:
            return autoencoder.transform(load(index))
        except TrajOODError as error:
            if on_error == "raise":
                raise
            return error

    with ThreadPoolExecutor(workers) as pool:
        ahead = pool.map(one, ranges[0]) if ranges else iter(())
        for number, rows in enumerate(ranges):
            outcomes = dict(zip(rows, ahead, strict=True))
            if number + 1 < len(ranges):
                ahead = pool.map(one, ranges[number + 1])
            good = {i: o for i, o in outcomes.items() if isinstance(o, Tensor)}
            failures = [{"id": name(i), "error": str(o)} for i, o in outcomes.items() if not isinstance(o, Tensor)]
            stack = torch.stack(list(good.values())) if good else torch.empty(0, *autoencoder.input_shape)
            yield Batch(tuple(name(i) for i in good), tuple(good), stack, failures)


def _is_source(images: object) -> bool:
    return all(hasattr(images, name) for name in ("load", "ids", "missing"))


def _source_of(images: Any) -> tuple[Callable[[int], Image.Image], Callable[[int], str]]:
    """How to get image i, and what to call it."""
    if _is_source(images):
        return images.load, lambda i: images.ids[i]

    def load(index: int) -> Image.Image:
        item = images[index]
        if isinstance(item, str | Path):
            return open_image(Path(item))
        if isinstance(item, Image.Image):
            return _plain(item, index)
        raise TrajOODError(f"images: expected PIL images or paths, got {type(item).__name__} at place {index}")

    return load, lambda i: str(images[i]) if isinstance(images[i], str | Path) else str(i)


def _plain(image: Image.Image, index: int) -> Image.Image:
    """As the reader of files makes it, which refuses the same: decoded, mode 'L' or 'RGB', alpha dropped."""
    where = f"images: the one at place {index}"
    check_picture(image, where)
    if image.mode.startswith(("I", "F")):  # convert() would clip 16 bits to white
        raise TrajOODError(
            f"images: expected 8 bits per channel, got mode {image.mode!r} at place {index}: give its path, or scale "
            "it to mode 'L'"
        )
    try:
        image.load()  # one that was opened, but not decoded, may be cut off, or its file closed by now
        if image.mode in ("L", "RGB"):
            return image
        if image.mode == "1":
            return image.convert("L")
        return (image.convert("RGBA") if image.mode == "P" else image).convert("RGB")
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, …
        reason = " ".join(str(error).split()) or type(error).__name__
        raise TrajOODError(f"{where}: cannot be decoded ({reason}); replace it or leave it out") from error
