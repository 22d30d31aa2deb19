"""The engine on maps whose dynamics are known, and the trajectory record's means."""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from traj_ood.dynamics.chunks import apply_in_chunks
from traj_ood.dynamics.fixed_function import FixedFunction
from traj_ood.dynamics.host import to_host
from traj_ood.dynamics.iterate import iterate
from traj_ood.dynamics.jacobian import divergence_at, spectral_radii
from traj_ood.dynamics.maps import LowPrecision
from traj_ood.dynamics.observers import Norm
from traj_ood.dynamics.trajectory import Status, Trajectory
from traj_ood.errors import TrajOODError

NAN = float("nan")


def cubic(z: Tensor) -> Tensor:
    """Fixed points −1, 0, 1 in every coordinate; ±1 attract with rate 0.4, 0 repels with rate 1.3."""
    return z + 0.3 * (z - z**3)


def rotate(z: Tensor) -> Tensor:
    """Two coordinates: a quarter turn with contraction 0.8."""
    return 0.8 * torch.stack([-z[:, 1], z[:, 0]], dim=1)


class Spy:
    """f that records the rows of every call; the first coordinate of a latent carries the sample's own number."""

    def __init__(self, rest: Callable[[Tensor], Tensor]) -> None:
        self.rest, self.rows, self.labels = rest, [], []  # type: ignore[var-annotated]

    def __call__(self, z: Tensor) -> Tensor:
        self.rows.append(len(z))
        self.labels.append(sorted({int(v) for v in z[:, 0]}))
        return torch.cat([z[:, :1], self.rest(z[:, 1:])], dim=1)

    def calls_of(self, label: int) -> int:
        return sum(label in labels for labels in self.labels)


class Recorder:
    """Observer that keeps copies of all it sees."""

    name = "seen"

    def __init__(self) -> None:
        self.points: dict[tuple[int, int], Tensor] = {}

    def observe(self, steps: Tensor, rows: Tensor, latents: Tensor) -> Tensor:
        for row, step, latent in zip(rows.tolist(), steps.tolist(), latents, strict=True):
            assert (row, step) not in self.points, "a point was shown twice"
            self.points[row, step] = latent.clone()
        return latents.flatten(1).double().sum(dim=1)


def numbered(values: Tensor) -> Tensor:
    return torch.cat([torch.arange(len(values))[:, None].to(values.dtype), values], dim=1)


def assert_same(one: Trajectory, other: Trajectory) -> None:
    """Up to the rounding of float32 points, whatever the padding."""
    assert torch.equal(one.steps, other.steps)
    assert torch.equal(one.status, other.status)
    torch.testing.assert_close(one.final, other.final, rtol=1e-5, atol=1e-6, equal_nan=True)
    width = min(one.residuals.shape[1], other.residuals.shape[1])
    for a, b in [(one.residuals, other.residuals), *((one.measures[k], other.measures[k]) for k in one.measures)]:
        width = min(a.shape[1], b.shape[1])
        torch.testing.assert_close(a[:, :width], b[:, :width], rtol=1e-4, atol=1e-9, equal_nan=True)
        assert a[:, width:].isnan().all()
        assert b[:, width:].isnan().all()


# ---------------------------------------------------------------------------------------------- known dynamics


@pytest.mark.parametrize("rate", [0.5, 0.9, -0.7])
def test_linear_contraction_has_the_analytic_rate_and_stop(rate: float) -> None:
    start = torch.tensor([[3.0, 4.0], [0.3, 0.4], [300.0, -400.0]], dtype=torch.float64)
    tol = 1e-5
    path = iterate(lambda z: rate * z, start, tol=tol, chunk=2)
    norms = start.norm(dim=1)
    for b in range(3):
        n = int(path.steps[b])
        # ‖z_{t+1} − z_t‖² = (c^t (1 − c) ‖z_0‖)²
        analytic = (rate ** torch.arange(n).double() * (1 - rate) * norms[b]).square()
        torch.testing.assert_close(path.residuals[b, :n], analytic, rtol=1e-6, atol=0)
        first_below = next(t for t in range(1, 1000) if (rate**t * (1 - rate) * float(norms[b])) ** 2 < tol)
        assert n == first_below + 1
        torch.testing.assert_close(path.final[b], rate**n * start[b])
    assert path.converged.all()
    assert path.residuals.shape == (3, int(path.steps.max()))


