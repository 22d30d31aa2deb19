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

from traj_ood.dynamics.fixed_function import check_answer, fixed_around, name_around
from traj_ood.dynamics.trajectory import Status, Trajectory
from traj_ood.errors import TrajOODError

SelfMap = Callable[[Tensor], Tensor]
"""f: latents (n, *L) → latents (n, *L), each row on its own."""


ROWS = 24
"""Rows per call of a network that says nothing about itself (see :func:`rows_per_call`)."""
_UNDER_WAY = 192  # samples at a time: full chunks for any network, and few idle rows beside the slow ones at the end
_SPARE = 32  # one row in so many may be idle before starts are taken in
_MOST_BATCHES, _MOST_BEHIND = 4, 4  # unfinished at a time: batches, and samples as multiples of those under way
_END: Any = object()


def rows_per_call(target: float) -> int:
    """About ``target`` rows, such that a row's place among them does not change its rounding: 1, or 6, 12, 24, 48, 96.

    MKL's matrix products on processors without AVX-512 take six rows at a time and round what is left over otherwise:
    of 128 rows the last two, which a trajectory then amplifies to 1e-6 of f.
    """
    return 1 if target < 3 else 6 * 2 ** min(4, max(0, round(math.log2(target / 6))))


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
            (n,) numbers, or None.
        """
        ...


class Norm:
    """‖z_t‖ at every point (Fig. 12b): bounded norms mean that the trajectory does not diverge."""

    name = "norm"

    def observe(self, steps: Tensor, rows: Tensor, latents: Tensor) -> Tensor:
        return latents.flatten(1).norm(dim=1).cpu().double()


@dataclass(frozen=True)
class LowPrecision:
    """Cheap first steps: f in low precision far from the end, f itself ("polish") from there on, sample by sample.

    A sample starts with ``self_map`` and changes to f for good as soon as one of these holds: its squared residual is
    below (``switch`` · ‖z‖)², has not reached a new minimum for ``patience`` steps, or ``max_steps`` steps are done.
    No trajectory converges or becomes non-finite on a cheap image: f itself decides. Cheap points are points of the
    trajectory like all others (residuals, observers, ``steps``), so scores and numbers of steps change. On the bundled
    model, with one dictionary from fp32, tests/test_precision.py holds that as many converge and that the mean distance
    over horizon 16 stays within 6 % (median below 0.5 %). Over the own length single scores have no such bound: a path
    that lingers between attractors may leave at another step.

    Attributes:
        self_map: f, cheaper, such as :func:`traj_ood.dynamics.device.bfloat16_map` makes; same shapes and type as f.
        max_steps: most cheap steps. Default 250, half of the paper's 500, so that f has as many left. It does not
            follow the limit of one call of :func:`iterate`: z_t must be the same whatever comes after t. Choose it
            below that limit where the end points matter; else those that meet the limit may be cheap images.
        switch: relative length of a step. Default 2⁻⁸, bfloat16's rounding unit: the bundled model stalls at 2⁻⁹, one
            with ‖z‖ ≈ 400 at 2⁻¹⁰, so shorter steps say little about f.
        patience: Default 8: at the noise floor of a deeper model, above ``switch``, new minima soon become rare, while
            the residuals of a trajectory on its way seldom stay up that long. Where they do, f goes on: only slower.
    Raises:
        TrajOODError: impossible values.
    """

    self_map: SelfMap
    max_steps: int = 250
    switch: float = 2.0**-8
    patience: int = 8

    def __post_init__(self) -> None:
        for name in ("max_steps", "patience"):
            if getattr(self, name) < 1:
                raise TrajOODError(f"low precision: expected {name} of at least 1, got {getattr(self, name)}")
        if not self.switch >= 0:
            raise TrajOODError(f"low precision: expected a switch >= 0, got {self.switch}")


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
    Returns:
        The :class:`Trajectory`, or one for each batch of the stream, in its order. The stopping test needs two
        consecutive images of f, so N >= 2 unless max_steps = 1.
    Raises:
        TrajOODError: impossible arguments, or a self-map that changes the latent's shape or type.
    """
    observers = list(observers)
    _check_settings(tol, max_steps, chunk, observers)
    maps = _Maps(self_map, low_precision, chunk)
    flight = _Flight(maps, tol, max_steps, observers, on_step, max(chunk, _UNDER_WAY // chunk * chunk))
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

    def take(self, keep: Tensor) -> _Running:
        """Those of ``keep`` (n,) bool; itself when that is all of them, as it is in most steps."""
        if bool(keep.all()):
            return self
        latents = self.latents[keep.to(self.latents.device)]
        return _Running(
            self.rows[keep], self.steps[keep], latents, self.cheap[keep], self.best[keep], self.best_step[keep]
        )

    def with_more(self, other: _Running) -> _Running:
        return _Running(*(torch.cat([getattr(self, f.name), getattr(other, f.name)]) for f in fields(self)))


class _Flight:
    """The samples under way, the starts that wait for a row, and the batches they belong to, the oldest first."""

    def __init__(
        self,
        maps: _Maps,
        tol: float,
        max_steps: int,
        observers: list[Observer],
        on_step: Callable[[int, int], None] | None,
        room: int,
    ) -> None:
        self._maps, self._tol, self._max_steps, self._observers = maps, tol, max_steps, observers
        self._on_step, self._room = on_step, room
        self._batches: deque[_Batch] = deque()
        self._running: _Running | None = None
        self._waiting: _Running | None = None
        self._silent: set[str] = set()  # observers that keep for themselves what they see
        self._count, self._closed = 0, False

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
        finite = _finite_rows(start)
        batch.status[~finite] = int(Status.NON_FINITE)
        batch.left = int(finite.sum())
        # A copy: its owner may fill the same buffer again while the samples are under way.
        self._waiting = _Running.begin(batch.first, start.detach().clone(), self._maps.has_cheap).take(finite)

    def advance(self) -> None:
        """Steps until the oldest batch has ended or starts are wanted."""
        while not self.wants_starts() and not (self._batches and not self._batches[0].left):
            self._board()
            if not self._running:
                return
            self._step()

    def finished(self) -> Iterator[Trajectory]:
        """The oldest batches, as far as all of their samples have ended."""
        while self._batches and not self._batches[0].left:
            names = [o.name for o in self._observers if o.name not in self._silent]
            yield self._batches.popleft().trajectory(self._max_steps, names)

    def is_over(self) -> bool:
        return self._closed and not self._batches

    def _has_room(self) -> bool:
        return self._room - len(self._running or ()) >= max(1, self._room // _SPARE)

    def _board(self) -> None:
        """Give free rows to starts that wait."""
        if not self._waiting or not self._has_room():
            return
        aboard = torch.arange(len(self._waiting)) < self._room - len(self._running or ())
        new, self._waiting = self._waiting.take(aboard), self._waiting.take(~aboard)
        self._observe(new)
        self._running = self._running.with_more(new) if self._running else new

    def _step(self) -> None:
        assert self._running is not None
        before = self._running
        images, squared, exact = self._maps.step(before)
        # A NaN or infinite coordinate, or a length that overflows, ends the trajectory at the point before.
        finite = squared.isfinite()
        if not bool(finite.all()):
            self._end(before.take(~finite), Status.NON_FINITE)
        moved = replace(before, steps=before.steps + 1, latents=images).take(finite)
        squared, exact = squared[finite], exact[finite]
        for batch, inside, places in self._parts(moved.rows):
            batch.residuals.put(places, moved.steps[inside] - 1, squared[inside])
        self._observe(moved)
        # ‖f(z_{t+1}) − f(z_t)‖² compares two images of f: the first residual ‖f(z_0) − z_0‖² is not one. After
        # cheap steps z_t is an image of f up to rounding, and what counts is that f itself no longer moves it.
        settled = (squared < self._tol) & exact & (moved.steps > 1)
        limited = ~settled & (moved.steps >= self._max_steps)
        for ended, status in ((settled, Status.CONVERGED), (limited, Status.STEP_LIMIT)):
            if bool(ended.any()):
                self._end(moved.take(ended), status)
        self._running = moved.take(~(settled | limited))
        if self._on_step is not None:
            self._on_step(int(moved.steps.max()) if len(moved) else 0, len(self._running) + len(self._waiting or ()))

    def _observe(self, points: _Running) -> None:
        if not len(points):
            return
        parts = list(self._parts(points.rows))
        for observer in self._observers:
            values = observer.observe(points.steps, points.rows, points.latents)
            if values is None:
                self._silent.add(observer.name)
                continue
            if not isinstance(values, Tensor) or values.shape != points.rows.shape:
                got = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
                raise TrajOODError(
                    f"observer {observer.name}: expected None or a tensor of one number for each of {len(points)} "
                    f"samples, got {got}"
                )
            values = values.cpu().double()
            for batch, inside, places in parts:
                batch.measure(observer.name).put(places, points.steps[inside], values[inside])

    def _end(self, samples: _Running, status: Status) -> None:
        for batch, inside, places in self._parts(samples.rows):
            batch.left -= len(places)
            batch.status[places] = int(status)
            batch.steps[places] = samples.steps[inside]
            device = batch.final.device
            batch.final[places.to(device)] = samples.latents[inside.to(device)]

    def _parts(self, rows: Tensor) -> Iterator[tuple[_Batch, Tensor, Tensor]]:
        """Each batch that some of ``rows`` (n,) belong to, which of them (n,) bool, and their places in it."""
        for batch in self._batches:
            inside = (rows >= batch.first) & (rows < batch.end)
            if bool(inside.any()):
                yield batch, inside, rows[inside] - batch.first


def apply_in_chunks(function: Callable[[Tensor], Tensor], inputs: Tensor, chunk: int, name: str = "f") -> Tensor:
    """``function`` on exactly ``chunk`` rows at a time, whatever the batch: float32 products round by their shape.

    A last chunk that is short is filled up with copies of its last row, and their results are dropped. Every chunk is a
    copy: a network may begin with an operation in place, such as ``nn.ReLU(inplace=True)``, and the rows are the
    caller's.

    Raises:
        TrajOODError: an answer that is no tensor of ``chunk`` rows, or chunks whose answers do not go together; calls
            the function ``name``.
    """
    if not len(inputs):
        return check_answer(name, function(inputs.new_zeros(chunk, *inputs.shape[1:])), chunk)[:0]
    answers: Tensor | None = None
    for first, part in zip(range(0, len(inputs), chunk), inputs.split(chunk), strict=True):
        answer = check_answer(name, function(_filled(part, chunk)), chunk)
        if answers is None:  # copied into: a network may answer in one buffer again and again
            answers = answer.new_empty((len(inputs), *answer.shape[1:]))
        if _kind(answer) != _kind(answers):
            raise TrajOODError(
                f"{name}: expected rows alike in every chunk, got {_kind(answers)} and then {_kind(answer)}: return "
                "one shape, type and device"
            )
        answers[first : first + len(part)] = answer[: len(part)]
    assert answers is not None
    return answers


def _filled(rows: Tensor, count: int) -> Tensor:
    """A copy with its last row repeated up to ``count`` rows, in the usual order in memory: convolutions round images
    whose channels come last otherwise."""
    full = rows.new_empty((count, *rows.shape[1:]))
    full[: len(rows)] = rows
    full[len(rows) :] = rows[-1:]
    return full


def _kind(rows: Tensor) -> str:
    return f"{str(rows.dtype).removeprefix('torch.')} {tuple(rows.shape[1:])} on {rows.device}"


class _Maps:
    """f for every sample, or its cheap copy for those that are still far from their end."""

    def __init__(self, self_map: SelfMap, low: LowPrecision | None, chunk: int) -> None:
        self._map, self._low, self._chunk, self._name = self_map, low, chunk, name_around(self_map)
        self.has_cheap = low is not None

    def step(self, running: _Running) -> tuple[Tensor, Tensor, Tensor]:
        """One step; what is known of the samples for :class:`LowPrecision` is brought up to date in place.

        Returns:
            Images (n, *L); squared residuals (n,) float64, NaN or infinite where the image or its length is not
            finite; (n,) bool: the image is one of f itself.
        """
        cheap, latents = running.cheap.clone(), running.latents
        if self._low is None or not bool(cheap.any()):
            images = self._images(self._map, latents)
            squared, _ = _squared_residuals(images, latents)
            return images, squared, ~cheap
        if bool(cheap.all()):
            images = self._images(self._low.self_map, latents)
        else:
            images = torch.empty_like(latents)
            for f, part in ((self._low.self_map, cheap), (self._map, ~cheap)):
                where = part.to(latents.device)
                images[where] = self._images(f, latents[where])
        squared, norms = _squared_residuals(images, latents)
        failed = cheap & ~squared.isfinite()
        if bool(failed.any()):  # a smaller range of numbers must not end a trajectory: f decides
            where, images = failed.to(latents.device), images.clone()
            images[where] = self._images(self._map, latents[where])
            squared, norms = _squared_residuals(images, latents)
            cheap &= ~failed
        running.cheap[:] = cheap & self._stays(self._low, running, squared, norms)
        return images, squared, ~cheap

    def _stays(self, low: LowPrecision, running: _Running, squared: Tensor, norms: Tensor) -> Tensor:
        """(n,) bool: the next step may be cheap, too."""
        step, fell = running.steps + 1, squared < running.best
        running.best[:] = torch.minimum(running.best, squared)
        running.best_step[fell] = step[fell]
        resolved = squared >= (low.switch * norms).square()
        return resolved & (step - running.best_step < low.patience) & (step < low.max_steps)

    def _images(self, function: SelfMap, latents: Tensor) -> Tensor:
        images = apply_in_chunks(function, latents, self._chunk, self._name)
        if images.shape != latents.shape:
            raise TrajOODError(
                f"{self._name} must keep the latent's shape {tuple(latents.shape[1:])}, got {tuple(images.shape[1:])}: "
                "encode(decode(z)) has to end where it started"
            )
        if function is not self._map:
            return images.to(latents.dtype)
        if _kind(images) != _kind(latents):
            raise TrajOODError(
                f"{self._name}: expected latents like those it was given, {_kind(latents)}, got {_kind(images)}: "
                "convert the model with .float(), and give both in its type"
            )
        return images


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


def _finite_rows(latents: Tensor) -> Tensor:
    return latents.flatten(1).norm(dim=1).isfinite().cpu()


def _squared_residuals(images: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
    """‖f(z) − z‖² and ‖f(z)‖, (n,) float64 on the CPU; the first is NaN where the second is not finite."""
    squared = (images - latents).flatten(1).norm(dim=1).cpu().double().square()
    norms = images.flatten(1).norm(dim=1).cpu().double()
    return torch.where(norms.isfinite(), squared, torch.nan), norms


def _check_start(start: Tensor, before: Tensor | None) -> None:
    if not isinstance(start, Tensor) or start.ndim < 2 or not start.is_floating_point():
        kind = f"{start.dtype} of shape {tuple(start.shape)}" if isinstance(start, Tensor) else type(start).__name__
        raise TrajOODError(f"start: expected floating-point latents of shape (B, *L), got {kind}")
    if before is not None and _kind(start) != _kind(before):
        raise TrajOODError(f"start: expected batches alike, got {_kind(before)} and then {_kind(start)}")


def _check_settings(tol: float, max_steps: int, chunk: int, observers: list[Observer]) -> None:
    if not isinstance(tol, int | float) or not 0 <= tol < math.inf:
        raise TrajOODError(f"tol: expected a finite squared residual >= 0, got {tol!r}")
    if not isinstance(max_steps, int) or max_steps < 1:
        raise TrajOODError(f"max_steps: expected a whole number of at least 1, got {max_steps!r}")
    if not isinstance(chunk, int) or chunk < 1:
        raise TrajOODError(f"chunk: expected a whole number of at least 1 row, got {chunk!r}")
    names = [observer.name for observer in observers]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise TrajOODError(f"observers: expected a name for each, got {twice!r} twice: rename one of the two")
