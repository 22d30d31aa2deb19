"""Threads that compute chunks side by side, one for each of torch's threads."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache
from threading import Barrier
from typing import TypeVar

import torch
from torch import Tensor

_Part = TypeVar("_Part")


def in_threads(function: Callable[[_Part], Tensor], parts: Sequence[_Part]) -> Iterator[Tensor]:
    """Yield ``function`` of every part, in order, computed in inference mode by as many threads as torch uses.

    Each part is computed by one thread, so that results do not depend on the number of threads.

    At most twice as many results as threads wait to be taken. If a call raises, the first such error in the order of
    the parts is raised once no other call is running.
    """
    threads = torch.get_num_threads()
    if threads < 2:
        yield from map(function, parts)
        return
    pool = _pool(threads)
    pending: deque[Future[Tensor]] = deque()
    torch.set_num_threads(1)  # also MKL's number, which holds for the whole process
    try:
        for part in parts:
            pending.append(pool.submit(_infer, function, part))
            if len(pending) > 2 * threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()
        wait(pending)
        torch.set_num_threads(threads)


def _infer(function: Callable[[_Part], Tensor], part: _Part) -> Tensor:
    with torch.inference_mode():  # holds for one thread only
        return function(part)


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Running threads, in each of which torch computes without further ones."""
    started = Barrier(threads)

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
