"""The fixed-point engine: a stream of starts in, finished trajectories out in order, every point shown to observers.

Equation (3) of the paper: z_{t+1} = f(z_t) with f = E∘D, stopped per sample at ‖f(z_{t+1}) − f(z_t)‖² < tol (App. D,
squared, 1e-5 for foundation models) or after ``max_steps`` (500 there).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, overload

import torch
from torch import Tensor

from traj_ood.dynamics.chunks import ROWS, kind
from traj_ood.dynamics.fixed_function import fixed_around
from traj_ood.dynamics.host import to_device, to_host, where
from traj_ood.dynamics.maps import LowPrecision, Maps, SelfMap
from traj_ood.dynamics.trajectory import Status, Trajectory
from traj_ood.errors import TrajOODError

_UNDER_WAY = 192  # samples at a time: full chunks for any network, and few idle rows beside the slow ones at the end
_SPARE = 32  # one row in so many may be idle before starts are taken in
_MOST_BATCHES, _MOST_BEHIND = 4, 4  # unfinished at a time: batches, and samples as multiples of those under way
_LOOK = 8  # steps of an accelerator between two looks: 2 % of a path of 186 steps in vain, an eighth of the waiting
_END: Any = object()


class Observer(Protocol):
    """Sees each point of each trajectory once, while it exists, and keeps one number of it.

    ``name`` is the key in :attr:`Trajectory.measures`; an observer that answers None leaves no measure.
    """

    name: str

    def observe(self, steps: Tensor, rows: Tensor, latents: Tensor) -> Tensor | None:
        """Measure a point z_t of each of n samples.

        Args:
            steps: (n,) int64, each sample's own t. rows: (n,) int64, the samples' numbers, counted over all starts.
            latents: (n, *L) the points.
        Returns:
            (n,) numbers, on the CPU or where the latents are, or None.
        """
        ...


class Norm:
    """‖z_t‖ at every point (Fig. 12b): bounded norms mean that the trajectory does not diverge."""

    name = "norm"

    def observe(self, steps: Tensor, rows: Tensor, latents: Tensor) -> Tensor:
        return latents.flatten(1).norm(dim=1)


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
    """Run z_{t+1} = f(z_t) for every sample of ``start`` until it settles.

    About 192 samples are under way at a time; whenever some have ended, the next starts take their rows, over the
    borders of the stream's batches, so that hardly a row of f is spent on filling.

    No result depends on batch-mates, order or batch size beyond 1e-9. Three things see to that: each sample stops on
    its own residual; converged and non-finite samples leave at once; and f is only ever called on exactly ``chunk``
    rows (the last chunk is filled up with copies of its last row), because a float32 product of another shape rounds
    differently by 1e-7, and a residual next to the tolerance would then stop one step earlier or later.

    Args:
        self_map: f, called under ``torch.inference_mode`` on (chunk, *L), and under
            :func:`traj_ood.dynamics.device.standard_settings`. A method of a model, such as ``autoencoder.self_map``,
            also has that model in evaluation mode meanwhile; what a function of your own calls is yours to switch.
        start: z_0, (B, *L) floating point, on the device where f runs; or a stream of such batches, alike but for B,
            which is read no further than the samples under way need: the unfinished batches are at most four, or
            hold less than 1,000 samples.
        tol: on the squared residual. Default 1e-5, the paper's for foundation models.
        max_steps: most evaluations of f per sample. Default 500, the paper's.
        observers: measure every point z_0 … z_N; memory grows with one number per point, not with the latents.
        chunk: rows per call of f. Default 24. Each :class:`Autoencoder` knows a number that suits it.
        on_step: called as ``on_step(step, running)`` after each evaluation, for progress bars: the most steps that any
            sample under way has taken, and how many of those that were read have not ended.
        low_precision: cheaper first steps, see :class:`LowPrecision`. Default None: f alone. In a step in which both
            maps are at work each fills up its own last chunk, so the gain needs batches of several chunks.
        look: steps between two looks of the host at what the device has computed. In between, samples that have ended
            run on; the points that they had no need of are dropped, and observers never see them, so results do not
            depend on it. Points wait for a look, so memory grows with it. Default: 1 on the CPU, where looking costs
            nothing, 8 on an accelerator, which else waits for the host in every step.
    Returns:
        The :class:`Trajectory`, or one for each batch of the stream, in its order. The stopping test needs two
        consecutive images of f, so N >= 2 unless max_steps = 1.
    Raises:
        TrajOODError: impossible arguments, or a self-map that changes the latent's shape or type.
    """
    observers = list(observers)
    _check_settings(tol, max_steps, chunk, look, observers)
    maps = Maps(self_map, low_precision, chunk)
    flight = _Flight(maps, tol, max_steps, observers, on_step, max(chunk, _UNDER_WAY // chunk * chunk), look)
    if not isinstance(start, Iterable):
        raise TrajOODError(f"start: expected latents (B, *L) or a stream of them, got {type(start).__name__}")
    if isinstance(start, Tensor):
        return next(_trajectories(flight, self_map, iter([start])))
    return _trajectories(flight, self_map, iter(start))


def _trajectories(flight: _Flight, self_map: SelfMap, starts: Iterator[Tensor]) -> Iterator[Trajectory]:
    # Neither the caller's code between two trajectories nor that which makes the starts runs in f's settings.
    while True:
        while flight.wants_starts():
            start = next(starts, _END)
            if start is _END:
                flight.close()
            else:
                flight.add(start)
        with fixed_around(self_map), torch.inference_mode():
            flight.advance()
        yield from flight.finished()
        if flight.is_over():
            return


class _Batch:
    """What is known of the trajectories of one batch of starts; its first sample has the number ``first``."""

    def __init__(self, first: int, start: Tensor) -> None:
        count = len(start)
        self.first, self.end, self.left = first, first + count, count
        self.ended = 0  # the look at which the last of its samples was seen to have ended
        # Everything that decides lives on the CPU (MPS has no float64); only latents stay on the device.
        self.steps = torch.zeros(count, dtype=torch.int64)
        self.status = torch.full((count,), int(Status.STEP_LIMIT))
        self.final = start.detach().clone()
        self.residuals = _Table(count)
        self.measures: dict[str, _Table] = {}

    def measure(self, name: str) -> _Table:
        return self.measures.setdefault(name, _Table(len(self.steps)))

    def trajectory(self, max_steps: int, names: Iterable[str]) -> Trajectory:
        measures = {name: self.measure(name).values() for name in names}
        return Trajectory(self.steps, self.status, self.residuals.values(), self.final, measures, max_steps)


@dataclass
class _Running:
    """The samples under way: numbers, steps taken and points (n, *L), and what :class:`LowPrecision` knows of each."""

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
        """Those of ``keep`` (n,) bool, at ``latents`` if given; itself when that is all of them."""
        if bool(keep.all()):
            return self if latents is None else replace(self, latents=latents)
        latents = _rows_of(self.latents, keep) if latents is None else latents
        return _Running(
            self.rows[keep], self.steps[keep], latents, self.cheap[keep], self.best[keep], self.best_step[keep]
        )

    def with_more(self, other: _Running) -> _Running:
        return _Running(*(torch.cat([getattr(self, f.name), getattr(other, f.name)]) for f in fields(self)))


@dataclass(frozen=True)
class _Points:
    """Points of trajectories, n of them: the samples' numbers and steps on the CPU, and latents (n, *L)."""

    rows: Tensor
    steps: Tensor
    latents: Tensor


