"""The service: decisions as in Python, bounds that hold, batches across clients, reloads that prove their seal."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import http.client
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from click.testing import CliRunner
from PIL import Image

from traj_ood import Detector, Normalised
from traj_ood.cli import main
from traj_ood.detector.decision import decide_all
from traj_ood.errors import TrajOODError

pytest.importorskip("fastapi", reason="needs traj_ood[serve]")
pytest.importorskip("multipart", reason="needs traj_ood[serve]")
pytest.importorskip("httpx", reason="needs httpx")

from starlette.testclient import TestClient

from traj_ood.serve import Held, Limits, create_app
from traj_ood.serve.batcher import Batcher
from traj_ood.serve.connections import connections
from traj_ood.serve.log import append

FEW = 1e-3  # calls of few images have fewer rows than a stream's, and this untrained network passes rounding on


def fitted(seed: int = 9) -> Detector:
    model = tiny.conv()
    made = Detector.fit(model, Normalised(tiny.images(30, model.input_shape)), "field")
    return made.calibrate(Normalised(tiny.images(40, model.input_shape, seed=seed)))


@pytest.fixture(scope="module")
def detector() -> Detector:
    return fitted()


@pytest.fixture(scope="module")
def client(detector: Detector) -> Iterator[TestClient]:
    with TestClient(create_app(detector, limits=Limits(images=8, body=100_000, pixels=40_000))) as client:
        yield client


def picture(size: int | tuple[int, int] = 20, seed: int = 0, form: str = "PNG") -> bytes:
    width, height = (size, size) if isinstance(size, int) else size
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width), dtype=np.uint8)
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


def expected(detector: Detector, contents: list[bytes]) -> list[dict[str, Any]]:
    images = [Image.open(io.BytesIO(content)) for content in contents]
    return [one.as_dict() for one in detector.decide(images)]


def assert_same(answer: Any, told: list[dict[str, Any]]) -> None:
    assert answer.status_code == 200, answer.text
    for one, own in zip(answer.json()["decisions"], told, strict=True):
        assert one.pop("name")
        assert one.pop("score") == pytest.approx(own["score"], rel=FEW)
        assert one == {key: value for key, value in own.items() if key != "score"}


def test_every_way_of_asking_says_what_the_detector_says(client: TestClient, detector: Detector) -> None:
    contents = [picture(seed=1), picture(33, seed=2), picture(8, seed=3, form="BMP")]
    told = expected(detector, contents)
    files = [("images", (f"{i}.png", content)) for i, content in enumerate(contents)]
    answer = client.post("/v1/score", files=files)
    assert [one["name"] for one in answer.json()["decisions"]] == ["0.png", "1.png", "2.png"]
    assert_same(answer, told)
    encoded = [base64.b64encode(content).decode() for content in contents]
    assert_same(client.post("/v1/score", json={"images": encoded}), told)
    alone = client.post("/v1/score", content=contents[0], headers={"Content-Type": "image/png"})
    assert_same(alone, told[:1])


def test_what_is_no_image_is_an_invalid_decision(client: TestClient) -> None:
    torn = picture(seed=1)[:60]
    files = [("images", ("a.png", picture(seed=1))), ("images", ("b\n.png", torn)), ("images", ("c", b""))]
    answer = client.post("/v1/score", files=files)
    assert answer.status_code == 200
    first, second, third = answer.json()["decisions"]
    assert first["reason"] in ("ok", "ood")
    assert second["reason"].startswith("invalid: ")
    assert (second["score"], second["p_value"], second["decision"]) == (None, None, None)
    assert third["reason"] == "invalid: expected an image, found nothing (0 bytes)"


@pytest.mark.parametrize(
    ("ask", "status", "reason"),
    [
        ({"json": {"images": []}}, 400, "expected at least one image, got none"),
        ({"json": {"images": "x"}}, 400, "JSON: expected"),
        ({"json": {"images": ["%%%"]}}, 400, "images[0]: not base64"),
        ({"json": {"images": [3]}}, 400, "images[0]: expected base64 text, got int"),
        ({"content": b"[" * 50_000, "headers": {"Content-Type": "application/json"}}, 400, "JSON: "),
        ({"content": b"x", "headers": {"Content-Type": "text/html"}}, 415, "expected multipart/form-data"),
        ({"content": b"x", "headers": {"Content-Type": "multipart/form-data"}}, 400, "multipart: "),
        ({"content": b"x", "headers": {"Content-Type": "multipart/form-data; boundary=a"}}, 400, ""),
        ({"data": {"images": "text"}, "files": {"images": b""}}, 400, "expected files named images, got the field"),
        ({"files": {"a": b""}}, 400, "multipart: expected files named images, got the field 'a'"),
        ({"json": {"images": [], "more": 1}}, 400, "JSON: expected"),
        ({"json": {"images": [""] * 9}}, 413, "expected at most 8 images, got 9"),
        ({"content": b'{"images": [[], []]}', "headers": {"Content-Type": "application/json"}}, 400, "JSON: expected"),
        ({"content": b"[" + b"1," * 40_000 + b"1]", "headers": {"Content-Type": "application/json"}}, 413, "got 40001"),
        ({"data": {"images": "x" * 5000}, "files": {"images": b""}}, 400, "multipart: Part exceeded maximum size"),
        ({"files": [("images", ("a", b"x"))] * 9}, 413, "multipart: Too many files"),
        ({"content": b"x" * 100_001, "headers": {"Content-Type": "image/png"}}, 413, "body: expected at most 100000"),
        (
            {"content": picture((201, 200)), "headers": {"Content-Type": "image/png"}},
            413,
            "40000 pixels, got 201 x 200",
        ),
    ],
)
def test_refusals_have_a_status_and_a_reason(client: TestClient, ask: Any, status: int, reason: str) -> None:
    answer = client.post("/v1/score", **ask)
    assert answer.status_code == status, answer.text
    assert reason in answer.json()["error"]
    service = client.app.state.service  # type: ignore[attr-defined]
    assert (service.bodies.taken, service.decoded.taken, service.batcher.queue.taken) == (0, 0, 0)


def test_a_body_without_a_length_is_bounded_as_well(client: TestClient) -> None:
    parts = (b"x" * 10_000 for _ in range(1000))
    answer = client.post("/v1/score", content=parts, headers={"Content-Type": "image/png"})
    assert answer.status_code == 413


def test_a_request_that_no_queue_could_take_is_too_large_and_no_limit_is_nonsense() -> None:
    assert (Limits(images=64, queue=10).images, Limits(body=10, bodies=5).body) == (10, 5)
    for wrong, text in (
        ({"patience": 0.0}, "patience: expected a number above 0, got 0"),
        ({"patience": float("nan")}, "patience: expected a number above 0"),
        ({"linger": -1.0}, "linger: expected seconds from 0"),
        ({"batch": 0}, "batch: expected a number above 0, got 0"),
    ):
        with pytest.raises(TrajOODError, match=text):
            Limits(**wrong)  # type: ignore[arg-type]


def test_rows_that_cannot_be_written_are_counted_and_cost_no_answer(detector: Detector, tmp_path: Path) -> None:
    with TestClient(create_app(detector, log=tmp_path / "rows")) as client:
        (tmp_path / "rows" / "memory").write_text("in the way of the folder")
        assert client.post("/v1/score", files=[("images", ("a", picture()))]).status_code == 200
        assert "traj_ood_lost_rows_total 1.0" in client.get("/metrics").text
        (tmp_path / "rows" / "memory").unlink()
        (tmp_path / "rows").rmdir()  # moved away, to begin new rows
        assert client.post("/v1/score", files=[("images", ("a", picture()))]).status_code == 200
        assert len(list((tmp_path / "rows" / "memory").glob("*.jsonl"))) == 1
    detector.save(tmp_path / "d")
    with pytest.raises(TrajOODError, match="expected a place outside of any detector"):
        create_app(detector, log=tmp_path / "d" / "rows")


def test_half_of_the_rows_are_none(tmp_path: Path) -> None:
    """A disk that fills up within a write."""

    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            return super().write(data[: len(data) // 2])

    (tmp_path / "rows.jsonl").write_text("{}\n")
    with Full(tmp_path / "rows.jsonl", "ab") as file, pytest.raises(OSError, match="No space left"):
        append(file, b'{"path": "a"}\n{"path": "b"}\n')
    assert (tmp_path / "rows.jsonl").read_text() == "{}\n"


def test_probes_metrics_and_the_description(client: TestClient) -> None:
    client.post("/v1/score", files=[("images", ("a.png", picture()))])
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/readyz").json()["detector"] == "memory"
    text = client.get("/metrics").text
    for name in ("traj_ood_requests_total", "traj_ood_images_total", "traj_ood_queued_images 0.0", "traj_ood_batch"):
        assert name in text
    assert "/v1/score" in client.get("/openapi.json").json()["paths"]


def test_no_image_touches_a_disk(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a file was made")

    monkeypatch.setattr(tempfile, "_mkstemp_inner", refuse)
    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(tempfile.SpooledTemporaryFile, "rollover", refuse)
    files = [("images", ("a.bmp", picture(190, form="BMP"))), ("images", ("b.bmp", picture(190, form="BMP")))]
    assert client.post("/v1/score", files=files).status_code == 200


# ---------------------------------------------------------------------- under load


def test_images_of_many_requests_are_judged_together_and_too_many_are_told_so(detector: Detector) -> None:
    """While the detector is held up the queue fills: what waits is judged in one batch, what is beyond it is 429."""
    sizes: list[int] = []
    go = threading.Event()

    class Slow:
        def __getattr__(self, name: str) -> Any:
            return getattr(detector, name)

        def judge(self, images: Any) -> Any:
            sizes.append(len(images.images))
            go.wait(tiny.PATIENCE)
            return detector.judge(images)

    app = create_app(detector, limits=Limits(queue=10, batch=64, linger=0.0))
    app.state.service.held.now = replace(app.state.service.held.now, judge=partial(decide_all, Slow().judge))
    with TestClient(app) as client:
        answers: list[Any] = []

        def ask(seed: int) -> None:
            answers.append(client.post("/v1/score", files=[("images", ("a", picture(seed=seed)))]))

        threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(10)]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + tiny.PATIENCE
        while app.state.service.batcher.queue.taken < 10:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        full = client.post("/v1/score", files=[("images", ("a", picture()))])
        assert full.status_code == 429
        assert full.headers["Retry-After"] == "1"
        assert "images in the queue: 10 are taken" in full.json()["error"]
        while app.state.service.decoded.taken or app.state.service.batcher._waiting.qsize() + sum(sizes) < 10:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        go.set()
        for thread in threads:
            thread.join()
        assert [answer.status_code for answer in answers] == [200] * 10
        assert sum(sizes) == 10
        assert len(sizes) <= 3  # the first alone, the others together
        assert app.state.service.batcher.queue.taken == 0


def test_an_answer_that_takes_too_long_is_told_and_forgotten(detector: Detector) -> None:
    app = create_app(detector, limits=Limits(patience=0.2, linger=0.0))
    go = threading.Event()

    def stuck(images: Any) -> Any:
        go.wait(tiny.PATIENCE)
        return [None] * len(images)

    app.state.service.held.now = replace(app.state.service.held.now, judge=stuck)
    with TestClient(app) as client:
        answer = client.post("/v1/score", files=[("images", ("a", picture()))])
        assert answer.status_code == 504
        assert app.state.service.batcher.queue.taken == 0
        go.set()


def test_a_judge_that_fails_is_told_and_the_next_one_is_served() -> None:
    async def run() -> None:
        batcher = Batcher(Limits(linger=0.0))
        task = asyncio.create_task(batcher.run())

        def fail(images: Any) -> Any:
            raise RuntimeError("broken")

        with pytest.raises(RuntimeError, match="broken"):
            await batcher.decide([torch.zeros(1)], fail)
        assert await batcher.decide([torch.zeros(1)], lambda images: ["fine"] * len(images)) == ["fine"]  # type: ignore[list-item]
        task.cancel()
        batcher.close()

    asyncio.run(run())


# ---------------------------------------------------------------------- another detector


def test_a_folder_is_taken_when_its_seal_holds_and_only_then(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    first, second = fitted(), fitted(seed=3)
    first.save(folder)
    app = create_app(folder, device="cpu", log=tmp_path / "rows", look=3600)
    held = app.state.service.held
    with TestClient(app) as client:
        told = expected(first, [picture()])
        assert_same(client.post("/v1/score", files=[("images", ("a", picture()))]), told)
        digest = held.now.digest
        assert not held.reload()
        second.save(folder)
        assert held.reload()
        assert held.now.digest != digest
        assert_same(client.post("/v1/score", files=[("images", ("a", picture()))]), expected(second, [picture()]))

        (folder / "scorer.safetensors").write_bytes(b"x")
        record = (folder / "detector.json").read_text()
        (folder / "detector.json").write_text(record)  # touched
        os.utime(folder / "detector.json", (1, 1))
        assert not held.reload()
        assert "damaged" in held.failure
        assert client.get("/readyz").json()["refused"] == held.failure
        assert_same(client.post("/v1/score", files=[("images", ("a", picture()))]), expected(second, [picture()]))
        shutil.rmtree(folder)
        assert not held.reload()
        assert client.post("/v1/score", files=[("images", ("a", picture()))]).status_code == 200

    logs = sorted((tmp_path / "rows").rglob("*.jsonl"))
    assert {path.parent.name for path in logs} == {digest, held.now.digest}
    lines = [json.loads(line) for path in logs for line in path.read_text().splitlines()]
    assert len(lines) == 4
    assert all(line["path"] == "a" and line["at"] for line in lines)
    from traj_ood.monitor import read_rows

    read_rows([tmp_path / "rows" / digest]).check(first.calibration)


@pytest.mark.parametrize("last", ["detector.json", "scorer.safetensors", "model/model.safetensors"])
def test_a_folder_that_is_being_written_is_taken_when_it_is_whole(tmp_path: Path, last: str) -> None:
    """Whichever file comes last: somebody copies file by file into the served folder."""
    first, second = fitted(), fitted(seed=3)
    first.save(tmp_path / "d")
    second.save(tmp_path / "new")
    held = Held(tmp_path / "d", "cpu")
    shutil.rmtree(tmp_path / "d")
    files = sorted(p.relative_to(tmp_path / "new") for p in (tmp_path / "new").rglob("*") if p.is_file())
    for name in sorted(files, key=lambda name: name.as_posix() == last):
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / "new" / name, tmp_path / "d" / name)
        assert held.reload() is (name.as_posix() == last)
        assert bool(held.failure) is (name.as_posix() != last)
    assert held.now.digest == Held(tmp_path / "new", "cpu").now.digest


# ---------------------------------------------------------------------- a real process


def test_a_port_that_is_taken_is_an_error_line(tmp_path: Path, detector: Detector) -> None:
    detector.save(tmp_path / "d")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = CliRunner().invoke(main, ["serve", str(tmp_path / "d"), "--port", str(port), "--device", "cpu"])
    assert done.exit_code == 2
    assert f"error: 127.0.0.1:{port} cannot be listened on: choose another --port or --host" in done.stderr


@pytest.mark.slow
def test_the_command_serves_on_loopback_and_ends_gracefully(tmp_path: Path, detector: Detector) -> None:
    import httpx

    detector.save(tmp_path / "d")
    command = [sys.executable, "-m", "traj_ood", "serve", str(tmp_path / "d"), "--port", "0", "--device", "cpu"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert "serving" in line, line
        url = line.split(" on ")[1].split(",")[0]
        with httpx.Client(base_url=url, timeout=tiny.PATIENCE) as client:
            deadline = time.monotonic() + tiny.PATIENCE
            while True:
                try:
                    client.get("/readyz").raise_for_status()
                    break
                except httpx.TransportError:
                    assert time.monotonic() < deadline
                    time.sleep(0.05)
            answer = client.post("/v1/score", files=[("images", ("a.png", picture()))])
            assert_same(answer, expected(detector, [picture()]))
        process.send_signal(signal.SIGTERM)
        assert process.wait(tiny.PATIENCE) in (0, -signal.SIGTERM)


@contextlib.contextmanager
def serving(detector: Detector, limits: Limits) -> Iterator[tuple[str, int]]:
    """The service in a thread of its own; yields its address."""
    import uvicorn

    app = create_app(detector, limits=limits)
    config = uvicorn.Config(app, http=connections(0.4), ws="none", log_level="critical", port=0)
    listening = config.bind_socket()
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield listening.getsockname()
    finally:
        server.should_exit = True
        thread.join()


def test_connections_that_begin_no_request_are_closed(detector: Detector) -> None:
    """A head that does not end, no word at all, and the rest of a body that was refused; honest ones stay."""
    heads = {
        "silent": b"",
        "slow head": b"POST /v1/score HTTP/1.1\r\nHost: a\r\nX: ",
        "refused": b"POST /v1/score HTTP/1.1\r\nHost: a\r\nContent-Type: image/png\r\nContent-Length: 9000\r\n\r\nxx",
    }
    with serving(detector, Limits(body=1000)) as address:
        for kind, head in heads.items():
            with socket.create_connection(address, timeout=tiny.PATIENCE) as line:
                line.sendall(head)
                answer = b""
                while part := line.recv(4096):
                    answer += part
                assert (b" 413 " in answer) is (kind == "refused")


@pytest.mark.parametrize("word", ["close", "TE, close"])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_client_that_closes_afterwards_reads_that_its_body_is_too_large(
    detector: Detector, chunked: bool, word: str
) -> None:
    with serving(detector, Limits(body=2**20, bodies=2**21)) as address:
        headers = {"Content-Type": "image/png", "Connection": word}
        parts = [b"x" * 2**20] * 8  # more than the buffers of a connection hold
        line = http.client.HTTPConnection(*address, timeout=tiny.PATIENCE)
        line.request("POST", "/v1/score", iter(parts) if chunked else b"".join(parts), headers, encode_chunked=chunked)
        answer = line.getresponse()
        assert (answer.status, "body: expected at most 1048576 bytes" in answer.read().decode()) == (413, True)


def test_a_body_that_is_too_large_gives_its_bytes_back_before_its_rest_is_read(detector: Detector) -> None:
    head = "POST /v1/score HTTP/1.1\r\nHost: a\r\nContent-Type: image/png\r\n"
    limits = Limits(body=1000, bodies=2000, patience=2 * tiny.PATIENCE)
    with serving(detector, limits) as address, contextlib.ExitStack() as stack:
        lines = [stack.enter_context(socket.create_connection(address, timeout=tiny.PATIENCE)) for _ in range(2)]
        for line in lines:
            line.sendall(f"{head}Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        for size in (900, 200):  # the second is more than allowed; the rest never comes
            time.sleep(0.2)
            for line in lines:
                line.sendall(f"{size:x}\r\n".encode() + b"x" * size + b"\r\n")
        time.sleep(0.2)
        fine = http.client.HTTPConnection(*address, timeout=tiny.PATIENCE)
        fine.request("POST", "/v1/score", b"x" * 900, {"Content-Type": "image/png"})
        assert fine.getresponse().status == 200


@pytest.mark.slow
def test_no_request_that_the_description_allows_breaks_it(client: TestClient) -> None:
    schemathesis = pytest.importorskip("schemathesis", reason="needs schemathesis")
    from hypothesis import HealthCheck, given, settings

    schema = schemathesis.openapi.from_asgi("/openapi.json", client.app)
    for operation in (result.ok() for result in schema.get_all_operations()):

        @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy())
        def fuzz(case: Any) -> None:
            response = case.call()
            assert response.status_code < 500, response.text
            case.validate_response(response)

        fuzz()