def test_the_tolerance_is_on_the_squared_residual() -> None:
    start = torch.tensor([[1.0]], dtype=torch.float64)
    path = iterate(lambda z: 0.5 * z, start, tol=1e-4)
    last = float(path.residuals[0, -1])
    assert last < 1e-4 <= float(path.residuals[0, -2])
    assert math.sqrt(last) > 1e-3  # an unsquared test would have gone on
    assert path.steps.tolist() == [7]  # 4^-(t+1) < 1e-4 first at t = 6


def test_the_first_residual_alone_never_stops() -> None:
    # The criterion compares two images of f, ‖f(z_1) − f(z_0)‖: a fixed point as start still takes two evaluations.
    path = iterate(lambda z: z, torch.ones(3, 2))
    assert path.steps.tolist() == [2, 2, 2]
    assert path.converged.all()
    assert path.residuals.tolist() == [[0.0, 0.0]] * 3


def test_tolerance_zero_and_exactly_at_the_tolerance_do_not_stop() -> None:
    path = iterate(lambda z: z, torch.ones(1, 1), tol=0.0, max_steps=5)
    assert path.status.tolist() == [Status.STEP_LIMIT]
    path = iterate(lambda z: z + 0.5, torch.zeros(1, 1), tol=0.25, max_steps=5)
    assert path.status.tolist() == [Status.STEP_LIMIT]


def test_several_attractors_each_start_ends_in_its_own_basin() -> None:
    start = torch.empty(200, 3).uniform_(-1.4, 1.4, generator=torch.Generator().manual_seed(0))
    start = torch.where(start.abs() < 1e-3, torch.full_like(start, 1e-3), start)
    path = iterate(cubic, start, tol=1e-10)
    assert path.converged.all()
    torch.testing.assert_close(path.final, start.sign(), rtol=0, atol=1e-4)
    assert len({tuple(row) for row in path.final.sign().tolist()}) == 8


def test_rotation_spirals_into_the_origin() -> None:
    path = iterate(rotate, torch.tensor([[1.0, 0.0]], dtype=torch.float64), observers=[Norm()], tol=1e-8)
    n = int(path.steps[0])
    torch.testing.assert_close(path.measure("norm")[0], 0.8 ** torch.arange(n + 1).double())


def test_two_cycle_meets_the_step_limit() -> None:
    path = iterate(lambda z: -z, torch.tensor([[1.0, 2.0]]), max_steps=51)
    assert path.status.tolist() == [Status.STEP_LIMIT]
    assert path.steps.tolist() == [51]
    torch.testing.assert_close(path.residuals, torch.full((1, 51), 20.0, dtype=torch.float64), rtol=1e-6, atol=0)
    assert path.final.tolist() == [[-1.0, -2.0]]
    assert not path.converged.any()


def test_max_steps_one() -> None:
    path = iterate(lambda z: 0.5 * z, torch.tensor([[1.0], [1e-9]]), max_steps=1, observers=[Norm()])
    assert path.steps.tolist() == [1, 1]
    assert path.status.tolist() == [Status.STEP_LIMIT] * 2
    assert path.residuals.shape == (2, 1)
    assert path.measure("norm").shape == (2, 2)


# ---------------------------------------------------------------------------------------------- failures are data


def test_diverging_samples_are_marked_and_isolated() -> None:
    def quadratic(z: Tensor) -> Tensor:  # |z| < 1 goes to 0, |z| > 1 to infinity
        return z**2

    start = torch.tensor([[0.5, 0.5], [3.0, 0.1], [0.9, -0.2], [1.5, 0.0]])
    path = iterate(quadratic, start, chunk=3, observers=[Norm()])
    assert path.status.tolist() == [Status.CONVERGED, Status.NON_FINITE, Status.CONVERGED, Status.NON_FINITE]
    assert path.final.isfinite().all()
    for b in range(4):
        alone = iterate(quadratic, start[b : b + 1], chunk=3, observers=[Norm()])
        n = int(path.steps[b])
        assert alone.steps.tolist() == [n]
        torch.testing.assert_close(alone.final[0], path.final[b], rtol=1e-5, atol=1e-6)
        assert path.residuals[b, :n].isfinite().all()
        assert path.residuals[b, n:].isnan().all()
        assert path.measure("norm")[b, : n + 1].isfinite().all()
        assert path.measure("norm")[b, n + 1 :].isnan().all()
    # the last finite point is the image of the one before
    n = int(path.steps[1])
    expected = start[1]
    for _ in range(n):
        expected = expected**2
    assert torch.equal(path.final[1], expected)


