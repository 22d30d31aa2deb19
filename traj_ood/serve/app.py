"""The application: ``/v1/score``, ``/healthz``, ``/readyz``, ``/metrics``.

A request passes: its body is received, bounded in bytes and time; image files are taken out of it; headers are read,
and what is too large is refused before it is decoded; images are decoded and prepared in threads, within a budget of
bytes; they wait in a bounded queue, are judged with those of other clients, and the answer has one decision for each.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from torch import Tensor

from traj_ood.data.decoding import open_bytes, size_of
from traj_ood.detector import Detector
from traj_ood.detector.decision import Decision
from traj_ood.errors import TrajOODError
from traj_ood.serve.batcher import Batcher
from traj_ood.serve.bodies import Upload, receive, uploads
from traj_ood.serve.held import Held
from traj_ood.serve.limits import BYTES_PER_PIXEL, Budget, Limits, RefusedError
from traj_ood.serve.log import RowLog
from traj_ood.serve.metrics import Metrics
from traj_ood.serve.schema import DESCRIPTION, score_route

_LOOK = 2.0  # seconds between looks at the detector's folder
_log = logging.getLogger("traj_ood.serve")


class Service:
    """What the requests of one application share."""

    def __init__(self, held: Held, limits: Limits, rows: RowLog | None, decoders: int) -> None:
        self.held, self.limits, self.rows = held, limits, rows
        self.metrics = Metrics()
        self.bodies = Budget(limits.bodies, "bytes of bodies")
        self.decoded = Budget(limits.decoded, "bytes of decoded images")
        self.batcher = Batcher(limits, self.metrics.batch.observe)
        self.is_ready = False
        self._decoders = ThreadPoolExecutor(decoders, thread_name_prefix="decode")
        self.metrics.watch("queued_images", "Images that wait or are judged", lambda: self.batcher.queue.taken)
        self.metrics.watch("body_bytes", "Bytes of bodies in flight", lambda: self.bodies.taken)
        self.metrics.watch("decoded_bytes", "Bytes of images being decoded", lambda: self.decoded.taken)
        self.metrics.detector.labels(held.now.digest).set(1)

    async def answer(self, request: Request) -> dict[str, Any]:
        """The decisions for a request.

        Raises:
            RefusedError: as the functions it calls; 504 when the detector takes too long.
        """
        body = await receive(request, self.limits, self.bodies)
        size = len(body)
        try:
            files = await uploads(request, body, self.limits)
            del body  # its images are kept until the answer, and no second copy
            with self.batcher.queue.part(len(files)):
                return await asyncio.wait_for(self._judged(files), self.limits.patience)
        except asyncio.TimeoutError as error:
            raise RefusedError(504, f"no answer within {self.limits.patience:g} s: try again later") from error
        finally:
            self.bodies.give(size)

    async def _judged(self, files: Sequence[Upload]) -> dict[str, Any]:
        now = self.held.now  # one detector for the whole request
        prepared = [await self._prepared(file, now.detector) for file in files]
        judged = iter(await self.batcher.decide([p for p in prepared if isinstance(p, Tensor)], now.judge))
        said = [next(judged) if isinstance(p, Tensor) else p for p in prepared]
        names = [file.name for file in files]
        for one in said:
            self.metrics.images.labels(one.reason.partition(":")[0]).inc()
        self._log(now.digest, names, said)
        decisions = [{"name": name, **one.as_dict()} for name, one in zip(names, said, strict=True)]
        return {"detector": now.digest, "decisions": decisions}

    async def _prepared(self, file: Upload, detector: Detector) -> Tensor | Decision:
        loop = asyncio.get_running_loop()
        width, height = await loop.run_in_executor(self._decoders, size_of, file.content)
        if width * height > self.limits.pixels:
            raise RefusedError(
                413, f"{file.name}: expected at most {self.limits.pixels} pixels, got {width} x {height}: scale it down"
            )
        size = min(width * height * BYTES_PER_PIXEL, self.decoded.total)
        self.decoded.take(size)
        work = self._decoders.submit(_prepare, file, detector)

        def free(_: object) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the service has ended
                loop.call_soon_threadsafe(self.decoded.give, size)

        work.add_done_callback(free)  # when the thread is done with it: who gives up waiting does not free its memory
        return await asyncio.wrap_future(work)

    def _log(self, digest: str, names: Sequence[str], said: Sequence[Decision]) -> None:
        """Rows of what was judged. A full disk costs rows, which is told, and not answers."""
        try:
            if self.rows is not None:
                self.rows.write(digest, names, said)
        except TrajOODError as error:
            self.metrics.lost.inc(len(said))
            _log.error("%d rows are lost: %s", len(said), error)

    async def look(self, seconds: float) -> None:
        """Take the folder's detector whenever it has changed, until cancelled."""
        while True:
            await asyncio.sleep(seconds)
            before, failed = self.held.now.digest, self.held.failure
            try:
                changed = await asyncio.get_running_loop().run_in_executor(None, self.held.reload)
            except Exception as error:  # the old one stays, whatever the new one does
                changed, self.held.failure = False, f"{type(error).__name__}: {error}"
            if changed:
                self.metrics.reloads.labels("taken").inc()
                self.metrics.detector.remove(before)
                self.metrics.detector.labels(self.held.now.digest).set(1)
                _log.warning("detector %s is in use now, in place of %s", self.held.now.digest, before)
            elif self.held.failure and self.held.failure != failed:
                self.metrics.reloads.labels("refused").inc()
                _log.error("the detector in the folder is not taken: %s", self.held.failure)

    def close(self) -> None:
        self.batcher.close()
        self._decoders.shutdown(wait=False, cancel_futures=True)


