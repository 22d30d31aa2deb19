"""Batching of images across clients."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from torch import Tensor

from traj_ood.detector.decision import Decision
from traj_ood.serve.limits import Budget, Limits

Judge = Callable[[Sequence[Tensor]], list[Decision]]


@dataclass(frozen=True)
class _Waiting:
    image: Tensor
    judge: Judge
    answer: asyncio.Future[Decision]


class Batcher:
    """Collects images into batches and judges them in a thread. ``queue`` is the budget of images that wait or are
    being judged.

    A batch is complete when it has ``limits.batch`` images, or when the first has waited ``limits.linger`` seconds. The
    queue fills while a batch is judged, so that under load batches are full without waiting. Images for different
    detectors (after a reload) are never in the same batch.
    """

    def __init__(self, limits: Limits, on_batch: Callable[[int], object] = lambda size: None) -> None:
        self.queue = Budget(limits.queue, "images in the queue")
        self._limits, self._on_batch = limits, on_batch
        self._waiting: asyncio.Queue[_Waiting] = asyncio.Queue()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="judge")
        self._held: _Waiting | None = None

    async def decide(self, images: Sequence[Tensor], judge: Judge) -> list[Decision]:
        """The decisions of ``judge`` on images (C, H, W), in order. The caller has reserved their part of ``queue``."""
        loop = asyncio.get_running_loop()
        waiting = [_Waiting(image, judge, loop.create_future()) for image in images]
        for one in waiting:
            self._waiting.put_nowait(one)
        return list(await asyncio.gather(*(one.answer for one in waiting)))

    async def run(self) -> None:
        """Judge batches until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            batch = [one for one in await self._collect() if not one.answer.done()]  # done: its client has left
            if not batch:
                continue
            self._on_batch(len(batch))
            try:
                decisions = await loop.run_in_executor(self._thread, batch[0].judge, [one.image for one in batch])
                for one, decision in zip(batch, decisions, strict=True):
                    if not one.answer.done():
                        one.answer.set_result(decision)
            except Exception as error:  # raised in the requests of this batch; the service goes on
                for one in batch:
                    if not one.answer.done():
                        one.answer.set_exception(error)

    async def _collect(self) -> list[_Waiting]:
        first = self._held or await self._waiting.get()
        self._held = None
        batch, loop = [first], asyncio.get_running_loop()
        deadline = loop.time() + self._limits.linger
        while len(batch) < self._limits.batch:
            if not self._waiting.empty():
                one = self._waiting.get_nowait()
            else:
                try:
                    one = await asyncio.wait_for(self._waiting.get(), max(0.0, deadline - loop.time()))
                except asyncio.TimeoutError:
                    break
            if one.judge is not first.judge:
                self._held = one
                break
            batch.append(one)
        return batch

    def close(self) -> None:
        with contextlib.suppress(RuntimeError):
            self._thread.shutdown(wait=False, cancel_futures=True)
