"""Chunks computed side by side: the same results, the first error, and torch's number of threads left alone."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from traj_ood import load_autoencoder
from traj_ood.dynamics.chunks import apply_in_chunks
from traj_ood.dynamics.workers import in_threads


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
