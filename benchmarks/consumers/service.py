"""A detector behind HTTP, with nothing but the standard library: python benchmarks/consumers/service.py DETECTOR

    curl --data-binary @photo.jpg http://127.0.0.1:8000/score
    {"score": 3.21, "p_value": 0.41, "ood": false, "steps": 1, "status": "ok"}

DETECTOR is a folder that `traj-ood fit` or `Detector.save` wrote. The body of a POST is one image file; the answer is
JSON. Anything else has an "error": 400 where the body is no image, 408 where it comes too slowly, 411 without its
length, 413 where the image alone is too large, and 503 with Retry-After where all clients together ask for too much.
GET /health says what is being served. It binds to the loopback interface: who is let in, TLS and rate limits for each
client are for the proxy before it.

Clients, the bytes of their bodies and the memory of decoded pixels are bounded together, see ``Bounds``.
Measured with a model of 8 x 8 pixels on two cores, 48 clients at once: 551 MiB with no load, at most 1,190 under
photographs of 12 megapixels and 1,345 under bodies of 30 MiB; images above 38 megapixels are refused. Where that is too
much, pass smaller ``Bounds``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from traj_ood import Detector, Status, TrajOODError
from traj_ood.data.decoding import open_image

_BYTES_PER_PIXEL = 28  # measured: as decoded, as RGB, and what the model's preprocessing makes of it on the way


class Bounds(NamedTuple):
    """What the service takes at most.

    Attributes:
        clients: connections at a time; each has a thread.
        body: bytes of one image file.
        bodies: bytes of all image files that are being received or waiting.
        decoded: bytes of all images that are decoded, or waiting for the detector, at 28 bytes a pixel; one image of
            more is refused.
        patience: seconds that a client may take to send its request, and that an image waits for its turn to be
            decoded.
    """

    clients: int = 32
    body: int = 32 * 2**20
    bodies: int = 128 * 2**20
    decoded: int = 2**30
    patience: float = 30.0


class RefusedError(Exception):
    """A request that is answered with this status and reason."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Budget:
    """An amount that all threads share.

    Attributes:
        peak: the largest part that was ever taken.
    """

    def __init__(self, total: int) -> None:
        self.total, self.peak = total, 0
        self._taken, self._changed = 0, threading.Condition()

    @contextlib.contextmanager
    def part(self, amount: int, patience: float) -> Iterator[None]:
        """Take ``amount`` until the block ends.

        Raises:
            RefusedError: others have not given enough back after ``patience`` seconds.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._taken + amount <= self.total, patience):
                raise RefusedError(503, "other clients' images fill the memory: try again")
            self._taken += amount
            self.peak = max(self.peak, self._taken)
        try:
            yield
        finally:
            with self._changed:
                self._taken -= amount
                self._changed.notify_all()


class Service(ThreadingHTTPServer):
    """Answers ``POST /score``. Requests are read at the same time and judged one after the other.

    Args:
        detector: calibrated or not; without calibration p_value and ood are null.
        address: host and port; port 0 takes a free one, see ``server_address``.
        bounds: see :class:`Bounds`.
    """

    daemon_threads = True
    request_queue_size = 128  # connections that the system keeps until this process takes them; 5 by default

    def __init__(
        self, detector: Detector, address: tuple[str, int] = ("127.0.0.1", 8000), bounds: Bounds | None = None
    ) -> None:
        super().__init__(address, _Handler)
        self.detector, self.bounds = detector, bounds or Bounds()
        self.bodies, self.decoded = Budget(self.bounds.bodies), Budget(self.bounds.decoded)
        self._clients = threading.BoundedSemaphore(self.bounds.clients)
        self._porters = threading.BoundedSemaphore(self.bounds.clients)  # who tell others that there is no room
        self._turn = threading.Lock()

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._clients.acquire(blocking=False):
            super().process_request(request, client_address)
        elif self._porters.acquire(blocking=False):  # the thread that accepts must not wait
            threading.Thread(target=self._turn_away, args=(request,), daemon=True).start()
        else:
            self.shutdown_request(request)

    def _turn_away(self, request: Any) -> None:
        try:
            _send(request, 503, {"error": f"{self.bounds.clients} clients are being served: try again"})
        finally:
            self.shutdown_request(request)
            self._porters.release()

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._clients.release()

    def judge(self, body: bytes) -> dict[str, Any]:
        """What the detector says of one image file.

        Raises:
            TrajOODError: not an image; large, animated and truncated files are refused by name.
            RefusedError: more pixels than there is memory for, at all or now.
        """
        with tempfile.NamedTemporaryFile() as file:  # the checks of files are checks of paths
            file.write(body)
            file.flush()
            need = _BYTES_PER_PIXEL * _pixels(file.name)
            if need > self.decoded.total:
                most = self.decoded.total // _BYTES_PER_PIXEL
                raise RefusedError(
                    413, f"expected at most {most} pixels, got {need // _BYTES_PER_PIXEL}: scale it down"
                )
            with self.decoded.part(need, self.bounds.patience):
                try:
                    image = open_image(Path(file.name), self.detector.reading)
                except TrajOODError as error:
                    raise TrajOODError(str(error).replace(file.name, "the body")) from error
                with self._turn:
                    said = self.detector.judge([image])
        return {
            "score": _number(float(said.scores[0])),
            "p_value": None if said.p_values is None else float(said.p_values[0]),
            "ood": None if said.decisions is None else bool(said.decisions[0]),
            "steps": None if said.steps is None else int(said.steps[0]),
            "status": None if said.status is None else Status(int(said.status[0])).name.lower(),
        }


class _Handler(BaseHTTPRequestHandler):
    server: Service

    def setup(self) -> None:
        self.timeout = self.server.bounds.patience + 5  # for what is sent; the clock below is the first to stop reading
        super().setup()
        # A timeout of the socket begins again with every byte; the clock of a request does not.
        self._clock = threading.Timer(self.server.bounds.patience, self._stop_reading)
        self._clock.daemon = True
        self._clock.start()

    def finish(self) -> None:
        self._clock.cancel()
        super().finish()

    def _stop_reading(self) -> None:
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RD)

    def do_GET(self) -> None:
        if self.path != "/health":
            return self._answer(404, {"error": f"no {self.path[:200]}: GET /health or POST /score"})
        return self._answer(200, {"detector": repr(self.server.detector)})

    def do_POST(self) -> None:
        if self.path != "/score":
            return self._answer(404, {"error": f"no {self.path[:200]}: GET /health or POST /score"})
        try:
            size, bounds = self._size(), self.server.bounds
            with self.server.bodies.part(size, 0):  # not waited for: whoever is sending may be slow
                body = self.rfile.read(size)
                self._clock.cancel()
                if len(body) < size:
                    raise RefusedError(408, f"expected {size} bytes within {bounds.patience:g} s, got {len(body)}")
                return self._answer(200, self.server.judge(body))
        except RefusedError as refusal:
            return self._answer(refusal.status, {"error": str(refusal)})
        except TrajOODError as error:
            return self._answer(400, {"error": str(error)})
        except MemoryError:
            return self._answer(503, {"error": "out of memory: try again, or send a smaller image"})

    def _size(self) -> int:
        """Bytes of the body.

        Raises:
            RefusedError: not given, or too many.
        """
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdecimal()):
            raise RefusedError(411, "expected a Content-Length")
        most = self.server.bounds.body
        if len(length) > 12 or int(length) > most:  # Python refuses to read numbers of thousands of digits
            raise RefusedError(413, f"expected at most {most} bytes, got {length[:20]}")
        return int(length)

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        # What is left of a body that nobody read must not be taken for the next request.
        self.close_connection = True
        self.log_request(status)
        _send(self.connection, status, content)


def _send(connection: socket.socket, status: int, content: dict[str, Any]) -> None:
    """The answer; after a refusal also take, for a second, what the client is still sending: closing a connection on
    that would take the answer away from the client."""
    with contextlib.suppress(OSError):  # the client may be gone
        connection.sendall(_response(status, content))
        if status < 400:
            return
        connection.shutdown(socket.SHUT_WR)
        connection.settimeout(1)
        end = time.monotonic() + 1
        while time.monotonic() < end and connection.recv(2**16):
            pass


def _response(status: int, content: dict[str, Any]) -> bytes:
    body = (json.dumps(content, allow_nan=False) + "\n").encode()
    lines = [f"HTTP/1.0 {status} {HTTPStatus(status).phrase}", "Content-Type: application/json"]
    lines += [f"Content-Length: {len(body)}", "Connection: close"] + (["Retry-After: 1"] if status == 503 else [])
    return "\r\n".join([*lines, "", ""]).encode() + body


def _pixels(path: str) -> int:
    """What an image's header says; 0 where there is none to be read, which decoding will tell in words."""
    try:
        with Image.open(path) as image:
            return image.width * image.height
    except Exception:  # Pillow's plugins raise OSError, SyntaxError, struct.error, … on damaged bytes
        return 0


def _number(score: float) -> float | str:
    """JSON has no infinity, which is the score of an image on which the model leaves the finite numbers."""
    return score if score != float("inf") else "Infinity"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("detector", type=Path, help="a detector's folder")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    options = parser.parse_args()
    with Service(Detector.load(options.detector, device=options.device), (options.host, options.port)) as service:
        print("serving on http://{}:{}".format(*service.server_address), flush=True)
        try:
            service.serve_forever()
        except KeyboardInterrupt:
            print("stopped")


if __name__ == "__main__":
    main()
