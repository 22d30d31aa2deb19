"""The offline benchmark `fashion`: Fashion-MNIST without three classes (ID), those classes (near), two far and three
diagnostic sets.

All images are 28 x 28 greyscale, from Fashion-MNIST or from files bundled with scikit-learn and scikit-image. They are
the same on every machine for given versions of these libraries: random draws use PCG64 with fixed seeds, and resizing
is Pillow's integer arithmetic.
"""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from traj_ood.data.benchmark import Benchmark, Split, split_off
from traj_ood.data.decoding import open_image
from traj_ood.data.fashion_mnist import obtain_fashion_mnist, read_fashion_mnist
from traj_ood.data.images import ArrayImages
from traj_ood.errors import TrajOODError

ID_CLASSES = (0, 1, 2, 3, 4, 6, 9)  # t-shirt, trouser, pullover, dress, coat, shirt, ankle boot
NEAR_CLASSES = {"sandal": 5, "sneaker": 7, "bag": 8}
SIDE = 28
VAL_SIZE = 2000
VAL_SEED = 20200523
FAR_SEED = 28
FAR_SIZE = 1000

TEXTURES = ("brick.png", "grass.png", "gravel.png")
# Smallest and largest side of a crop. Below 28 pixels it would be enlarged and blurred; above 112 (4 x) the texture
# averages out to flat grey.
TEXTURE_SIDES = (28, 112)
PHOTOS = (
    "astronaut.png",
    "coffee.png",
    "chelsea.png",
    "rocket.jpg",
    "hubble_deep_field.jpg",
    "retina.jpg",
    "ihc.png",
)
# Larger than for textures, so that objects (an eye, a spoon, a galaxy) stay recognisable. 280 fits the smallest photo.
PHOTO_SIDES = (56, 280)
# Smallest standard deviation of a crop in grey levels: crops of sky, or of the black around the retina, show nothing.
MIN_CONTRAST = 10
LFW_FACES = 100  # only the first 100 of the 200 entries of lfw_subset are faces


def load_fashion(root: str | Path | None = None) -> Benchmark:
    """Load the benchmark `fashion`; see :func:`~traj_ood.data.fashion_mnist.obtain_fashion_mnist` for ``root``."""
    folder = obtain_fashion_mnist(root)
    train_images, train_labels = read_fashion_mnist(folder, "train")
    test_images, test_labels = read_fashion_mnist(folder, "t10k")

    in_distribution = np.flatnonzero(np.isin(train_labels, ID_CLASSES))
    if len(in_distribution) < VAL_SIZE + 2:
        raise TrajOODError(
            f"{folder}: expected over {VAL_SIZE + 1} training images of the classes {ID_CLASSES}, got "
            f"{len(in_distribution)}; fetch the Fashion-MNIST files again"
        )

    def part(name: str, images: np.ndarray, labels: np.ndarray, chosen: np.ndarray) -> ArrayImages:
        ids = tuple(f"fashion-mnist/{name}/{i:05d}" for i in chosen)
        return ArrayImages(ids, images[chosen], tuple(str(label) for label in labels[chosen]))

    def test_part(*classes: int) -> ArrayImages:
        return part("t10k", test_images, test_labels, np.flatnonzero(np.isin(test_labels, classes)))

    images = part("train", train_images, train_labels, in_distribution)
    val, train = split_off(images, VAL_SIZE, VAL_SEED, "fashion/val")
    return Benchmark(
        name="fashion",
        train=Split("train", "train", train),
        val=Split("val", "val", val),
        test=Split("test", "test", test_part(*ID_CLASSES)),
        ood=(*(Split(name, "near", test_part(label)) for name, label in NEAR_CLASSES.items()), *far_sets()),
        train_size=2000,
        note="This project's own protocol; the 2,000 training images for attractors follow the paper.",
    )


def far_sets() -> tuple[Split, ...]:
    """The two far sets and the three diagnostic sets (crops of ten pictures, noise); needs scikit-learn and
    scikit-image, but neither a network nor Fashion-MNIST."""
    return (
        Split("digits", "far", _digits()),
        Split("faces", "far", _faces()),
        Split("textures", "diagnostic", crops(TEXTURES, TEXTURE_SIDES, "textures")),
        Split("photos", "diagnostic", crops(PHOTOS, PHOTO_SIDES, "photos")),
        Split("noise", "diagnostic", noise((SIDE, SIDE))),
    )


