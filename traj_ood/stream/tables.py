"""Tables of rows as CSV, JSON lines or Parquet, on standard output or in a file that is complete or absent.

A file is written as ``NAME.part`` and renamed once its last row is on disk; Parquet is made of a ``NAME.part`` of JSON
lines. An interrupted run can be resumed from its ``.part`` file, up to the last complete line.
"""

from __future__ import annotations

import io
import os
import stat
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO

from traj_ood.detector import Detector
from traj_ood.errors import TrajOODError, unknown_name
from traj_ood.io.files import abandon, folder_errors, lock
from traj_ood.stream.formats import TEXT_FORMATS, JSONLinesFormat, TextFormat, text_format
from traj_ood.stream.parquet import read_parquet, write_parquet
from traj_ood.stream.paths import Entry
from traj_ood.stream.resuming import Resumed, match_file
from traj_ood.stream.rows import Row

FORMATS = (*TEXT_FORMATS, "parquet")


class Table(ABC):
    """Destination of rows. As a context manager it closes its file on exit; only :meth:`finish` completes the file."""

    def __enter__(self) -> Table:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def match(self, entries: Iterator[Entry], detector: Detector) -> Resumed:
        """Match the complete rows that are there with ``detector`` and the beginning of ``entries``, which is advanced
        past them."""
        return Resumed()

    @abstractmethod
    def write(self, rows: Sequence[Row]) -> None:
        """Append rows, which are then visible to readers of the file or, until it is finished, of its ``.part``."""

    @abstractmethod
    def finish(self) -> None:
        """Complete the table after the last row."""

    def close(self) -> None:  # noqa: B027 (not every table has one)
        """Close the file, finished or not."""


def open_table(
    path: Path | None,
    format: str | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    quote_formulas: bool = True,
) -> Table:
    """Open a table at ``path``, a file that does not exist yet, or on standard output.

    Args:
        path: missing folders are created. None: standard output.
        format: one of ``FORMATS``. Default: by the suffix of ``path``; ``csv`` on standard output.
        resume: continue an unfinished file if there is one.
        overwrite: start again, and replace an existing file at the end.
        quote_formulas: see :class:`traj_ood.stream.formats.CSVFormat`.
    """
    form = _format(path, format)
    if resume and overwrite:
        raise TrajOODError("--resume continues a file and --overwrite starts it again: give one of them")
    if path is None:
        if form == "parquet" or resume:
            what = "Parquet" if form == "parquet" else "--resume"
            raise TrajOODError(f"{what}: expected a file to write, got standard output; name one with --out")
        stream = getattr(sys.stdout, "buffer", None)
        if stream is None:
            raise TrajOODError("standard output is closed, so rows cannot be written to it; name a file with --out")
        return OutputTable(text_format(form, quote_formulas), stream)
    if path.exists() and not path.is_file():
        raise TrajOODError(f"{path}: expected a file to write, found a folder or device; choose another --out")
    part = path.with_name(path.name + ".part")
    if resume and path.exists() and not part.exists():
        return FinishedTable(form, quote_formulas, path)
    file = _open_part(part)
    try:
        if not resume:
            _start_again(file, path, part, overwrite)
        if form == "parquet":
            return ParquetTable(path, part, file)
        return FileTable(text_format(form, quote_formulas), path, part, file)
    except BaseException:
        file.close()
        raise


class OutputTable(Table):
    """Rows as text on standard output, flushed after every batch."""

    def __init__(self, form: TextFormat, stream: BinaryIO) -> None:
        self._form, self._stream = form, stream
        self._header = form.header  # written with the first rows, so that a run that fails before prints nothing

    def finish(self) -> None:
        self.write([])

    def write(self, rows: Sequence[Row]) -> None:
        try:
            self._stream.write(self._header + b"".join(map(self._form.encode, rows)))
            self._stream.flush()
        except OSError as error:
            abandon(self._stream)
            if isinstance(error, BrokenPipeError):
                raise
            raise TrajOODError(
                f"standard output cannot be written ({error.strerror}); it is complete up to the last line end"
            ) from error
        self._header = b""


class FileTable(Table):
    """Rows as text in ``NAME.part``, one write per batch; renamed when finished, else kept for --resume."""

    def __init__(self, form: TextFormat, path: Path, part: Path, file: io.FileIO) -> None:
        self._form, self._path, self._part, self._file = form, path, part, file
        self._is_empty = os.fstat(file.fileno()).st_size == 0

    def match(self, entries: Iterator[Entry], detector: Detector) -> Resumed:
        with _disk_errors(self._path):
            self._file.seek(0)
            resumed, end = match_file(self._form, self._part, self._file, entries, detector)
            self._file.truncate(end)
            self._file.seek(end)
        return resumed

    def write(self, rows: Sequence[Row]) -> None:
        data = b"".join(map(self._form.encode, rows))
        with _disk_errors(self._path, f"rows before that are kept in {self._part.name}: continue with --resume"):
            if self._file.tell() == 0:
                data = self._form.header + data
            _write_all(self._file, data)
        self._is_empty = False

    def finish(self) -> None:
        self.write([])  # writes the header if there were no rows
        with _disk_errors(self._path):
            os.fsync(self._file.fileno())
            os.replace(self._part, self._path)
        self._file.close()

    def close(self) -> None:
        if not self._file.closed:
            if self._is_empty:
                self._part.unlink(missing_ok=True)
            self._file.close()


