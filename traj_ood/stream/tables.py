"""Rows as CSV, JSON lines or Parquet, on standard output or in a file that is whole or absent.

A file is written as ``NAME.part`` and gets its name when its last row is on the disk, so the name is what says that
it is whole. CSV and JSON lines can be resumed from their ``.part``: a row counts as whole when its line is.
"""

from __future__ import annotations

import contextlib
import io
import os
import stat
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO

from traj_ood.errors import TrajOODError, unknown_name
from traj_ood.io.files import folder_errors, lock
from traj_ood.stream.formats import TEXT_FORMATS, TextFormat, text_format
from traj_ood.stream.paths import Entry
from traj_ood.stream.resuming import Calibrated, Resumed, match_file
from traj_ood.stream.rows import COLUMNS, Row

FORMATS = (*TEXT_FORMATS, "parquet")
_ROW_GROUP = 8192


class Table(ABC):
    """Somewhere rows go. As a context manager it closes its file whatever happens; only :meth:`finish` completes it."""

    def __enter__(self) -> Table:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def match(self, entries: Iterator[Entry], most: int, calibrated: Calibrated) -> Resumed:
        """Take from ``entries`` those that have a whole row here already; the next row goes behind these.

        Args:
            entries: the input, from its start.
            most: rows with a score, and rows with an error, to hold for :meth:`Resumed.check`.
            calibrated: p-value and decision that belong to a score.
        Raises:
            TrajOODError: rows that do not match the start of the input, its files or the calibration, or are damaged.
        """
        return Resumed()

    @property
    def is_finished(self) -> bool:
        """Whether :meth:`match` found a finished file that holds a row for every entry."""
        return False

    @abstractmethod
    def write(self, rows: Sequence[Row]) -> None:
        """Append rows; when this returns, a reader can see them (Parquet: when the table is finished).

        Raises:
            TrajOODError: they cannot be written. BrokenPipeError: nobody reads standard output any more.
        """

    @abstractmethod
    def finish(self) -> None:
        """Say that the last row is written.

        Raises:
            TrajOODError: the file cannot be completed.
        """

    @abstractmethod
    def close(self) -> None:
        """Let go of the file, finished or not."""


