"""The benchmarks `tiny-imagenet` and `imagenet-sample`: photographs against scenes, textures, X-rays and digits.

They need folders below one root, and no image list::

    tiny_imagenet/{train,val}/WNID/*.JPEG    `tiny-imagenet`: 64 x 64, any number of each class
    imagenet_sample/WNID_NAME.JPEG           `imagenet-sample`: one image of each of ImageNet's 1,000 classes
    scenes/CLASS/*.jpg                       near: landscapes, streets and buildings, which ImageNet shows by the way
    dtd10/CLASS/*.jpg, chest_xray/*.jpg      far: Describable Textures, chest X-rays
    mnist/t10k-images-idx3-ubyte             far: handwritten digits, with their labels beside them (gzipped or not)

Every image of a benchmark, in distribution or not, passes one resize and one JPEG step (:mod:`.equal_files`), and what
files give away all the same stands in every table (:mod:`traj_ood.evaluation.file_control`). Near and far were decided
by what the sets show, before any score was computed on them.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from traj_ood.data.benchmark import Benchmark, Split, sample_indices
from traj_ood.data.equal_files import EqualImages
from traj_ood.data.fashion_mnist import read_fashion_mnist
from traj_ood.data.images import ArrayImages, FileImages, ImageSource, labelled_by_folder, read_folder
from traj_ood.data.preflight import MissingDataError
from traj_ood.errors import TrajOODError

_SEED = 0
_VAL_SIZE = 1000
_FIT_SIZE = 500
NEAR = ("scenes",)
FAR = ("dtd10", "chest_xray", "mnist")


@dataclass(frozen=True)
class _Suite:
    """``folder`` holds the ID images, ``side`` is that of the squares, ``source`` says where the data come from."""

    folder: str
    side: int
    source: str


_SUITES = {
    "tiny-imagenet": _Suite("tiny_imagenet", 64, "Tiny-ImageNet (Stanford's CS231n)"),
    "imagenet-sample": _Suite("imagenet_sample", 256, "github.com/EliSchwartz/imagenet-sample-images"),
}
NATURAL_BENCHMARKS = tuple(_SUITES)


def load_natural(name: str, root: str | Path | None = None, allow_missing: bool = False) -> Benchmark:
    """One of ``NATURAL_BENCHMARKS``.

    Args:
        name: which.
        root: the folder that holds the folders above; default ``$TRAJ_OOD_DATA``, then ``./data``.
        allow_missing: leave out OOD sets that are not there; the name then ends in ``-partial``.

    Raises:
        MissingDataError: no root, or folders are not there; all of them are named.
        TrajOODError: a folder holds what it should not.
    """
    suite = _SUITES[name]
    base = _find_root(name, suite, root)
    absent = tuple(s for s in (*NEAR, *FAR) if not (base / s).is_dir())
    if absent and (not allow_missing or len(absent) == len((*NEAR, *FAR))):
        raise MissingDataError(
            f"benchmark {name!r}: {len(absent)} of {len((*NEAR, *FAR))} OOD sets are missing: expected "
            f"{', '.join(str(base / s) for s in absent)}; {_how(suite)}",
            tuple(str(base / s) for s in absent),
        )
    train, val, test = _tiny(base) if name == "tiny-imagenet" else _sample(base)

    def equal(images: ImageSource) -> ImageSource:
        return EqualImages(images, suite.side)

    return Benchmark(
        name=f"{name}-partial" if absent else name,
        train=Split("train", "train", equal(train)),
        val=None if val is None else Split("val", "val", equal(val)),
        test=Split("test", "test", equal(test)),
        ood=tuple(
            Split(s, "near" if s in NEAR else "far", equal(_ood(base, s))) for s in (*NEAR, *FAR) if s not in absent
        ),
        train_size=2000 if name == "tiny-imagenet" else None,
        note=f"This project's own protocol; every image at {suite.side} x {suite.side} pixels through one JPEG step."
        + (f" Left out, for want of data: {', '.join(absent)}." if absent else ""),
        how_to_get=_how(suite),
        control=True,
    )


def class_folders(root: Path, folder: str) -> FileImages:
    """The images below ``root / folder``, labelled by the first folder on the way to each, as in an ImageFolder."""
    images = labelled_by_folder(read_folder(root / folder, prefix=folder))
    return FileImages(root, images.ids, images.ids, images.labels)


def _tiny(base: Path) -> tuple[ImageSource, ImageSource | None, ImageSource]:
    held_out = class_folders(base, "tiny_imagenet/val")
    size = min(_VAL_SIZE, len(held_out) // 3)
    val = set(sample_indices(len(held_out), size, _SEED, "tiny-imagenet/val"))
    rest = [i for i in range(len(held_out)) if i not in val]
    return class_folders(base, "tiny_imagenet/train"), held_out.select(sorted(val)), held_out.select(rest)


def _sample(base: Path) -> tuple[ImageSource, None, ImageSource]:
    """500 images to fit on and 500 to test on. They have no labels: one image of a class says nothing of the class."""
    images = read_folder(base / "imagenet_sample", prefix="imagenet_sample")
    for path in images.paths:
        if not re.match(r"n\d{8}_.", path):
            raise TrajOODError(
                f"{base / 'imagenet_sample' / path}: expected a name of the form WNID_NAME.JPEG (n01440764_tench.JPEG);"
                " rename or remove the file"
            )
    fit = set(sample_indices(len(images), min(_FIT_SIZE, len(images) // 2), _SEED, "imagenet-sample/fit"))
    rest = [i for i in range(len(images)) if i not in fit]
    return images.select(sorted(fit)), None, images.select(rest)


def _ood(base: Path, name: str) -> ImageSource:
    if name != "mnist":
        return read_folder(base / name, prefix=name)
    digits, _ = read_fashion_mnist(base / name, "t10k")
    return ArrayImages(tuple(f"mnist/t10k/{i:05d}" for i in range(len(digits))), digits)


def _find_root(name: str, suite: _Suite, root: str | Path | None) -> Path:
    """The first candidate that holds the ID images."""
    variable = os.environ.get("TRAJ_OOD_DATA")
    places = [Path(root)] if root is not None else [*([Path(variable)] if variable else []), Path("data")]
    for place in places:
        if (place / suite.folder).is_dir():
            return place
    looked = tuple(str(place / suite.folder) for place in places)
    raise MissingDataError(
        f"benchmark {name!r}: expected the folder {suite.folder}/, found no {' and no '.join(looked)}; give the folder "
        f"that holds it as root or in $TRAJ_OOD_DATA; {_how(suite)}",
        looked,
    )


def _how(suite: _Suite) -> str:
    return (
        f"unpack {suite.source} as {suite.folder}/, Intel's image classification scenes as scenes/, ten classes of the "
        "Describable Textures as dtd10/, chest X-rays as chest_xray/ and MNIST's test files as mnist/ below one root"
    )
