"""Threads that compute chunks side by side, one for each of torch's threads."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

_Part = TypeVar("_Part")
_Result = TypeVar("_Result")
_OUTER = threading.local()
"""The number of threads of the thread that is inside :func:`single_threaded`."""


def in_threads(
    function: Callable[[_Part], Tensor], parts: Sequence[_Part], beside: Callable[[], None] | None = None
) -> Generator[Tensor, None, None]:
    """Yield ``function`` of every part, in order, computed in inference mode by as many threads as torch uses.

    Each part is computed by a single thread, so that results do not depend on the number of threads. At most twice as
    many results as there are threads wait to be taken. If calls raise, the error of the first of these parts is raised,
    once no other call is running.

    Args:
        function: called in several threads at once.
        parts: its arguments.
        beside: another task, which one of the threads does meanwhile; with a single thread it is done first.
    """
    with single_threaded() as threads:
        if threads < 2:
            if beside is not None:
                beside()
            yield from map(function, parts)
            return
        pool = _pool(threads)
        pending: deque[Future[Tensor]] = deque()
        other: list[Future[None]] = [] if beside is None else [pool.submit(_infer, beside)]
        try:
            for part in parts:
                pending.append(pool.submit(_infer, function, part))
                if len(pending) > 2 * threads:
                    yield pending[0].result()  # stays in the queue, to be waited for if it is interrupted
                    pending.popleft()
            while pending:
                yield pending[0].result()
                pending.popleft()
            for task in other:
                task.result()
        finally:
            for future in pending:
                future.cancel()
            wait(pending)
            wait(other)


@contextmanager
def single_threaded() -> Iterator[int]:
    """Context in which torch's own operations have one thread, and :func:`in_threads` has as many as torch had before;
    yields that number.

    Enter it around a sequence of calls of :func:`in_threads`. Otherwise torch's operations between two calls wake its
    OpenMP threads, which keep their cores busy for a while after each operation and slow the next call.
    """
    threads = thread_count()
    if torch.get_num_threads() < 2:
        yield threads
        return
    _pool(threads)
    _OUTER.threads = threads
    torch.set_num_threads(1)  # also MKL's number, which holds for the whole process
    try:
        yield threads
    finally:
        _OUTER.threads = None
        torch.set_num_threads(threads)


def thread_count() -> int:
    """The number of threads that :func:`in_threads` uses."""
    return getattr(_OUTER, "threads", None) or torch.get_num_threads()


def _infer(function: Callable[..., _Result], *arguments: Any) -> _Result:
    with torch.inference_mode():  # holds for one thread only
        return function(*arguments)


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """A pool of started threads, in each of which torch's operations have one thread."""
    started = threading.Barrier(threads)

    def start() -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()  # from the first read on, torch keeps a thread's own number
        started.wait()

    pool = ThreadPoolExecutor(threads, "traj_ood-chunk")
    wait([pool.submit(start) for _ in range(threads)])
    torch.set_num_threads(threads)  # torch gives the number set last to new threads
    return pool


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a child process has the pool's object without its threads
