"""A detector behind HTTP, with nothing but the standard library: python benchmarks/consumers/service.py DETECTOR

    curl --data-binary @photo.jpg http://127.0.0.1:8000/score
    {"score": 3.21, "p_value": 0.41, "ood": false, "steps": 1, "status": "step_limit"}

DETECTOR is a folder that `traj-ood fit` or `Detector.save` wrote. The body of a POST is one image file; the answer is
JSON, with status 400 and an "error" where the body is no image. GET /health says what is being served. It binds to the
loopback interface: who is let in, TLS and rate limits are for the proxy before it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from traj_ood import Detector, Status, TrajOODError
from traj_ood.data.decoding import open_image

MOST_BYTES = 32 * 2**20
_PATIENCE = 30  # seconds a client may take to send its image


class Service(ThreadingHTTPServer):
    """Answers ``POST /score``. Requests are read at the same time and judged one after the other.

    Args:
        detector: calibrated or not; without calibration p_value and ood are null.
        address: host and port; port 0 takes a free one, see ``server_address``.
    """

    daemon_threads = True

    def __init__(self, detector: Detector, address: tuple[str, int] = ("127.0.0.1", 8000)) -> None:
        super().__init__(address, _Handler)
        self.detector = detector
        self.turn = threading.Lock()

    def judge(self, body: bytes) -> dict[str, Any]:
        """What the detector says of one image file.

        Raises:
            TrajOODError: not an image; large, animated and truncated files are refused by name.
        """
        with tempfile.NamedTemporaryFile() as file:  # the checks of files are checks of paths
            file.write(body)
            file.flush()
            try:
                image = open_image(Path(file.name), self.detector.reading)
            except TrajOODError as error:
                raise TrajOODError(str(error).replace(file.name, "the body")) from error
        with self.turn:
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
    timeout = _PATIENCE

    def do_GET(self) -> None:
        if self.path != "/health":
            return self._answer(404, {"error": f"no {self.path}: GET /health or POST /score"})
        return self._answer(200, {"detector": repr(self.server.detector)})

    def do_POST(self) -> None:
        if self.path != "/score":
            return self._answer(404, {"error": f"no {self.path}: GET /health or POST /score"})
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            return self._answer(411, {"error": "expected a Content-Length"})
        if len(length) > 12 or int(length) > MOST_BYTES:  # Python refuses to read numbers of thousands of digits
            return self._answer(413, {"error": f"expected at most {MOST_BYTES} bytes, got {length[:20]}"})
        try:
            return self._answer(200, self.server.judge(self.rfile.read(int(length))))
        except TrajOODError as error:
            return self._answer(400, {"error": str(error)})

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        body = (json.dumps(content, allow_nan=False) + "\n").encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if status >= 400:  # what is left of a body that nobody read must not be taken for the next request
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        self.wfile.write(body)


def _number(score: float) -> float | str:
    """JSON has no infinity, which is the score of an image on which the model leaves the finite numbers."""
    return score if score != float("inf") else "inf"


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
