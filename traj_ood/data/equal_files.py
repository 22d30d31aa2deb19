"""The same resize and JPEG compression for every image of a benchmark, so that file properties do not separate sets.

Resolution alone separates full-size photographs from 64-pixel images, and block artefacts separate JPEG from PNG files;
a score that uses them detects nothing about the content. Differences that remain (a 28-pixel digit gains no detail at
64 pixels) are measured by :mod:`traj_ood.data.spectrum`.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from traj_ood.data.contents import is_of_image
from traj_ood.data.images import ImageSource
from traj_ood.errors import TrajOODError

QUALITY = 90
"""JPEG quality: high enough to preserve textures, and a common choice of encoders."""


def centre_square(image: Image.Image, side: int, filter: str) -> Image.Image:
    """The centre square of an image at ``side`` × ``side`` pixels; Pillow widens the filter when it scales down."""
    short = min(image.size)
    left, top = (image.width - short) // 2, (image.height - short) // 2
    return image.resize((side, side), Image.Resampling[filter], box=(left, top, left + short, top + short))


def equalise(image: Image.Image, side: int) -> Image.Image:
    """The bicubic centre square of an image as RGB, compressed and decoded as JPEG."""
    buffer = io.BytesIO()
    centre_square(image.convert("RGB"), side, "BICUBIC").save(buffer, "JPEG", quality=QUALITY)
    with Image.open(buffer) as file:
        return file.convert("RGB")


@dataclass(frozen=True, eq=False)
class EqualImages:
    """An ImageSource that applies :func:`equalise`, at ``side`` pixels, to the images of another; ids and labels are
    unchanged."""

    source: ImageSource
    side: int

    def __post_init__(self) -> None:
        if self.side < 8:
            raise TrajOODError(f"equal images: expected a side of at least 8, got {self.side}")

    @property
    def ids(self) -> Sequence[str]:
        return self.source.ids

    @property
    def labels(self) -> Sequence[str]:
        return self.source.labels

    def __len__(self) -> int:
        return len(self.source)

    def load(self, index: int) -> Image.Image:
        return equalise(self.source.load(index), self.side)

    def contents(self, indices: Sequence[int] | None = None) -> tuple[str, ...]:
        """SHA-256 over the content of each original image, the side and the quality; that of a file without an image
        is the original's."""
        found = self.source.contents(indices)
        return tuple(self._made_of(c) if is_of_image(c) else c for c in found)

    def digest(self) -> str:
        """SHA-256 over the digest of the source, the side and the quality."""
        return self._made_of(self.source.digest())

    def select(self, indices: Sequence[int]) -> EqualImages:
        return EqualImages(self.source.select(indices), self.side)

    def missing(self) -> list[str]:
        return self.source.missing()

    def _made_of(self, digest: str) -> str:
        return hashlib.sha256(f"{digest} {self.side} {QUALITY}".encode()).hexdigest()
