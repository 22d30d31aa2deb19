"""The fixed-point engine: repeats the self-map per sample until it settles, and streams every point to observers.

Equation (3) of the paper: z_{t+1} = f(z_t) with f = E∘D, stopped per sample at ‖f(z_{t+1}) − f(z_t)‖² < tol (App. D,
squared, 1e-5 for foundation models) or after ``max_steps`` (500 there).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from traj_ood.dynamics.fixed_function import check_answer, fixed_around, name_around
from traj_ood.dynamics.trajectory import Status, Trajectory
from traj_ood.errors import TrajOODError

SelfMap = Callable[[Tensor], Tensor]
"""f: latents (n, *L) → latents (n, *L), each row on its own."""


ROWS = 24
"""Rows per call of a network that says nothing about itself (see :func:`rows_per_call`)."""


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

    def observe(self, step: int, rows: Tensor, latents: Tensor) -> Tensor | None:
        """Measure z_step of the samples ``rows`` (n,) int64; ``latents`` is (n, *L). Returns (n,) float64, or None."""
        ...


class Norm:
    """‖z_t‖ at every point (Fig. 12b): bounded norms mean that the trajectory does not diverge."""

    name = "norm"

    def observe(self, step: int, rows: Tensor, latents: Tensor) -> Tensor:
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


def iterate(
    self_map: SelfMap,
    start: Tensor,
    *,
    tol: float = 1e-5,
    max_steps: int = 500,
    observers: Iterable[Observer] = (),
    chunk: int = ROWS,
    on_step: Callable[[int, int], None] | None = None,
    low_precision: LowPrecision | None = None,
) -> Trajectory:
    """Run z_{t+1} = f(z_t) for every sample of ``start`` until it settles.

    No result depends on batch-mates, order or batch size beyond 1e-9. Three things see to that: each sample stops on
    its own residual; converged and non-finite samples leave the batch at once; and f is only ever called on exactly
    ``chunk`` rows (the last chunk is filled up with copies of its last row), because a float32 product of another shape
    rounds differently by 1e-7, and a residual next to the tolerance would then stop one step earlier or later.

    Args:
        self_map: f, called under ``torch.inference_mode`` on (chunk, *L), and under
            :func:`traj_ood.dynamics.device.standard_settings`. A method of a model, such as ``autoencoder.self_map``,
            also has that model in evaluation mode meanwhile; what a function of your own calls is yours to switch.
        start: z_0, (B, *L) floating point, on the device where f runs.
        tol: on the squared residual. Default 1e-5, the paper's for foundation models.
        max_steps: most evaluations of f per sample. Default 500, the paper's.
        observers: measure every point z_0 … z_N; memory grows with one number per point, not with the latents.
        chunk: rows per call of f. Default 24: more would fill matrix products better, but drag more idle rows along
            with the few samples that settle last. Each :class:`Autoencoder` knows a number that suits it.
        on_step: called as ``on_step(step, still_running)`` after each step, for progress bars.
        low_precision: cheaper first steps, see :class:`LowPrecision`. Default None: f alone. In a step in which both
            maps are at work each fills up its own last chunk, so the gain needs batches of several chunks.
    Returns:
        The :class:`Trajectory`. The stopping test needs two consecutive images of f, so N >= 2 unless max_steps = 1.
    Raises:
        TrajOODError: impossible arguments, or a self-map that changes the latent's shape or type.
    """
    _check_arguments(start, tol, max_steps, chunk)
    with fixed_around(self_map):
        return _run(_Maps(self_map, low_precision, chunk, len(start)), start, tol, max_steps, list(observers), on_step)


def _run(
    maps: _Maps,
    start: Tensor,
    tol: float,
    max_steps: int,
    watchers: list[Observer],
    on_step: Callable[[int, int], None] | None,
) -> Trajectory:
    count = len(start)
    # Everything that decides lives on the CPU (MPS has no float64); only latents stay on the device.
    steps = torch.zeros(count, dtype=torch.int64)
    status = torch.full((count,), int(Status.STEP_LIMIT))
    final = start.clone()
    residuals = _Columns(count)
    measures = {w.name: _Columns(count) for w in watchers}

    finite = _finite_rows(start)
    status[~finite] = int(Status.NON_FINITE)
    rows = finite.nonzero()[:, 0]
    latents = _take(start, finite)
    with torch.inference_mode():
        for w in watchers if len(rows) else ():
            measures[w.name].add(0, rows, w.observe(0, rows, latents))
        for step in range(1, max_steps + 1):
            if not len(rows):
                break
            images, squared, exact = maps.step(step, rows, latents)
            # A NaN or infinite coordinate, or a length that overflows, ends the trajectory at the point before.
            finite = squared.isfinite()
            if not bool(finite.all()):
                status[rows[~finite]] = int(Status.NON_FINITE)
                rows, images, squared, exact = rows[finite], _take(images, finite), squared[finite], exact[finite]
                if not len(rows):
                    break
            steps[rows] = step
            final[rows.to(final.device)] = images
            residuals.add(step - 1, rows, squared)
            for w in watchers:
                measures[w.name].add(step, rows, w.observe(step, rows, images))
            # ‖f(z_{t+1}) − f(z_t)‖² compares two images of f: the first residual ‖f(z_0) − z_0‖² is not one. After
            # cheap steps z_t is an image of f up to rounding, and what counts is that f itself no longer moves it.
            settled = (squared < tol) & exact & (step > 1)
            status[rows[settled]] = int(Status.CONVERGED)
            running = ~settled
            rows, latents = rows[running], _take(images, running)
            if on_step is not None:
                on_step(step, len(rows))
    return Trajectory(
        steps=steps,
        status=status,
        residuals=residuals.table(),
        final=final,
        measures={name: columns.table() for name, columns in measures.items() if not columns.silent},
        max_steps=max_steps,
    )


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
    outputs: list[Tensor] = []
    for part in inputs.split(chunk):
        answer = check_answer(name, function(_filled(part, chunk)), chunk)
        if outputs and _kind(answer) != _kind(outputs[0]):
            raise TrajOODError(
                f"{name}: expected rows alike in every chunk, got {_kind(outputs[0])} and then {_kind(answer)}: return "
                "one shape, type and device"
            )
        outputs.append(answer[: len(part)])
    return torch.cat(outputs) if len(outputs) != 1 else outputs[0]


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

    def __init__(self, self_map: SelfMap, low: LowPrecision | None, chunk: int, count: int) -> None:
        self._map, self._low, self._chunk, self._name = self_map, low, chunk, name_around(self_map)
        self._cheap = torch.full((count,), low is not None)
        self._best = torch.full((count,), torch.inf, dtype=torch.float64)
        self._best_step = torch.zeros(count, dtype=torch.int64)

    def step(self, step: int, rows: Tensor, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One step of the samples ``rows`` (n,) at ``latents`` (n, *L).

        Returns:
            Images (n, *L); squared residuals (n,) float64, NaN or infinite where the image or its length is not
            finite; (n,) bool: the image is one of f itself.
        """
        cheap = self._cheap[rows]
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
        self._cheap[rows] = cheap & self._stays(self._low, step, rows, squared, norms)
        return images, squared, ~cheap

    def _stays(self, low: LowPrecision, step: int, rows: Tensor, squared: Tensor, norms: Tensor) -> Tensor:
        """(n,) bool: the next step may be cheap, too."""
        fell = rows[squared < self._best[rows]]
        self._best[rows] = torch.minimum(self._best[rows], squared)
        self._best_step[fell] = step
        resolved = squared >= (low.switch * norms).square()
        return resolved & (step - self._best_step[rows] < low.patience) & (step < low.max_steps)

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


