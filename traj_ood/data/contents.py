"""SHA-256 of files, cached so that an unchanged file is read only once.

The cache, ``contents.sqlite`` in ``$TRAJ_OOD_DATA`` or ``~/.cache/traj_ood``, has a row per file: a hash of its
resolved path, a hash of its size, times and inode number, and the hash of its bytes. Any number of processes can share
it. If it cannot be read or written, files are hashed again, with one warning.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import TypeVar

from traj_ood.errors import TrajOODError, warn
from traj_ood.io.files import cache_folder

FILE_NAME = "contents.sqlite"
ABSENT = ""
"""The digest of what cannot be read or is no regular file."""
BROKEN = "broken: "
"""What the digest of a broken record begins with; its reason follows."""

_EMPTY = hashlib.sha256().hexdigest()
_READERS = 4
_FILES_PER_TASK = 64  # one task per file would cost as much as reading a small file
_FILES_PER_COMMIT = 8192  # a million files take minutes, and an interruption must not lose them all
_KEYS_PER_QUERY = 500  # older versions of SQLite allow at most 999 variables
_BLOCK = 2**20  # bytes read at a time
_LOCK_SECONDS = 10.0  # how long to wait for another process that writes
_FINE_CLOCK, _COARSE_CLOCK = 100_000_000, 2_000_000_000  # bounds on the clock's tick, in nanoseconds
_TABLE = "CREATE TABLE IF NOT EXISTS files (path BLOB PRIMARY KEY, stamp BLOB, sha256 BLOB) WITHOUT ROWID"
_T = TypeVar("_T")
_Key = tuple[bytes, bytes]

_warned: set[str] = set()
_own: dict[_Key, str] = {}  # what this process has hashed itself, if the store does not count or cannot be used
_distrusts = False  # whether the store does not count


def is_of_image(digest: str) -> bool:
    """Whether images with this digest are copies of each other: files that are absent or empty and broken records share
    a digest without being the same image."""
    return digest not in (ABSENT, _EMPTY) and not digest.startswith(BROKEN)


def stamp(path: str) -> tuple[int, ...] | None:
    """Size, mtime, ctime (ns) and inode, which change whenever the bytes of a regular file do; None for anything else.
    ctime is included because mtime can be set back (``cp -p``, ``rsync -t``)."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    if not stat.S_ISREG(found.st_mode):
        return None
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


def hash_file(path: str) -> str:
    """SHA-256 (hex) of a regular file; ``ABSENT`` if it cannot be read."""
    digest = hashlib.sha256()
    try:
        # Without O_NONBLOCK, opening a pipe that has replaced the file would wait for a writer.
        with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return ABSENT
            while block := file.read(_BLOCK):
                digest.update(block)
    except (OSError, ValueError):
        return ABSENT
    return digest.hexdigest()


def distrust() -> None:
    """Ignore the rows of other processes and of earlier runs from now on: every file is read once more."""
    global _distrusts
    _distrusts = True
    _own.clear()


def hash_files(paths: Sequence[str]) -> tuple[str, ...]:
    """SHA-256 (hex) of each file, given by resolved paths; ``ABSENT`` for those that cannot be read.

    A file whose :func:`stamp` equals that of its row is not read. A file written a moment ago is not cached, as it may
    change again within one tick of the file system's clock.
    """
    return tuple(digest for part in _parts(paths, _FILES_PER_COMMIT) for digest in _hash_part(part))


def _hash_part(paths: Sequence[str]) -> list[str]:
    begin = time.time_ns()
    found = [(path, stamp(path)) for path in paths]
    keys = [None if marks is None else _key(path, marks) for path, marks in found]
    wanted = [key for key in keys if key is not None]
    known = {key: _own[key] for key in wanted if key in _own}
    if not _distrusts:
        known |= _with_store(lambda store: _lookup(store, wanted)) or {}
    new = [(path, key) for path, key in zip(paths, keys, strict=True) if key is not None and key not in known]
    made: dict[_Key, str] = {}
    for path, key, digest in _read(new):
        known[key] = digest
        # A file that changed while it was read has an invalid digest, which is not cached.
        marks = stamp(path)
        if digest != ABSENT and marks is not None and _is_settled(marks, begin) and _key(path, marks) == key:
            made[key] = digest
    if made and (_with_store(lambda store: _remember(store, made)) is None or _distrusts):
        _own.update(made)
    return [ABSENT if key is None else known[key] for key in keys]


def _read(files: Sequence[tuple[str, _Key]]) -> Iterator[tuple[str, _Key, str]]:
    def task(part: Sequence[tuple[str, _Key]]) -> list[tuple[str, _Key, str]]:
        return [(path, key, hash_file(path)) for path, key in part]

    with ThreadPoolExecutor(_READERS) as pool:
        for done in pool.map(task, _parts(files, _FILES_PER_TASK)):
            yield from done


def _key(path: str, marks: tuple[int, ...]) -> _Key:
    name = hashlib.blake2b(path.encode("utf-8", "surrogateescape"), digest_size=16).digest()
    return name, hashlib.blake2b(repr(marks).encode(), digest_size=16).digest()


def _is_settled(marks: tuple[int, ...], begin: int) -> bool:
    """Whether a change of the file after ``begin`` changes its time, too. Some file systems store whole seconds."""
    changed = marks[1] if os.name == "nt" else marks[2]  # on Windows ctime is the time of creation
    return begin - changed > (_FINE_CLOCK if changed % 1_000_000_000 else _COARSE_CLOCK)


def _parts(items: Sequence[_T], size: int) -> Iterator[Sequence[_T]]:
    return (items[start : start + size] for start in range(0, len(items), size))


# ---------------------------------------------------------------------- the store


def _with_store(query: Callable[[sqlite3.Connection], _T]) -> _T | None:
    """The result of ``query`` on the cache file; None, with a warning, if the file cannot be used."""
    path = Path(FILE_NAME)
    try:
        path = cache_folder() / FILE_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(path, timeout=_LOCK_SECONDS, isolation_level=None)) as store:
            return query(store)
    except (OSError, sqlite3.Error, TrajOODError) as error:  # TrajOODError: no home folder
        if str(path) not in _warned:
            _warned.add(str(path))
            warn(
                f"{path}: hashes of files cannot be cached there ({error}): files are read again by every run; delete "
                "it if it is damaged, or set $TRAJ_OOD_DATA to a folder that can be written"
            )
        return None


def _lookup(store: sqlite3.Connection, keys: Sequence[_Key]) -> dict[_Key, str]:
    known: dict[_Key, str] = {}
    store.execute(_TABLE)
    for part in _parts(keys, _KEYS_PER_QUERY):
        marks = dict(part)
        query = f"SELECT path, stamp, sha256 FROM files WHERE path IN ({','.join('?' * len(marks))})"
        for path, mark, value in store.execute(query, list(marks)):
            digest = value[:32].hex() if isinstance(value, bytes) else ""
            if mark == marks[path] and value == _sealed(path, mark, digest):
                known[path, mark] = digest
    return known


def _remember(store: sqlite3.Connection, made: dict[_Key, str]) -> bool:
    rows = [(path, mark, _sealed(path, mark, digest)) for (path, mark), digest in made.items()]
    store.execute(_TABLE)
    store.execute("BEGIN IMMEDIATE")
    store.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?)", rows)
    store.execute("COMMIT")
    return True


def _sealed(path: bytes, mark: bytes, digest: str) -> bytes:
    """The digest followed by a checksum of its row, so that a flipped bit on disk is not taken for another image."""
    value = bytes.fromhex(digest)
    return value + hashlib.blake2b(path + mark + value, digest_size=8).digest()
