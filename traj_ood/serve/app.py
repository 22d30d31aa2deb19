"""The ASGI application with ``/v1/score``, ``/healthz``, ``/readyz`` and ``/metrics``.

A request is handled in these steps. Its body is received, limited in bytes and time, and split into image files. Image
headers are read, and images that are too large are refused before decoding. Images are decoded and prepared in threads,
within a budget of bytes. They wait in a bounded queue and are judged together with those of other clients. The response
has one decision per image.
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
from traj_ood.serve.metrics import ServiceMetrics
from traj_ood.serve.schema import DESCRIPTION, score_route

_RELOAD_SECONDS = 2.0  # between checks whether the detector's folder has changed
_log = logging.getLogger("traj_ood.serve")


class Service:
    """The state that all requests of an application share."""

    def __init__(self, held: Held, limits: Limits, rows: RowLog | None, decoders: int) -> None:
        self.held, self.limits, self.rows = held, limits, rows
        self.metrics = ServiceMetrics()
        self.bodies = Budget(limits.bodies, "bytes of bodies")
        self.decoded = Budget(limits.decoded, "bytes of decoded images")
        self.batcher = Batcher(limits, self.metrics.batch.observe)
        self.is_ready = False
        self._decoders = ThreadPoolExecutor(decoders, thread_name_prefix="decode")
        self.metrics.watch("queued_images", "Images waiting or being judged", lambda: self.batcher.queue.taken)
        self.metrics.watch("body_bytes", "Bytes of request bodies in memory", lambda: self.bodies.taken)
        self.metrics.watch("decoded_bytes", "Bytes of images being decoded", lambda: self.decoded.taken)
        self.metrics.detector.labels(held.now.digest).set(1)

    async def answer(self, request: Request) -> dict[str, Any]:
        """The response to a request: the detector's digest and one decision per image."""
        body = await receive(request, self.limits, self.bodies)
        size = len(body)
        try:
            files = await uploads(request, body, self.limits)
            del body  # keep one copy of the images until the response
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
        decisions = [next(judged) if isinstance(p, Tensor) else p for p in prepared]
        names = [file.name for file in files]
        for decision in decisions:
            self.metrics.images.labels(decision.reason.partition(":")[0]).inc()
        self._log(now.digest, names, decisions)
        records = [{"name": name, **made.as_dict()} for name, made in zip(names, decisions, strict=True)]
        return {"detector": now.digest, "decisions": records}

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
            with contextlib.suppress(RuntimeError):  # the loop is closed: the service has stopped
                loop.call_soon_threadsafe(self.decoded.give, size)

        work.add_done_callback(free)  # when the thread is done: a cancelled request does not free its memory
        return await asyncio.wrap_future(work)

    def _log(self, digest: str, names: Sequence[str], decisions: Sequence[Decision]) -> None:
        """Write one row per decision. Rows lost to a full disk are counted and logged; the request succeeds."""
        try:
            if self.rows is not None:
                self.rows.write(digest, names, decisions)
        except TrajOODError as error:
            self.metrics.lost.inc(len(decisions))
            _log.error("%d rows are lost: %s", len(decisions), error)

    async def reload_every(self, seconds: float) -> None:
        """Reload the detector whenever its folder has changed, until cancelled."""
        while True:
            await asyncio.sleep(seconds)
            before, failed = self.held.now.digest, self.held.failure
            try:
                changed = await asyncio.get_running_loop().run_in_executor(None, self.held.reload)
            except Exception as error:  # keep the old detector, whatever the new one raises
                changed, self.held.failure = False, f"{type(error).__name__}: {error}"
            if changed:
                self.metrics.reloads.labels("taken").inc()
                self.metrics.detector.remove(before)
                self.metrics.detector.labels(self.held.now.digest).set(1)
                _log.warning("detector %s is in use now, in place of %s", self.held.now.digest, before)
            elif self.held.failure and self.held.failure != failed:
                self.metrics.reloads.labels("refused").inc()
                _log.error("the detector in the folder is not used: %s", self.held.failure)

    @contextlib.asynccontextmanager
    async def running(self, look: float) -> AsyncIterator[None]:
        """Context manager in which requests are answered, and the detector is reloaded every ``look`` seconds."""
        tasks = [asyncio.create_task(self.batcher.run()), asyncio.create_task(self.reload_every(look))]
        self.is_ready = True
        try:
            yield
        finally:
            self.is_ready = False
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self.batcher.close()
            self._decoders.shutdown(wait=False, cancel_futures=True)


def create_app(
    source: Detector | str | Path,
    *,
    limits: Limits | None = None,
    device: str = "auto",
    log: str | Path | None = None,
    decoders: int = 2,
    look: float = _RELOAD_SECONDS,
) -> FastAPI:
    """The ASGI application of a detector, for uvicorn or any other server; one process, one event loop.

    Args:
        source: a detector, or its folder, which is reloaded when it changes.
        limits: see :class:`Limits`; the defaults suit a machine with 4 GiB of memory.
        device: device of a detector that is loaded from a folder.
        log: folder for a log of all decisions (names and numbers, no images). Default None: no log.
        decoders: threads that decode images. Default 2.
        look: seconds between checks whether the folder has changed. Default 2.
    """
    rows = None if log is None else RowLog(Path(log))
    service = Service(Held(source, device), limits or Limits(), rows, decoders)
    app = FastAPI(title="traj_ood", version="1", description=DESCRIPTION, lifespan=lambda _: service.running(look))
    app.state.service = service
    _add_routes(app, service)
    return app


def _add_routes(app: FastAPI, service: Service) -> None:
    @app.post("/v1/score", **score_route(service.limits.images))
    async def score(request: Request) -> Response:
        """One decision per image, in order."""
        began = time.perf_counter()
        status, content = await _answered(service, request)
        service.metrics.requests.labels(str(status)).inc()
        service.metrics.seconds.observe(time.perf_counter() - began)
        headers = {"Retry-After": "1"} if status == 429 else None
        return JSONResponse(content, status, headers)

    @app.get("/healthz", summary="The process is alive")
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


async def _answered(service: Service, request: Request) -> tuple[int, dict[str, Any]]:
    try:
        return 200, await service.answer(request)
    except RefusedError as refusal:
        return refusal.status, {"error": str(refusal)}
    except (TrajOODError, MemoryError, RuntimeError) as error:
        _log.error("a request failed: %r", error)
        return 503, {"error": "the detector failed on this request: try again"}


def _prepare(file: Upload, detector: Detector) -> Tensor | Decision:
    """The image (C, H, W) in the model's units, or a decision with the error."""
    try:
        image = open_bytes(file.content, "the image", detector.reading)
        return detector.autoencoder.transform(image)
    except TrajOODError as error:
        return Decision(error=str(error).removeprefix("the image: "))
    except Exception as error:  # user code may raise anything
        return Decision(error=f"the model's transform failed: {type(error).__name__}")
