"""The three examples of benchmarks/consumers/ do what they say, each on a detector made here."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from PIL import Image

from traj_ood import Detector, Normalised

CONSUMERS = Path(__file__).parents[1] / "benchmarks" / "consumers"


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, CONSUMERS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def detector() -> Detector:
    model = tiny.conv()
    made = Detector.fit(model, Normalised(tiny.images(30, model.input_shape)), "field")
    return made.calibrate(Normalised(tiny.images(40, model.input_shape, seed=9)))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three images of another size than the model's, two grey and one in colour, and a broken file."""
    folder = tmp_path / "photos"
    tiny.write_images(folder / "grey", 2, seed=0, size=20)
    tiny.write_images(folder / "colour", 1, seed=1, size=17, mode="RGB")
    (folder / "torn.png").write_bytes((folder / "grey" / "000.png").read_bytes()[:60])
    return folder


# ---------------------------------------------------------------------- the service


@pytest.fixture
def service(detector: Detector) -> Iterator[Any]:
    with load("service").Service(detector, ("127.0.0.1", 0)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def ask(server: Any, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, Any]:
    connection = HTTPConnection(*server.server_address, timeout=tiny.PATIENCE)
    try:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        assert answer.headers["Content-Type"] == "application/json"
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def test_the_service_says_what_the_detector_says(service: Any, detector: Detector, photos: Path) -> None:
    for path in (photos / "grey" / "000.png", photos / "colour" / "000.png"):
        said = detector.judge([path])
        status, answer = ask(service, "POST", "/score", path.read_bytes())
        assert status == 200
        assert answer == {
            "score": float(said.scores[0]),
            "p_value": float(said.p_values[0]),
            "ood": bool(said.decisions[0]),
            "steps": 1,
            "status": "ok",
        }
    assert ask(service, "GET", "/health") == (200, {"detector": repr(detector)})


def test_the_service_refuses_by_name(service: Any, photos: Path) -> None:
    status, answer = ask(service, "POST", "/score", b"no image")
    assert status == 400
    assert answer["error"].startswith("the body: ")
    assert ask(service, "POST", "/score", (photos / "torn.png").read_bytes())[0] == 400
    assert ask(service, "POST", "/score", b"")[0] == 400
    assert ask(service, "POST", "/score", b"x", **{"Content-Length": "99999999999"})[0] == 413
    assert ask(service, "POST", "/score", b"x", **{"Content-Length": "9" * 5000})[0] == 413
    assert ask(service, "GET", "/nothing") == (404, {"error": "no /nothing: GET /health or POST /score"})
    assert ask(service, "GET", "/health")[0] == 200  # and lives on


@pytest.fixture
def bounded(detector: Detector) -> Iterator[Any]:
    """A service with room for 4 clients, two bodies of the largest size, and 40,000 decoded pixels."""
    module = load("service")
    bounds = module.Bounds(clients=4, body=20_000, bodies=40_000, decoded=28 * 40_000, patience=3.0)
    with module.Service(detector, ("127.0.0.1", 0), bounds) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def picture(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (width, height), 128).save(file, "PNG")
    return file.getvalue()


def test_clients_at_once_are_served_within_the_memory(bounded: Any) -> None:
    """Each image takes 36 of the 40 thousand pixels: never two are decoded at once."""
    answers: list[int] = []

    def client() -> None:
        for _ in range(3):
            try:
                answers.append(ask(bounded, "POST", "/score", picture(180, 200))[0])
            except (ConnectionError, TimeoutError):  # refused before its request was read
                answers.append(503)

    threads = [threading.Thread(target=client) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 24
    assert set(answers) <= {200, 503}
    assert answers.count(200) >= 3
    assert bounded.decoded.peak == 28 * 36_000
    assert bounded.bodies.peak <= 40_000
    assert ask(bounded, "POST", "/score", picture(8, 8))[0] == 200  # all is given back


def test_what_is_too_large_alone_is_refused_before_it_is_decoded(bounded: Any) -> None:
    status, answer = ask(bounded, "POST", "/score", picture(400, 101))
    assert (status, answer["error"]) == (413, "expected at most 40000 pixels, got 40400: scale it down")
    assert bounded.decoded.peak == 0
    assert ask(bounded, "POST", "/score", b"x" * 20_001) == (413, {"error": "expected at most 20000 bytes, got 20001"})


def test_slow_clients_and_too_many_of_them_are_told(bounded: Any) -> None:
    slow = [socket.create_connection(bounded.server_address, timeout=60) for _ in range(4)]
    try:
        for connection in slow[:3]:  # two of these fill the memory for bodies
            connection.sendall(b"POST /score HTTP/1.0\r\nContent-Length: 20000\r\n\r\n12")
        slow[3].sendall(b"POST /sc")
        with socket.create_connection(bounded.server_address, timeout=60) as fifth:
            assert b"4 clients are being served: try again" in fifth.makefile("rb").read()
        said = [connection.makefile("rb").read() for connection in slow]
        assert sorted(text[9:12] for text in said[:3]) == [b"408", b"408", b"503"]
        assert sum(b"expected 20000 bytes within 3 s, got 2" in text for text in said) == 2
        assert sum(b"Retry-After: 1" in text for text in said) == 1
    finally:
        for connection in slow:
            connection.close()
    deadline = time.monotonic() + 30
    while ask(bounded, "GET", "/health")[0] != 200:  # and lives on
        assert time.monotonic() < deadline


# ---------------------------------------------------------------------- ONNX Runtime alone


def test_onnx_runtime_needs_neither_torch_nor_traj_ood(detector: Detector, photos: Path, tmp_path: Path) -> None:
    for library in ("onnxscript", "onnxruntime"):
        pytest.importorskip(library, reason="needs traj_ood[export]")
    from traj_ood.export import export_detector

    model = tmp_path / "detector.onnx"
    export_detector(detector, model, "onnx", images=torch.rand(4, 1, 8, 8))
    paths = [str(photos / name) for name in ("grey/000.png", "torn.png", "colour/000.png", "grey/001.png")]
    deep = np.linspace(0, 65535, 400).astype(np.uint16).reshape(20, 20)
    Image.fromarray(deep).save(photos / "deep.png")
    frames = [Image.new("L", (20, 20), shade) for shade in (0, 255)]
    frames[0].save(photos / "moving.gif", save_all=True, append_images=frames[1:])
    whole_png = (photos / "grey" / "000.png").read_bytes()
    (photos / "odd.png").write_bytes(whole_png[:30] + b"\xff" * 8 + whole_png[38:])  # Pillow: SyntaxError
    (photos / "program.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n")
    Image.new("1", (10_000, 10_000)).save(photos / "bomb.png")
    paths += [str(photos / name) for name in ("deep.png", "moving.gif", "odd.png", "program.png", "bomb.png")]
    paths += ["=1+1.png"]
    bare = "import runpy, sys; sys.modules.update(torch=None, traj_ood=None, pandas=None); sys.argv = sys.argv[1:]; "
    command = [sys.executable, "-c", bare + "runpy.run_path(sys.argv[0], run_name='__main__')"]
    command += [str(CONSUMERS / "onnx_runtime.py"), str(model), *paths]
    done = subprocess.run(command, capture_output=True, text=True, timeout=tiny.PATIENCE, check=False)
    assert done.returncode == 3, done.stderr  # one image could not be read
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    assert [row["path"] for row in rows] == [*paths[:-1], "'=1+1.png"]  # which no spreadsheet runs
    assert rows[1]["score"] == ""
    failed = [row["reason"].startswith("invalid: ") for row in rows]
    assert failed == [False, True, False, False, False, True, True, True, True, True]
    assert "several frames" in rows[5]["reason"]
    assert "at most 89478485 pixels" in rows[8]["reason"]
    whole = [row for row in rows if row["score"]]
    said = detector.decide([row["path"] for row in whole])
    assert [float(row["score"]) for row in whole] == pytest.approx([one.score for one in said], rel=1e-4)
    assert [row["reason"] for row in whole] == [one.reason for one in said]
    assert [float(row["p_value"]) for row in whole] == [one.p_value for one in said]


# ---------------------------------------------------------------------- a batch job


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_the_batch_job_writes_a_row_for_every_file(
    suffix: str, detector: Detector, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = load("batch_job")
    monkeypatch.setattr(job, "BATCH", 2)
    held: list[tuple[int, ...]] = []
    judge = detector.judge
    monkeypatch.setattr(detector, "judge", lambda images: held.append(tuple(images.images.shape)) or judge(images))
    monkeypatch.setattr(job.Detector, "load", lambda folder: detector)
    out = tmp_path / f"scores{suffix}"
    monkeypatch.setattr(sys, "argv", ["batch_job.py", "detector", str(photos), str(out)])
    with pytest.raises(SystemExit) as ended:
        job.main()
    assert ended.value.code == 3
    table = pd.read_parquet(out) if suffix == ".parquet" else pd.read_csv(out)
    assert list(table.columns) == job.COLUMNS
    assert table["path"].tolist() == ["colour/000.png", "grey/000.png", "grey/001.png", "torn.png"]
    assert held == [(2, 1, 8, 8), (1, 1, 8, 8)]  # of the model's size, not of the photographs'
    said = judge([photos / p for p in table["path"][:3]])
    assert table["score"][:3].tolist() == pytest.approx(said.scores.tolist(), rel=1e-12)
    assert table["ood"][:3].tolist() == said.decisions.tolist()
    assert table["error"].notna().tolist() == [False, False, False, True]
    assert table["score"].isna().tolist() == [False, False, False, True]
    assert table["steps"][:3].tolist() == [1, 1, 1]
    assert table["status"][:3].tolist() == ["ok"] * 3


def test_the_batch_job_loads_a_folder_and_raises_the_alarm(
    detector: Detector, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector.save(tmp_path / "detector")
    (photos / "torn.png").rename(photos / "=1+1.png")
    (photos / "=1+1.png").write_bytes((photos / "grey" / "000.png").read_bytes())
    command = [sys.executable, str(CONSUMERS / "batch_job.py"), str(tmp_path / "detector"), str(photos)]
    done = subprocess.run(
        [*command, str(tmp_path / "scores.csv"), "--alarm", "-1"],
        capture_output=True,
        text=True,
        timeout=tiny.PATIENCE,
        check=False,
    )
    assert done.returncode == 4, done.stderr
    assert done.stdout.startswith("4 images, 0 unreadable, ")
    assert pd.read_csv(tmp_path / "scores.csv")["path"].tolist()[0] == "'=1+1.png"
    monkeypatch.setattr(sys, "argv", [*command[1:], "scores.txt"])
    with pytest.raises(
        SystemExit, match=r"batch_job: error: scores\.txt: expected a name that ends in \.parquet or \.csv"
    ):
        load("batch_job").main()
