"""Outliers made from ID images: a validation set for choices that may not look at any OOD set, and simple inputs.

A detector's form and its constants have to be chosen on something. These images are made of ID validation images alone,
so nothing of a test set enters the choice; whether they stand for real OOD images is another question.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

import numpy as np

from traj_ood.data.benchmark import Role, Split
from traj_ood.data.images import ImageSource
from traj_ood.errors import TrajOODError, unknown_name

if TYPE_CHECKING:
    from PIL import Image

Make = Callable[["Image.Image", "Image.Image", np.random.Generator], "Image.Image"]


def blend(image: Image.Image, other: Image.Image, draws: np.random.Generator) -> Image.Image:
    """The mean of two images."""
    from PIL import Image

    return Image.blend(image, other, 0.5)


def cutmix(image: Image.Image, other: Image.Image, draws: np.random.Generator) -> Image.Image:
    """The upper or the left half from another image."""
    width, height = image.size
    box = (0, 0, width, height // 2) if draws.random() < 0.5 else (0, 0, width // 2, height)
    mixed = image.copy()
    mixed.paste(other.crop(box), box)
    return mixed


def jigsaw(image: Image.Image, other: Image.Image, draws: np.random.Generator) -> Image.Image:
    """The four quarters in another order."""
    width, height = image.size[0] // 2, image.size[1] // 2
    corners = [(x, y) for y in (0, height) for x in (0, width)]
    order = draws.permutation(4)
    while (order == np.arange(4)).all():
        order = draws.permutation(4)
    mixed = image.copy()
    for (x, y), source in zip(corners, order, strict=True):
        left, top = corners[source]
        mixed.paste(image.crop((left, top, left + width, top + height)), (x, y))
    return mixed


def rotate(image: Image.Image, other: Image.Image, draws: np.random.Generator) -> Image.Image:
    """Turned by a multiple of 45 degrees, but not by 0 or 180, which symmetric things survive; black corners."""
    from PIL import Image

    return image.rotate(int(draws.choice([45, 90, 135, 225, 270, 315])), resample=Image.Resampling.BILINEAR)


def invert(image: Image.Image, other: Image.Image, draws: np.random.Generator) -> Image.Image:
    """The negative."""
    from PIL import ImageOps

    return ImageOps.invert(image)


def blur(image: Image.Image, other: Image.Image, draws: np.random.Generator) -> Image.Image:
    """Gaussian blur, its radius a fourteenth of the image's shorter side."""
    from PIL import ImageFilter

    return image.filter(ImageFilter.GaussianBlur(min(image.size) / 14))


def constant(image: Image.Image, other: Image.Image, draws: np.random.Generator) -> Image.Image:
    """One colour, drawn uniformly."""
    from PIL import Image

    colour = [int(c) for c in draws.integers(0, 256, len(image.getbands()))]
    return Image.new(image.mode, image.size, colour[0] if len(colour) == 1 else tuple(colour))


def noise(image: Image.Image, other: Image.Image, draws: np.random.Generator) -> Image.Image:
    """Uniform noise, pixel by pixel."""
    from PIL import Image

    return Image.fromarray(draws.integers(0, 256, np.asarray(image).shape, dtype=np.uint8))


OUTLIERS: dict[str, Make] = {
    "blend": blend,
    "cutmix": cutmix,
    "jigsaw": jigsaw,
    "rotate": rotate,
    "invert": invert,
    "blur": blur,
}
"""Kinds of outliers to choose by: images that keep what ID images are made of."""

SIMPLE: dict[str, Make] = {"constant": constant, "noise": noise, "blur": blur, "invert": invert}
"""Simple inputs, on which scores of distances are known to fail."""


@dataclass(frozen=True, eq=False)
class MadeImages:
    """Images made from those of another source, one each; the same whenever and in whatever order they are loaded.

    Attributes:
        source: the images they are made from; at least 2.
        kind: a name in ``OUTLIERS`` or ``SIMPLE``.
        seed: of what is drawn.

    Raises:
        TrajOODError: an unknown kind, or fewer than 2 images.
    """

    source: ImageSource
    kind: str
    seed: int = 0

    def __post_init__(self) -> None:
        known = {**OUTLIERS, **SIMPLE}
        if self.kind not in known:
            raise unknown_name("kind of made images", self.kind, known)
        if len(self.source) < 2:
            raise TrajOODError(f"{self.kind} images: expected at least 2 images to make them from, got 1; give more")

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(f"{self.kind}/{image_id}" for image_id in self.source.ids)

    @property
    def labels(self) -> tuple[str, ...]:
        return ()

    def __len__(self) -> int:
        return len(self.source)

    def load(self, index: int) -> Image.Image:
        """Image ``index``; where two are needed, the other is drawn among the rest and brought to its size and mode."""
        draws = np.random.default_rng([self.seed, index])
        image = self.source.load(index)
        other = image
        if self.kind in ("blend", "cutmix"):
            partner = (index + 1 + int(draws.integers(len(self.source) - 1))) % len(self.source)
            other = self.source.load(partner).convert(image.mode).resize(image.size)
        return {**OUTLIERS, **SIMPLE}[self.kind](image, other, draws)

    def contents(self, indices: Sequence[int] | None = None) -> tuple[str, ...]:
        """Of the image that each is made from, the kind, the seed and the place, by which partners are drawn."""
        rows = range(len(self)) if indices is None else indices
        made = zip(rows, self.source.contents(rows), strict=True)
        return tuple(hashlib.sha256(f"{found} {self.kind} {self.seed} {i}".encode()).hexdigest() for i, found in made)

    def digest(self) -> str:
        """Of the source, the kind and the seed."""
        return hashlib.sha256(f"{self.source.digest()} {self.kind} {self.seed}".encode()).hexdigest()

    def select(self, indices: Sequence[int]) -> ImageSource:
        """The images at ``indices`` with their ids here; partners may differ from those in the whole source."""
        return MadeImages(self.source.select(indices), self.kind, self.seed)

    def missing(self) -> list[str]:
        return self.source.missing()


def made_sets(images: ImageSource, kinds: dict[str, Make], role: Role = "near", seed: int = 0) -> tuple[Split, ...]:
    """One split of made images for each kind.

    Args:
        images: ID validation images to choose by, ID test images to report simple inputs on.
        kinds: ``OUTLIERS`` or ``SIMPLE``.
        role: of the splits.
        seed: of what is drawn.
    Raises:
        TrajOODError: see :class:`MadeImages`, or an unknown role.
    """
    if role not in get_args(Role):
        raise unknown_name("role", role, get_args(Role))
    return tuple(Split(kind, role, MadeImages(images, kind, seed)) for kind in kinds)
