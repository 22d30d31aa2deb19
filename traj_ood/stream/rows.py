"""From paths to rows: images are read ahead by threads, judged batch by batch, and come out in the order they came in.

Where batches end follows the speed of the input, so nothing in a row may depend on it; that rows do not is the
detector's promise, and tested.
"""

from __future__ import annotations

import hashlib
import math
import queue
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from traj_ood.autoencoders import Autoencoder
from traj_ood.data.contents import hash_file, stamp
from traj_ood.data.decoding import Reading, open_bytes, open_image
from traj_ood.detector.decision import ERROR, OOD, Decision, decide_all, reason_of
from traj_ood.errors import TrajOODError
from traj_ood.stream.paths import Entry
from traj_ood.text import one_line

if TYPE_CHECKING:
    from traj_ood.detector import Detector

_LINGER_SECONDS = 1.0  # that a batch waits for more when the input is slow, say a folder that another program fills
_LATENT_BYTES = 2**27
_MAX_BATCH = 512
_DIGITS = 16


@dataclass(frozen=True)
class Row:
    """What is said of one image; None is what does not apply.

    Attributes:
        path: as it was given; bytes that are not UTF-8 stand as lone surrogates.
        score, p_value, decision, steps, status, error: of :class:`traj_ood.Decision`.
        content: the first 16 hex digits of the SHA-256 of the file that was judged; None where none could be read. By
            it ``--resume`` knows a file that has changed since.
        reason: ``ok``, ``ood``, ``invalid: …`` or ``uncalibrated``; by default, and in every table, the one that
            follows from the others.
    """

    path: str
    score: float | None = None
    p_value: float | None = None
    decision: str | None = None
    steps: int | None = None
    status: str = ERROR
    error: str | None = None
    content: str | None = None
    reason: str = ""

    def __post_init__(self) -> None:
        if not self.reason:
            object.__setattr__(self, "reason", reason_of(self.score, self.decision, self.error))

    @classmethod
    def of(cls, path: str, said: Decision, content: str | None = None) -> Row:
        """The row of an image."""
        error = None if said.error is None else _line(said.error, "")
        return cls(path, said.score, said.p_value, said.decision, said.steps, said.status, error, content)


COLUMNS = tuple(field.name for field in fields(Row))


@dataclass(frozen=True)
class Tally:
    """Rows counted: all, those with an error, and those whose decision is ``ood``."""

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
    """The prepared image (C, H, W), or the error in one line; and the ``content`` of its row."""

    image: Tensor | str
    content: str | None = None


_Queued = tuple[Entry, "Future[_Loaded]"]


def content_of(digest: str) -> str | None:
    """The ``content`` of a row, from a SHA-256 in hex or :data:`traj_ood.data.contents.ABSENT`."""
    return digest[:_DIGITS] or None


