"""Chunks computed side by side: the same results, the first error, and torch's number of threads left alone."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future

import pytest
import torch
from torch import Tensor, nn

from traj_ood import load_autoencoder
from traj_ood.dynamics.chunks import apply_in_chunks
from traj_ood.dynamics.compiled import CompiledMap
from traj_ood.dynamics.fixed_function import FixedFunction
from traj_ood.dynamics.iterate import iterate
from traj_ood.dynamics.observers import Norm
from traj_ood.dynamics.workers import in_threads, single_threaded, thread_count
from traj_ood.errors import TrajOODError


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_results_come_in_order_and_from_several_threads() -> None:
    meeting, names = threading.Barrier(2, timeout=60), set()

    def double(part: Tensor) -> Tensor:
        meeting.wait()  # passes only if two threads are here at once
        names.add(threading.current_thread().name)
        assert torch.is_inference_mode_enabled()
        assert torch.get_num_threads() == 1
        return 2 * part

    parts = torch.arange(8.0).split(1)
    assert [float(result) for result in in_threads(double, parts)] == [0, 2, 4, 6, 8, 10, 12, 14]
    assert len(names) == 2


def test_torch_threads_stay_as_they_were() -> None:
    list(in_threads(torch.square, torch.ones(4).split(1)))
    seen = []
    other = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    other.start()
    other.join()
    assert (torch.get_num_threads(), seen) == (2, [2])


def test_first_error_in_order_is_raised_when_no_call_runs() -> None:
    running = []

    def fail(part: Tensor) -> Tensor:
        running.append(part)
        try:
            raise ValueError(f"part {int(part)}")
        finally:
            running.pop()

    with pytest.raises(ValueError, match="part 0"):
        list(in_threads(fail, torch.arange(6).split(1)))
    assert not running


def test_trajectories_equal_those_of_one_thread() -> None:
    model = load_autoencoder("fashion-mae")
    images = torch.rand(3 * model.chunk - 5, *model.input_shape, generator=torch.Generator().manual_seed(0))
    assert model.side_by_side
    threaded = model.encode(images)
    torch.set_num_threads(1)
    alone = model.encode(images)
    assert threaded.sub(alone).norm() <= 1e-6 * alone.norm()


def test_another_task_is_done_meanwhile() -> None:
    meeting, order = threading.Barrier(2, timeout=60), []

    def task() -> None:
        meeting.wait()  # passes only beside a call of the function
        assert torch.is_inference_mode_enabled()
        order.append("task")

    def meet(part: Tensor) -> Tensor:
        meeting.wait()
        return part

    assert [float(result) for result in in_threads(meet, torch.ones(1).split(1), task)] == [1]
    assert order == ["task"]
    torch.set_num_threads(1)
    found = in_threads(lambda part: order.append("call") or part, torch.ones(1).split(1), lambda: order.append("first"))  # type: ignore[func-returns-value]
    list(found)
    assert order == ["task", "first", "call"]


def test_error_of_the_other_task_is_raised() -> None:
    def task() -> None:
        raise ValueError("the task's")

    with pytest.raises(ValueError, match="the task's"):
        list(in_threads(torch.square, torch.ones(4).split(1), task))
    assert torch.get_num_threads() == 2


def test_torch_is_single_threaded_between_calls_as_asked() -> None:
    def use() -> None:
        with single_threaded() as threads:
            assert (threads, thread_count(), torch.get_num_threads()) == (2, 2, 1)
            with single_threaded() as inner:
                assert inner == 2
            test_results_come_in_order_and_from_several_threads()
            assert torch.get_num_threads() == 1
            raise ValueError("leave")

    with pytest.raises(ValueError, match="leave"):
        use()
    assert (thread_count(), torch.get_num_threads()) == (2, 2)


class Doubling(FixedFunction):
    """Doubles rows; with ``rounds``, off by 1e-7 in calls of 12 rows."""

    def __init__(self, rounds: bool) -> None:
        self.name, self.module, self.chunk, self.rounds = "doubling", nn.Linear(1, 1), 48, rounds
        self.side_by_side = True
        self.seen: list[int] = []

    def function(self, rows: Tensor) -> Tensor:
        self.seen.append(len(rows))
        return 2 * rows * (1 + 1e-7 * (self.rounds and len(rows) == 12))


@pytest.mark.parametrize(
    ("threads", "count", "calls"),
    [
        (1, 55, [12, 48]),
        (1, 144, [48, 48, 48]),
        (1, 2, [6]),
        (2, 55, [1, 6, 48]),
        (2, 144, [24, 24, 48, 48]),
        (2, 40, [6, 12, 24]),
        (2, 2, [1, 1]),
    ],
)
def test_calls_have_fewer_rows_where_that_changes_nothing(threads: int, count: int, calls: list[int]) -> None:
    torch.set_num_threads(threads)
    model, rows = Doubling(rounds=False), torch.arange(float(count))[:, None]
    with torch.inference_mode():
        plain = apply_in_chunks(model.function, rows, 48)
        assert set(model.seen) == {48}
        model.try_rows({model.function: torch.tensor([[0.3], [0.7]])})
        assert model.equal_rows == (1, 6, 12, 24)
        model.seen = []
        short = apply_in_chunks(model.function, rows, 48)
    assert short.sub(plain).abs().max() <= 1e-9
    assert sorted(model.seen) == calls


def test_numbers_of_rows_that_round_otherwise_are_not_used() -> None:
    model = Doubling(rounds=True)
    with torch.inference_mode():
        model.try_rows({model.function: torch.tensor([[0.3], [0.7]])})
    assert model.equal_rows == (1, 6, 24)
    model.side_by_side, model.equal_rows = False, ()
    model.try_rows({model.function: torch.tensor([[0.3], [0.7]])})
    assert model.equal_rows == ()


def test_compiled_functions_are_called_with_whole_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sizes that round alike were tried with the function itself, and other sizes are not compiled."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    model = Doubling(rounds=False)
    model.equal_rows = (1, 6, 12, 24)
    with torch.inference_mode():
        apply_in_chunks(CompiledMap(model.function), torch.ones(50, 1), 48)
    assert set(model.seen) == {48}


def test_rows_of_two_kinds_are_refused_and_threads_come_back() -> None:
    class Turns(Doubling):
        def function(self, rows: Tensor) -> Tensor:
            super().function(rows)
            return rows.double() if rows[0, 0] else rows

    model = Turns(rounds=False)
    with torch.inference_mode(), pytest.raises(TrajOODError, match="same shape, type and device") as caught:
        apply_in_chunks(model.function, torch.arange(480.0)[:, None], 48)  # the first chunk alone begins with 0
    # While somebody still holds the error, and with it the frames that it came through.
    assert (caught.value.__traceback__ is not None, torch.get_num_threads()) == (True, 2)


def test_an_interrupted_wait_ends_after_the_calls_that_run(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, interrupted, ended = threading.Event(), threading.Event(), list[Tensor]()

    def slow(part: Tensor) -> Tensor:
        begun.set()
        interrupted.wait(60)
        ended.append(part)
        return part

    def interrupt(future: Future[Tensor], timeout: float | None = None) -> Tensor:
        begun.wait(60)
        threading.Timer(0.2, interrupted.set).start()
        raise KeyboardInterrupt

    results = in_threads(slow, torch.ones(1).split(1))
    monkeypatch.setattr(Future, "result", interrupt)
    with pytest.raises(KeyboardInterrupt):
        next(results)
    assert (len(ended), torch.get_num_threads()) == (1, 2)


def test_trajectories_are_the_same_with_fewer_rows_a_call() -> None:
    model = load_autoencoder("fashion-mae")
    start = model.encode(torch.rand(70, *model.input_shape, generator=torch.Generator().manual_seed(0)))
    observers = [Norm()]
    short = iterate(model.self_map, start, chunk=model.chunk, max_steps=40, observers=observers)
    model.equal_rows = ()
    whole = iterate(model.self_map, start, chunk=model.chunk, max_steps=40, observers=observers)
    assert torch.equal(short.steps, whole.steps)
    assert short.final.sub(whole.final).norm() <= 1e-6 * whole.final.norm()
    torch.testing.assert_close(short.measure("norm"), whole.measure("norm"), rtol=1e-6, atol=0, equal_nan=True)


def test_unknown_networks_are_called_by_one_thread() -> None:
    names = []

    def watched(rows: Tensor) -> Tensor:
        names.append(threading.current_thread())
        return rows

    with torch.inference_mode():
        apply_in_chunks(watched, torch.ones(6, 2), 2)
    assert set(names) == {threading.main_thread()}


def _in_child() -> None:
    list(in_threads(torch.square, torch.ones(4).split(1)))
    os._exit(0)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
def test_forked_process_starts_its_own_threads() -> None:
    list(in_threads(torch.square, torch.ones(4).split(1)))
    child = multiprocessing.get_context("fork").Process(target=_in_child)
    child.start()
    child.join(60)
    assert child.exitcode == 0
