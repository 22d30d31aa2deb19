"""Choose the ID images of a detector: images to fit its scorer, and other images to calibrate its threshold."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from traj_ood.data.benchmark import at_most, split_off
from traj_ood.data.decoding import AS_STORED, Reading
from traj_ood.data.encoded import EncodedImages, read_encoded
from traj_ood.data.images import FileImages, ImageSource, read_folder, read_image_list
from traj_ood.data.records import DEFAULT_OPENING, Opening, is_records
from traj_ood.data.registry import list_benchmarks, load_benchmark
from traj_ood.errors import TrajOODError, unknown_name

HELD_OUT = 0.2
"""Share of the ID images that is held out for calibration if no calibration images are given."""
MAX_CALIBRATION = 2000
"""Largest number of held-out images, or of images from a benchmark's val split. With so many, the share of ID images
that a 95 % threshold accepts is known to half a percent (one standard deviation); more would only cost time."""


@dataclass(frozen=True)
class IDImages:
    """ID images by purpose; no image is in both ``train`` and ``calibration``."""

    name: str  # of the benchmark, folder or list
    train: ImageSource  # all that may be used for learning, such as by a surrogate of a backbone
    fit: ImageSource  # those of ``train`` on which the scorer is fitted
    calibration: ImageSource  # for the threshold
    origin: str  # of the calibration images, in words


def choose_id_images(
    source: str,
    *,
    count: int | None = None,
    seed: int = 0,
    calibration: str | None = None,
    least: int = 1,
    root: str | Path | None = None,
    follow_links: bool = False,
    reading: Reading = AS_STORED,
    opening: Opening = DEFAULT_OPENING,
) -> IDImages:
    """Choose ID images from a benchmark (its training split), a folder, an image list or a source of records.

    Args:
        source: the name or YAML file of a benchmark, a folder, a list, or a source that :mod:`.records` reads.
        count: number of images to fit on, drawn with ``seed``. Default: the benchmark's protocol, or all.
        seed: seed of this draw and of the held-out images.
        calibration: a folder or list of calibration images, all of which are used. Default: the benchmark's val split,
            else a fifth of the images, drawn with ``seed``; at most 2,000 of either.
        least: smallest number of held-out images. Default 1.
        root: folder of a benchmark's data, and the folder to which paths in image lists are relative. Default: where
            each benchmark looks, and the list's own folder.
        follow_links, reading, opening: how image lists, image files and sources of records are read.
    """
    name, images, val, protocol = _read(source, root, follow_links, reading, opening)
    if seed < 0:
        raise TrajOODError(f"seed: expected 0 or more, got {seed}")
    held: ImageSource
    if calibration is not None:
        held, origin = _read_files(calibration, root, follow_links, reading, opening), f"images of {calibration}"
        _check_disjoint(images, held, source, calibration)
    elif val is not None:
        held, origin = at_most(val, MAX_CALIBRATION, seed, "calibration"), "images of the val split"
    else:
        if len(images) < 2 * least:
            raise TrajOODError(
                f"{source}: expected at least {2 * least} images, {least} of them to be held out for calibration, got "
                f"{len(images)}: give more images, a smaller tpr, or separate calibration images (--calibrate)"
            )
        size = max(least, min(MAX_CALIBRATION, round(HELD_OUT * len(images))))
        held, images = split_off(images, size, seed, "calibration")
        origin = f"held-out images of {source}"
    if count is None:
        count = len(images) if protocol is None else min(protocol, len(images))
    if not 2 <= count <= len(images):
        raise TrajOODError(
            f"{source}: expected between 2 and {len(images)} images to learn from (all that are not held out), got "
            f"{count}; ask for a number in that range"
        )
    return IDImages(name, images, at_most(images, count, seed, "fit"), held, origin)


def calibration_images(
    source: str,
    root: str | Path | None = None,
    follow_links: bool = False,
    reading: Reading = AS_STORED,
    opening: Opening = DEFAULT_OPENING,
) -> ImageSource:
    """ID images for calibrating an existing detector: all of a folder or list, or a benchmark's val split."""
    _, images, val, _ = _read(source, root, follow_links, reading, opening)
    if not _is_benchmark(source):
        return images
    if val is None:
        raise TrajOODError(
            f"{source}: expected a val split of ID images that were not used for training, got a benchmark without "
            "one: give a folder or a list of such images"
        )
    return val


def _read(
    source: str, root: str | Path | None, follow_links: bool, reading: Reading, opening: Opening
) -> tuple[str, ImageSource, ImageSource | None, int | None]:
    """Name, training images, val images or None, and the protocol's number of training images or None."""
    if is_records(source):
        return source.rstrip("/").rpartition("/")[2], read_encoded(source, reading, opening), None, None
    if _is_benchmark(source):
        benchmark = load_benchmark(source, root, follow_links=follow_links, reading=reading, opening=opening)
        val = None if benchmark.val is None else benchmark.val.images
        return benchmark.name, benchmark.train.images, val, benchmark.train_size
    if not Path(source).exists():
        known = [info.name for info in list_benchmarks()]
        raise TrajOODError(f"{source}: no such folder or image list; {unknown_name('benchmark', source, known)}")
    return Path(source).resolve().name, _read_files(source, root, follow_links, reading, opening), None, None


def _is_benchmark(source: str) -> bool:
    return source in [info.name for info in list_benchmarks()] or source.lower().endswith((".yaml", ".yml"))


def _read_files(
    source: str, root: str | Path | None, follow_links: bool, reading: Reading, opening: Opening
) -> FileImages | EncodedImages:
    if is_records(source):
        return read_encoded(source, reading, opening)
    path = Path(source)
    if not path.is_file():
        images = read_folder(path)
    else:
        images = read_image_list(path, root or path.parent, follow_links=follow_links)
        images.check_links()  # before anything is computed
    return replace(images, exif=reading.exif, bit_depth=reading.bit_depth)


def _check_disjoint(images: ImageSource, held: ImageSource, source: str, calibration: str) -> None:
    """Refuse calibration images that are also fitted on: their scores are lower than those of new images."""
    if not (isinstance(images, FileImages) and isinstance(held, FileImages)):
        return
    known = set(held.resolved())
    shared = sum(path in known for path in images.resolved())
    if shared:
        raise TrajOODError(
            f"{calibration}: {shared} of its images are also in {source}; calibrate on images that the detector is not "
            "fitted on, or omit --calibrate to hold out some of them"
        )