def default_batch_size(model: Autoencoder) -> int:
    """Images judged at a time: whole chunks of the model, at most 512 images and 128 MiB of latents."""
    latent = model.encode(torch.zeros(1, *model.input_shape))
    most = min(_MAX_BATCH, _LATENT_BYTES // (4 * max(latent.numel(), math.prod(model.input_shape))))
    return max(1, most // model.chunk) * model.chunk


def score_rows(
    detector: Detector,
    entries: Iterable[Entry],
    *,
    batch_size: int | None = None,
    workers: int = 2,
    linger: float = _LINGER_SECONDS,
) -> Generator[list[Row], None, None]:
    """One row per entry, in order, as lists of one batch each; an image that fails has a row that says why.

    At most 2 · ``batch_size`` + ``workers`` images are in memory, as tensors, whatever the number of entries. Close the
    iterator (or exhaust it) to end its threads.

    Args:
        detector: its ``autoencoder.transform`` prepares images, its ``judge`` judges them.
        entries: consumed in a thread of their own, so they may come slowly and without end.
        batch_size: most images at a time; changes memory and speed, no row. Default: :func:`default_batch_size`.
        workers: threads that read images.
        linger: seconds that an unfinished batch waits for more entries. Default 1: rows of a slow input come soon, and
            an input faster than that always fills its batches.
    Raises:
        TrajOODError: impossible arguments, entries that end in an error, or too little memory for a batch.
    """
    size = default_batch_size(detector.autoencoder) if batch_size is None else batch_size
    for name, value in (("batch size", size), ("workers", workers)):
        if value < 1:
            raise TrajOODError(f"{name}: expected at least 1, got {value}")

    def load(entry: Entry) -> _Loaded:
        return _load(entry, detector.autoencoder.transform, detector.reading)

    for batch in _read_ahead(entries, load, size, workers, linger):
        rows = _judge(detector, batch)
        del batch  # its images, while the next ones are read
        yield rows


def judge_entries(detector: Detector, entries: Iterable[Entry]) -> list[Row]:
    """One row per entry, in order, of one batch that is read and judged here, as :func:`score_rows` does it.

    Raises:
        TrajOODError: too little memory.
    """
    transform, reading = detector.autoencoder.transform, detector.reading
    return _judge(detector, [(entry, _load(entry, transform, reading)) for entry in entries])


def _load(entry: Entry, transform: Callable[..., Tensor], reading: Reading) -> _Loaded:
    if entry.error:
        return _Loaded(_line(entry.error, entry.path))
    if entry.content is not None:
        return _Loaded(_prepare(entry, transform, reading), content_of(hashlib.sha256(entry.content).hexdigest()))
    before = stamp(entry.path)
    image = _prepare(entry, transform, reading)
    content = content_of(hash_file(entry.path))  # its second read comes from memory
    if stamp(entry.path) != before:
        return _Loaded("the file changed while it was being read; judge it again")
    return _Loaded(image, content)


def _prepare(entry: Entry, transform: Callable[..., Tensor], reading: Reading) -> Tensor | str:
    """The prepared image, or the error in one line, without the path that the row names already."""
    path, content = entry.path, entry.content
    try:
        image = open_image(Path(path), reading) if content is None else open_bytes(content, path, reading)
    except TrajOODError as error:
        return _line(str(error), path)
    try:
        return transform(image)
    except Exception as error:  # a transform may be anybody's, and the images of a stream too
        return _line(f"the model's transform failed on {image.width} x {image.height} pixels: {error!r}", path)


def _judge(detector: Detector, batch: list[tuple[Entry, _Loaded]]) -> list[Row]:
    """One row for each of a batch."""
    images = [loaded.image for _, loaded in batch if isinstance(loaded.image, Tensor)]
    judged = iter(_judge_images(detector, images))
    rows = []
    for entry, loaded in batch:
        said = Decision(error=loaded.image) if isinstance(loaded.image, str) else next(judged)
        rows.append(Row.of(entry.path, said, loaded.content))
    return rows


def _judge_images(detector: Detector, images: list[Tensor]) -> list[Decision]:
    """What the detector says of each.

    Raises:
        TrajOODError: too little memory.
    """
    try:
        return decide_all(partial(detector.judge, whole_chunks=True), images)
    except (MemoryError, RuntimeError) as error:
        # On the CPU torch has no class of its own for it.
        if isinstance(error, RuntimeError) and not re.search("out of memory|can't allocate memory", str(error)):
            raise
        raise TrajOODError(f"out of memory while judging {len(images)} images: give a smaller --batch-size") from error


def _line(text: str, path: str) -> str:
    return one_line(text).removeprefix(one_line(f"{Path(path)}:")).strip()  # errors name it as one_line writes it


def _taken(batch: deque[_Queued]) -> Iterator[_Queued]:
    """What is in ``batch``, and is not in it any more: a generator that waits must hold no images."""
    while batch:
        yield batch.popleft()


class _End:
    """Stands in the queue after the last entry."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


def _read_ahead(
    entries: Iterable[Entry], load: Callable[[Entry], _Loaded], size: int, workers: int, linger: float
) -> Iterator[list[tuple[Entry, _Loaded]]]:
    """Batches of up to ``size`` entries with what ``load`` made of them, in order.

    A thread of its own reads the entries, since standard input may block for ever, and hands them to the pool; the
    bounded queue behind it is what holds it back.
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
    """The next entries, as soon as there are ``size`` of them or the first has waited for ``linger`` seconds."""
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
