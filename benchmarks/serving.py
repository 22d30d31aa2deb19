"""`traj-ood serve` under load on loopback: throughput beside the bare detector's, latency, memory, hostile bodies.

    python benchmarks/serving.py --model timm:FOLDER --images FOLDER     # some minutes on two cores
    python benchmarks/serving.py --tiny                                  # a rehearsal: generated images, a tiny model

A detector (mahalanobis) is fitted on 400 of the images and calibrated on 300 others; the rest is asked, again and again
until there are ``--count`` requests. The bare detector is `score_rows` over the same files in this process, before and
after: decoding, preprocessing and judging by one thread of torch and two that decode, as in the service, which is a
process of its own. 64 clients, threads of this process, send one image a request as fast as they are answered, and try
again after a 429; then one client alone. Memory is the service's peak (VmHWM, Linux). Hostile clients then send, all at
once, what nobody honest sends, and honest requests among it; every request has to get an answer (or, where it goes
on behind one, its connection closed), and the service to live. On a machine that does other work (see the load average
before it) only the ratio by CPU time says something. Writes results/benchmarks/serving.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
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
JPEG = {"Content-Type": "image/jpeg"}
FITTED, HELD = 400, 300
TICKS = os.sysconf("SC_CLK_TCK")


@contextmanager
def service(detector: Path, patience: float) -> Iterator[tuple[str, int]]:
    """Address and process id of `traj-ood serve` with one thread of torch."""
    words = [sys.executable, "-m", "traj_ood", "serve", str(detector), "--port", "0", "--threads", "1"]
    with subprocess.Popen(
        [*words, "--device", "cpu", "--patience", f"{patience:g}"], stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        line = next((text for text in process.stderr if "serving" in text), "")
        url = line.split(" on ")[1].split(",")[0]
        threading.Thread(target=process.stderr.read, daemon=True).start()  # a full pipe would hold up the service
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
            process.wait(90)


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


def load(url: str, pid: int, paths: list[Path], clients: int) -> dict[str, Any]:
    """One image a request, from all clients at once."""
    bodies = [path.read_bytes() for path in paths]
    taken: list[float] = []
    answers: Counter[str] = Counter()

    def ask(k: int) -> float | None:
        began = time.perf_counter()
        while True:
            try:
                answer = client.post(f"{url}/v1/score", content=bodies[k], headers=JPEG)
            except httpx.HTTPError as error:
                answers[type(error).__name__] += 1
                return None
            answers[str(answer.status_code)] += 1
            if answer.status_code != 429:
                break
            time.sleep(float(answer.headers["Retry-After"]))
        taken.append(time.perf_counter() - began)
        return float(answer.json()["decisions"][0]["score"]) if answer.status_code == 200 else None

    clock, cpu = time.perf_counter(), cpu_seconds(pid)
    room = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    with httpx.Client(timeout=300, limits=room) as client, ThreadPoolExecutor(clients) as pool:
        scores = list(pool.map(ask, range(len(paths))))
    seconds, used = time.perf_counter() - clock, cpu_seconds(pid) - cpu
    taken.sort()
    return {
        "clients": clients,
        "images": len(paths),
        "answers": dict(answers),
        "lost": sum(score is None for score in scores),
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


def hostile(url: str, pid: int, image: bytes, rounds: int, patience: float) -> dict[str, Any]:
    """Requests that nobody honest sends, from all clients at once: the statuses by kind."""
    junk, large = os.urandom(2**20) * 30, bomb()
    as_json = {"Content-Type": "application/json"}

    def endless() -> Iterator[bytes]:
        for _ in range(400):
            yield b"x" * 2**17

    def slow() -> Iterator[bytes]:
        until = time.monotonic() + 2 * patience
        while time.monotonic() < until:
            yield b"x"
            time.sleep(0.2)

    kinds: dict[str, Callable[[], dict[str, Any]]] = {
        "30 MiB of junk": lambda: {"content": junk, "headers": JPEG},
        "endless": lambda: {"content": endless(), "headers": JPEG},
        "slow": lambda: {"content": slow(), "headers": JPEG},
        "100 megapixels": lambda: {"content": large, "headers": JPEG},
        "torn": lambda: {"content": image[: len(image) // 2], "headers": JPEG},
        "no image": lambda: {"content": b"<html>", "headers": JPEG},
        "many of 100 megapixels": lambda: {"files": [("images", ("a.png", large))] * 50},
        "deep JSON": lambda: {"content": b"[" * 10**6, "headers": as_json},
        "30 MiB of empty lists": lambda: {"content": b'{"images": [' + b"[]," * 10**7 + b"0]}", "headers": as_json},
        "a head of 1 MiB": lambda: {"content": image, "headers": {**JPEG, "X-Junk": "x" * 2**20}},
        "honest": lambda: {"content": image, "headers": JPEG},
    }

    def ask(kind: str) -> tuple[str, str]:
        try:
            with httpx.Client(timeout=120) as client:
                return kind, str(client.post(f"{url}/v1/score", **kinds[kind]()).status_code)
        except (httpx.WriteError, httpx.ReadError):
            return kind, "closed"  # the service had answered before all was sent, and the answer is lost with the rest
        except httpx.HTTPError as error:
            return kind, type(error).__name__

    asked = [kind for _ in range(rounds) for kind in kinds]
    with ThreadPoolExecutor(CLIENTS) as pool:
        found = Counter(pool.map(ask, asked))
    alive = httpx.get(f"{url}/healthz", timeout=60).status_code == 200
    after = httpx.post(f"{url}/v1/score", content=image, headers=JPEG, timeout=60).status_code
    statuses: dict[str, dict[str, int]] = {}
    for (kind, status), count in sorted(found.items()):
        statuses.setdefault(kind, {})[status] = count
    return {"requests": len(asked), "answers": statuses, "peak MiB": peak_mib(pid), "lives": alive, "then": after}


def made(folder: Path) -> tuple[str, Path]:
    """A tiny model and images for it."""
    from traj_ood import ConvAutoencoder, ConvNetwork

    draw = np.random.default_rng(0)
    (folder / "images").mkdir()
    for i in range(128):
        pixels = draw.uniform(0, 255, (32, 32)) * draw.uniform(0.2, 1)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / "images" / f"{i:03d}.jpg")
    torch.manual_seed(0)
    ConvAutoencoder(ConvNetwork(channels=1, size=8, width=2, bottleneck=6)).save_pretrained(folder / "conv")
    return str(folder / "conv"), folder / "images"


def fitted(model: str, images: Path, place: Path, counts: tuple[int, int]) -> tuple[Path, list[Path]]:
    """A detector that the command line has made, and the images that it has not seen."""
    found = read_folder(images)
    paths = [str(path) for path in found.paths]
    random.Random(0).shuffle(paths)
    fit, held = counts
    for name, part in (("fit", paths[:fit]), ("held", paths[fit : fit + held])):
        (place / f"{name}.txt").write_text("".join(f"{path} 0\n" for path in part))
    words = [place / "fit.txt", "--data-root", found.root, "--model", model, "--scorer", "mahalanobis"]
    words += ["--calibrate", place / "held.txt", "--out", place / "served", "--device", "cpu", "--threads", "1", "-q"]
    subprocess.run([sys.executable, "-m", "traj_ood", "fit", *map(str, words)], check=True)
    return place / "served", [Path(found.root) / path for path in paths[fit + held :]]


def run(detector: Path, images: list[Path], count: int, rounds: int, patience: float) -> dict[str, Any]:
    """All phases, as JSON."""
    torch.set_num_threads(1)
    paths = (images * (count // len(images) + 1))[:count]
    with service(detector, patience) as (url, pid):
        load(url, pid, paths[:CLIENTS], CLIENTS)  # what is made at first use
        idle = peak_mib(pid)
        first = bare(detector, paths)
        served = load(url, pid, paths, CLIENTS)
        second = bare(detector, paths)
        alone = load(url, pid, paths[:100], 1)
        attacked = hostile(url, pid, paths[0].read_bytes(), rounds, patience)
    told, answered = first.pop("scores"), served.pop("scores")
    del second["scores"], alone["scores"]
    differences = [abs(a - b) / max(abs(b), 1e-12) for a, b in zip(answered, told, strict=True) if a is not None]
    mean = {name: (first[name] + second[name]) / 2 for name in first}
    clock, cpu = "images a second", "CPU milliseconds an image"
    return {
        "bare detector, before and after": [first, second],
        "service": served,
        "throughput beside the bare detector's": {
            "by the clock": round(served[clock] / mean[clock], 3),
            "by CPU time": round(mean[cpu] / served[cpu], 3),
        },
        "one client": alone,
        "largest relative difference of a score": max(differences, default=None),
        "MiB after the first 64 requests": idle,
        "hostile": attacked,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="as of traj-ood fit")
    parser.add_argument("--images", type=Path, help="folder of JPEG files, more than 700")
    parser.add_argument("--count", type=int, default=1024, help="requests")
    parser.add_argument("--rounds", type=int, default=8, help="of each hostile request")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        model, images = made(place) if options.tiny else (options.model, options.images.resolve())
        detector, asked = fitted(model, images, place, (50, 30) if options.tiny else (FITTED, HELD))
        name = repr(Detector.load(detector, device="cpu"))
        count, rounds, patience = (96, 1, 3.0) if options.tiny else (options.count, options.rounds, 20.0)
        found = run(detector, asked, count, rounds, patience)
    shown = [word if "/" not in word else Path(word).name for word in sys.argv[1:]]
    record = {
        "command": shlex.join(["python", "benchmarks/serving.py", *shown]),
        "commit": git_commit(),
        "detector": name,
        "load average before": round(before, 2),
        **found,
        "versions": environment(),
    }
    write_atomic(options.out, (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode())
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