def test_nan_start_and_nan_image_stay_apart() -> None:
    def f(z: Tensor) -> Tensor:
        return torch.where(z > 10, torch.full_like(z, NAN), 0.5 * z)

    start = torch.tensor([[1.0], [NAN], [11.0], [math.inf], [2.0]])
    spy = Spy(f)
    path = iterate(spy, numbered(start), chunk=2, observers=[Norm()])
    assert path.status.tolist() == [0, 2, 2, 2, 0]
    assert path.steps.tolist()[1:4] == [0, 0, 0]
    assert spy.calls_of(1) == 0
    assert spy.calls_of(2) == 1
    assert path.final[2].tolist() == [2.0, 11.0]
    assert path.measure("norm")[1].isnan().all()
    assert path.measure("norm")[2, 0] > 11
    assert path.mean_over_path("norm").isnan().tolist() == [False, True, False, True, False]


@pytest.mark.parametrize("value", [NAN, 1.0])
def test_batch_in_which_nothing_stays_finite(value: float) -> None:
    path = iterate(lambda z: z * NAN, torch.full((3, 2), value), observers=[Norm()])
    assert path.status.tolist() == [Status.NON_FINITE] * 3
    assert path.steps.tolist() == [0, 0, 0]
    recorded = not math.isnan(value)
    assert path.mean_over_path("norm").isfinite().tolist() == [recorded] * 3
    assert path.mean_over_path("norm", horizon=4).isfinite().tolist() == [recorded] * 3
    assert path.at_end("norm").isfinite().tolist() == [recorded] * 3


def test_empty_batch() -> None:
    calls: list[int] = []

    def f(z: Tensor) -> Tensor:
        calls.append(len(z))
        return z

    path = iterate(f, torch.empty(0, 3, 4), observers=[Norm()])
    assert len(path) == 0
    assert path.final.shape == (0, 3, 4)
    assert path.residuals.shape == (0, 1)
    assert path.mean_over_path("norm").shape == (0,)
    assert calls == []


# ---------------------------------------------------------------------------------------------- independence


@pytest.mark.parametrize(("count", "chunk"), [(1, 4), (4, 4), (7, 4), (9, 1), (3, 32)])
def test_f_sees_exactly_chunk_rows(count: int, chunk: int) -> None:
    start = torch.empty(count, 2).uniform_(-1.4, 1.4, generator=torch.Generator().manual_seed(1))
    spy = Spy(cubic)
    iterate(spy, numbered(start), chunk=chunk)
    assert spy.rows
    assert set(spy.rows) == {chunk}


def test_settled_samples_are_not_evaluated_again() -> None:
    start = numbered(torch.tensor([[1e-3], [1.0], [1e3], [1e-3], [1e15]]))
    spy = Spy(lambda z: torch.where(z > 1e10, z * 1e30, 0.5 * z))
    path = iterate(spy, start, chunk=2)
    for b in range(4):
        assert spy.calls_of(b) == int(path.steps[b])
    assert path.steps.tolist()[0] < path.steps.tolist()[1] < path.steps.tolist()[2]
    assert spy.calls_of(4) == 1
    assert path.steps[4] == 0


@pytest.mark.parametrize("count", [3, 4])
@pytest.mark.parametrize("channels", [1, 3])
def test_f_sees_the_usual_order_in_memory(count: int, channels: int) -> None:
    seen = []
    images = torch.randn(count, channels, 5, 5).to(memory_format=torch.channels_last)
    apply_in_chunks(lambda x: seen.append(x.stride()) or x, images, 4)  # type: ignore[func-returns-value]
    assert seen == [torch.empty(4, channels, 5, 5).stride()]