class _Columns:
    """One number per sample and step, appended step by step; NaN where a sample had already ended."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._entries: list[tuple[int, Tensor, Tensor]] = []
        self.silent = False

    def add(self, column: int, rows: Tensor, values: Tensor | None) -> None:
        if values is None:
            self.silent = True
        else:
            self._entries.append((column, rows, values.cpu()))

    def table(self) -> Tensor:
        width = max((column + 1 for column, rows, _ in self._entries if len(rows)), default=1)
        table = torch.full((self._count, width), torch.nan, dtype=torch.float64)
        for column, rows, values in self._entries:
            if len(rows):
                table[rows, column] = values.double()
        return table


def _finite_rows(latents: Tensor) -> Tensor:
    return latents.flatten(1).norm(dim=1).isfinite().cpu()


def _squared_residuals(images: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
    """‖f(z) − z‖² and ‖f(z)‖, (n,) float64 on the CPU; the first is NaN where the second is not finite."""
    squared = (images - latents).flatten(1).norm(dim=1).cpu().double().square()
    norms = images.flatten(1).norm(dim=1).cpu().double()
    return torch.where(norms.isfinite(), squared, torch.nan), norms


def _take(latents: Tensor, keep: Tensor) -> Tensor:
    """The kept rows; no copy when that is all of them, as it is in most steps."""
    return latents if bool(keep.all()) else latents[keep.to(latents.device)]


def _check_arguments(start: Tensor, tol: float, max_steps: int, chunk: int) -> None:
    if start.ndim < 2 or not start.is_floating_point():
        raise TrajOODError(
            f"start: expected floating-point latents of shape (B, *L), got {start.dtype} of shape {tuple(start.shape)}"
        )
    if not 0 <= tol < math.inf:
        raise TrajOODError(f"tol: expected a finite squared residual >= 0, got {tol}")
    if max_steps < 1:
        raise TrajOODError(f"max_steps: expected at least 1, got {max_steps}")
    if chunk < 1:
        raise TrajOODError(f"chunk: expected at least 1 row, got {chunk}")
