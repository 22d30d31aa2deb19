"""Paths of a stream of images, from folders, image lists and standard input, read lazily.

At most one folder's names or one line is in memory at a time. An invalid path (outside its list's root, or behind a
link that leads out of its folder) becomes an entry with an error, so that one in a million does not end a run.

Paths are text in which bytes that are not UTF-8 are lone surrogates (PEP 383), as everywhere in Python.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from traj_ood.data.images import IMAGE_SUFFIXES, inside_root, leaves, path_and_label, walk_images
from traj_ood.errors import TrajOODError

_STDIN = "standard input"
_READ_BYTES = 65536
_POLL_SECONDS = 0.02
_MAX_PATH_BYTES = 2**20  # limit on one path, so that a file without separators is not read into memory as a whole


@dataclass(frozen=True)
class Entry:
    """One image of a stream."""

    path: str  # of the file, relative to the working directory, or the name of a record; also the path in its row
    error: str = ""  # why it must not be read
    content: bytes | None = None  # of the image file, from a source of records; None: ``path`` is read


class ByteStream(Protocol):
    """An open binary file; only ``read`` is used."""

    def read(self, size: int = ..., /) -> bytes | None: ...


def walk(folder: str, *, follow_links: bool = False, others: Counter[str] | None = None) -> Iterator[Entry]:
    """Iterate over the image files in and below ``folder``, as :func:`traj_ood.data.images.walk_images`, in the order
    of :func:`traj_ood.data.read_folder`.

    A folder that cannot be listed gives an entry with an error, and so do links that lead out of ``folder``, unless
    ``follow_links``, and ``folder`` itself if it has no images. ``others`` counts the suffixes of files that are no
    images.
    """
    found = False
    for path, error in walk_images(folder, Counter() if others is None else others, follow_links=follow_links):
        found = True
        yield Entry(path, error)
    if not found:
        yield Entry(folder, f"expected a folder with images ({' '.join(IMAGE_SUFFIXES)}), found none in it")


def read_paths(stream: ByteStream, *, null: bool = False) -> Iterator[Entry]:
    """Iterate over paths, one per line, or with ``null`` each ended by a NUL byte, as ``find -print0`` writes them.
    Empty lines are skipped. A carriage return at the end of a line is removed; names that end in one need ``null``."""
    for record in _records(stream, b"\0" if null else b"\n", _STDIN):
        path = os.fsdecode(record if null else record.removesuffix(b"\r"))
        if path:
            yield Entry(path)


def read_list(list_path: str | Path, root: str | Path, *, follow_links: bool = False) -> Iterator[Entry]:
    """Iterate over an image list in OpenOOD's format, ``relative/path label`` per line.

    The rules are those of :func:`traj_ood.data.read_image_list`, except that a path that is absolute or leaves ``root``
    gives an entry with an error, an image may be listed twice, and names need not be UTF-8.
    """
    real_root = os.path.realpath(root)
    try:
        with open(list_path, "rb", buffering=0) as file:
            for number, line in enumerate(_records(file, b"\n", str(list_path)), start=1):
                text = os.fsdecode(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
                written, _ = path_and_label(text.strip())
                if written:
                    yield _listed(written, f"line {number} of {list_path}", root, real_root, follow_links)
    except OSError as error:
        reason = error.strerror or str(error)
        message = f"image list {list_path}: cannot be read ({reason}); give a text file of image paths"
        raise TrajOODError(message) from error


def _listed(written: str, where: str, root: str | Path, real_root: str, follow_links: bool) -> Entry:
    try:
        path = os.path.join(root, inside_root(written, where))
    except TrajOODError as error:
        return Entry(written, str(error))
    if not follow_links and leaves(path, real_root):
        return Entry(path, f"{where}: a link on the way leads out of {root}; allow that with --follow-links")
    return Entry(path)


def _records(stream: ByteStream, separator: bytes, name: str) -> Iterator[bytes]:
    """Iterate over the records between separators as soon as they arrive; the last need not end in a separator."""
    rest = b""
    while (block := stream.read(_READ_BYTES)) != b"":
        if block is None:  # nothing has come yet, in a pipe that another process has made non-blocking
            time.sleep(_POLL_SECONDS)
            continue
        if separator != b"\0" and b"\0" in block:
            hint = "paths that end in one need --null" if name == _STDIN else "give a text file, one path a line"
            raise TrajOODError(f"{name}: expected lines of text, got a NUL byte; {hint}")
        *whole, rest = (rest + block).split(separator)
        yield from whole
        if len(rest) > _MAX_PATH_BYTES:
            kind = "NUL bytes" if separator == b"\0" else "lines"
            hint = "check --null" if name == _STDIN else "give a text file, one path a line"
            raise TrajOODError(f"{name}: expected paths separated by {kind}, got {len(rest)} bytes without one; {hint}")
    yield rest