def test_apply_in_chunks_keeps_rows_in_order() -> None:
    inputs = torch.arange(11.0)[:, None]
    shapes = []

    def double(part: Tensor) -> Tensor:
        shapes.append(len(part))
        return 2 * part

    assert torch.equal(apply_in_chunks(double, inputs, 4), 2 * inputs)
    assert shapes == [4, 4, 4]


MAPS: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    "cubic": (cubic, torch.empty(23, 5).uniform_(-1.4, 1.4, generator=torch.Generator().manual_seed(2))),
    "mixed fates": (lambda z: z**2, torch.linspace(-1.3, 1.3, 23)[:, None].repeat(1, 2)),
    "linear": (
        lambda z: z @ (0.6 * torch.eye(7) + 0.03),
        torch.randn(23, 7, generator=torch.Generator().manual_seed(3)),
    ),
}


@pytest.mark.parametrize("name", [*MAPS, "vit", "conv"])
def test_a_trajectory_is_the_same_alone_in_any_batch_and_in_any_order(name: str) -> None:
    if name in MAPS:
        f, start, chunk, steps = *MAPS[name], 8, 200
    else:
        model = tiny.vit() if name == "vit" else tiny.conv()
        f, start, chunk, steps = model.self_map, model.encode(tiny.images(23)), model.chunk, 12

    def run(rows: list[int]) -> Trajectory:
        return iterate(f, start[rows], chunk=chunk, max_steps=steps, observers=[Norm()])

    together = run(list(range(23)))
    assert len(set(together.steps.tolist())) > 1 or name in ("conv", "vit")

    def part(rows: list[int]) -> Trajectory:
        return Trajectory(
            together.steps[rows],
            together.status[rows],
            together.residuals[rows],
            together.final[rows],
            {k: v[rows] for k, v in together.measures.items()},
        )

    order = torch.randperm(23, generator=torch.Generator().manual_seed(4)).tolist()
    for rows in [*([b] for b in (0, 5, 16, 22)), order, order[:9], list(range(22, -1, -1)), [5] * 11]:
        assert_same(run(rows), part(rows))


def test_start_is_not_changed() -> None:
    start = torch.ones(4, 2)
    iterate(lambda z: z.mul_(0.5) if z.is_inference() else 0.5 * z, start)
    assert torch.equal(start, torch.ones(4, 2))


# ---------------------------------------------------------------------------------------------- observers


def test_observers_see_each_point_once_with_the_right_rows() -> None:
    start = torch.cat([torch.tensor([[NAN, 0.0], [5.0, 5.0]]), torch.linspace(-1.4, 1.4, 18).reshape(9, 2)])
    recorder = Recorder()
    path = iterate(cubic, start, chunk=4, observers=[Norm(), recorder])
    expected = set()
    for b in range(len(start)):
        if path.status[b] == Status.NON_FINITE and not path.steps[b] and start[b].isnan().any():
            continue
        z = start[b : b + 1]
        for t in range(int(path.steps[b]) + 1):
            expected.add((b, t))
            torch.testing.assert_close(recorder.points[b, t], z[0], rtol=1e-6, atol=1e-6)
            assert path.measure("seen")[b, t] == pytest.approx(float(recorder.points[b, t].double().sum()))
            z = cubic(z)
    assert set(recorder.points) == expected
    for b in range(1, len(start)):
        assert torch.equal(recorder.points[b, int(path.steps[b])], path.final[b])


class Fates(FixedFunction):
    """``fates`` of a model whose chunks run side by side."""

    def __init__(self) -> None:
        self.name, self.module, self.chunk, self.side_by_side = "fates", nn.Identity(), 12, True

    def self_map(self, z: Tensor) -> Tensor:
        return fates(z)