class _Flight:
    """The samples under way, the starts that wait for a row, and the batches they belong to, the oldest first."""

    def __init__(
        self,
        maps: Maps,
        tol: float,
        max_steps: int,
        observers: list[Observer],
        on_step: Callable[[int, int], None] | None,
        room: int,
        look: int | None,
    ) -> None:
        self._maps, self._tol, self._max_steps, self._observers = maps, tol, max_steps, observers
        self._on_step, self._room, self._look = on_step, room, look
        self._batches: deque[_Batch] = deque()
        self._running: _Running | None = None
        self._waiting: _Running | None = None
        self._silent: set[str] = set()  # observers that keep for themselves what they see
        self._unread: list[tuple[str, _Points, Tensor]] = []  # what observers measured, and where
        self._count, self._looks, self._closed = 0, 0, False

    def wants_starts(self) -> bool:
        """Whether rows are free that nothing waits for, and the stream may have more.

        Nothing is read while much waits for one slow sample: what was read before stays in memory until that ends.
        """
        behind = self._count - self._batches[0].first + len(self._batches) if self._batches else 0
        if len(self._batches) >= _MOST_BATCHES and behind >= _MOST_BEHIND * self._room:
            return False
        return not self._closed and self._has_room() and not self._waiting

    def close(self) -> None:
        """The stream has ended."""
        self._closed = True

    def add(self, start: Any) -> None:
        """The next batch."""
        known = self._running or self._waiting
        _check_start(start, known.latents if known else None)
        batch = _Batch(self._count, start)
        self._count += len(start)
        self._batches.append(batch)
        finite = to_host([start.flatten(1).norm(dim=1)])[0].isfinite()
        batch.status[~finite] = int(Status.NON_FINITE)
        batch.left, batch.ended = int(finite.sum()), self._looks
        if self._look is None:
            self._look = 1 if start.device.type == "cpu" else _LOOK
        # A copy: its owner may fill the same buffer again while the samples are under way.
        self._waiting = _Running.begin(batch.first, start.detach().clone(), self._maps.has_cheap).take(finite)

    def advance(self) -> None:
        """Steps until the oldest batch has ended or starts are wanted."""
        while not self.wants_starts() and not self._has_ended():
            self._board()
            if not self._running:
                self._read([])
                return
            self._fly(self._running)

    def finished(self) -> Iterator[Trajectory]:
        """The oldest batches, as far as all of their samples have ended."""
        while self._has_ended():
            names = [o.name for o in self._observers if o.name not in self._silent]
            yield self._batches.popleft().trajectory(self._max_steps, names)

    def is_over(self) -> bool:
        return self._closed and not self._batches

    def _has_ended(self) -> bool:
        """Whether all samples of the oldest batch have, and what was measured of them is known."""
        if not self._batches or self._batches[0].left:
            return False
        return not self._unread or self._batches[0].ended < self._looks

    def _has_room(self) -> bool:
        return self._room - len(self._running or ()) >= max(1, self._room // _SPARE)

    def _board(self) -> None:
        """Give free rows to starts that wait."""
        if not self._waiting or not self._has_room():
            return
        aboard = torch.arange(len(self._waiting)) < self._room - len(self._running or ())
        new, self._waiting = self._waiting.take(aboard), self._waiting.take(~aboard)
        self._observe([_Points(new.rows, new.steps, new.latents)])
        self._running = self._running.with_more(new) if self._running else new

    def _fly(self, before: _Running) -> None:
        """Some steps of the samples under way, and one look at them."""
        assert self._look is not None
        length = min(self._look, self._max_steps - int(before.steps.min()))
        points, lengths = self._maps.fly(before.latents, before.cheap, length)
        moved, norms = self._read([lengths])[0]
        # A NaN or infinite coordinate, or a length that overflows, ends the trajectory at the point before.
        self._land(before, points, torch.where(norms.isfinite(), moved.square(), torch.nan), norms)

    def _land(self, before: _Running, points: list[Tensor], squared: Tensor, norms: Tensor) -> None:
        """How far each sample has really come: until it ended, or the other of the two maps was to take over; the rest
        of its ``points`` is dropped. ``squared`` and ``norms`` are (steps, n)."""
        count, exact = len(before), ~before.cheap
        now = replace(before, steps=before.steps.clone(), cheap=before.cheap.clone())
        flying, places = torch.ones(count, dtype=torch.bool), torch.zeros(count, dtype=torch.int64)
        fates = torch.full((count,), -1)
        shown = []
        for step in range(len(squared)):
            finite = squared[step].isfinite()
            fates[flying & ~finite & exact] = int(Status.NON_FINITE)
            now.cheap[flying & ~finite] = False  # a smaller range of numbers must not end a trajectory: f decides
            flying &= finite
            now.steps += flying
            places[flying] = step + 1
            for batch, inside, rows in self._parts(before.rows[flying]):
                batch.residuals.put(rows, now.steps[flying][inside] - 1, squared[step, flying][inside])
            shown.append(_Points(before.rows[flying], now.steps[flying], _rows_of(points[step + 1], flying)))
            # ‖f(z_{t+1}) − f(z_t)‖² compares two images of f: the first residual ‖f(z_0) − z_0‖² is not one. After
            # cheap steps z_t is an image of f up to rounding, and what counts is that f itself no longer moves it.
            settled = flying & (squared[step] < self._tol) & exact & (now.steps > 1)
            limited = flying & ~settled & (now.steps >= self._max_steps)
            fates[settled], fates[limited] = int(Status.CONVERGED), int(Status.STEP_LIMIT)
            cheap = flying & ~exact
            if bool(cheap.any()):
                best, best_step = now.best[cheap], now.best_step[cheap]
                now.cheap[cheap] = self._maps.stays(
                    squared[step, cheap], norms[step, cheap], now.steps[cheap], best, best_step
                )
                now.best[cheap], now.best_step[cheap] = best, best_step
            if self._on_step is not None:
                going = int((fates < 0).sum()) + len(self._waiting or ())
                self._on_step(int(now.steps[flying].max()) if bool(flying.any()) else 0, going)
            flying &= (fates < 0) & (now.cheap | exact)
            if not bool(flying.any()):
                break
        self._observe(shown)
        self._end(before.rows, now.steps, fates, points, places)
        kept = fates < 0
        self._running = now.take(kept, _reached(points, places, kept))

    def _observe(self, shown: list[_Points]) -> None:
        """Show points to the observers; what they measure is read at the next look, or now where looking is free."""
        shown = [points for points in shown if len(points.rows)]
        if not shown or not self._observers:
            return
        points = shown[0]
        if len(shown) > 1:
            points = _Points(*(torch.cat([getattr(p, f.name) for p in shown]) for f in fields(_Points)))
        for observer in self._observers:
            values = observer.observe(points.steps, points.rows, points.latents)
            if values is None:
                self._silent.add(observer.name)
                continue
            if not isinstance(values, Tensor) or values.shape != points.rows.shape:
                got = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
                raise TrajOODError(
                    f"observer {observer.name}: expected None or a tensor of one number for each of "
                    f"{len(points.rows)} samples, got {got}"
                )
            where_to = _Points(points.rows, points.steps, points.latents[:0])
            self._unread.append((observer.name, where_to, values))
        if self._look == 1:
            self._read([])

    def _read(self, values: list[Tensor]) -> list[Tensor]:
        """Float64 copies on the CPU: a look, at which all that observers have measured comes, too."""
        unread, self._unread = self._unread, []
        self._looks += 1
        if not values and not unread:
            return []
        found = to_host([*values, *(measured for _, _, measured in unread)])
        for (name, points, _), measured in zip(unread, found[len(values) :], strict=True):
            for batch, inside, rows in self._parts(points.rows):
                batch.measure(name).put(rows, points.steps[inside], measured[inside])
        return found[: len(values)]

    def _end(self, rows: Tensor, steps: Tensor, fates: Tensor, points: list[Tensor], places: Tensor) -> None:
        ended = fates >= 0
        if not bool(ended.any()):
            return
        final = _reached(points, places, ended)
        for batch, inside, own in self._parts(rows[ended]):
            batch.left -= len(own)
            batch.ended = self._looks
            batch.status[own] = fates[ended][inside]
            batch.steps[own] = steps[ended][inside]
            device = batch.final.device
            batch.final[to_device(own, device)] = _rows_of(final, inside)

    def _parts(self, rows: Tensor) -> Iterator[tuple[_Batch, Tensor, Tensor]]:
        """Each batch that some of ``rows`` (n,) belong to, which of them (n,) bool, and their places in it."""
        for batch in self._batches:
            inside = (rows >= batch.first) & (rows < batch.end)
            if bool(inside.any()):
                yield batch, inside, rows[inside] - batch.first


class _Table:
    """One number per sample and step; NaN where a sample had already ended."""

    def __init__(self, count: int) -> None:
        self._values = torch.full((count, 1), torch.nan, dtype=torch.float64)
        self._width = 1

    def put(self, rows: Tensor, columns: Tensor, values: Tensor) -> None:
        self._width = max(self._width, int(columns.max()) + 1)
        missing = self._width - self._values.shape[1]
        if missing > 0:  # doubled: a path that grows step by step must not be copied at each of them
            more = self._values.new_full((len(self._values), max(missing, self._values.shape[1])), torch.nan)
            self._values = torch.cat([self._values, more], dim=1)
        self._values[rows, columns] = values

    def values(self) -> Tensor:
        return self._values[:, : self._width].clone()


def _rows_of(latents: Tensor, keep: Tensor) -> Tensor:
    """Those of ``keep`` (n,) bool on the CPU; itself when that is all of them, as it is in most steps."""
    return latents if bool(keep.all()) else latents[where(keep, latents.device)]


def _reached(points: list[Tensor], places: Tensor, keep: Tensor) -> Tensor:
    """(K, *L) of each sample of ``keep`` (n,) bool the point ``places`` (n,) says, among those of each step."""
    if bool((places[keep] == len(points) - 1).all()):
        return _rows_of(points[-1], keep)
    out = points[0].new_empty((int(keep.sum()), *points[0].shape[1:]))
    for place in places[keep].unique().tolist():
        there = places == place
        out[where(there[keep], out.device)] = _rows_of(points[place], keep & there)
    return out


def _check_start(start: Tensor, before: Tensor | None) -> None:
    if not isinstance(start, Tensor) or start.ndim < 2 or not start.is_floating_point():
        got = f"{start.dtype} of shape {tuple(start.shape)}" if isinstance(start, Tensor) else type(start).__name__
        raise TrajOODError(f"start: expected floating-point latents of shape (B, *L), got {got}")
    if before is not None and kind(start) != kind(before):
        raise TrajOODError(f"start: expected batches alike, got {kind(before)} and then {kind(start)}")


def _check_settings(tol: float, max_steps: int, chunk: int, look: int | None, observers: list[Observer]) -> None:
    if not isinstance(tol, int | float) or not 0 <= tol < math.inf:
        raise TrajOODError(f"tol: expected a finite squared residual >= 0, got {tol!r}")
    if not isinstance(max_steps, int) or max_steps < 1:
        raise TrajOODError(f"max_steps: expected a whole number of at least 1, got {max_steps!r}")
    if not isinstance(chunk, int) or chunk < 1:
        raise TrajOODError(f"chunk: expected a whole number of at least 1 row, got {chunk!r}")
    if look is not None and (not isinstance(look, int) or look < 1):
        raise TrajOODError(f"look: expected a whole number of at least 1 step, or None, got {look!r}")
    names = [observer.name for observer in observers]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise TrajOODError(f"observers: expected a name for each, got {twice!r} twice: rename one of the two")
