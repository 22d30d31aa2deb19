"""Turn paths into rows: threads read images ahead, the detector judges them in batches, and rows keep their order.

Batch boundaries depend on the speed of the input. Rows do not, as a detector's scores are independent of the batch.
"""

from __future__ import annotations

import hashlib
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

from torch import Tensor

from traj_ood.data.contents import hash_file, stamp
from traj_ood.data.decoding import Reading, open_bytes, open_image
from traj_ood.detector import Detector
from traj_ood.detector.decision import ERROR, OOD, Decision, decide_all, reason_of
from traj_ood.errors import TrajOODError, is_out_of_memory
from traj_ood.scorers.batch_size import default_batch_size
from traj_ood.stream.paths import Entry
from traj_ood.text import one_line

_LINGER_SECONDS = 1.0  # how long a batch waits for more images from a slow input, such as a pipe
_DIGITS = 16  # of a file's SHA-256 in its row


@dataclass(frozen=True)
class Row:
    """The result for one image: a :class:`traj_ood.Decision` with a path. Fields that do not apply are None."""

    path: str  # as given; bytes that are not UTF-8 are lone surrogates
    score: float | None = None
    p_value: float | None = None
    decision: str | None = None
    steps: int | None = None
    status: str = ERROR
    error: str | None = None
    # 16 hex digits of the SHA-256 of the judged file, and of its reading, by which --resume recognises changes
    content: str | None = None

    @property
    def reason(self) -> str:
        """``ok``, ``ood``, ``invalid: …`` or ``uncalibrated``, which follows from the other fields."""
        return reason_of(self.score, self.decision, self.error)

    @classmethod
    def of(cls, path: str, made: Decision, content: str | None = None) -> Row:
        """The row of the image at ``path`` with the decision ``made``."""
        error = None if made.error is None else _line(made.error, "")
        return cls(path, made.score, made.p_value, made.decision, made.steps, made.status, error, content)


COLUMNS = (*(field.name for field in fields(Row)), "reason")


@dataclass(frozen=True)
class Tally:
    """Counts of rows: all, those with an error, and those with the decision ``ood``."""

    count: int = 0
    failed: int = 0
    ood: int = 0

    def plus(self, rows: Iterable[Row]) -> Tally:
        count, failed, ood = self.count, self.failed, self.ood
        for row in rows:
            count, failed, ood = count + 1, failed + (row.status == ERROR), ood + (row.decision == OOD)
        return Tally(count, failed, ood)


@dataclass(frozen=True)
class _Loaded:
    """The prepared image (C, H, W) or an error of one line, and the ``content`` of its row."""

    image: Tensor | str
    content: str | None = None


_Queued = tuple[Entry, "Future[_Loaded]"]


def content_of(digest: str, reading: Reading) -> str | None:
    """The ``content`` of a row, from a SHA-256 in hex or :data:`traj_ood.data.contents.ABSENT`, and from how the file
    is read where that is not the default: rows of two readings are not of one run."""
    options = reading.options()
    if digest and options:
        digest = hashlib.sha256(f"{digest} {sorted(options.items())}".encode()).hexdigest()
    return digest[:_DIGITS] or None


def score_rows(
    detector: Detector,
    entries: Iterable[Entry],
    *,
    batch_size: int | None = None,
    workers: int = 2,
    linger: float = _LINGER_SECONDS,
) -> Generator[list[Row], None, None]:
    """Yield the rows of each batch, one row per entry, in order; an image that fails has a row with the reason.

    At most 2 · ``batch_size`` + ``workers`` images are in memory, as tensors, whatever the number of entries. Close or
    exhaust the iterator to end its threads.

    Args:
        detector: the detector.
        entries: the images, consumed in a separate thread, so that they may arrive slowly and without end.
        batch_size: images per batch; affects memory and speed, not rows. Default: see
            :func:`traj_ood.scorers.batch_size.default_batch_size`.
        workers: threads that read images.
        linger: seconds that an incomplete batch waits for more entries. Default 1, so that rows of a slow input come
            soon, while a faster input fills its batches.
    """
    size = default_batch_size(detector.scorers) if batch_size is None else batch_size
    for name, value in (("batch size", size), ("workers", workers)):
        if value < 1:
            raise TrajOODError(f"{name}: expected at least 1, got {value}")

    def load(entry: Entry) -> _Loaded:
        return _load(entry, detector.autoencoder.transform, detector.reading)

    for batch in _read_ahead(entries, load, size, workers, linger):
        rows = _judge(detector, batch)
        del batch  # frees its images while the next ones are read
        yield rows


