"""Atomic writes and locks: a file is written completely or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, TextIO

from traj_ood.errors import TrajOODError

CACHE_VARIABLE = "TRAJ_OOD_DATA"


def cache_folder() -> Path:
    """The cache folder: ``$TRAJ_OOD_DATA``, or ``~/.cache/traj_ood``."""
    try:
        # Absolute, because apt runs in another working directory.
        return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "traj_ood").absolute()
    except RuntimeError as error:
        raise TrajOODError(
            f"expected a home folder for the cache, found none: set {CACHE_VARIABLE} to a folder that can be written"
        ) from error


def write_atomic(path: str | Path, content: bytes | Callable[[BinaryIO], object], *, replace: bool = True) -> None:
    """Write a file atomically: after a failure, ``path`` is as it was before. ``content`` may be a callable that writes
    to an open binary file; its own errors pass through.

    The content goes to a hidden file in the same folder (a rename across file systems is not atomic), is flushed to
    disk and then renamed to ``path``. On any failure the hidden file is removed. Missing folders are created. What
    exists and is no regular file is refused, as a rename would replace a device by a file. ``replace=False`` keeps a
    file that exists by the time of the rename, so that the first of several processes wins.
    """
    path = Path(path)
    if os.path.exists(path) and not os.path.isfile(path):
        found = "a folder" if os.path.isdir(path) else "a device or pipe"
        raise TrajOODError(f"{path}: expected a file to write, found {found}; choose another name")
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with folder_errors(path.parent, path.name):
            path.parent.mkdir(parents=True, exist_ok=True)
            # Not with tempfile, whose files only the user can read (mode 0600): results are to be shared.
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


def check_can_write(folder: str | Path, file: str = "") -> None:
    """Check that ``folder`` can be created or replaced, or can hold the file ``file``, before hours of work for it;
    nothing is left behind."""
    folder = Path(os.path.realpath(Path(folder).expanduser()))
    target = folder / file
    made = [path for path in target.parents if not os.path.exists(path)]
    probe = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with folder_errors(folder, file):
            probe.mkdir(parents=True)
    finally:
        with contextlib.suppress(OSError):  # stops at the first folder that is not empty
            for path in (probe, *made):
                path.rmdir()


@contextlib.contextmanager
def alone_in(folder: str | Path) -> Iterator[None]:
    """Context manager that locks ``folder`` for this process, or raises if another has it; the lock also ends if the
    process is killed.

    The folder itself is locked, without a lock file; do not replace it meanwhile. Missing folders are created, and
    removed again if nothing was written to them. Where folders cannot be locked (Windows, some network file systems)
    there is no protection.
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
                    f"{folder}: in use by another process; wait until it ends, or choose another folder"
                ) from error
        yield
    finally:
        if opened >= 0:
            os.close(opened)
        with contextlib.suppress(OSError):  # stops at the first folder that is not empty
            for path in made:
                path.rmdir()


def files_below(folder: str | Path) -> Iterator[Path]:
    """Every file in and below ``folder``, without following links to folders. A folder that another process removes
    meanwhile has none (``Path.rglob`` raises there)."""
    for place, _, names in os.walk(folder):
        yield from (Path(place, name) for name in names)


def empty_folder(folder: str | Path, first: str) -> None:
    """Empty ``folder``, removing the file ``first`` before everything else."""
    folder = Path(folder)
    with folder_errors(folder):
        (folder / first).unlink(missing_ok=True)
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def lock(opened: int, path: Path) -> None:
    """Lock ``path`` for this process through its file descriptor ``opened``, until that is closed or the process ends;
    without effect where locks are not supported.

    Raises BlockingIOError if another process has the lock, or has replaced or removed ``path`` since it was opened.
    """
    try:
        import fcntl

        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except (ImportError, OSError):  # go on without protection
        return
    with contextlib.suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(opened), os.stat(path)):
            return
    raise BlockingIOError


def abandon(stream: BinaryIO | TextIO) -> None:
    """Redirect a broken output stream to the null device, so that Python's flush at exit does not fail again."""
    with contextlib.suppress(OSError, ValueError):
        number, null = stream.fileno(), os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, number)
        os.close(null)


@contextlib.contextmanager
def folder_errors(folder: Path, name: str = "", then: str = "") -> Iterator[None]:
    """Context manager that turns an OSError, or safetensors' error for one, into a ``TrajOODError``: ``folder``, or the
    file ``name`` in it, cannot be written. ``then`` says what to do; by default, to free space or choose another
    folder."""
    try:
        yield
    except Exception as error:
        of_safetensors = type(error).__name__ == "SafetensorError" and "I/O error" in str(error)
        if not isinstance(error, OSError) and not of_safetensors:
            raise
        file, told = f" (for {name})" if name else "", getattr(error, "strerror", None) or error
        then = then or f"free space, fix its permissions or {_elsewhere(folder)}"
        raise TrajOODError(f"{folder}: expected a folder that can be written{file}, got: {told}; {then}") from error


def _elsewhere(folder: Path) -> str:
    """Advice on how to choose another folder."""
    with contextlib.suppress(TrajOODError):
        if folder.absolute().is_relative_to(cache_folder()):
            return f"set {CACHE_VARIABLE} to another folder for the cache"
    return "choose another folder"