class FinishedTable(Table):
    """A finished file; nothing is written, but its rows must match the input, of which nothing may be left."""

    def __init__(self, form: str, quote_formulas: bool, path: Path) -> None:
        self._is_parquet = form == "parquet"
        self._form = JSONLinesFormat() if self._is_parquet else text_format(form, quote_formulas)
        self._path = path

    def match(self, entries: Iterator[Entry], detector: Detector) -> Resumed:
        with _disk_errors(self._path), self._opened() as file:
            resumed, end = match_file(self._form, self._path, file, entries, detector)
            size = os.fstat(file.fileno()).st_size
        rest = next(entries, None)
        if rest is not None or end != size:
            more = "it ends in a broken row" if rest is None else f"this input goes on with {rest.path!r}"
            raise TrajOODError(
                f"{self._path}: finished with {resumed.tally.count} rows, but {more}; choose another --out, or score "
                "all of it again with --overwrite"
            )
        return resumed

    def _opened(self) -> io.FileIO:
        """The file; for Parquet a temporary one of the same rows as text."""
        if not self._is_parquet:
            return open(self._path, "rb", buffering=0)
        lines: Any = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 (the caller closes it)
        lines.writelines(map(self._form.encode, read_parquet(self._path)))
        lines.seek(0)
        return lines

    def write(self, rows: Sequence[Row]) -> None:
        raise AssertionError("a finished table is not written")

    def finish(self) -> None:
        pass


class ParquetTable(FileTable):
    """Rows as JSON lines in ``NAME.part``, from which the Parquet file is made when finished."""

    def __init__(self, path: Path, part: Path, file: io.FileIO) -> None:
        super().__init__(JSONLinesFormat(), path, part, file)

    def finish(self) -> None:
        with _disk_errors(self._path), open(self._part, "rb") as lines:
            write_parquet(self._path, map(self._form.decode, self._form.records(lines)))
            self._part.unlink()
        self._file.close()


# ---------------------------------------------------------------------- files


def _format(path: Path | None, format: str | None) -> str:
    if format is not None:
        if format not in FORMATS:
            raise unknown_name("format", format, FORMATS)
        return format
    if path is None:
        return "csv"
    suffix = path.suffix.lower().removeprefix(".")
    if suffix not in FORMATS:
        known = ", ".join(f".{name}" for name in FORMATS)
        raise TrajOODError(f"{path}: expected a name that ends in one of {known}; rename it or give --format")
    return suffix


def _open_part(part: Path) -> io.FileIO:
    """Open or create the unfinished file and lock it for this process; the lock ends with the process."""
    with _disk_errors(part):
        part.parent.mkdir(parents=True, exist_ok=True)
        # Do not follow a link, which could lead to any file, nor wait for the reader of a pipe.
        opened = os.open(
            part, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0), 0o666
        )
    if not stat.S_ISREG(os.fstat(opened).st_mode):
        os.close(opened)
        raise TrajOODError(f"{part}: expected an unfinished file or nothing, found a pipe or device; remove it")
    file = io.FileIO(opened, "r+b")
    try:
        lock(file.fileno(), part)
    except BlockingIOError as error:
        file.close()
        raise TrajOODError(f"{part}: another process is writing it; wait for it, or choose another --out") from error
    return file


def _start_again(file: io.FileIO, path: Path, part: Path, overwrite: bool) -> None:
    """Empty the unfinished file, which the caller has locked; without ``overwrite``, refuse to lose existing rows."""
    size = os.fstat(file.fileno()).st_size
    if path.exists() and not overwrite:
        if size == 0:
            part.unlink()
        raise TrajOODError(f"{path}: exists already; choose another --out, or replace it with --overwrite")
    if size and not overwrite:
        raise TrajOODError(
            f"{part}: left by a run that did not finish; continue it with --resume, or start again with --overwrite"
        )
    with _disk_errors(path):
        file.truncate(0)


def _write_all(file: io.FileIO, data: bytes | memoryview) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def _disk_errors(
    path: Path, then: str = "free space, fix its permissions or choose another --out"
) -> AbstractContextManager[None]:
    """Context manager that turns an OSError into a ``TrajOODError`` about a file that cannot be written."""
    return folder_errors(path.parent, path.name, then)
