"""Whether the rows that an interrupted run left belong to this run: to its input, its detector and its calibration.

A row is its own evidence, so there is no second file that says whose rows these are and could be lost or out of date:
:func:`match_file` compares every path with the input's, and the caller judges some of the images again, which have to
come out the same (:meth:`Resumed.check`); p-value and decision of every row have to be those of its score, and its file
has to hold what it held. That notices another detector, calibration or image. The images judged again are spread over
all the rows, and there are as many with a score as with an error: neither a start of unreadable files nor one that two
detectors agree on hides the rest.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from traj_ood.data.contents import hash_files
from traj_ood.errors import TrajOODError
from traj_ood.stream.formats import TextFormat
from traj_ood.stream.paths import Entry
from traj_ood.stream.rows import Row, Tally, content_of

Calibrated = Callable[[float], tuple[float | None, str | None]]
_COMPARED_HELD = 16  # of those whose bytes are in memory
_COMPARED_FILES = 1024  # files at a time, whose bytes are compared with their rows
_ROUNDING = 1e-6  # of a score, relative: what float32 leaves of it when the batch changes


@dataclass(frozen=True)
class Resumed:
    """What an interrupted run left.

    Attributes:
        tally: of its whole rows.
        sample: some of them with their entries, spread over all, in order.
        where: the file, for errors.
    """

    tally: Tally = field(default_factory=Tally)
    sample: tuple[tuple[Entry, Row], ...] = ()
    where: str = ""

    def check(self, rows: Iterable[Row]) -> None:
        """Compare ``rows``, made anew from the entries in ``sample``, with what is there.

        Scores may differ by rounding: those of a model or a scorer that is not ours, or on a GPU, may follow the batch.
        P-value and decision follow from the score, and :meth:`Table.match` has compared them.

        Raises:
            TrajOODError: a row differs.
        """
        for (entry, there), row in zip(self.sample, rows, strict=True):
            if not _same_but_for_rounding(row, there):
                now = f"status {row.status}" if row.score is None else f"score {row.score}"
                raise TrajOODError(
                    f"{self.where}: expected what this detector says of {entry.path!r} ({now}), found another row; "
                    "resume with the detector, device and images that it was made with, or start again with --overwrite"
                )


def match_file(
    form: TextFormat, path: Path, file: io.FileIO, entries: Iterator[Entry], most: int, calibrated: Calibrated
) -> tuple[Resumed, int]:
    """What the file holds of the input, and where its last whole row ends; ``entries`` stands behind that row."""
    tally, end = Tally(), len(form.header)
    scored, failed = _Spread(most), _Spread(most)
    unseen: list[tuple[Entry, Row]] = []
    with open(file.fileno(), "rb", closefd=False) as reader:
        if reader.read(end) != form.header:
            if os.fstat(file.fileno()).st_size < end:  # broken off before its first row
                return Resumed(), 0
            raise TrajOODError(
                f"{path}: expected a table that starts with {form.header!r}, as this version writes it; choose another "
                "--out, or start again with --overwrite"
            )
        try:
            for record in form.records(reader):
                row = form.decode(record)
                entry = _same(path, tally.count + 1, row.path, next(entries, None))
                if row.score is not None and (row.p_value, row.decision) != calibrated(row.score):
                    raise TrajOODError(
                        f"{path}: row {tally.count + 1}: expected the p-value and decision that belong to its score, "
                        "found others; resume with the calibration that it was made with, or start again with "
                        "--overwrite"
                    )
                (failed if row.score is None else scored).add(tally.count, entry, row)
                tally, end = tally.plus([row]), end + len(record)
                unseen.append((entry, row))
                if len(unseen) >= (_COMPARED_FILES if entry.content is None else _COMPARED_HELD):
                    _refuse_changed(path, tally.count, unseen)
                    unseen = []
            _refuse_changed(path, tally.count, unseen)
        except ValueError as error:
            if isinstance(error, TrajOODError):
                raise
            damage = f"row {tally.count + 1} is damaged ({error})"
            raise TrajOODError(f"{path}: {damage}; start again with --overwrite") from error
    sample = sorted(scored.held + failed.held, key=lambda item: item[0])
    return Resumed(tally, tuple((entry, row) for _, entry, row in sample), str(path)), end


class _Spread:
    """At most ``most`` of the rows that come, the first and then at equal distances, however many there will be."""

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


def _refuse_changed(path: Path, last: int, rows: Sequence[tuple[Entry, Row]]) -> None:
    """Refuse rows, the last of them number ``last``, of files that do not hold what was judged."""
    held = {entry.content: hashlib.sha256(entry.content).hexdigest() for entry, _ in rows if entry.content is not None}
    places = [os.path.realpath(entry.path) for entry, _ in rows if entry.content is None]
    files = iter(hash_files(places))
    digests = [next(files) if entry.content is None else held[entry.content] for entry, _ in rows]
    for number, ((entry, row), digest) in enumerate(zip(rows, digests, strict=True), last - len(rows) + 1):
        if not entry.error and content_of(digest) != row.content:
            raise TrajOODError(
                f"{path}: row {number}: {entry.path!r} has changed since it was judged; start again with --overwrite"
            )


def _same_but_for_rounding(row: Row, there: Row) -> bool:
    """Whether two rows say the same, apart from what follows from the score."""
    if row.score is None or there.score is None:
        return row == there
    near = math.isclose(row.score, there.score, rel_tol=_ROUNDING)
    return near and (row.path, row.steps, row.status) == (there.path, there.steps, there.status)


def _same(path: Path, number: int, there: str, entry: Entry | None) -> Entry:
    """The input's entry, where it is the one that the row is of."""
    if entry is None or entry.path != there:
        here = "its end" if entry is None else repr(entry.path)
        raise TrajOODError(
            f"{path}: row {number} is of {there!r}, where this input has {here}; resume with the same input, or start "
            "again with --overwrite"
        )
    return entry
