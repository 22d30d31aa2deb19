"""Text formats of rows: CSV and JSON lines.

Names that are not UTF-8 are stored in CSV as their bytes (read it with ``errors="surrogateescape"``), and in JSON lines
as lone surrogates ``\\udcXX``, which Python's json reads back. In CSV, texts that a spreadsheet would evaluate are
quoted; ``traj_ood.text.unquote_formula`` is the inverse.
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

from traj_ood.detector.decision import ERROR, INFINITIES
from traj_ood.stream.rows import COLUMNS, Row
from traj_ood.text import quote_formula, unquote_formula

_MAX_RECORD_BYTES = 2**20  # limit on one record, so that a damaged file is not read into memory as a whole


class TextFormat(ABC):
    """Encodes a row as one record of bytes and decodes it; a file begins with ``header``."""

    header: bytes = b""

    @abstractmethod
    def encode(self, row: Row) -> bytes:
        """The record of a row, including its line end."""

    @abstractmethod
    def parse(self, record: bytes) -> Row:
        """Parse a record, or raise a ValueError or TypeError; :meth:`decode` also verifies it."""

    def decode(self, record: bytes) -> Row:
        """Parse a record and verify that :meth:`encode` gives the same bytes, and that the row does not contradict
        itself; else a ValueError."""
        try:
            row = self.parse(record)
            number = row.score is None or not math.isnan(row.score)
            share = row.p_value is None or 0 <= row.p_value <= 1
            whole = self.encode(row) == record and number and share
        except (TypeError, LookupError, RecursionError) as error:  # other JSON, or nested too deeply
            raise ValueError(str(error)) from error
        if not whole or (row.score is None) != (row.status == ERROR):
            raise ValueError("not as it was written")
        return row

    def records(self, file: BinaryIO) -> Iterator[bytes]:
        """Iterate over complete records from the file's position; an incomplete one at the end is left out, and one
        longer than a megabyte is a ValueError."""
        for line in _lines(file):
            if line.endswith(b"\n"):
                yield line


class CSVFormat(TextFormat):
    """Comma-separated values, quoted where needed, with ``\\n`` after each row; an empty cell is None.

    ``quote_formulas`` writes texts that a spreadsheet would evaluate (a path ``=1+1.png``) with a ``'`` before them,
    and expects it when reading, as names can come from anyone. Numbers are not quoted.
    """

    def __init__(self, quote_formulas: bool = True) -> None:
        self._quotes = quote_formulas
        self.header = self._line(COLUMNS)

    def encode(self, row: Row) -> bytes:
        cells = [getattr(row, name) for name in COLUMNS]
        return self._line([quote_formula(c) if self._quotes and isinstance(c, str) else c for c in cells])

    def parse(self, record: bytes) -> Row:
        text = record.decode("utf-8", "surrogateescape")
        try:
            (fields,) = csv.reader(io.StringIO(text, newline=""), strict=True)
        except csv.Error as damage:
            raise ValueError(str(damage)) from damage
        if len(fields) != len(COLUMNS):
            raise ValueError(f"{len(fields)} columns")
        if self._quotes:
            if any(quote_formula(unquote_formula(cell)) != cell for cell in (fields[0], *fields[5:])):
                raise ValueError("a text that a spreadsheet would evaluate, not quoted: add --no-quote-formulas")
            fields = [unquote_formula(cell) if k in (0, 5, 6, 8) else cell for k, cell in enumerate(fields)]
        cells: list[Any] = [cell or None for cell in fields[:-1]]  # the reason follows from them
        for place, number in ((1, float), (2, float), (4, int)):
            cells[place] = None if cells[place] is None else number(cells[place])
        return Row(*cells)

    def records(self, file: BinaryIO) -> Iterator[bytes]:
        pieces: list[bytes] = []
        size = quotes = 0
        for line in _lines(file):
            pieces.append(line)
            size, quotes = size + len(line), quotes + line.count(b'"')
            if size > _MAX_RECORD_BYTES:
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
    """One JSON object per line, ASCII only; None is null, and an infinite score the text "Infinity".

    JSON has no infinity, and parsers disagree on numbers beyond their range. The text is that of protobuf's JSON;
    Python's ``float`` and JavaScript's ``Number`` convert it to infinity.
    """

    def encode(self, row: Row) -> bytes:
        cells = {**asdict(row), "reason": row.reason}
        cells["score"] = INFINITIES.get(cells["score"], cells["score"])
        return json.dumps(cells, allow_nan=False).encode() + b"\n"

    def parse(self, record: bytes) -> Row:
        cells = json.loads(record)
        if cells["score"] in INFINITIES:
            raise ValueError("the score 1e999 of an earlier version, now written as the text Infinity")
        del cells["reason"]  # it follows from the others
        words = {text: number for number, text in INFINITIES.items()}
        return Row(**{**cells, "score": words.get(cells["score"], cells["score"])})


TEXT_FORMATS = ("csv", "jsonl")


def text_format(name: str, quote_formulas: bool = True) -> TextFormat:
    """The format with this name of ``TEXT_FORMATS``."""
    return CSVFormat(quote_formulas) if name == "csv" else JSONLinesFormat()


def _lines(file: BinaryIO) -> Iterator[bytes]:
    while line := file.readline(_MAX_RECORD_BYTES):
        yield line
