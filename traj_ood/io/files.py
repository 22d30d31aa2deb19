"""Files that are complete or absent: the one way anything is written to disk."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from traj_ood.errors import TrajOODError

CACHE_VARIABLE = "TRAJ_OOD_DATA"


def cache_folder() -> Path:
    """``$TRAJ_OOD_DATA``, or ``~/.cache/traj_ood``; what cannot be written there is an error that names the variable.

    Raises ``TrajOODError`` when the variable is not set and this user has no home folder.
    """
    try:
        # Absolute, because apt runs in another working folder.
        return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "traj_ood").absolute()
    except RuntimeError as error:
        raise TrajOODError(
            f"expected a home folder for the cache, found none: set {CACHE_VARIABLE} to a folder that can be written"
        ) from error


def write_atomic(path: str | Path, content: bytes | Callable[[BinaryIO], object], *, replace: bool = True) -> None:
    """Write ``content`` (bytes, or a callable given an open binary file) so that ``path`` is whole or unchanged.

    The bytes go to a hidden file in the same folder (a rename across file systems is not atomic), reach the disk, and
    take the place of ``path`` in one step. Missing folders are made. On any failure the hidden file is removed.
    Without ``replace`` a file that is there by then stays, and of several processes the first one's does.

    Raises ``TrajOODError`` naming the folder when it cannot be written (no permission, disk full), and for a ``path``
    that is there and no regular file: a rename would replace a device by a file. Any error of the callable other than
    OSError passes through.
    """
    path = Path(path)
    if os.path.exists(path) and not os.path.isfile(path):
        found = "a folder" if os.path.isdir(path) else "a device or pipe"
        raise TrajOODError(f"{path}: expected a file to write, found {found}; choose another name")
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with folder_errors(path.parent, path.name):
            path.parent.mkdir(parents=True, exist_ok=True)
            # Opened by name, not through tempfile: its files are private (0600), and results are there to be read.
            with open(temporary, "xb") as file:
                if callable(content):
                    content(file)
                else:
                    file.write(content)
                file.flush()
                os.fsync(file.fileno())
            if replace:
                os.replace(temporary, path)
            else:
                with contextlib.suppress(FileExistsError):
                    os.link(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def check_writable(folder: str | Path) -> None:
    """Refuse a place where ``folder`` could not be made, or replaced, before hours of work for it; nothing is left.

    Raises ``TrajOODError`` naming the folder.
    """
    folder = Path(os.path.realpath(Path(folder).expanduser()))
    made = [path for path in folder.parents if not os.path.exists(path)]
    probe = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with folder_errors(folder):
            probe.mkdir(parents=True)
    finally:
        with contextlib.suppress(OSError):  # the first that is not empty ends it
            for path in (probe, *made):
                path.rmdir()


@contextlib.contextmanager
def alone_in(folder: str | Path) -> Iterator[None]:
    """This process alone works in ``folder``, until the block ends or the process dies, however it dies.

    Missing folders are made, and removed again if nothing was written to them. It is the folder itself that is locked,
    so no file stands for the lock; do not replace it meanwhile. Where folders cannot be locked (Windows, some network
    file systems) nothing is guarded.

    Raises ``TrajOODError`` when another process is in it, or when it can be neither made nor opened.
    """
    folder = Path(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    opened = -1
    try:
        with folder_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            opened = os.open(folder, os.O_RDONLY) if os.name == "posix" else -1
        if opened >= 0:
            try:
                lock(opened, folder)
            except BlockingIOError as error:
                raise TrajOODError(
                    f"{folder}: another process is at work in it; wait until it ends, or choose another folder"
                ) from error
        yield
    finally:
        if opened >= 0:
            os.close(opened)
        with contextlib.suppress(OSError):  # the first that is not empty ends it
            for path in made:
                path.rmdir()


def empty_folder(folder: str | Path, first: str) -> None:
    """Remove everything in ``folder``, the file ``first`` before all else, but not the folder itself.

    Raises ``TrajOODError`` when something cannot be removed.
    """
    folder = Path(folder)
    with folder_errors(folder):
        (folder / first).unlink(missing_ok=True)
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def lock(opened: int, path: Path) -> None:
    """Keep other processes out of ``path``, open as ``opened``, until that is closed, however this process dies.

    Where nothing can be locked (Windows, some network file systems), nothing is guarded.

    Raises:
        BlockingIOError: another process is in it, or has replaced or removed it since it was opened.
    """
    try:
        import fcntl

        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except (ImportError, OSError):  # better unguarded than not at all
        return
    with contextlib.suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(opened), os.stat(path)):
            return
    raise BlockingIOError


@contextlib.contextmanager
def folder_errors(folder: Path, name: str = "", then: str = "") -> Iterator[None]:
    """OSError as the one line of a folder that cannot be written.

    Args:
        name: of the file that is meant for it. then: what to do; by default, find space elsewhere.
    """
    try:
        yield
    except OSError as error:
        file = f" (for {name})" if name else ""
        then = then or f"free space, fix its permissions or {_elsewhere(folder)}"
        raise TrajOODError(
            f"{folder}: expected a folder that can be written{file}, got: {error.strerror or error}; {then}"
        ) from error


def _elsewhere(folder: Path) -> str:
    """How to have something written elsewhere."""
    with contextlib.suppress(TrajOODError):
        if folder.absolute().is_relative_to(cache_folder()):
            return f"set {CACHE_VARIABLE} to another folder for the cache"
    return "choose another folder"
