"""Score all entries into a table, with resuming."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from itertools import chain

from traj_ood.detector import Detector
from traj_ood.scorers.batch_size import default_batch_size
from traj_ood.stream.paths import Entry
from traj_ood.stream.rows import Row, Tally, score_rows
from traj_ood.stream.tables import Table


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
    """Write one row per entry into ``table``, from :func:`open_table`, and finish it; the caller closes it.

    ``entries`` are the whole input, also when an earlier run is resumed: ``resume`` keeps the rows that are in the
    table. Their paths must be those of the entries and their files unchanged; 64 images with a score and 64 with an
    error, spread over all rows, are judged again and must give the same rows, scores to 1e-6, relative. ``on_rows`` is
    called with every batch of new rows after it is written.

    Returns counts of all rows in the table, and of those from an earlier run.
    """
    size = default_batch_size(detector.scorers) if batch_size is None else batch_size
    entries = iter(entries)
    earlier = Tally()
    if resume:
        held = table.match(entries, detector)
        with closing(score_rows(detector, [e for e, _ in held.sample], batch_size=size, workers=workers)) as again:
            held.check(chain.from_iterable(again))
        earlier = held.tally
    tally = earlier
    with closing(score_rows(detector, entries, batch_size=size, workers=workers)) as batches:
        for rows in batches:
            table.write(rows)
            on_rows(rows)
            tally = tally.plus(rows)
    table.finish()
    return tally, earlier