def open_table(
    path: Path | None,
    format: str | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    quote_formulas: bool = True,
) -> Table:
    """A table at ``path``, or on standard output.

    Args:
        path: a file that does not exist yet; missing folders are made. None is standard output.
        format: one of ``FORMATS``. Default: by the suffix of ``path``; ``csv`` on standard output.
        resume: continue an unfinished file when there is one; CSV and JSON lines only.
        overwrite: start again, and at the end replace a file that is there.
        quote_formulas: of :class:`traj_ood.stream.formats.CSVFormat`.
    Raises:
        TrajOODError: impossible combinations, a file that is there already or that another process writes, or a folder
            that cannot be written.
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
            raise TrajOODError("standard output is closed: expected somewhere to write rows; name a file with --out")
        return OutputTable(text_format(form, quote_formulas), stream)
    if resume and form == "parquet":
        raise TrajOODError(
            f"{path}: Parquet cannot be resumed, as its index is written last; use --out with .csv or .jsonl to resume"
        )
    if path.exists() and not path.is_file():
        raise TrajOODError(f"{path}: expected a file to write, found a folder or device; choose another --out")
    part = path.with_name(path.name + ".part")
    if resume and path.exists() and not part.exists():
        return FinishedTable(text_format(form, quote_formulas), path)
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
    """Rows as text on standard output, flushed batch by batch."""

    def __init__(self, form: TextFormat, stream: BinaryIO) -> None:
        self._form, self._stream = form, stream
        self._header = form.header  # goes with the first rows: a run that fails before has said nothing

    def write(self, rows: Sequence[Row]) -> None:
        self._write(self._header + b"".join(map(self._form.encode, rows)))
        self._header = b""

    def finish(self) -> None:
        self.write([])

    def close(self) -> None:
        pass

    def _write(self, data: bytes) -> None:
        try:
            self._stream.write(data)
            self._stream.flush()
        except OSError as error:
            self._abandon()
            if isinstance(error, BrokenPipeError):
                raise
            raise TrajOODError(
                f"standard output cannot be written ({error.strerror}); what is there is whole up to the last line end"
            ) from error

    def _abandon(self) -> None:
        """Python flushes standard output once more when it ends; what is still in it must not fail again."""
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


class FileTable(Table):
    """Rows as text in ``NAME.part``, each batch in one write; renamed when finished, kept for --resume otherwise."""

    def __init__(self, form: TextFormat, path: Path, part: Path, file: io.FileIO) -> None:
        self._form, self._path, self._part, self._file = form, path, part, file
        self._is_worthless = os.fstat(file.fileno()).st_size == 0

    def match(self, entries: Iterator[Entry], most: int, calibrated: Calibrated) -> Resumed:
        with _disk_errors(self._path):
            self._file.seek(0)
            resumed, end = match_file(self._form, self._part, self._file, entries, most, calibrated)
            self._file.truncate(end)
            self._file.seek(end)
        return resumed

    def write(self, rows: Sequence[Row]) -> None:
        data = b"".join(map(self._form.encode, rows))
        with _disk_errors(self._path, f"rows before that are kept in {self._part.name}: continue with --resume"):
            if self._file.tell() == 0:
                data = self._form.header + data
            _write_all(self._file, data)
        self._is_worthless = False

    def finish(self) -> None:
        self.write([])  # where there are no rows, the header alone
        with _disk_errors(self._path):
            os.fsync(self._file.fileno())
            os.replace(self._part, self._path)
        self._file.close()

    def close(self) -> None:
        if not self._file.closed:
            if self._is_worthless:
                self._part.unlink(missing_ok=True)
            self._file.close()


class FinishedTable(Table):
    """A finished file: there is nothing to write, but its rows must be those of this input."""

    def __init__(self, form: TextFormat, path: Path) -> None:
        self._form, self._path = form, path

    @property
    def is_finished(self) -> bool:
        return True

    def match(self, entries: Iterator[Entry], most: int, calibrated: Calibrated) -> Resumed:
        with _disk_errors(self._path), open(self._path, "rb", buffering=0) as file:
            resumed, end = match_file(self._form, self._path, file, entries, most, calibrated)
            size = os.fstat(file.fileno()).st_size
        rest = next(entries, None)
        if rest is not None or end != size:
            more = "it ends in a broken row" if rest is None else f"this input goes on with {rest.path!r}"
            raise TrajOODError(
                f"{self._path}: finished with {resumed.tally.count} rows, but {more}; choose another --out, or score "
                "all of it again with --overwrite"
            )
        return resumed

    def write(self, rows: Sequence[Row]) -> None:
        raise AssertionError("a finished table is not written")

    def finish(self) -> None:
        pass

    def close(self) -> None:
        pass


class ParquetTable(Table):
    """Rows in row groups of 8,192; the file is of no use before it is finished, so an unfinished one is removed.

    Parquet's text is UTF-8. Of a name that is not, the column ``path`` shows odd bytes as ``\\udcXX``, and
    ``path_bytes``, null for all other rows, holds it as it is.
    """

    def __init__(self, path: Path, part: Path, file: io.FileIO) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        kinds = {"score": pa.float64(), "p_value": pa.float64(), "steps": pa.int64()}
        fields = [(name, kinds.get(name, pa.string())) for name in COLUMNS]
        self._schema = pa.schema([*fields, ("path_bytes", pa.binary())])
        self._path, self._part = path, part
        self._rows: list[Row] = []
        self._file, self._sink = file, _Sink(file)
        with _disk_errors(path):
            self._writer = pq.ParquetWriter(self._sink, self._schema, compression="zstd")

    def write(self, rows: Sequence[Row]) -> None:
        self._rows += rows
        while len(self._rows) >= _ROW_GROUP:
            self._write_group(self._rows[:_ROW_GROUP])
            self._rows = self._rows[_ROW_GROUP:]

    def finish(self) -> None:
        if self._rows:
            self._write_group(self._rows)
        with _disk_errors(self._path):
            self._writer.close()
            os.fsync(self._file.fileno())
            os.replace(self._part, self._path)
        self._file.close()

    def close(self) -> None:
        if not self._file.closed:
            self._part.unlink(missing_ok=True)
            self._sink.ignores = True
            with contextlib.suppress(Exception):
                self._writer.close()
            self._file.close()

    def _write_group(self, rows: Sequence[Row]) -> None:
        import pyarrow as pa

        columns: dict[str, list[Any]] = {name: [getattr(row, name) for row in rows] for name in COLUMNS}
        for name in ("path", "error", "reason"):
            columns[name] = [text and text.encode("utf-8", "backslashreplace").decode() for text in columns[name]]
        columns["path_bytes"] = [
            None if shown == row.path else os.fsencode(row.path)
            for row, shown in zip(rows, columns["path"], strict=True)
        ]
        with _disk_errors(self._path):
            self._writer.write_table(pa.table(columns, schema=self._schema))


class _Sink(io.RawIOBase):
    """What pyarrow writes to: every byte, where a plain file may take half of them and pyarrow would not notice.

    Attributes:
        ignores: write nothing any more. A writer that is given up still writes its index, if only when it is collected,
            and crashes the process when that fails.
    """

    def __init__(self, file: io.FileIO) -> None:
        self._file, self.ignores = file, False

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        if not self.ignores:
            _write_all(self._file, data)
        return len(data)


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
    """The unfinished file, made where there is none, for this process alone; the system lets go of it at any death."""
    with _disk_errors(part):
        part.parent.mkdir(parents=True, exist_ok=True)
        # Neither through a link, which could lead to any file, nor into a pipe, which would wait for a reader.
        opened = os.open(
            part, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0), 0o666
        )
    if not stat.S_ISREG(os.fstat(opened).st_mode):
        os.close(opened)
        raise TrajOODError(f"{part}: expected a file that an earlier run left, or nothing, found a pipe or device")
    file = io.FileIO(opened, "r+b")
    try:
        lock(file.fileno(), part)
    except BlockingIOError as error:
        file.close()
        raise TrajOODError(f"{part}: another process is writing it; wait for it, or choose another --out") from error
    return file


def _start_again(file: io.FileIO, path: Path, part: Path, overwrite: bool) -> None:
    """Refuse to lose what an earlier run left, unless that is asked for. The caller holds the unfinished file."""
    size = os.fstat(file.fileno()).st_size
    if path.exists() and not overwrite:
        if size == 0:
            part.unlink()
        raise TrajOODError(f"{path}: there already; choose another --out, or replace it with --overwrite")
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
    """OSError as the one line of a file that cannot be written."""
    return folder_errors(path.parent, path.name, then)