def _digits() -> ArrayImages:
    """scikit-learn's 1,797 handwritten digits, originally 8 x 8 with values 0 to 16."""
    from sklearn.datasets import load_digits

    found: Any = load_digits()
    digits = np.rint(found.images * (255 / 16)).astype(np.uint8)
    return _numbered("sklearn/digits", np.stack([_resized(digit) for digit in digits]))


def _faces() -> ArrayImages:
    """The 100 faces of scikit-image's Labeled Faces in the Wild subset, originally 25 x 25 with values 0 to 1."""
    faces = np.load(_bundled("lfw_subset.npy"))[:LFW_FACES]
    return _numbered("skimage/lfw", np.stack([_resized(face) for face in np.rint(faces * 255).astype(np.uint8)]))


def noise(shape: tuple[int, ...]) -> ArrayImages:
    """1,000 images of independent uniform bytes, from the raw PCG64 stream, which never changes between versions."""
    words = np.random.PCG64(FAR_SEED).random_raw(FAR_SIZE * math.prod(shape) // 8)
    return _numbered("noise/uniform", words.astype("<u8").view(np.uint8).reshape(FAR_SIZE, *shape))


def crops(
    files: tuple[str, ...],
    sides: tuple[int, int],
    stream: str,
    *,
    scaled_to: int = SIDE,
    mode: Literal["L", "RGB"] = "L",
) -> ArrayImages:
    """1,000 square crops of random size (between ``sides``) and position from scikit-image's ``files`` in turn, scaled
    to ``scaled_to`` × ``scaled_to`` pixels.

    A nearly uniform one (standard deviation below ``MIN_CONTRAST``, measured on the scaled crop in grey) is drawn
    again.
    """
    sources = [np.asarray(open_image(_bundled(name)).convert(mode)) for name in files]
    generators = [np.random.Generator(np.random.PCG64([FAR_SEED, len(stream), i])) for i in range(len(files))]
    ids, chosen = [], []
    for number in range(FAR_SIZE):
        turn, which = divmod(number, len(files))
        ids.append(f"skimage/{Path(files[which]).stem}/{turn:04d}")
        chosen.append(_crop(sources[which], sides, generators[which], scaled_to))
    return ArrayImages(tuple(ids), np.stack(chosen))


def _crop(source: np.ndarray, sides: tuple[int, int], generator: np.random.Generator, scaled_to: int) -> np.ndarray:
    """One scaled crop of ``source``, (H, W) or (H, W, 3) uint8, that is not nearly uniform."""
    height, width = source.shape[:2]
    while True:
        side = int(generator.integers(sides[0], sides[1], endpoint=True))
        top = int(generator.integers(0, height - side, endpoint=True))
        left = int(generator.integers(0, width - side, endpoint=True))
        crop = _resized(source[top : top + side, left : left + side], scaled_to)
        grey = np.asarray(Image.fromarray(crop).convert("L"))  # Pillow's integer luma
        if _variance_times_count_squared(grey) >= (MIN_CONTRAST * grey.size) ** 2:
            return crop


def _variance_times_count_squared(grey: np.ndarray) -> int:
    """n² var = n Σx² − (Σx)², in integers: ``std`` may round differently on other machines and change later draws."""
    values = grey.astype(np.int64)
    return int(values.size * (values**2).sum() - values.sum() ** 2)


def _resized(square: np.ndarray, side: int = SIDE) -> np.ndarray:
    """Resize a square uint8 image to ``side``, bilinear; Pillow antialiases when scaling down."""
    image = Image.fromarray(np.ascontiguousarray(square))
    return np.asarray(image.resize((side, side), Image.Resampling.BILINEAR))


def _numbered(prefix: str, array: np.ndarray) -> ArrayImages:
    return ArrayImages(tuple(f"{prefix}/{i:04d}" for i in range(len(array))), array)


def _bundled(name: str) -> Path:
    """Path of a file in the scikit-image wheel. Not from ``skimage.data``, which would download missing files."""
    spec = find_spec("skimage")
    if spec is None or spec.origin is None:
        raise TrajOODError(
            "the far sets need scikit-image, which is not installed; install it with: pip install scikit-image"
        )
    path = Path(spec.origin).parent / "data" / name
    if not path.is_file():
        raise TrajOODError(
            f"{path}: expected this file of the scikit-image package, found nothing; install a version "
            "that bundles it, e.g. pip install scikit-image==0.26.0"
        )
    return path
