"""Encoded image files in memory, the form in which ``fit``, ``calibrate`` and ``bench`` hold a source of records."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from traj_ood.data.contents import BROKEN
from traj_ood.data.decoding import AS_STORED, Reading, open_bytes
from traj_ood.data.images import Listed
from traj_ood.data.records import DEFAULT_OPENING, Opening, Record, read_records, short
from traj_ood.errors import TrajOODError

MAX_BYTES = 2**33
"""Largest total size of the files, 8 GiB: fifty thousand photographs. ``score`` streams and has no such limit."""


@dataclass(frozen=True, eq=False)
class EncodedImages(Listed):
    """An ImageSource of encoded files in memory; a broken record raises when it is loaded.

    Attributes:
        ids: N unique ids, without the location of the source.
        files: the content of each image file, or the reason why the record is broken.
        labels: N class labels; empty if any image has none.
        exif, bit_depth: how files are decoded, see :class:`traj_ood.data.Reading`.
    """

    columns = ("ids", "files", "labels")

    ids: tuple[str, ...]
    files: tuple[bytes | str, ...]
    labels: tuple[str, ...] = ()
    exif: bool = False
    bit_depth: int | None = None

    def load(self, index: int) -> Image.Image:
        content = self.files[index]
        if isinstance(content, str):
            raise TrajOODError(f"{self.ids[index]}: {content}")
        return open_bytes(content, self.ids[index], Reading(self.exif, self.bit_depth))

    def contents(self, indices: Sequence[int] | None = None) -> tuple[str, ...]:
        """SHA-256 of each file; for a broken record its reason."""
        rows = range(len(self)) if indices is None else indices
        files = (self.files[i] for i in rows)
        return tuple(BROKEN + f if isinstance(f, str) else hashlib.sha256(f).hexdigest() for f in files)

    def digest(self) -> str:
        """SHA-256 over ids and contents, and over decoding settings that are not the default."""
        reading = Reading(self.exif, self.bit_depth).options()
        parts = [*self.ids, *self.contents(), *(f"{key}={value}" for key, value in sorted(reading.items()))]
        return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogatepass")).hexdigest()

    def missing(self) -> list[str]:
        """Ids of the broken records, with their reasons."""
        return [f"{name} ({why})" for name, why in zip(self.ids, self.files, strict=True) if isinstance(why, str)]


def read_encoded(source: str, reading: Reading = AS_STORED, opening: Opening = DEFAULT_OPENING) -> EncodedImages:
    """Read all records of a source into memory, at most ``MAX_BYTES`` and each with an id of its own."""
    found: dict[str, Record] = {}
    size = 0
    for record in read_records(source, opening):
        name = short(record.key, source)
        if name in found:
            raise TrajOODError(f"{source}: two records are called {name!r}: give each image a different key")
        found[name] = record
        size += len(record.content or b"")
        if size > MAX_BYTES:
            raise TrajOODError(
                f"{source}: expected at most {MAX_BYTES} bytes of images to learn from, got more: give "
                "some of the shards"
            )
    if not found:
        raise TrajOODError(f"{source}: expected images, found none")
    files = tuple(r.error if r.content is None else r.content for r in found.values())
    labels = tuple(r.label for r in found.values())
    return EncodedImages(tuple(found), files, labels if all(labels) else (), reading.exif, reading.bit_depth)