@pytest.mark.parametrize("look", [1, 4])
@pytest.mark.parametrize("much", [0, 700, 2**22])
def test_observers_beside_f_measure_the_same(look: int, much: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("traj_ood.dynamics.iterate._MUCH", much)
    batches = [scattered(count, seed) for seed, count in enumerate((60, 1, 0, 250, 100))]
    alone, beside, counts = Recorder(), Recorder(), []
    beside.beside = True  # type: ignore[attr-defined]
    observe = beside.observe
    beside.observe = lambda *points: counts.append(len(points[0])) or observe(*points)  # type: ignore[assignment, func-returns-value]
    options: dict[str, Any] = {"chunk": 12, "max_steps": 20, "look": look}
    one, other = (
        list(iterate(f, iter(batches), observers=[Norm(), r], **options))
        for f, r in ((fates, alone), (Fates().self_map, beside))
    )
    for a, b in zip(one, other, strict=True):
        assert_same(a, b)
    assert alone.points.keys() == beside.points.keys()
    assert (len(counts) < 8) == (much > 10**6)


def test_points_in_between_are_not_kept() -> None:
    class Watch:
        name = "alive"

        def __init__(self) -> None:
            self.references: list[weakref.ref[Tensor]] = []

        def observe(self, steps: Tensor, rows: Tensor, latents: Tensor) -> Tensor:
            self.references.append(weakref.ref(latents))
            return torch.full((len(rows),), float(sum(r() is not None for r in self.references)))

    path = iterate(lambda z: -z, torch.ones(4, 100), max_steps=40, observers=[Watch()])
    assert path.measure("alive").max() <= 3


def test_on_step_reports_progress() -> None:
    seen: list[tuple[int, int]] = []
    path = iterate(lambda z: 0.5 * z, torch.tensor([[1.0], [100.0]]), on_step=lambda s, r: seen.append((s, r)))
    assert [s for s, _ in seen] == list(range(1, int(path.steps.max()) + 1))
    assert seen[0] == (1, 2)
    assert seen[-1][1] == 0


# ---------------------------------------------------------------------------------------------- looks of the host


def fates(z: Tensor) -> Tensor:
    """To −1, 0 or 1; beyond 2 to infinity in a few steps; beyond 10 at once."""
    return torch.where(z.abs() > 10, torch.full_like(z, NAN), torch.where(z.abs() > 2, z**2, cubic(z)))


@pytest.mark.parametrize(("look", "chunk"), [(2, 7), (3, 48), (8, 7), (1000, 48)])
def test_results_do_not_depend_on_how_often_the_host_looks(look: int, chunk: int) -> None:
    batches = [scattered(count, seed) for seed, count in enumerate((150, 1, 0, 40, 213))]
    for row, value in ((0, NAN), (1, 2.5), (2, 11.0), (3, 1.0), (4, math.inf)):
        batches[3][row] = value
    options = {"chunk": chunk, "max_steps": 30}
    recorders = Recorder(), Recorder()
    often, seldom = (
        list(iterate(fates, iter(batches), observers=[Norm(), r], look=n, **options))
        for r, n in zip(recorders, (1, look), strict=True)
    )
    assert {int(s) for path in often for s in path.status} == {0, 1, 2}
    for one, other in zip(often, seldom, strict=True):
        assert one.residuals.shape == other.residuals.shape
        assert_same(one, other)
    assert recorders[0].points.keys() == recorders[1].points.keys()
    for key, point in recorders[0].points.items():
        torch.testing.assert_close(recorders[1].points[key], point, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("look", [1, 4, 8])
def test_the_host_reads_once_in_so_many_steps(look: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that it reads goes through one function."""
    reads, calls = [], []

    def counted(values: list[Tensor]) -> list[Tensor]:
        reads.append(len(values))
        return to_host(values)

    def f(z: Tensor) -> Tensor:
        calls.append(len(z))
        return cubic(z)

    monkeypatch.setattr("traj_ood.dynamics.iterate.to_host", counted)
    batches = [scattered(100, seed) for seed in range(6)]
    assert len(list(iterate(f, iter(batches), chunk=192, max_steps=60, look=look))) == 6
    steps = len(calls)
    assert len(reads) <= -(-steps // look) + len(batches)  # one for each batch of starts: are they finite?
    reads.clear()
    calls.clear()
    list(iterate(f, iter(batches), chunk=192, max_steps=60, look=look, observers=[Norm()]))
    if look > 1:  # what observers measure comes with the next look; what is left of it with one more
        assert len(reads) <= -(-len(calls) // look) + len(batches) + 1


def test_values_on_the_device_and_on_the_host_are_read_together() -> None:
    """An observer may measure on either; here on a fake device, which knows shapes alone."""
    with FakeTensorMode():
        found = to_host([torch.ones(2, 3, device="xpu"), torch.ones(4), torch.ones(5, device="xpu").double()])
    assert [(tuple(v.shape), v.device.type, v.dtype) for v in found] == [
        (shape, "cpu", torch.float64) for shape in ((2, 3), (4,), (5,))
    ]


def test_low_precision_changes_over_at_the_same_step_however_often_the_host_looks() -> None:
    start = torch.linspace(-1.4, 1.4, 42)[:, None].repeat(1, 2) + 0.01
    start[7] = 1.7

    def coarse(z: Tensor) -> Tensor:
        return torch.where(z > 1.6, torch.full_like(z, NAN), (64 * cubic(z)).round() / 64)

    low = LowPrecision(coarse, max_steps=12, patience=3)
    options = {"low_precision": low, "max_steps": 60, "chunk": 6, "observers": [Norm()]}
    often = iterate(cubic, start, look=1, **options)
    assert often.steps.unique().numel() > 3
    for look in (2, 5, 16):
        assert_same(iterate(cubic, start, look=look, **options), often)


@pytest.mark.parametrize("look", [0, -1, 1.5])
def test_an_impossible_look_is_refused(look: Any) -> None:
    with pytest.raises(TrajOODError, match="look: expected a whole number of at least 1 step, got"):
        iterate(cubic, torch.ones(1, 1), look=look)


# ---------------------------------------------------------------------------------------------- a stream of starts


def scattered(count: int, seed: int) -> Tensor:
    """Starts whose paths have very different lengths: some begin next to the repelling 0."""
    draw = torch.Generator().manual_seed(seed)
    scale = 10.0 ** -torch.randint(0, 6, (count, 1), generator=draw)
    return torch.empty(count, 3).uniform_(-1.4, 1.4, generator=draw) * scale


@pytest.mark.parametrize("chunk", [1, 7, 48, 500])
def test_a_stream_gives_what_its_batches_give(chunk: int) -> None:
    batches = [scattered(count, seed) for seed, count in enumerate((300, 1, 0, 40, 513))]
    batches[3][5] = NAN
    found = list(iterate(cubic, iter(batches), chunk=chunk, max_steps=60, observers=[Norm()]))
    assert len(found) == len(batches)
    for path, start in zip(found, batches, strict=True):
        alone = iterate(cubic, start, chunk=chunk, max_steps=60, observers=[Norm()])
        assert_same(path, alone)
        for row in range(0, len(start), 97):
            assert_same(iterate(cubic, start[row : row + 1], max_steps=60, observers=[Norm()]), only(path, row))


def only(path: Trajectory, row: int) -> Trajectory:
    part = slice(row, row + 1)
    measures = {name: values[part] for name, values in path.measures.items()}
    return Trajectory(path.steps[part], path.status[part], path.residuals[part], path.final[part], measures)


def test_free_rows_are_the_next_starts() -> None:
    spy = Spy(cubic)
    batches = [numbered(scattered(200, seed)) for seed in range(8)]
    paths = list(iterate(spy, iter(batches), chunk=24, max_steps=60))
    needed = sum(int(path.steps.sum()) for path in paths)
    tail = 60 * 24 * 8  # as the last samples of all settle
    assert needed <= sum(spy.rows) <= 1.06 * needed + tail


def test_a_stream_is_read_no_further_than_rows_are_free() -> None:
    read: list[int] = []

    def starts() -> Iterator[Tensor]:
        for number in range(50):
            read.append(number)
            yield scattered(100, number)

    paths = iterate(cubic, starts(), chunk=24, max_steps=60)
    assert read == []
    next(paths)
    assert len(read) <= 192 * 4 // 100 + 2
    assert len(list(paths)) == 49


def test_the_caller_and_its_starts_stay_out_of_inference_mode() -> None:
    def starts() -> Iterator[Tensor]:
        for number in range(3):
            assert not torch.is_inference_mode_enabled()
            yield scattered(150, number)

    for path in iterate(cubic, starts(), max_steps=9):
        assert not torch.is_inference_mode_enabled()
        assert len(path) == 150


def test_another_default_device_changes_nothing() -> None:
    """``torch.set_default_device("cuda")``; here meta, which holds no values."""

    starts, points = [scattered(30, 0), scattered(9, 1)], scattered(4, 2)

    def found() -> list[Any]:
        paths = iterate(cubic, iter(starts), max_steps=9, observers=[Norm()])
        values = [(path.steps, path.residuals, path.measure("norm")) for path in paths]
        return [values, spectral_radii(cubic, points).values, divergence_at(cubic, points, 6)]

    expected = str(found())
    torch.set_default_device("meta")
    try:
        assert str(found()) == expected
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize(("seconds", "expected"), [(0.01, 96), (1.0, 6)])
def test_a_slow_f_has_no_more_samples_in_progress_than_a_chunk(
    seconds: float, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the first results come soon, and an interruption loses little."""
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def f(z: Tensor) -> Tensor:
        clock[0] += seconds
        return z + 1.0  # never converges

    most = 0

    def on_step(step: int, running: int) -> None:
        nonlocal most
        most = max(most, running)

    starts = (torch.full((6, 2), float(k)) for k in range(16))
    paths = list(iterate(f, starts, max_steps=20, chunk=6, on_step=on_step))
    assert most == expected
    assert [float(path.final[0, 0]) for path in paths] == [k + 20.0 for k in range(16)]


def test_batches_of_a_stream_must_be_alike() -> None:
    with pytest.raises(
        TrajOODError, match=r"expected batches of one shape, type and device, got float32 \(3,\) on cpu and"
    ):
        list(iterate(cubic, iter([scattered(9, 0), scattered(9, 1).double()])))
    with pytest.raises(
        TrajOODError, match=r"start: expected latents of float32 or float64 and shape \(B, \*L\), got list"
    ):
        list(iterate(cubic, iter([[1.0]])))  # type: ignore[list-item]


def test_none_in_a_stream_is_no_end() -> None:
    with pytest.raises(
        TrajOODError, match=r"start: expected latents of float32 or float64 and shape \(B, \*L\), got NoneType"
    ):
        list(iterate(cubic, [scattered(9, 0), None, scattered(9, 1)]))  # type: ignore[list-item]


def test_a_source_may_fill_one_buffer_again_and_again() -> None:
    buffer = torch.empty(10, 3)

    def starts() -> Iterator[Tensor]:
        for part in whole.split(10):
            buffer.copy_(part)
            yield buffer

    whole = scattered(60, 4)
    expected = iterate(cubic, whole, max_steps=60)
    found = list(iterate(cubic, starts(), max_steps=60))
    assert torch.equal(torch.cat([path.steps for path in found]), expected.steps)
    torch.testing.assert_close(torch.cat([path.final for path in found]), expected.final)


@pytest.mark.parametrize("count", [5, 50])
def test_f_may_answer_in_one_buffer_again_and_again(count: int) -> None:
    buffer, start = torch.empty(24, 3), scattered(count, 5)
    path = iterate(lambda z: torch.mul(z, 0.5, out=buffer), start, tol=0, max_steps=3)
    torch.testing.assert_close(path.final, start / 8)
    steps = torch.stack([start.norm(dim=1).double() / 2 ** (t + 1) for t in range(3)], dim=1)
    torch.testing.assert_close(path.residuals.sqrt(), steps, rtol=1e-5, atol=0)


def test_empty_batches_are_not_read_without_end() -> None:
    read = []

    def starts() -> Iterator[Tensor]:
        yield torch.ones(1, 3)
        for number in range(100_000):
            read.append(number)
            yield torch.ones(0, 3)

    next(iterate(cubic, starts(), tol=0, max_steps=5))
    assert len(read) < 5000


class Answer:
    name = "mine"

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def observe(self, steps: Tensor, rows: Tensor, latents: Tensor) -> Any:
        return self.answer


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"start": 5}, r"start: expected latents \(B, \*L\) or a stream of them, got int"),
        ({"tol": "a"}, "tol: expected a finite squared residual >= 0, got 'a'"),
        ({"max_steps": 2.5}, r"max_steps: expected a whole number of at least 1, got 2\.5"),
        ({"chunk": 2.5}, r"chunk: expected a whole number of at least 1 row, got 2\.5"),
        ({"chunk": np.int64(6)}, r"chunk: expected a whole .* row, got (np.int64\()?6\)?: convert it by int"),
        ({"look": True}, "look: expected a whole number of at least 1 step, got True"),
        ({"observers": [Norm(), Norm()]}, "observers: expected different names, got 'norm' twice"),
        ({"observers": [Answer(torch.ones(1))]}, r"observer mine: expected None or .* of 4 samples, got shape \(1,\)"),
        ({"observers": [Answer(1.0)]}, "observer mine: expected None or .* of 4 samples, got float"),
    ],
)
def test_impossible_arguments_are_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(TrajOODError, match=words):
        iterate(**{"self_map": cubic, "start": torch.ones(4, 3), **changes})