def judge_entries(detector: Detector, entries: Iterable[Entry]) -> list[Row]:
    """One row per entry, in order, as :func:`score_rows`, for one batch and without threads."""
    transform, reading = detector.autoencoder.transform, detector.reading
    return _judge(detector, [(entry, _load(entry, transform, reading)) for entry in entries])


def _load(entry: Entry, transform: Callable[..., Tensor], reading: Reading) -> _Loaded:
    if entry.error:
        return _Loaded(_line(entry.error, entry.path))
    if entry.content is not None:
        return _Loaded(
            _prepare(entry, transform, reading), content_of(hashlib.sha256(entry.content).hexdigest(), reading)
        )
    before = stamp(entry.path)
    image = _prepare(entry, transform, reading)
    content = content_of(hash_file(entry.path), reading)  # the second read comes from the system's cache
    if stamp(entry.path) != before:
        return _Loaded("the file changed while it was being read; judge it again")
    return _Loaded(image, content)


def _prepare(entry: Entry, transform: Callable[..., Tensor], reading: Reading) -> Tensor | str:
    """The prepared image, or an error of one line without the path, which is in the row."""
    path, content = entry.path, entry.content
    try:
        image = open_image(Path(path), reading) if content is None else open_bytes(content, path, reading)
    except TrajOODError as error:
        return _line(str(error), path)
    try:
        return transform(image)
    except Exception as error:  # user code may raise anything
        return _line(f"the model's transform failed on {image.width} x {image.height} pixels: {error!r}", path)


def _judge(detector: Detector, batch: list[tuple[Entry, _Loaded]]) -> list[Row]:
    """One row per entry of a batch."""
    images = [loaded.image for _, loaded in batch if isinstance(loaded.image, Tensor)]
    judged = iter(_judge_images(detector, images))
    rows = []
    for entry, loaded in batch:
        decision = Decision(error=loaded.image) if isinstance(loaded.image, str) else next(judged)
        rows.append(Row.of(entry.path, decision, loaded.content))
    return rows


def _judge_images(detector: Detector, images: list[Tensor]) -> list[Decision]:
    """One decision per prepared image."""
    try:
        return decide_all(partial(detector.judge, whole_chunks=True), images)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise TrajOODError(f"out of memory while judging {len(images)} images: give a smaller --batch-size") from error


def _line(text: str, path: str) -> str:
    """``text`` on one line, without the path at its beginning."""
    return one_line(text).removeprefix(one_line(f"{Path(path)}:")).strip()


def _taken(batch: deque[_Queued]) -> Iterator[_Queued]:
    """Iterate over ``batch``, removing its items, so that a suspended generator keeps no images in memory."""
    while batch:
        yield batch.popleft()


class _End:
    """Marks the end of the queue, with the error that ended the entries, if any."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


def _read_ahead(
    entries: Iterable[Entry], load: Callable[[Entry], _Loaded], size: int, workers: int, linger: float
) -> Iterator[list[tuple[Entry, _Loaded]]]:
    """Iterate over batches of up to ``size`` loaded entries, in order.

    A separate thread reads the entries, as standard input may block for ever, and submits them to the pool; the bounded
    queue limits how far it reads ahead.
    """
    waiting: queue.Queue[_Queued | _End] = queue.Queue(maxsize=size + workers)
    stopped = threading.Event()
    pool = ThreadPoolExecutor(workers)

    def put(item: _Queued | _End) -> None:
        while not stopped.is_set():
            try:
                waiting.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def feed() -> None:
        try:
            for entry in entries:
                if stopped.is_set():
                    return
                put((entry, pool.submit(load, entry)))
            put(_End())
        except BaseException as error:
            put(_End(error))

    threading.Thread(target=feed, daemon=True, name="entries").start()
    try:
        end = None
        while end is None:
            batch, end = _next_batch(waiting, size, linger)
            if batch:
                yield [(entry, future.result()) for entry, future in _taken(batch)]
        if end.error is not None:
            raise end.error
    finally:
        stopped.set()
        pool.shutdown(wait=False, cancel_futures=True)


def _next_batch(waiting: queue.Queue[_Queued | _End], size: int, linger: float) -> tuple[deque[_Queued], _End | None]:
    """The next entries, once there are ``size`` of them or the first has waited ``linger`` seconds."""
    batch: deque[_Queued] = deque()
    deadline = math.inf
    while len(batch) < size:
        try:
            item = waiting.get(timeout=None if deadline == math.inf else max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            break
        if isinstance(item, _End):
            return batch, item
        if not batch:
            deadline = time.monotonic() + linger
        batch.append(item)
    return batch, None
