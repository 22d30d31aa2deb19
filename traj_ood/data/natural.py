"""The benchmarks `tiny-imagenet` and `imagenet-sample`: photographs against scenes, textures, X-rays and digits.

They need folders below one root, without image lists::

    tiny_imagenet/{train,val}/WNID/*.JPEG    `tiny-imagenet`: 64 x 64, any number of each class
    imagenet_sample/WNID_NAME.JPEG           `imagenet-sample`: one image of each of ImageNet's 1,000 classes
    scenes/CLASS/*.jpg                       near: landscapes, streets, buildings, which are backgrounds in ImageNet
    dtd10/CLASS/*.jpg, chest_xray/*.jpg      far: Describable Textures, chest X-rays
    mnist/t10k-images-idx3-ubyte             far: handwritten digits, with their labels beside them (gzipped or not)

Every image of a benchmark, in distribution or not, goes through the same resize and JPEG compression
(:mod:`.equal_files`); differences between files that remain are measured in every table
(:mod:`traj_ood.evaluation.file_control`). Near and far were decided by the sets' content, before any score was computed
on them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from traj_ood.data.benchmark import Benchmark, Split, split_off
from traj_ood.data.equal_files import EqualImages
from traj_ood.data.fashion_mnist import read_fashion_mnist
from traj_ood.data.images import ArrayImages, FileImages, ImageSource, labelled_by_folder, read_folder
from traj_ood.data.preflight import MissingDataError, find_root
from traj_ood.errors import TrajOODError

_SEED = 0
_VAL_SIZE = 1000
_FIT_SIZE = 500
NEAR = ("scenes",)
FAR = ("dtd10", "chest_xray", "mnist")


@dataclass(frozen=True)
class _Suite:
    folder: str  # of the ID images
    side: int  # of the square images in pixels
    source: str  # where the data come from
    images: str  # in distribution, in words


NATURAL_BENCHMARKS = {
    "tiny-imagenet": _Suite("tiny_imagenet", 64, "Tiny-ImageNet (Stanford's CS231n)", "Tiny-ImageNet"),
    "imagenet-sample": _Suite(
        "imagenet_sample", 256, "github.com/EliSchwartz/imagenet-sample-images", "500 of 1,000 ImageNet images"
    ),
}


def load_natural(name: str, root: str | Path | None = None, allow_missing: bool = False) -> Benchmark:
    """Load one of ``NATURAL_BENCHMARKS`` from the folder that contains the folders above; default ``$TRAJ_OOD_DATA``,
    then ``./data``.

    ``allow_missing`` omits missing OOD sets; the benchmark's name then ends in ``-partial``.
    """
    suite = NATURAL_BENCHMARKS[name]
    base = find_root(name, root, suite.folder, f"the folder {suite.folder}/", _how(suite))
    sets = (*NEAR, *FAR)
    absent = tuple(s for s in sets if not (base / s).is_dir())
    if absent and (not allow_missing or absent == sets):
        places = tuple(str(base / s) for s in absent)
        raise MissingDataError(
            f"benchmark {name!r}: {len(absent)} of {len(sets)} OOD sets are missing: expected {', '.join(places)}; "
            f"{_how(suite)}",
            places,
        )
    train, val, test = _tiny(base) if name == "tiny-imagenet" else _sample(base)

    def equal(images: ImageSource) -> ImageSource:
        return EqualImages(images, suite.side)

    return Benchmark(
        name=f"{name}-partial" if absent else name,
        train=Split("train", "train", equal(train)),
        val=None if val is None else Split("val", "val", equal(val)),
        test=Split("test", "test", equal(test)),
        ood=tuple(Split(s, "near" if s in NEAR else "far", equal(_ood(base, s))) for s in sets if s not in absent),
        train_size=2000 if name == "tiny-imagenet" else None,
        note=f"This project's own protocol; every image at {suite.side} x {suite.side} pixels through one JPEG step."
        + (f" Left out, for want of data: {', '.join(absent)}." if absent else ""),
        how_to_get=_how(suite),
        control=True,
    )


def class_folders(root: Path, folder: str) -> FileImages:
    """The images below ``root / folder``, each labelled by its subfolder, as in torchvision's ImageFolder."""
    images = labelled_by_folder(read_folder(root / folder, prefix=folder))
    return FileImages(root, images.ids, images.ids, images.labels)


def imagenet_sample(base: Path) -> FileImages:
    """The images of ``imagenet_sample/``, whose names give their classes."""
    images = read_folder(base / "imagenet_sample", prefix="imagenet_sample")
    for path in images.paths:
        if not re.match(r"n\d{8}_.", path):
            raise TrajOODError(
                f"{images.root / path}: expected a name of the form WNID_NAME.JPEG (n01440764_tench.JPEG), which gives "
                "the class; rename or remove the file"
            )
    return images


def _tiny(base: Path) -> tuple[ImageSource, ImageSource | None, ImageSource]:
    held_out = class_folders(base, "tiny_imagenet/val")
    size = min(_VAL_SIZE, len(held_out) // 3)
    return class_folders(base, "tiny_imagenet/train"), *split_off(held_out, size, _SEED, "tiny-imagenet/val")


def _sample(base: Path) -> tuple[ImageSource, None, ImageSource]:
    """500 images to fit on and 500 to test on, without labels, as there is only one image of each class."""
    images = imagenet_sample(base)
    fit, rest = split_off(images, min(_FIT_SIZE, len(images) // 2), _SEED, "imagenet-sample/fit")
    return fit, None, rest


def _ood(base: Path, name: str) -> ImageSource:
    if name != "mnist":
        return read_folder(base / name, prefix=name)
    digits, _ = read_fashion_mnist(base / name, "t10k", "mnist")
    return ArrayImages(tuple(f"mnist/t10k/{i:05d}" for i in range(len(digits))), digits)


def _how(suite: _Suite) -> str:
    return (
        f"unpack {suite.source} as {suite.folder}/, Intel's image classification scenes as scenes/, ten classes of the "
        "Describable Textures as dtd10/, chest X-rays as chest_xray/ and MNIST's test files as mnist/ below one root"
    )
