"""Lay unpacked folders out as OpenOOD's CIFAR-10 protocol reads them: python benchmarks/openood_layout.py FROM ROOT

FROM holds ``cifar10/{train,test}/CLASS/``, and any of ``tiny_imagenet/val/WNID/``, ``dtd10/``, ``scenes/`` and
``mnist/`` (idx files). ROOT becomes ``benchmark_imglist/cifar10/*.txt`` and ``images_classic/…``, for

    traj-ood bench cifar10 --allow-missing --data-root ROOT …

These are not OpenOOD's own files. Tiny ImageNet is its validation part, Texture ten classes of DTD, and scenes stand in
the place of Places365, under their own name; CIFAR-100 and SVHN are left out. Every image, in distribution or not, is
written as a 32-pixel centre square through one JPEG step (traj_ood/data/equal_files.py), because some of these sets
come as JPEG and others do not, and are of all sizes. The test images are split as there: 1,000 for validation, the rest
for testing.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from traj_ood.data.benchmark import sample_indices
from traj_ood.data.equal_files import QUALITY, centre_square
from traj_ood.data.fashion_mnist import read_fashion_mnist
from traj_ood.data.images import ArrayImages, ImageSource, read_folder
from traj_ood.data.natural import class_folders
from traj_ood.errors import TrajOODError
from traj_ood.io.files import write_atomic

SIDE = 32
VAL_SIZE = 1000
SETS = {"tin": "tiny_imagenet/val", "mnist": "mnist", "texture": "dtd10", "scenes": "scenes"}


def lay_out(source: Path, root: Path) -> dict[str, int]:
    """Write what is there; returns the number of images of each list."""
    classes = sorted(p.name for p in (source / "cifar10" / "train").glob("*/"))
    if len(classes) < 2:
        raise TrajOODError(f"{source}/cifar10/train: expected a folder for each class, found {len(classes)}: unpack it")
    number = {name: i for i, name in enumerate(classes)}
    written = {}
    for part in ("train", "test"):
        images = class_folders(source, f"cifar10/{part}")
        lines = _write(images, root, f"cifar10/{part}", [number[label] for label in images.labels])
        val = set(sample_indices(len(lines), min(VAL_SIZE, len(lines) // 2), 0, "val")) if part == "test" else set()
        written[part] = _list(root, f"{part}_cifar10", [x for i, x in enumerate(lines) if i not in val])
        if val:
            written["val"] = _list(root, "val_cifar10", [x for i, x in enumerate(lines) if i in val])
    for name, folder in SETS.items():
        if (source / folder).is_dir():
            images = _digits(source / folder) if name == "mnist" else read_folder(source / folder)
            written[name] = _list(root, f"test_{name}", _write(images, root, name, [-1] * len(images)))
    return written


def _digits(folder: Path) -> ImageSource:
    array, _ = read_fashion_mnist(folder, "t10k", "mnist")
    return ArrayImages(tuple(f"{i:05d}" for i in range(len(array))), array)


def _write(images: ImageSource, root: Path, name: str, labels: Sequence[int]) -> list[str]:
    """The images below ``images_classic / name`` and a line of the list for each."""
    lines = []
    for i, label in enumerate(labels):
        path = f"{name}/{i // 1000:03d}/{i:06d}.jpg"
        target = root / "images_classic" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        centre_square(images.load(i).convert("RGB"), SIDE, "BICUBIC").save(target, "JPEG", quality=QUALITY)
        lines.append(f"{path} {label}")
    return lines


def _list(root: Path, name: str, lines: list[str]) -> int:
    target = root / "benchmark_imglist" / "cifar10" / f"{name}.txt"
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(target, ("\n".join(lines) + "\n").encode())
    return len(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the unpacked folders")
    parser.add_argument("root", type=Path, help="where OpenOOD's layout is written")
    given = parser.parse_args(arguments)
    for name, count in lay_out(given.source, given.root).items():
        print(f"{name}: {count}")


if __name__ == "__main__":
    main()