# ---------------------------------------------------------------------------------------------- the record


def record() -> Trajectory:
    """Three samples of 2, 1 and 0 steps; the third never had a finite point."""
    distances = torch.tensor([[6.0, 3.0, 0.0], [4.0, 2.0, NAN], [NAN, NAN, NAN]], dtype=torch.float64)
    return Trajectory(
        steps=torch.tensor([2, 1, 0]),
        status=torch.tensor([0, 1, 2]),
        residuals=torch.tensor([[1.0, 0.5], [2.0, NAN], [NAN, NAN]], dtype=torch.float64),
        final=torch.zeros(3, 2),
        measures={"distance/tokens": distances},
    )


@pytest.mark.parametrize(
    ("horizon", "expected"),
    [
        (None, [3.0, 3.0]),  # (6 + 3 + 0) / 3, (4 + 2) / 2: the own length
        (0, [6.0, 4.0]),
        (1, [4.5, 3.0]),
        (2, [3.0, 8 / 3]),  # the second stays at its end point 2
        (5, [9 / 6, (4 + 5 * 2) / 6]),
    ],
)
def test_mean_over_path(horizon: int | None, expected: list[float]) -> None:
    means = record().mean_over_path("distance/tokens", horizon)
    assert means.dtype == torch.float64
    assert means[:2].tolist() == pytest.approx(expected)
    assert means[2].isnan()


