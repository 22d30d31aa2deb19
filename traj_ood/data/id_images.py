"""The ID images of a detector: those it learns from, and others that its threshold comes from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from traj_ood.data.benchmark import sample_indices
from traj_ood.data.decoding import AS_STORED, Reading
from traj_ood.data.encoded import EncodedImages, read_encoded
from traj_ood.data.images import FileImages, ImageSource, read_folder, read_image_list
from traj_ood.data.records import AS_USUAL, Opening, is_records
from traj_ood.data.registry import list_benchmarks, load_benchmark
from traj_ood.errors import TrajOODError, unknown_name

HELD_OUT = 0.2
"""Share of the ID images that is held out for calibration where none are given."""
MAX_CALIBRATION = 2000
"""Most images of that share, or of a benchmark's val split. With so many, the share of ID images that a threshold of
95 % accepts is known to half a percent (one standard deviation); more would cost time and say little."""


@dataclass(frozen=True)
class IDImages:
    """ID images by what they are for; no image is in both ``train`` and ``calibration``.

    Attributes:
        name: of the benchmark, folder or list.
        train: all that may be learnt from, such as by a surrogate of a backbone.
        fit: those of ``train`` that the scorer learns from.
        calibration: those that the threshold comes from.
        origin: of the calibration images, in words.
    """

    name: str
    train: ImageSource
    fit: ImageSource
    calibration: ImageSource
    origin: str


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
    opening: Opening = AS_USUAL,
) -> IDImages:
    """ID images from a benchmark, a folder or an image list.

    Args:
        source: a benchmark's name or YAML file, whose training split is taken; a folder; or an image list.
        count: images to learn from, drawn by ``seed``. Default: the benchmark's protocol, or all.
        seed: of that draw and of what is held out.
        calibration: a folder or list of images to calibrate on, all of them. Default: the benchmark's val split, else a
            fifth of the images, drawn by ``seed``; of either at most 2,000.
        least: calibration images that are needed: where a fifth of the images is fewer, more are held out. Default 1.
        root: where a benchmark's data are, and where the paths of image lists start. Default: each benchmark's own
            places, and the list's own folder.
        follow_links: let image lists reach out of their roots by links. Default false.
        reading: how image files become pixels.
        opening: of sources of records (tar shards, Parquet, videos, addresses; :mod:`traj_ood.data.records`), which may
            stand wherever a folder or list may.
    Raises:
        TrajOODError: nothing of that name, a link out of a list's root, images that cannot be told apart, fewer images
            than ``count``, or fewer than two for each that is held out.
    """
    name, images, val, protocol = _read(source, root, follow_links, reading, opening)
    if seed < 0:
        raise TrajOODError(f"seed: expected 0 or more, got {seed}")
    held: ImageSource
    if calibration is not None:
        held, origin = _read_files(calibration, root, follow_links, reading, opening), f"images of {calibration}"
        _check_disjoint(images, held, source, calibration)
    elif val is not None:
        held, origin = _at_most(val, MAX_CALIBRATION, seed, "calibration"), "images of the val split"
    else:
        if len(images) < 2 * least:
            raise TrajOODError(
                f"{source}: expected at least {2 * least} images, {least} of them to be held out for calibration, got "
                f"{len(images)}: give more images, a smaller tpr, or calibration images of their own (--calibrate)"
            )
        size = max(least, min(MAX_CALIBRATION, round(HELD_OUT * len(images))))
        chosen = set(sample_indices(len(images), size, seed, "calibration"))
        held = images.select(sorted(chosen))
        images = images.select([i for i in range(len(images)) if i not in chosen])
        origin = f"held-out images of {source}"
    if count is None:
        count = len(images) if protocol is None else min(protocol, len(images))
    if not 2 <= count <= len(images):
        raise TrajOODError(
            f"{source}: expected between 2 and {len(images)} images to learn from (all that are not held out), got "
            f"{count}; ask for a number in that range"
        )
    return IDImages(name, images, _at_most(images, count, seed, "fit"), held, origin)


def calibration_images(
    source: str,
    root: str | Path | None = None,
    follow_links: bool = False,
    reading: Reading = AS_STORED,
    opening: Opening = AS_USUAL,
) -> ImageSource:
    """ID images to calibrate a detector on that is there already: all of a folder or list, or a benchmark's val split.

    Args:
        root, follow_links, reading, opening: see :func:`choose_id_images`.
    Raises:
        TrajOODError: nothing of that name, or a benchmark without a val split.
    """
    _, images, val, _ = _read(source, root, follow_links, reading, opening)
    if not _is_benchmark(source):
        return images
    if val is None:
        raise TrajOODError(
            f"{source}: expected a val split of ID images that nothing was trained on, got a benchmark without one: "
            "give a folder or a list of such images"
        )
    return val


def _read(
    source: str, root: str | Path | None, follow_links: bool, reading: Reading, opening: Opening
) -> tuple[str, ImageSource, ImageSource | None, int | None]:
    """Name, training images, val images and the protocol's number of training images, the last two where there are."""
    if is_records(source):
        return source.rstrip("/").rpartition("/")[2], read_encoded(source, reading, opening), None, None
    is_benchmark = _is_benchmark(source)
    if not is_benchmark and not Path(source).exists():
        known = [info.name for info in list_benchmarks()]
        raise TrajOODError(f"{source}: no such folder or image list; {unknown_name('benchmark', source, known)}")
    if is_benchmark:
        benchmark = load_benchmark(source, root, follow_links=follow_links, reading=reading)
        val = None if benchmark.val is None else benchmark.val.images
        return benchmark.name, benchmark.train.images, val, benchmark.train_size
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


def _at_most(images: ImageSource, count: int, seed: int, stream: str) -> ImageSource:
    return images if count >= len(images) else images.select(sample_indices(len(images), count, seed, stream))


def _check_disjoint(images: ImageSource, held: ImageSource, source: str, calibration: str) -> None:
    """Images cannot calibrate what has learnt from them: their scores are lower than those of images to come."""
    if not (isinstance(images, FileImages) and isinstance(held, FileImages)):
        return
    known = set(held.resolved())
    shared = sum(path in known for path in images.resolved())
    if shared:
        raise TrajOODError(
            f"{calibration}: {shared} of its images are in {source}, too; calibrate on images that the detector does "
            "not learn from, or leave --calibrate out to hold some of them out"
        )
