"""A row as one line of text, and back: CSV and JSON lines.

How names that are not UTF-8 are written: CSV holds their bytes as they are (read it with
``errors="surrogateescape"``), JSON lines lone surrogates as ``\\udcXX``, which Python's json reads back.
"""

from __future__ import annotations

import csv
import io
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any, BinaryIO

from traj_ood.stream.rows import COLUMNS, ERROR, Row

_LONGEST = 2**20  # bytes of one record; a damaged file must not be taken into memory whole


class TextFormat(ABC):
    """A row as one record of bytes, and back; ``header`` comes before the first."""

    header: bytes = b""

    @abstractmethod
    def encode(self, row: Row) -> bytes:
        """One record, its line end included."""

    @abstractmethod
    def parse(self, record: bytes) -> Row:
        """The row that a record seems to hold.

        Raises:
            ValueError, TypeError: not a record of this format.
        """

    def decode(self, record: bytes) -> Row:
        """The row of a record.

        Raises:
            ValueError: the record is not, byte for byte, what :meth:`encode` makes of a row.
        """
        try:
            row = self.parse(record)
            numbers = [value for value in (row.score, row.p_value) if value is not None]
            whole = self.encode(row) == record and not any(map(math.isnan, numbers))
        except (TypeError, RecursionError) as error:  # JSON of another kind, or nested without end
            raise ValueError(str(error)) from error
        if not whole or (row.score is None) != (row.status == ERROR):
            raise ValueError("not as it was written")
        return row

    def records(self, file: BinaryIO) -> Iterator[bytes]:
        """Whole records from the file's position on; what a broken-off write left at the end is no record.

        Raises:
            ValueError: a record of more than a megabyte.
        """
        for line in _lines(file):
            if line.endswith(b"\n"):
                yield line


class CSVFormat(TextFormat):
    """Comma-separated, quoted where needed, one ``\\n`` after each row; empty is None."""

    def __init__(self) -> None:
        self.header = self._line(COLUMNS)

    def encode(self, row: Row) -> bytes:
        return self._line([getattr(row, name) for name in COLUMNS])

    def parse(self, record: bytes) -> Row:
        text = record.decode("utf-8", "surrogateescape")
        try:
            (fields,) = csv.reader(io.StringIO(text, newline=""), strict=True)
        except csv.Error as damage:
            raise ValueError(str(damage)) from damage
        if len(fields) != len(COLUMNS):
            raise ValueError(f"{len(fields)} columns")
        path, score, p_value, decision, steps, status, error, content = fields
        number, share, count = float(score or "nan"), float(p_value or "nan"), int(steps or -1)
        return Row(
            path,
            number if score else None,
            share if p_value else None,
            decision or None,
            count if steps else None,
            status,
            error or None,
            content or None,
        )

    def records(self, file: BinaryIO) -> Iterator[bytes]:
        pieces: list[bytes] = []
        size = quotes = 0
        for line in _lines(file):
            pieces.append(line)
            size, quotes = size + len(line), quotes + line.count(b'"')
            if size > _LONGEST:
                raise ValueError("a row without an end")
            if line.endswith(b"\n") and quotes % 2 == 0:  # else the line ends inside a quoted name
                yield b"".join(pieces)
                pieces, size, quotes = [], 0, 0

    @staticmethod
    def _line(values: Sequence[Any]) -> bytes:
        text = io.StringIO(newline="")
        csv.writer(text).writerow(values)  # with "\n" for a line end, Python < 3.13 leaves a carriage return unquoted
        return text.getvalue().removesuffix("\r\n").encode("utf-8", "surrogateescape") + b"\n"


class JSONLinesFormat(TextFormat):
    """One JSON object per line, ASCII only; null is None, and an infinite score the number 1e999.

    JSON has no infinity; readers make one of a number beyond their range, so that it still is above every threshold.
    """

    def encode(self, row: Row) -> bytes:
        text = json.dumps(asdict(row))
        return text.replace('"score": Infinity', '"score": 1e999').encode() + b"\n"  # in a path, quotes are escaped

    def parse(self, record: bytes) -> Row:
        return Row(**json.loads(record))


TEXT_FORMATS: dict[str, type[TextFormat]] = {"csv": CSVFormat, "jsonl": JSONLinesFormat}


def _lines(file: BinaryIO) -> Iterator[bytes]:
    while line := file.readline(_LONGEST):
        yield line
