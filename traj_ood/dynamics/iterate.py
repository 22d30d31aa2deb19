"""iterate, the fixed-point engine: turns a stream of starts into trajectories, in order, and measures every point.

Equation (3) of the paper: z_{t+1} = f(z_t) with f = E∘D, stopped per sample at ‖f(z_{t+1}) − f(z_t)‖² < tol (App. D:
squared, 1e-5 for foundation models) or after ``max_steps`` (500 there).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar, overload

import torch
from torch import Tensor

from traj_ood.dynamics.batch_record import BatchRecord
from traj_ood.dynamics.chunks import ROWS, kind
from traj_ood.dynamics.device import standard_settings
from traj_ood.dynamics.fixed_function import fixed_around
from traj_ood.dynamics.host import to_device, to_host, where
from traj_ood.dynamics.maps import LowPrecision, Maps, SelfMap
from traj_ood.dynamics.observers import Observer
from traj_ood.dynamics.trajectory import Status, Trajectory, check_stopping
from traj_ood.dynamics.workers import single_threaded
from traj_ood.errors import TrajOODError, check_whole

_IN_PROGRESS = 192  # samples iterated at a time: full chunks for any network, and few idle rows beside the last samples
_LONG_STEP = 0.25  # seconds a step from which on no further chunk is taken in, as it would only delay the first results
_IDLE_SHARE = 32  # one in so many rows may be idle before new starts are taken in
_MAX_BATCHES, _MAX_BEHIND = 4, 4  # unfinished batches, and unfinished samples as a multiple of those in progress
_MUCH = 2**22  # bytes of points that observers beside f measure at a time: searches for few points wait for memory
_LOOK = 8  # steps on an accelerator between two reads: wastes 2 % of a path of 186 steps, and waits an eighth as often
_END: Any = object()


@overload
def iterate(
    self_map: SelfMap,
    start: Tensor,
    *,
    tol: float = ...,
    max_steps: int = ...,
    observers: Iterable[Observer] = ...,
    chunk: int = ...,
    on_step: Callable[[int, int], None] | None = ...,
    low_precision: LowPrecision | None = ...,
    look: int | None = ...,
) -> Trajectory: ...
@overload
def iterate(
    self_map: SelfMap,
    start: Iterable[Tensor],
    *,
    tol: float = ...,
    max_steps: int = ...,
    observers: Iterable[Observer] = ...,
    chunk: int = ...,
    on_step: Callable[[int, int], None] | None = ...,
    low_precision: LowPrecision | None = ...,
    look: int | None = ...,
) -> Iterator[Trajectory]: ...
def iterate(
    self_map: SelfMap,
    start: Tensor | Iterable[Tensor],
    *,
    tol: float = 1e-5,
    max_steps: int = 500,
    observers: Iterable[Observer] = (),
    chunk: int = ROWS,
    on_step: Callable[[int, int], None] | None = None,
    low_precision: LowPrecision | None = None,
    look: int | None = None,
) -> Trajectory | Iterator[Trajectory]:
    """Iterate z_{t+1} = f(z_t) for every sample of ``start`` until it converges.

    >>> path = iterate(lambda z: 0.5 * z, torch.tensor([[8.0, 0.0], [1.0, 0.0]]))
    >>> path.steps.tolist(), path.converged.tolist()
    ([12, 9], [True, True])
    >>> path.residuals[1, :3].tolist()
    [0.25, 0.0625, 0.015625]

    About 192 samples are iterated at a time, fewer if a step of these takes longer than a quarter of a second, but at
    least a chunk. Whenever some have ended, the next starts take their rows, across the batches of the stream, so that
    few rows of f are padding.

    No result depends on other samples, their order or the batch size beyond 1e-9, for three reasons: each sample stops
    on its own residual; converged and non-finite samples are removed at once; and f is always called on exactly
    ``chunk`` rows (a short last chunk is padded with copies of its last row), because float32 products of another shape
    differ by 1e-7, so that a residual near the tolerance might stop one step earlier or later. Only a model of which it
    is known that fewer rows change no bit (``FixedFunction.equal_rows``) is called on fewer.

    Args:
        self_map: f, called on (chunk, *L) under ``torch.inference_mode`` and
            :func:`traj_ood.dynamics.device.standard_settings`. If it is a method of a model, such as
            ``autoencoder.self_map``, the model is put into evaluation mode meanwhile; for any other function that is up
            to you.
        start: z_0, (B, *L) floating point, on the device of f; or a stream of such batches that differ only in B. The
            stream is read only as far as needed: at most four batches are unfinished, or they hold fewer than 1,000
            samples.
        tol: tolerance on the squared residual. Default 1e-5, the paper's for foundation models.
        max_steps: maximum number of evaluations of f per sample. Default 500, the paper's.
        observers: measure every point z_0 … z_N; memory grows by one number per point and observer.
        chunk: rows per call of f. Default 24. Each :class:`Autoencoder` has a suitable number.
        on_step: called as ``on_step(step, running)`` after each evaluation, for progress bars: the largest number of
            steps of any sample in progress, and the number of samples read that have not ended.
        low_precision: cheaper first steps, see :class:`LowPrecision`. Default None: f alone. In a step that uses both
            maps each pads its own last chunk, so a gain needs batches of several chunks.
        look: steps between two reads of the device's results by the host. Samples that have ended in between run on;
            their surplus points are dropped before observers see them, so results do not depend on it. Memory grows
            with it. Default: 1 on the CPU, where reading is free, and 8 on an accelerator, which otherwise waits for
            the host in every step.
    Returns:
        The :class:`Trajectory`, or for a stream an iterator over one per batch, in order. The stopping test needs two
        consecutive images of f, so N >= 2 unless max_steps = 1.
    Raises:
        TrajOODError: impossible arguments, or a self-map that changes the latent's shape or type.
    """
    observers = list(observers)
    _check_settings(tol, max_steps, chunk, look, observers)
    maps = Maps(self_map, low_precision, chunk)
    engine = _Engine(maps, tol, max_steps, observers, on_step, chunk, look)
    if not isinstance(start, Iterable):
        raise TrajOODError(f"start: expected latents (B, *L) or a stream of them, got {type(start).__name__}")
    if isinstance(start, Tensor):
        return next(_trajectories(engine, self_map, iter([start])))
    return _trajectories(engine, self_map, iter(start))


def _trajectories(engine: _Engine, self_map: SelfMap, starts: Iterator[Tensor]) -> Iterator[Trajectory]:
    """Run the engine on a stream of starts, and yield the trajectories of each batch in order."""
    # Only f runs in its settings, not the code that makes the starts or the caller's code between two trajectories.
    while True:
        while engine.wants_starts():
            start = next(starts, _END)
            if start is _END:
                engine.close()
            else:
                with standard_settings():  # the default device may be another than the CPU
                    engine.add(start)
        with fixed_around(self_map), torch.inference_mode(), engine.threads():
            engine.advance()
        with standard_settings():
            finished = list(engine.finished())
        yield from finished
        if engine.is_over():
            return


@dataclass
class _Running:
    """The samples in progress: numbers, steps made, points (n, *L), and the state that :class:`LowPrecision` needs."""

    rows: Tensor
    steps: Tensor
    latents: Tensor
    cheap: Tensor
    best: Tensor
    best_step: Tensor

    @classmethod
    def begin(cls, first: int, latents: Tensor, cheap: bool) -> _Running:
        count = len(latents)
        zeros = torch.zeros(count, dtype=torch.int64)
        best = torch.full((count,), torch.inf, dtype=torch.float64)
        return cls(first + torch.arange(count), zeros, latents, torch.full((count,), cheap), best, zeros.clone())

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, keep: Tensor, latents: Tensor | None = None) -> _Running:
        """The samples of ``keep`` (n,) bool, with new ``latents`` if given; self if these are all."""
        if bool(keep.all()):
            return self if latents is None else replace(self, latents=latents)
        latents = _rows_of(self.latents, keep) if latents is None else latents
        return _Running(
            self.rows[keep], self.steps[keep], latents, self.cheap[keep], self.best[keep], self.best_step[keep]
        )


@dataclass(frozen=True)
class _Points:
    """n points of trajectories: numbers and steps of the samples on the CPU, and latents (n, *L)."""

    rows: Tensor
    steps: Tensor
    latents: Tensor


_Samples = TypeVar("_Samples", _Running, _Points)


def _joined(parts: list[_Samples]) -> _Samples:
    if len(parts) == 1:
        return parts[0]
    return type(parts[0])(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(parts[0])))


class _Engine:
    """The state of the engine: samples in progress, waiting starts, and their batches, the oldest first.

    While :meth:`wants_starts`, its caller gives it batches (:meth:`add`) or ends the stream (:meth:`close`); then
    :meth:`advance` makes steps, and :meth:`finished` returns the trajectories of batches that have ended. Each row of f
    that a sample no longer needs is given to the next waiting start, of whatever batch.

    Args:
        maps, tol, max_steps, observers, on_step, chunk, look: see :func:`iterate`.
    """

    def __init__(
        self,
        maps: Maps,
        tol: float,
        max_steps: int,
        observers: list[Observer],
        on_step: Callable[[int, int], None] | None,
        chunk: int,
        look: int | None,
    ) -> None:
        self._maps, self._tol, self._max_steps, self._observers = maps, tol, max_steps, observers
        is_beside = [maps.is_side_by_side and getattr(observer, "beside", False) for observer in observers]
        self._beside = [observer for observer, beside in zip(observers, is_beside, strict=True) if beside]
        self._at_once = [observer for observer, beside in zip(observers, is_beside, strict=True) if not beside]
        self._on_step, self._look = on_step, look
        self._room = chunk  # number of samples in progress at a time, doubled while steps are short
        self._most_room = max(chunk, _IN_PROGRESS // chunk * chunk)
        self._batches: deque[BatchRecord] = deque()
        self._running: _Running | None = None
        self._waiting: _Running | None = None
        self._silent: set[str] = set()  # observers that return None
        self._shown: list[_Points] = []  # points that observers with ``beside`` have not measured yet
        self._unread: list[tuple[str, _Points, Tensor]] = []  # measures that have not been read yet, and their points
        self._count, self._closed = 0, False
        self._looks, self._complete = 0, 0  # number of reads, and of the last one with which all measures were known

    def threads(self) -> AbstractContextManager[Any]:
        """The context for :meth:`advance`."""
        return single_threaded() if self._maps.is_side_by_side else nullcontext()

    def wants_starts(self) -> bool:
        """Whether to read the next batch: there are free rows, no waiting starts, and the stream has not ended.

        Nothing is read while many finished samples wait for a slow one, because they stay in memory until it ends.
        """
        behind = self._count - self._batches[0].first + len(self._batches) if self._batches else 0
        if len(self._batches) >= _MAX_BATCHES and behind >= _MAX_BEHIND * self._room:
            return False
        return not self._closed and self._has_room() and not self._waiting

    def close(self) -> None:
        """Record that the stream has ended."""
        self._closed = True

    def add(self, start: Any) -> None:
        """Take in the next batch."""
        known = self._running or self._waiting
        _check_start(start, known.latents if known else None)
        batch = BatchRecord(self._count, start)
        self._count += len(start)
        self._batches.append(batch)
        finite = to_host([start.flatten(1).norm(dim=1)])[0].isfinite()
        batch.status[~finite] = int(Status.NON_FINITE)
        batch.left, batch.ended = int(finite.sum()), self._looks
        if self._look is None:
            self._look = 1 if start.device.type == "cpu" else _LOOK
        # A copy, because the caller may reuse the buffer for the next batch.
        self._waiting = _Running.begin(batch.first, start.detach().clone(), self._maps.has_cheap).take(finite)

    def advance(self) -> None:
        """Make steps until the oldest batch has ended or starts are needed."""
        while not self.wants_starts() and not self._has_ended():
            self._fill_rows()
            if not self._running:
                self._measure_shown()
                self._read([])
                return
            self._step(self._running)

    def finished(self) -> Iterator[Trajectory]:
        """Yield the trajectories of the oldest batches whose samples have all ended."""
        while self._has_ended():
            names = [o.name for o in self._observers if o.name not in self._silent]
            yield self._batches.popleft().trajectory(self._max_steps, names)

    def is_over(self) -> bool:
        return self._closed and not self._batches

    def _has_ended(self) -> bool:
        """Whether all samples of the oldest batch have ended and their measures have been read."""
        if not self._batches or self._batches[0].left:
            return False
        return not (self._shown or self._unread) or self._batches[0].ended < self._complete

    def _has_room(self) -> bool:
        return self._room - len(self._running or ()) >= max(1, self._room // _IDLE_SHARE)

    def _fill_rows(self) -> None:
        """Give free rows to waiting starts."""
        if not self._waiting or not self._has_room():
            return
        chosen = torch.arange(len(self._waiting)) < self._room - len(self._running or ())
        new, self._waiting = self._waiting.take(chosen), self._waiting.take(~chosen)
        self._observe([_Points(new.rows, new.steps, new.latents)])
        self._running = _joined([self._running, new]) if self._running else new

    def _step(self, before: _Running) -> None:
        """Make some steps of the samples in progress, and read the results once."""
        assert self._look is not None
        length = min(self._look, self._max_steps - int(before.steps.min()))
        is_due = not self._batches[0].left or sum(points.latents.nbytes for points in self._shown) >= _MUCH
        beside = self._measure_shown if is_due else None
        began = time.perf_counter()
        points, lengths = self._maps.advance(before.latents, before.cheap, length, beside)
        moved, norms = self._read([lengths])[0]
        if time.perf_counter() - began < _LONG_STEP * length:
            self._room = min(2 * self._room, self._most_room)
        # A NaN or infinite coordinate, or a norm that overflows, ends the trajectory at the previous point.
        self._record(before, points, torch.where(norms.isfinite(), moved.square(), torch.nan), norms)

    def _record(self, before: _Running, points: list[Tensor], squared: Tensor, norms: Tensor) -> None:
        """Record the steps of each sample up to its end, or to its switch from the cheap map to f; later points are
        dropped.

        Args:
            before: the n samples before the steps.
            points: their points before the first step and after each.
            squared: (steps, n) float64 squared residuals ‖f(z) − z‖²; NaN where f(z) is not finite.
            norms: (steps, n) float64 ‖f(z)‖.
        """
        count, exact = len(before), ~before.cheap
        now = replace(before, steps=before.steps.clone(), cheap=before.cheap.clone())
        active, places = torch.ones(count, dtype=torch.bool), torch.zeros(count, dtype=torch.int64)
        outcomes = torch.full((count,), -1)  # the Status of samples that have ended, −1 for the others
        shown = []
        for step in range(len(squared)):
            finite = squared[step].isfinite()
            outcomes[active & ~finite & exact] = int(Status.NON_FINITE)
            now.cheap[active & ~finite] = False  # an overflow of the cheap map does not end a trajectory: f decides
            active &= finite
            now.steps += active
            places[active] = step + 1
            for batch, inside, rows in self._parts(before.rows[active]):
                batch.residuals.put(rows, now.steps[active][inside] - 1, squared[step, active][inside])
            shown.append(_Points(before.rows[active], now.steps[active], _rows_of(points[step + 1], active)))
            # The stopping test compares two images of f, so it does not apply to the first residual ‖f(z_0) − z_0‖².
            # After cheap steps z_t is an image of f up to rounding, and the test is whether f moves it.
            settled = active & (squared[step] < self._tol) & exact & (now.steps > 1)
            limited = active & ~settled & (now.steps >= self._max_steps)
            outcomes[settled], outcomes[limited] = int(Status.CONVERGED), int(Status.STEP_LIMIT)
            cheap = active & ~exact
            if bool(cheap.any()):
                best, best_step = now.best[cheap], now.best_step[cheap]
                now.cheap[cheap] = self._maps.stays(
                    squared[step, cheap], norms[step, cheap], now.steps[cheap], best, best_step
                )
                now.best[cheap], now.best_step[cheap] = best, best_step
            if self._on_step is not None:
                going = int((outcomes < 0).sum()) + len(self._waiting or ())
                self._on_step(int(now.steps[active].max()) if bool(active.any()) else 0, going)
            active &= (outcomes < 0) & (now.cheap | exact)
            if not bool(active.any()):
                break
        self._observe(shown)
        self._end(before.rows, now.steps, outcomes, points, places)
        kept = outcomes < 0
        self._running = now.take(kept, _reached(points, places, kept))

    def _observe(self, shown: list[_Points]) -> None:
        """Call the observers, those with ``beside`` during a later step; results are read with the next residuals, or
        at once if reading is free."""
        shown = [points for points in shown if len(points.rows)]
        if not shown or not self._observers:
            return
        if self._beside:
            self._shown += shown
        if self._at_once:
            points = _joined(shown)
            for observer in self._at_once:
                self._measure(observer, points)
        if self._look == 1:
            self._read([])

    def _measure_shown(self) -> None:
        if self._shown:
            points, self._shown = _joined(self._shown), []
            for observer in self._beside:
                self._measure(observer, points)

    def _measure(self, observer: Observer, points: _Points) -> None:
        values = observer.observe(points.steps, points.rows, points.latents)
        if values is None:
            self._silent.add(observer.name)
            return
        if not isinstance(values, Tensor) or values.shape != points.rows.shape:
            got = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
            raise TrajOODError(
                f"observer {observer.name}: expected None or a tensor of one number for each of "
                f"{len(points.rows)} samples, got {got}"
            )
        self._unread.append((observer.name, _Points(points.rows, points.steps, points.latents[:0]), values))

    def _read(self, values: list[Tensor]) -> list[Tensor]:
        """Read values as float64 copies on the CPU, and with them all pending measures of observers."""
        unread, self._unread = self._unread, []
        self._looks += 1
        if not self._shown:
            self._complete = self._looks
        if not values and not unread:
            return []
        found = to_host([*values, *(measured for _, _, measured in unread)])
        for (name, points, _), measured in zip(unread, found[len(values) :], strict=True):
            for batch, inside, rows in self._parts(points.rows):
                batch.measure(name).put(rows, points.steps[inside], measured[inside])
        return found[: len(values)]

    def _end(self, rows: Tensor, steps: Tensor, outcomes: Tensor, points: list[Tensor], places: Tensor) -> None:
        ended = outcomes >= 0
        if not bool(ended.any()):
            return
        final = _reached(points, places, ended)
        for batch, inside, own in self._parts(rows[ended]):
            batch.left -= len(own)
            batch.ended = self._looks
            batch.status[own] = outcomes[ended][inside]
            batch.steps[own] = steps[ended][inside]
            device = batch.final.device
            batch.final[to_device(own, device)] = _rows_of(final, inside)

    def _parts(self, rows: Tensor) -> Iterator[tuple[BatchRecord, Tensor, Tensor]]:
        """Each batch that contains some of ``rows`` (n,), the mask (n,) bool of these, and their indices in it."""
        for batch in self._batches:
            inside = (rows >= batch.first) & (rows < batch.end)
            if bool(inside.any()):
                yield batch, inside, rows[inside] - batch.first


def _rows_of(latents: Tensor, keep: Tensor) -> Tensor:
    """The rows of ``keep`` (n,) bool on the CPU; ``latents`` itself if these are all, as in most steps."""
    return latents if bool(keep.all()) else latents[where(keep, latents.device)]


def _reached(points: list[Tensor], places: Tensor, keep: Tensor) -> Tensor:
    """For each sample of ``keep`` (n,) bool its point at step ``places`` (n,), (K, *L); ``points`` has one tensor per
    step."""
    if bool((places[keep] == len(points) - 1).all()):
        return _rows_of(points[-1], keep)
    out = points[0].new_empty((int(keep.sum()), *points[0].shape[1:]))
    for place in places[keep].unique().tolist():
        there = places == place
        out[where(there[keep], out.device)] = _rows_of(points[place], keep & there)
    return out


def _check_start(start: Tensor, before: Tensor | None) -> None:
    # Shorter types cannot resolve steps near the tolerance.
    if not isinstance(start, Tensor) or start.ndim < 2 or start.dtype not in (torch.float32, torch.float64):
        got = f"{start.dtype} of shape {tuple(start.shape)}" if isinstance(start, Tensor) else type(start).__name__
        raise TrajOODError(f"start: expected latents of float32 or float64 and shape (B, *L), got {got}")
    if before is not None and kind(start) != kind(before):
        raise TrajOODError(
            f"start: expected batches of one shape, type and device, got {kind(before)} and then {kind(start)}"
        )


def _check_settings(tol: float, max_steps: int, chunk: int, look: int | None, observers: list[Observer]) -> None:
    check_stopping(tol, max_steps)
    check_whole("chunk", chunk, unit="row")
    if look is not None:
        check_whole("look", look, unit="step")
    if not all(isinstance(observer, Observer) for observer in observers):
        raise TrajOODError(f"observers: expected objects with a name and a method observe, got {observers}")
    names = [observer.name for observer in observers]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise TrajOODError(f"observers: expected different names, got {twice!r} twice: rename one of the two")