def create_app(
    source: Detector | str | Path,
    *,
    limits: Limits | None = None,
    device: str = "auto",
    log: str | Path | None = None,
    decoders: int = 2,
    look: float = _LOOK,
) -> FastAPI:
    """The ASGI application of a detector, for uvicorn or any other server; one process, one event loop.

    Args:
        source: a detector, or its folder, which is looked at every ``look`` seconds and loaded anew when it changes.
        limits: see :class:`Limits`; the defaults suit a machine of 4 GiB.
        device: where a folder's detector computes.
        log: a folder for rows of all that was judged (names and numbers, no images); None (default) writes none.
        decoders: threads that decode images. Default 2.
    Raises:
        TrajOODError: a folder that is no detector, or is damaged.
    """
    limits = limits or Limits()
    rows = None if log is None else RowLog(Path(log))
    service = Service(Held(source, device), limits, rows, decoders)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(service.batcher.run()), asyncio.create_task(service.look(look))]
        service.is_ready = True
        try:
            yield
        finally:
            service.is_ready = False
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            service.close()

    app = FastAPI(title="traj_ood", version="1", description=DESCRIPTION, lifespan=lifespan)
    app.state.service = service

    @app.post("/v1/score", **score_route(limits.images))
    async def score(request: Request) -> Response:
        """One decision for each image, in order."""
        began = time.perf_counter()
        status, content = await _answered(service, request)
        service.metrics.requests.labels(str(status)).inc()
        service.metrics.seconds.observe(time.perf_counter() - began)
        headers = {"Retry-After": "1"} if status == 429 else None
        return JSONResponse(content, status, headers)

    @app.get("/healthz", summary="The process lives")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz", summary="A detector is ready to judge", responses={503: {"description": "It is not."}})
    async def readyz() -> Response:
        now = service.held.now
        content = {"status": "ok", "detector": now.digest, "is": repr(now.detector), "refused": service.held.failure}
        return JSONResponse(content if service.is_ready else {"status": "stopping"}, 200 if service.is_ready else 503)

    @app.get("/metrics", summary="Prometheus text", response_class=Response)
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return app


async def _answered(service: Service, request: Request) -> tuple[int, dict[str, Any]]:
    try:
        return 200, await service.answer(request)
    except RefusedError as refusal:
        return refusal.status, {"error": str(refusal)}
    except (TrajOODError, MemoryError, RuntimeError) as error:
        _log.error("a request failed: %r", error)
        return 503, {"error": "the detector failed on this request: try again"}


def _prepare(file: Upload, detector: Detector) -> Tensor | Decision:
    """The image (C, H, W) in the model's units, or why there is none."""
    try:
        image = open_bytes(file.content, "the image", detector.reading)
        return detector.autoencoder.transform(image)
    except TrajOODError as error:
        return Decision(error=str(error).removeprefix("the image: "))
    except Exception as error:  # a transform may be anybody's
        return Decision(error=f"the model's transform failed: {type(error).__name__}")