def test_record_ends_and_length() -> None:
    path = record()
    assert len(path) == 3
    assert path.at_end("distance/tokens")[:2].tolist() == [0.0, 2.0]
    assert path.at_end("distance/tokens")[2].isnan()
    assert path.converged.tolist() == [True, False, False]
    infinite = replace(path, measures={"log": torch.tensor([[1.0, -torch.inf, 2.0], [1.0, 3.0, NAN], [NAN] * 3])})
    assert infinite.at_end("log")[:2].tolist() == [2.0, 3.0]


# ---------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"start": torch.ones(3)},
            r"start: expected latents of float32 or float64 and shape \(B, \*L\), got torch.float32",
        ),
        ({"start": torch.ones(3, 2, dtype=torch.int64)}, "start: expected latents of float32 .* got torch.int64"),
        ({"start": torch.ones(3, 2, dtype=torch.float16)}, "start: expected latents of float32 .* got torch.float16"),
        ({"self_map": None}, "f: expected a function of latents, got NoneType"),
        ({"observers": [None]}, r"observers: expected objects with a name and a method observe, got \[None\]"),
        ({"tol": -1e-9}, "tol: expected a finite squared residual >= 0, got -1e-09"),
        ({"tol": NAN}, "tol: expected a finite squared residual >= 0, got nan"),
        ({"tol": float("inf")}, "tol: expected a finite squared residual >= 0, got inf"),
        ({"max_steps": 0}, "max_steps: expected a whole number of at least 1, got 0"),
        ({"chunk": 0}, "chunk: expected a whole number of at least 1 row, got 0"),
    ],
)
def test_impossible_arguments(changes: dict[str, object], text: str) -> None:
    arguments = {"self_map": lambda z: z, "start": torch.ones(2, 2), **changes}
    with pytest.raises(TrajOODError, match=text):
        iterate(**arguments)  # type: ignore[arg-type]


def test_f_that_changes_the_shape() -> None:
    with pytest.raises(TrajOODError, match=r"f must keep the latent's shape \(3, 2\), got \(6,\): encode must return"):
        iterate(lambda z: z.flatten(1), torch.ones(2, 3, 2))


def test_unknown_measure_and_bad_horizon() -> None:
    with pytest.raises(TrajOODError, match=r"has no measure 'norm', only \['distance/tokens'\]"):
        record().measure("norm")
    with pytest.raises(TrajOODError, match="horizon: expected a number of steps >= 0, got -1"):
        record().mean_over_path("distance/tokens", -1)
