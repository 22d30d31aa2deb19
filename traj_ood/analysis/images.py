"""The image sets of the paper's small experiments: Fashion-MNIST, MNIST and CIFAR-10, all classes, train and test."""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from traj_ood.data import ImageSource
from traj_ood.data.benchmark import sample_indices
from traj_ood.data.cifar10_local import CIFAR, ID_CLASSES, NEAR_CLASSES, PER_CLASS, cifar_images
from traj_ood.data.fashion_mnist import FILES, find_idx_files, obtain_fashion_mnist, read_fashion_mnist
from traj_ood.data.images import ArrayImages
from traj_ood.errors import TrajOODError, unknown_name
from traj_ood.io.files import cache_folder, check_can_write

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageData:
    """An image set: its name, the shape (C, H, W) of its images, and its training and test images."""

    name: str
    shape: tuple[int, int, int]
    train: ImageSource
    test: ImageSource


def load_images(name: str, root: Path | None = None) -> ImageData:
    """Load all classes of ``fashion-mnist``, ``mnist`` or ``cifar10``.

    Args:
        root: folder of its files, or a folder that contains one with the set's name. Default: each set's usual places.
            Fashion-MNIST is downloaded if it is not found, MNIST through torchvision; CIFAR-10 must be in
            ``$TRAJ_OOD_DATA`` or ``./data`` as ``cifar10/{train,test}/CLASS/*.jpg``, the layout of the benchmark
            ``cifar10-local``.
    Raises:
        TrajOODError: unknown name, or files that are missing or malformed.
    """
    if name not in _LOADERS:
        raise unknown_name("image set", name, _LOADERS)
    return _LOADERS[name](root)


def sample(images: ImageSource, size: int, seed: int, stream: str) -> ImageSource:
    """Draw ``size`` images (0: all) without replacement, in their order, by ``seed``; a larger sample of the same seed
    contains a smaller one. ``stream`` distinguishes draws of the same seed, and begins the message of the
    ``TrajOODError`` that is raised for more images than there are.
    """
    if size == 0:
        return images
    if not 1 <= size <= len(images):
        raise TrajOODError(f"{stream}: expected 1 to {len(images):,} images, got {size:,}; ask for fewer")
    return images.select(sample_indices(len(images), size, seed, stream))


def spread(length: int, most: int) -> tuple[int, ...]:
    """At most ``most`` evenly spaced indices in 0 … length − 1, including both ends.

    Lists of images are often sorted by class, so that their first images are not representative.
    """
    return tuple(torch.linspace(0, length - 1, min(most, length), dtype=torch.float64).round().long().tolist())


def stack(transform: Callable[[Image.Image], Tensor], images: ImageSource) -> Tensor:
    """All images, (N, C, H, W) on the CPU, in the units that ``transform`` converts them to."""
    return torch.stack([transform(images.load(i)) for i in range(len(images))])


def _mnist(root: Path | None) -> ImageData:
    cache, root = cache_folder() / "mnist", _own_folder(root, "mnist")
    base = Path(root) if root is not None else cache
    folder = find_idx_files(base, "MNIST")
    if folder is None and root is None:
        check_can_write(cache)
        # The remedy is the same for any failure of the download (no network, a moved mirror, a wrong checksum).
        try:
            from torchvision.datasets import MNIST

            with contextlib.redirect_stdout(io.StringIO()):
                MNIST(str(cache), download=True)
        except Exception as error:
            logger.info("MNIST through torchvision: %s", error)
        folder = find_idx_files(base, "MNIST")
    if folder is None:
        raise TrajOODError(
            f"MNIST: expected {', '.join(f + '[.gz]' for f in FILES)} in {base} or in MNIST/raw below it, found "
            f"not all four{', nor could torchvision download them' if root is None else ''}; put them there, or give "
            "their folder with --data-root"
        )
    return _idx("mnist", folder)


def _idx(name: str, folder: Path) -> ImageData:
    parts = []
    for part, prefix in (("train", "train"), ("t10k", "test")):
        array, labels = read_fashion_mnist(folder, part, name)
        ids = tuple(f"{prefix}/{i:05d}" for i in range(len(array)))
        parts.append(ArrayImages(ids, array, tuple(map(str, labels.tolist()))))
    return ImageData(name, (1, 28, 28), parts[0], parts[1])


def _own_folder(root: Path | None, name: str) -> Path | None:
    """The folder ``root/name`` if it exists, else ``root``: one root can hold several sets with equal file names."""
    return root if root is None or not (Path(root) / name).is_dir() else Path(root) / name


def _cifar10(root: Path | None) -> ImageData:
    base = Path(root) if root is not None else Path(os.environ.get("TRAJ_OOD_DATA") or "data")
    classes = tuple(sorted((*ID_CLASSES, *NEAR_CLASSES)))
    for part, count in PER_CLASS.items():
        for name in classes:
            if not (folder := base / CIFAR / part / name).is_dir():
                raise TrajOODError(
                    f"{folder}: expected a folder of {count:,} CIFAR-10 images, found none; give the folder that holds "
                    "cifar10/{train,test}/CLASS/*.jpg with --data-root"
                )
    train, test = (cifar_images(base, part, classes) for part in ("train", "test"))
    return ImageData("cifar10", (3, 32, 32), train, test)


_LOADERS: dict[str, Callable[[Path | None], ImageData]] = {
    "fashion-mnist": lambda root: _idx("fashion-mnist", obtain_fashion_mnist(_own_folder(root, "fashion-mnist"))),
    "mnist": _mnist,
    "cifar10": _cifar10,
}
IMAGE_SETS = tuple(_LOADERS)
