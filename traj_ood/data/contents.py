"""What is in a file: the SHA-256 of its bytes, remembered so that a file that has not changed is not read twice.

``contents.sqlite`` in the cache folder (``$TRAJ_OOD_DATA``, or ``~/.cache/traj_ood``) holds a row per file: a hash of
its resolved path, of its size, times and inode number, and of its bytes. Any number of processes may share it. It is a
convenience: where it cannot be read or written, files are hashed anew, and one warning says so.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
import stat
import threading
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
"""Stands for what cannot be read, or is no regular file."""

_READERS = 4
_PER_TASK = 64  # files: a task for each would cost as much as a small file
_PER_COMMIT = 8192  # files: a million of them take minutes, and an interruption must not lose them all
_QUESTIONS = 500  # older SQLite takes at most 999 variables
_BLOCK = 2**20
_LOCK_SECONDS = 10.0  # seconds for another process that writes
_FINE_CLOCK, _COARSE_CLOCK = 100_000_000, 2_000_000_000  # nanoseconds
_T = TypeVar("_T")
_Key = tuple[bytes, bytes]

_memory = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None)
_lock = threading.Lock()
_warned: set[str] = set()
_believed: set[_Key] | None = None  # None: all


def stamp(path: str) -> tuple[int, ...] | None:
    """Size, times of last change (ns) and inode of a regular file: it stays the same while its bytes do.

    The time of the last change of the inode is part of it, since anyone can set the time of modification back (``cp
    -p``, ``rsync -t``). None for all that is no regular file or cannot be looked at.
    """
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    if not stat.S_ISREG(found.st_mode):
        return None
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


def hash_file(path: str) -> str:
    """SHA-256 (hex) of a regular file's bytes; ``ABSENT`` where there is none to read."""
    digest = hashlib.sha256()
    try:
        # A pipe put there since would wait for its writer.
        with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return ABSENT
            while block := file.read(_BLOCK):
                digest.update(block)
    except (OSError, ValueError):
        return ABSENT
    return digest.hexdigest()


def distrust() -> None:
    """From now on this process believes only the rows that it writes itself: every file is read once more."""
    global _believed
    with _lock:
        _believed = set()


def hash_files(paths: Sequence[str]) -> tuple[str, ...]:
    """SHA-256 (hex) of the bytes of each file, ``ABSENT`` for what cannot be read.

    A file whose stamp is that of its row is not read. One that has just been written is not remembered: its bytes may
    change once more within one tick of the clock that stamps it.

    Args:
        paths: resolved ones, links followed.
    """
    found: list[str] = []
    for part in _parts(paths, _PER_COMMIT):
        found += _hash_part(part)
    return tuple(found)


def _hash_part(paths: Sequence[str]) -> list[str]:
    found = [(path, stamp(path)) for path in paths]
    keys = [None if marks is None else _key(path, marks) for path, marks in found]
    wanted = [key for key in keys if key is not None]
    known = _ask(lambda store: _lookup(store, wanted)) or {}
    if len(known) < len(wanted):
        known |= _lookup(_memory, wanted)
    if _believed is not None:
        known = {key: digest for key, digest in known.items() if key in _believed}
    new = [(path, key) for path, key in zip(paths, keys, strict=True) if key is not None and key not in known]
    made: dict[_Key, str] = {}
    for path, key, digest in _read(new):
        known[key] = digest
        # What changed while it was read has the digest of neither state: the next question reads it again.
        marks = stamp(path)
        if digest != ABSENT and marks is not None and _is_settled(marks) and _key(path, marks) == key:
            made[key] = digest
    if _believed is not None:
        _believed.update(made)
    if made and _ask(lambda store: _remember(store, made)) is None:
        _remember(_memory, made)
    return [ABSENT if key is None else known[key] for key in keys]


def _read(files: Sequence[tuple[str, _Key]]) -> Iterator[tuple[str, _Key, str]]:
    def task(part: Sequence[tuple[str, _Key]]) -> list[tuple[str, _Key, str]]:
        return [(path, key, hash_file(path)) for path, key in part]

    with ThreadPoolExecutor(_READERS) as pool:
        for done in pool.map(task, _parts(files, _PER_TASK)):
            yield from done


def _key(path: str, marks: tuple[int, ...]) -> _Key:
    name = hashlib.blake2b(path.encode("utf-8", "surrogateescape"), digest_size=16).digest()
    return name, hashlib.blake2b(repr(marks).encode(), digest_size=16).digest()


def _is_settled(marks: tuple[int, ...]) -> bool:
    """Whether a change of the file from now on would get another time than it has. Some file systems count seconds."""
    changed = marks[1] if os.name == "nt" else marks[2]  # on Windows the last one is the time of creation
    return time.time_ns() - changed > (_FINE_CLOCK if changed % 1_000_000_000 else _COARSE_CLOCK)


def _parts(items: Sequence[_T], size: int) -> Iterator[Sequence[_T]]:
    return (items[start : start + size] for start in range(0, len(items), size))


# ---------------------------------------------------------------------- the store


def _ask(question: Callable[[sqlite3.Connection], _T]) -> _T | None:
    """The answer of the file; None, and a warning, where it has none to give."""
    path = Path(FILE_NAME)
    try:
        path = cache_folder() / FILE_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(path, timeout=_LOCK_SECONDS, isolation_level=None)) as store:
            return question(store)
    except (OSError, sqlite3.Error, TrajOODError) as error:  # the last: no home folder
        _warn(path, error)
        return None


def _warn(path: Path, error: Exception) -> None:
    if str(path) in _warned:
        return
    _warned.add(str(path))
    warn(
        f"{path}: hashes of files cannot be kept there ({error}): files are read again by every run; delete it if it "
        "is damaged, or name a folder that can be written in $TRAJ_OOD_DATA",
        stacklevel=2,
    )


def _lookup(store: sqlite3.Connection, keys: Sequence[_Key]) -> dict[_Key, str]:
    known: dict[_Key, str] = {}
    with _lock:
        _make(store)
        for part in _parts(keys, _QUESTIONS):
            marks = dict(part)
            question = f"SELECT path, stamp, sha256 FROM files WHERE path IN ({','.join('?' * len(marks))})"
            for path, mark, value in store.execute(question, list(marks)):
                digest = _opened(path, mark, value)
                if digest is not None and mark == marks[path]:
                    known[path, mark] = digest
    return known


def _remember(store: sqlite3.Connection, made: dict[_Key, str]) -> bool:
    rows = [(path, mark, _sealed(path, mark, digest)) for (path, mark), digest in made.items()]
    with _lock:
        _make(store)
        store.execute("BEGIN IMMEDIATE")
        store.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?)", rows)
        store.execute("COMMIT")
    return True


def _make(store: sqlite3.Connection) -> None:
    store.execute("CREATE TABLE IF NOT EXISTS files (path BLOB PRIMARY KEY, stamp BLOB, sha256 BLOB) WITHOUT ROWID")


def _sealed(path: bytes, mark: bytes, digest: str) -> bytes:
    """The digest with a checksum of its row: a bit that flips on a disk must not make one picture another."""
    value = bytes.fromhex(digest)
    return value + hashlib.blake2b(path + mark + value, digest_size=8).digest()


def _opened(path: bytes, mark: bytes, value: object) -> str | None:
    if not isinstance(value, bytes) or len(value) != 40:
        return None
    digest = value[:32].hex()
    return digest if _sealed(path, mark, digest) == value else None
