"""Images whose files are in memory: what ``fit``, ``calibrate`` and ``bench`` make of a source of records."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from traj_ood.data.decoding import AS_STORED, Reading, open_bytes
from traj_ood.data.records import AS_USUAL, Opening, read_records, short
from traj_ood.errors import TrajOODError

if TYPE_CHECKING:
    from PIL import Image

MAX_BYTES = 2**33
"""Of all files together, 8 GiB: fifty thousand photographs. Scoring streams and has no such bound."""


@dataclass(frozen=True, eq=False)
class EncodedImages:
    """A finite source; what is broken in it is an error when it is loaded.

    Attributes:
        ids: N unique ids, without where the source lies.
        files: N contents of image files, or the reason why there is none.
        labels: N class labels, or empty where not all have one.
        exif, bit_depth: how files become pixels, see :class:`traj_ood.data.Reading`.
    """

    ids: tuple[str, ...]
    files: tuple[bytes | str, ...]
    labels: tuple[str, ...] = ()
    exif: bool = False
    bit_depth: int | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def load(self, index: int) -> Image.Image:
        """Image ``index``.

        Raises:
            TrajOODError: it is broken, or cannot be decoded.
        """
        content = self.files[index]
        if isinstance(content, str):
            raise TrajOODError(f"{self.ids[index]}: {content}")
        return open_bytes(content, self.ids[index], Reading(self.exif, self.bit_depth))

    def contents(self, indices: Sequence[int] | None = None) -> tuple[str, ...]:
        """SHA-256 of each file; of a broken one its reason."""
        rows = range(len(self)) if indices is None else indices
        return tuple(_digest(self.files[i]) for i in rows)

    def digest(self) -> str:
        """SHA-256 over ids and contents, and over how they are read where that is not the default."""
        reading = Reading(self.exif, self.bit_depth).options()
        parts = [*self.ids, *self.contents(), *(f"{key}={value}" for key, value in sorted(reading.items()))]
        return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogatepass")).hexdigest()

    def select(self, indices: Sequence[int]) -> EncodedImages:
        """The images at ``indices``, in that order."""
        ids, files = (tuple(part[i] for i in indices) for part in (self.ids, self.files))
        labels = tuple(self.labels[i] for i in indices) if self.labels else ()
        return EncodedImages(ids, files, labels, self.exif, self.bit_depth)  # type: ignore[arg-type]

    def missing(self) -> list[str]:
        """Ids of those that are broken in the source."""
        return [name for name, content in zip(self.ids, self.files, strict=True) if isinstance(content, str)]


def read_encoded(source: str, reading: Reading = AS_STORED, opening: Opening = AS_USUAL) -> EncodedImages:
    """All records of a source, see :func:`traj_ood.data.records.read_records`.

    Raises:
        TrajOODError: as there; none; two with one id; or more than ``MAX_BYTES``.
    """
    ids: dict[str, None] = {}
    files: list[bytes | str] = []
    labels: list[str] = []
    size = 0
    for record in read_records(source, opening):
        name = short(record.key, source)
        if name in ids:
            raise TrajOODError(f"{source}: two records are called {name!r}: give each image a key of its own")
        ids[name] = None
        files.append(record.error if record.content is None else record.content)
        labels.append(record.label)
        size += len(record.content or b"")
        if size > MAX_BYTES:
            raise TrajOODError(
                f"{source}: expected at most {MAX_BYTES} bytes of images to learn from, got more: give "
                "some of the shards"
            )
    if not ids:
        raise TrajOODError(f"{source}: expected images, found none")
    known = tuple(labels) if all(labels) else ()
    return EncodedImages(tuple(ids), tuple(files), known, reading.exif, reading.bit_depth)


def _digest(content: bytes | str) -> str:
    return hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else f"broken: {content}"
