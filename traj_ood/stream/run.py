"""A whole run: entries in, a table out, and what is left to say of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING

import torch

from traj_ood.detector.decision import ID, OOD
from traj_ood.stream.paths import Entry
from traj_ood.stream.rows import Row, Tally, default_batch_size, score_rows
from traj_ood.stream.tables import Table

if TYPE_CHECKING:
    from traj_ood.detector import Detector

_REJUDGED_ROWS = 64


def write_scores(
    detector: Detector,
    entries: Iterable[Entry],
    table: Table,
    *,
    resume: bool = False,
    batch_size: int | None = None,
    workers: int = 2,
    on_rows: Callable[[Sequence[Row]], object] = lambda rows: None,
) -> tuple[Tally, Tally]:
    """Write a row for every entry, and finish the table.

    Args:
        entries: the input, from its start also when an earlier run is resumed.
        table: of :func:`open_table`; closing it is the caller's part.
        resume: keep the rows that the table holds. Their paths have to be the entries', their files unchanged, and 64
            images with a score and 64 with an error, spread over all, are judged again: their rows have to come out the
            same, scores to a relative 1e-6.
        batch_size, workers: of :func:`score_rows`.
        on_rows: called with every batch of new rows, after it is written.
    Returns:
        Of all rows in the table, and of those that an earlier run had written.
    Raises:
        TrajOODError: see :func:`score_rows`, :class:`Table` and :class:`Resumed`.
        BrokenPipeError: nobody reads standard output any more.
    """
    size = default_batch_size(detector.autoencoder) if batch_size is None else batch_size
    entries = iter(entries)
    earlier = Tally()
    if resume:
        held = table.match(entries, _REJUDGED_ROWS, partial(_calibrated, detector))
        with closing(score_rows(detector, [e for e, _ in held.sample], batch_size=size, workers=workers)) as again:
            held.check(chain.from_iterable(again))
        earlier = held.tally
        if table.is_finished:
            return earlier, earlier
    tally = earlier
    with closing(score_rows(detector, entries, batch_size=size, workers=workers)) as batches:
        for rows in batches:
            table.write(rows)
            on_rows(rows)
            tally = tally.plus(rows)
    table.finish()
    return tally, earlier


def _calibrated(detector: Detector, score: float) -> tuple[float | None, str | None]:
    """What the detector's calibration says of a score."""
    known = detector.calibration
    if known is None:
        return None, None
    one = torch.tensor([score], dtype=torch.float64)
    return float(known.p_values(one)), OOD if bool(known.decide(one)) else ID
