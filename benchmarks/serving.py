"""`traj-ood serve` under load on loopback: throughput beside the bare detector's, latency, memory, hostile bodies.

    python benchmarks/serving.py --detector FOLDER --images FOLDER
    python benchmarks/serving.py --tiny                      # a rehearsal: generated images, a tiny model

The bare detector is `score_rows` over the same files in this process: decoding, preprocessing and judging. The service
is a process with one thread of torch; 64 clients, threads of this process, send one image a request as fast as they are
answered. Memory is the service's peak (VmHWM, Linux). Hostile clients then send, all at once, junk of 30 MiB, bodies
that never end, small files of a hundred megapixels, torn images, and what is no image; every request has to get an
answer, and the service to live. CPU times tell what a busy machine's clock cannot. Writes
results/benchmarks/serving.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from PIL import Image

from traj_ood import Detector
from traj_ood.data.images import read_folder
from traj_ood.io.files import write_atomic
from traj_ood.io.provenance import environment, git_commit
from traj_ood.stream import Entry, score_rows

OUT = Path(__file__).parents[1] / "results" / "benchmarks" / "serving.json"
CLIENTS = 64
TICKS = os.sysconf("SC_CLK_TCK")


@contextmanager
def service(detector: Path) -> Iterator[tuple[str, int]]:
    """Address and process id of `traj-ood serve` with one thread of torch."""
    words = [sys.executable, "-m", "traj_ood", "serve", str(detector), "--port", "0", "--threads", "1"]
    with subprocess.Popen(
        [*words, "--device", "cpu", "--patience", "20"], stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        line = next((text for text in process.stderr if "serving" in text), "")
        url = line.split(" on ")[1].split(",")[0]
        try:
            for _ in range(600):
                try:
                    httpx.get(f"{url}/readyz").raise_for_status()
                    break
                except httpx.TransportError:
                    time.sleep(0.1)
            yield url, process.pid
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def cpu_seconds(pid: int) -> float:
    """User and system time of a process, of all its threads (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def peak_mib(pid: int) -> float:
    """Largest resident memory of a process so far (Linux)."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return round(next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024, 1)


def bare(detector: Path, paths: list[Path]) -> dict[str, Any]:
    """The detector alone over the files."""
    loaded = Detector.load(detector, device="cpu")
    entries = [Entry(str(path)) for path in paths]
    list(score_rows(loaded, entries[:64], batch_size=64))
    clock, cpu = time.perf_counter(), time.process_time()
    rows = [row for batch in score_rows(loaded, entries, batch_size=64) for row in batch]
    seconds, used = time.perf_counter() - clock, time.process_time() - cpu
    return {
        "images a second": round(len(rows) / seconds, 2),
        "CPU milliseconds an image": round(1000 * used / len(rows), 3),
        "scores": [row.score for row in rows],
    }


def load(url: str, pid: int, paths: list[Path]) -> dict[str, Any]:
    """One image a request from all clients at once."""
    bodies = [path.read_bytes() for path in paths]
    taken: list[float] = []

    def ask(k: int) -> Any:
        began = time.perf_counter()
        while True:
            answer = client.post(f"{url}/v1/score", content=bodies[k], headers={"Content-Type": "image/jpeg"})
            if answer.status_code != 429:
                break
            time.sleep(float(answer.headers["Retry-After"]))
        taken.append(time.perf_counter() - began)
        return answer.json()["decisions"][0]["score"] if answer.status_code == 200 else answer.status_code

    clock, cpu = time.perf_counter(), cpu_seconds(pid)
    room = httpx.Limits(max_connections=CLIENTS, max_keepalive_connections=CLIENTS)
    with httpx.Client(timeout=300, limits=room) as client, ThreadPoolExecutor(CLIENTS) as pool:
        scores = list(pool.map(ask, range(len(paths))))
    seconds, used = time.perf_counter() - clock, cpu_seconds(pid) - cpu
    taken.sort()
    return {
        "images a second": round(len(paths) / seconds, 2),
        "CPU milliseconds an image": round(1000 * used / len(paths), 3),
        "seconds": {q: round(taken[int(s * (len(taken) - 1))], 4) for q, s in (("p50", 0.5), ("p99", 0.99))},
        "peak MiB": peak_mib(pid),
        "scores": scores,
    }


def bomb() -> bytes:
    """A PNG of a few kilobytes that is a hundred megapixels."""
    file = BytesIO()
    Image.new("1", (10_000, 10_000)).save(file, "PNG")
    return file.getvalue()


def hostile(url: str, pid: int, image: bytes, rounds: int) -> dict[str, Any]:
    """Bodies that nobody honest sends, from all clients at once: the statuses by kind."""
    junk, large, jpeg = os.urandom(2**20) * 30, bomb(), {"Content-Type": "image/jpeg"}

    def endless() -> Iterator[bytes]:
        for _ in range(400):
            yield b"x" * 2**17

    def slow() -> Iterator[bytes]:
        for _ in range(60):
            yield b"x"
            time.sleep(0.5)

    kinds: dict[str, Callable[[], dict[str, Any]]] = {
        "30 MiB of junk": lambda: {"content": junk, "headers": jpeg},
        "endless": lambda: {"content": endless(), "headers": jpeg},
        "slow": lambda: {"content": slow(), "headers": jpeg},
        "100 megapixels": lambda: {"content": large, "headers": jpeg},
        "torn": lambda: {"content": image[: len(image) // 2], "headers": jpeg},
        "no image": lambda: {"content": b"<html>", "headers": jpeg},
        "many of 100 megapixels": lambda: {"files": [("images", ("a.png", large))] * 50},
        "deep JSON": lambda: {"content": b"[" * 10**6, "headers": {"Content-Type": "application/json"}},
        "honest": lambda: {"content": image, "headers": jpeg},
    }

    def ask(kind: str) -> tuple[str, str]:
        try:
            with httpx.Client(timeout=120) as client:
                return kind, str(client.post(f"{url}/v1/score", **kinds[kind]()).status_code)
        except httpx.WriteError:
            return kind, "closed after the answer"  # the service had answered before all was sent
        except httpx.HTTPError as error:
            return kind, type(error).__name__

    asked = [kind for _ in range(rounds) for kind in kinds]
    with ThreadPoolExecutor(CLIENTS) as pool:
        found = Counter(pool.map(ask, asked))
    alive = httpx.get(f"{url}/healthz", timeout=60).status_code == 200
    after = httpx.post(f"{url}/v1/score", content=image, headers=jpeg, timeout=60).status_code
    statuses: dict[str, dict[str, int]] = {}
    for (kind, status), count in sorted(found.items()):
        statuses.setdefault(kind, {})[status] = count
    return {"requests": len(asked), "answers": statuses, "peak MiB": peak_mib(pid), "lives": alive, "then": after}


def tiny(folder: Path) -> tuple[Path, Path]:
    """A tiny detector and images for it."""
    from traj_ood import ConvAutoencoder, ConvNetwork, Normalised

    draw = np.random.default_rng(0)
    (folder / "images").mkdir()
    for i in range(128):
        pixels = draw.integers(0, 255, (32, 32), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{i:03d}.jpg")
    torch.manual_seed(0)
    model = ConvAutoencoder(ConvNetwork(channels=1, size=8, width=2, bottleneck=6))
    made = Detector.fit(model, Normalised(torch.randn(50, 1, 8, 8)), "field")
    made.calibrate(Normalised(torch.randn(50, 1, 8, 8))).save(folder / "d")
    return folder / "d", folder / "images"


def run(detector: Path, images: Path, count: int, rounds: int) -> dict[str, Any]:
    """All phases, as JSON."""
    torch.set_num_threads(1)
    found = read_folder(images)
    paths = [Path(found.root) / path for path in found.paths]
    paths = (paths * (count // len(paths) + 1))[:count]
    with service(detector) as (url, pid):
        idle = peak_mib(pid)
        first = bare(detector, paths)
        served = load(url, pid, paths)
        second = bare(detector, paths)
        attacked = hostile(url, pid, paths[0].read_bytes(), rounds)
    alone, answered = first.pop("scores"), served.pop("scores")
    second.pop("scores")
    differences = [abs(a - b) / max(abs(b), 1e-12) for a, b in zip(answered, alone, strict=True)]
    cpu = (first["CPU milliseconds an image"] + second["CPU milliseconds an image"]) / 2
    return {
        "images": count,
        "clients": CLIENTS,
        "bare detector, before and after": [first, second],
        "service": served,
        "throughput of the bare detector's, by CPU time": round(cpu / served["CPU milliseconds an image"], 3),
        "largest relative difference of a score": max(differences),
        "idle MiB": idle,
        "hostile": attacked,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--detector", type=Path)
    parser.add_argument("--images", type=Path, help="folder of JPEG files")
    parser.add_argument("--count", type=int, default=512, help="requests")
    parser.add_argument("--rounds", type=int, default=8, help="of each hostile request")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        detector, images = tiny(Path(folder)) if options.tiny else (options.detector, options.images)
        name = repr(Detector.load(detector, device="cpu"))
        found = run(detector, images, 128 if options.tiny else options.count, 1 if options.tiny else options.rounds)
    shown = [word if "/" not in word else Path(word).name for word in sys.argv[1:]]
    record = {
        "command": shlex.join(["python", "benchmarks/serving.py", *shown]),
        "commit": git_commit(),
        "detector": name,
        **found,
        "versions": environment(),
    }
    write_atomic(options.out, (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode())
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
