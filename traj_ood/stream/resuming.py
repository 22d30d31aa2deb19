"""Verify that the rows left by an interrupted run have this run's input, detector and calibration.

The rows themselves are checked, so that no second file with their origin can be lost or out of date. For every row,
:func:`match_file` compares its path with the input, its p-value and decision with the calibration of its score, and its
file with the recorded digest. The caller judges some of the images again and compares the results
(:meth:`Resumed.check`). This notices another detector, calibration or image. The images judged again are spread over
all rows, as many with a score as with an error, so that a difference cannot hide behind unreadable files or behind a
beginning on which two detectors agree.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from traj_ood.data.contents import hash_files
from traj_ood.data.decoding import Reading
from traj_ood.detector import Detector
from traj_ood.detector.decision import ID, OOD
from traj_ood.errors import TrajOODError
from traj_ood.stream.formats import TextFormat
from traj_ood.stream.paths import Entry
from traj_ood.stream.rows import Row, Tally, content_of

_REJUDGED_ROWS = 64  # with a score, and as many with an error
_COMPARED_FILES = 1024  # files whose bytes are compared with their rows at a time
_COMPARED_RECORDS = 16  # likewise for records, whose bytes are in memory
_ROUNDING = 1e-6  # relative; how much a float32 score may change with the batch


@dataclass(frozen=True)
class Resumed:
    """The rows left by an interrupted run."""

    tally: Tally = field(default_factory=Tally)  # of its complete rows
    sample: tuple[tuple[Entry, Row], ...] = ()  # some of them with their entries, spread over all rows, in order
    where: str = ""  # the file, for errors

    def check(self, rows: Iterable[Row]) -> None:
        """Compare ``rows``, computed again for the entries in ``sample``, with the rows that are there.

        Scores may differ by rounding, as user-defined models and scorers, and GPUs, may depend on the batch. P-values
        and decisions follow from the score and have been compared by :meth:`Table.match`.
        """
        for (entry, there), row in zip(self.sample, rows, strict=True):
            if not _same_but_for_rounding(row, there):
                now = f"status {row.status}" if row.score is None else f"score {row.score}"
                raise TrajOODError(
                    f"{self.where}: expected this detector's result on {entry.path!r} ({now}), found another row; "
                    "resume with the detector, device and images that it was made with, or start again with --overwrite"
                )


def match_file(
    form: TextFormat, path: Path, file: io.FileIO, entries: Iterator[Entry], detector: Detector
) -> tuple[Resumed, int]:
    """The rows in ``file``, and the position after its last complete row.

    ``entries`` is advanced past the entries that have a row.
    """
    tally, end = Tally(), len(form.header)
    scored, failed = _Spread(_REJUDGED_ROWS), _Spread(_REJUDGED_ROWS)
    unseen: list[tuple[Entry, Row]] = []
    with open(file.fileno(), "rb", closefd=False) as reader:
        begin = form.header or b"{"  # as a row of JSON lines begins
        head = reader.read(len(begin))
        if not begin.startswith(head):
            raise TrajOODError(
                f"{path}: expected a table that starts with {begin!r}, as this version writes it; choose another "
                "--out, or start again with --overwrite"
            )
        if len(head) < end:  # broken off before its first row
            return Resumed(), 0
        reader.seek(end)
        try:
            for record in form.records(reader):
                row = form.decode(record)
                entry = _same(path, tally.count + 1, row.path, next(entries, None))
                if row.score is not None and (row.p_value, row.decision) != _calibrated(detector, row.score):
                    raise TrajOODError(
                        f"{path}: row {tally.count + 1}: expected the p-value and decision that belong to its score, "
                        "found others; resume with the calibration that it was made with, or start again with "
                        "--overwrite"
                    )
                (failed if row.score is None else scored).add(tally.count, entry, row)
                tally, end = tally.plus([row]), end + len(record)
                unseen.append((entry, row))
                if len(unseen) >= (_COMPARED_FILES if entry.content is None else _COMPARED_RECORDS):
                    _refuse_changed(path, tally.count, unseen, detector.reading)
                    unseen = []
            _refuse_changed(path, tally.count, unseen, detector.reading)
        except ValueError as error:
            if isinstance(error, TrajOODError):
                raise
            damage = f"row {tally.count + 1} is damaged ({error})"
            raise TrajOODError(f"{path}: {damage}; start again with --overwrite") from error
    sample = sorted(scored.held + failed.held, key=lambda item: item[0])
    return Resumed(tally, tuple((entry, row) for _, entry, row in sample), str(path)), end


def _calibrated(detector: Detector, score: float) -> tuple[float | None, str | None]:
    """P-value and decision of a score by the detector's calibration."""
    known = detector.calibration
    if known is None:
        return None, None
    one = torch.tensor([score], dtype=torch.float64)
    return float(known.p_values(one)), OOD if bool(known.decide(one)) else ID


class _Spread:
    """Keeps at most ``most`` of the rows added, the first and then at equal distances, for any number of rows."""

    def __init__(self, most: int) -> None:
        self.held: list[tuple[int, Entry, Row]] = []
        self._most, self._seen, self._stride = most, 0, 1

    def add(self, number: int, entry: Entry, row: Row) -> None:
        if self._seen % self._stride == 0:
            if len(self.held) == self._most:
                self.held = self.held[::2]
                self._stride *= 2
            if self._seen % self._stride == 0:
                self.held.append((number, entry, row))
        self._seen += 1


def _refuse_changed(path: Path, last: int, rows: Sequence[tuple[Entry, Row]], reading: Reading) -> None:
    """Refuse rows, the last of which has the number ``last``, whose files have changed since they were judged."""
    held = {entry.content: hashlib.sha256(entry.content).hexdigest() for entry, _ in rows if entry.content is not None}
    places = [os.path.realpath(entry.path) for entry, _ in rows if entry.content is None]
    files = iter(hash_files(places))
    digests = [next(files) if entry.content is None else held[entry.content] for entry, _ in rows]
    for number, ((entry, row), digest) in enumerate(zip(rows, digests, strict=True), last - len(rows) + 1):
        if not entry.error and content_of(digest, reading) != row.content:
            raise TrajOODError(
                f"{path}: row {number}: {entry.path!r} has changed since it was judged, or was read with other "
                "--exif or --bit-depth; start again with --overwrite"
            )


def _same_but_for_rounding(row: Row, there: Row) -> bool:
    """Whether two rows are equal up to the rounding of their scores, p-values and decisions left aside."""
    if row.score is None or there.score is None:
        return row == there
    near = math.isclose(row.score, there.score, rel_tol=_ROUNDING)
    return near and (row.path, row.steps, row.status) == (there.path, there.steps, there.status)


def _same(path: Path, number: int, there: str, entry: Entry | None) -> Entry:
    """``entry``, if the row is of this entry, else an error."""
    if entry is None or entry.path != there:
        here = "its end" if entry is None else repr(entry.path)
        raise TrajOODError(
            f"{path}: row {number} is of {there!r}, where this input has {here}; resume with the same input, or start "
            "again with --overwrite"
        )
    return entry
