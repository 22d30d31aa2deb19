"""Sets of images by name: benchmarks, image sets and folders."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from traj_ood.analysis.images import IMAGE_SETS, load_images, sample
from traj_ood.data import Benchmark, ImageSource, list_benchmarks, load_benchmark, read_folder
from traj_ood.data.benchmark import TEST_SEED
from traj_ood.errors import TrajOODError, unknown_name


@dataclass(frozen=True)
class NamedImages:
    """Images with their name in results."""

    name: str
    source: ImageSource


def named_images(names: Sequence[str], root: Path | None, most: int) -> list[NamedImages]:
    """Load sets of images by name, each sampled to at most ``most`` images, the same ones on every machine.

    Args:
        names: each a folder of images (a path, or a folder in ``root``); an image set of
            :data:`traj_ood.analysis.images.IMAGE_SETS`, which stands for its test images (``cifar10`` is the image set,
            not OpenOOD's benchmark); or the name or YAML file of a benchmark, which stands for its test split and all
            its OOD sets.
        root: folder of the data, as for :func:`traj_ood.load_benchmark`.
        most: maximum number of images per set, drawn by a fixed seed.
    Raises:
        TrajOODError: an unknown name, two sets with the same name, or data that are missing or malformed.
    """
    found = [images for name in names for images in _of(name, root)]
    counts = Counter(images.name for images in found)
    twice = next((name for name, count in counts.items() if count > 1), None)
    if twice is not None:
        raise TrajOODError(
            f"data: expected sets of images with different names, got {twice!r} twice: leave one out or rename its "
            "folder"
        )
    return [NamedImages(i.name, sample(i.source, min(most, len(i.source)), TEST_SEED, i.name)) for i in found]


def training_images(name: str, root: Path | None, size: int, seed: int) -> ImageSource:
    """Draw ``size`` images by ``seed`` from a folder, or from the training images of an image set or a benchmark.

    Raises:
        TrajOODError: as :func:`named_images`, or fewer than ``size`` images.
    """
    folder = folder_of(name, root)
    if folder is not None:
        images: ImageSource = read_folder(folder, prefix=folder.name)
    elif name in IMAGE_SETS:
        images = load_images(name, root).train
    else:
        images = _benchmark(name, root).train.images
    return sample(images, size, seed, name)


def _of(name: str, root: Path | None) -> list[NamedImages]:
    folder = folder_of(name, root)
    if folder is not None:
        return [NamedImages(folder.name, read_folder(folder, prefix=folder.name))]
    if name in IMAGE_SETS:
        return [NamedImages(name, load_images(name, root).test)]
    benchmark = _benchmark(name, root)
    own = NamedImages(f"{benchmark.name} test", benchmark.test.images)
    return [own, *(NamedImages(split.name, split.images) for split in benchmark.ood)]


def folder_of(name: str, root: Path | None) -> Path | None:
    """The folder that ``name`` means, as a path or in ``root``; None if there is none."""
    places = (Path(name).expanduser(), *([root / name] if root is not None and name not in IMAGE_SETS else []))
    return next((folder for folder in places if folder.is_dir()), None)


def _benchmark(name: str, root: Path | None) -> Benchmark:
    known = [info.name for info in list_benchmarks()]
    if name in known or name.lower().endswith((".yaml", ".yml")):
        return load_benchmark(name, root)
    raise unknown_name("set of images", name, [*known, *IMAGE_SETS, "a folder of images", "a benchmark's .yaml file"])
