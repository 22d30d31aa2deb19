"""The same resize and the same JPEG step for every image of a benchmark, so that no set gives itself away by its files.

Full-size photographs beside 64-pixel ones are told apart by resolution alone, and JPEG files beside PNG ones by their
blocks; a score that does so has seen nothing of what the images show. What the step cannot take away (a 28-pixel digit
has no more detail at 64) :mod:`traj_ood.data.spectrum` measures.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from traj_ood.data.images import ImageSource
from traj_ood.errors import TrajOODError

if TYPE_CHECKING:
    from PIL import Image

QUALITY = 90
"""Of the JPEG step: high enough to leave textures, and an encoder's common choice."""


def squared(image: Image.Image, side: int) -> Image.Image:
    """The centre square of an image as RGB at ``side`` × ``side`` pixels.

    Bicubic; Pillow widens the filter when it scales down (antialias).
    """
    from PIL import Image

    short = min(image.size)
    left, top = (image.width - short) // 2, (image.height - short) // 2
    box = (left, top, left + short, top + short)
    return image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC, box=box)


def equalise(image: Image.Image, side: int, quality: int = QUALITY) -> Image.Image:
    """:func:`squared`, once through JPEG."""
    from PIL import Image

    buffer = io.BytesIO()
    squared(image, side).save(buffer, "JPEG", quality=quality)
    with Image.open(buffer) as file:
        return file.convert("RGB")


@dataclass(frozen=True, eq=False)
class EqualImages:
    """Images of another source after :func:`equalise`, under their own ids and labels.

    Attributes:
        source: the images.
        side: of the squares, in pixels.
        quality: of the JPEG step.

    Raises:
        TrajOODError: a side below 8 or a quality outside 1 … 100.
    """

    source: ImageSource
    side: int
    quality: int = QUALITY

    def __post_init__(self) -> None:
        if self.side < 8 or not 1 <= self.quality <= 100:
            raise TrajOODError(
                f"equal images: expected a side of at least 8 and a quality of 1 to 100, got {self.side} and "
                f"{self.quality}"
            )

    @property
    def ids(self) -> Sequence[str]:
        return self.source.ids

    @property
    def labels(self) -> Sequence[str]:
        return self.source.labels

    def __len__(self) -> int:
        return len(self.source)

    def load(self, index: int) -> Image.Image:
        """Image ``index``, RGB."""
        return equalise(self.source.load(index), self.side, self.quality)

    def contents(self, indices: Sequence[int] | None = None) -> tuple[str, ...]:
        """Of what the source holds, and the step."""
        found = self.source.contents(indices)
        return tuple(hashlib.sha256(f"{c} {self.side} {self.quality}".encode()).hexdigest() for c in found)

    def digest(self) -> str:
        """Of the source and the step."""
        return hashlib.sha256(f"{self.source.digest()} {self.side} {self.quality}".encode()).hexdigest()

    def select(self, indices: Sequence[int]) -> EqualImages:
        """The images at ``indices``, in that order."""
        return EqualImages(self.source.select(indices), self.side, self.quality)

    def missing(self) -> list[str]:
        return self.source.missing()
