"""Scoring over Ray on this machine: the rows of one process, from one worker and from two.

    python benchmarks/cluster.py --detector FOLDER --images FOLDER       # some minutes on two cores
    python benchmarks/cluster.py --tiny                                  # a rehearsal: generated images, a tiny model

A cluster of two nodes on this machine, as `ray start` makes them, each with one CPU, and workers of one thread; beside
them one process, of one thread, too. Starting a worker (Python, torch, the detector) takes as long as hundreds of
images, so the rate is that of the images between a short and a long run. Scores have to agree to 1e-9. Two workers on
two cores share them with what Ray and others run (see the load average before it). Writes
results/benchmarks/cluster.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from traj_ood import ConvAutoencoder, ConvNetwork, Detector, Normalised
from traj_ood.data.images import read_folder
from traj_ood.distributed import read_rows_of, score_to
from traj_ood.distributed.engine import Workers
from traj_ood.io.files import write_atomic
from traj_ood.io.provenance import environment, git_commit
from traj_ood.stream import Entry, score_rows

OUT = Path(__file__).parents[1] / "results" / "benchmarks" / "cluster.json"
STORE = 100_000_000  # bytes of a node's object store
WAIT = 300  # seconds for the nodes to join


@contextmanager
def nodes(count: int) -> Iterator[tuple[Any, list[subprocess.Popen[bytes]]]]:
    """``ray``, connected to a cluster of ``count`` nodes on this machine with one CPU each, and the process that is the
    parent of a node's others, for each; `ray stop` would end those of anybody."""
    import ray

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started: list[subprocess.Popen[bytes]] = []
    environ = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as place:  # short: sockets are in it
        common = ["--node-ip-address", "127.0.0.1", "--num-cpus", "1", "--object-store-memory", str(STORE), "--block"]
        head = ["--head", "--port", str(port), "--include-dashboard", "false", "--temp-dir", place]
        try:
            for number in range(count):
                own = head if number == 0 else ["--address", f"127.0.0.1:{port}"]
                words = [sys.executable, "-m", "ray.scripts.scripts", "start", "--disable-usage-stats", *own, *common]
                with open(Path(place) / f"node-{number}.log", "wb") as log:
                    started.append(subprocess.Popen(words, stdout=log, stderr=log, env=environ))
                _wait_for(lambda log=log: "runtime started" in Path(log.name).read_text(), started[-1], log.name)
            ray.init(address=f"127.0.0.1:{port}", log_to_driver=False, logging_level="ERROR")
            _wait_for(lambda: sum(node["Alive"] for node in ray.nodes()) == count, started[-1], log.name)
            yield ray, started
        finally:
            ray.shutdown()
            for process in reversed(started):
                end_node(process)


def end_node(process: subprocess.Popen[bytes]) -> None:
    """Kill all processes of a node at once, as the loss of a machine does."""
    import psutil

    if process.poll() is None:
        node = psutil.Process(process.pid)
        for one in (node, *node.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait()


def _wait_for(ready: Any, process: subprocess.Popen[bytes], log: str) -> None:
    deadline = time.monotonic() + WAIT
    while not ready():
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"ray start: no node: {Path(log).read_text()[-1000:]}")
        time.sleep(0.2)


def alone(detector: Path, paths: list[str]) -> tuple[float, list[float | None]]:
    """Seconds and scores of one process."""
    loaded = Detector.load(detector, device="cpu")
    began = time.perf_counter()
    rows = [row for batch in score_rows(loaded, [Entry(path) for path in paths]) for row in batch]
    return time.perf_counter() - began, [row.score for row in rows]


def spread(detector: Path, paths: list[str], workers: int, out: Path) -> tuple[float, list[float | None]]:
    """Seconds and scores of ``workers`` workers of the cluster."""
    began = time.perf_counter()
    score_to(out, [Entry(path) for path in paths], detector, workers=Workers(count=workers))
    return time.perf_counter() - began, read_rows_of(out)["score"].tolist()


def run(detector: Path, images: Path, count: int) -> dict[str, Any]:
    """Everything, as JSON."""
    torch.set_num_threads(1)
    found = read_folder(images)
    paths = [str(Path(found.root) / path) for path in found.paths]
    long = (paths * (4 * count // len(paths) + 1))[: 4 * count]
    short = long[:count]
    alone(detector, short[:64])  # what is made at first use
    first, (whole, scores) = alone(detector, short)[0], alone(detector, long)
    record: dict[str, Any] = {"images": [count, 4 * count], "one process": _rate(first, whole, 3 * count)}
    with nodes(2), tempfile.TemporaryDirectory() as place:
        for workers in (1, 2):
            few, _ = spread(detector, short, workers, Path(place) / f"{workers}-short")
            many, said = spread(detector, long, workers, Path(place) / f"{workers}-long")
            largest = float(np.max(np.abs(np.divide(said, scores) - 1)))
            found_here = _rate(few, many, 3 * count)
            record[f"{workers} worker{'s' * (workers > 1)}"] = {**found_here, "largest relative difference": largest}
            if largest > 1e-9:
                raise SystemExit(f"{workers} workers: scores differ from one process's by {largest:.3g}")
    return record


def _rate(few: float, many: float, between: int) -> dict[str, float | None]:
    """Seconds of both runs, and the rate without what a run takes at its start; None if that hides it."""
    rate = round(between / (many - few), 2) if many > few else None
    return {"seconds, short": round(few, 2), "seconds, long": round(many, 2), "images a second": rate}


def made(folder: Path) -> tuple[Path, Path]:
    """A tiny detector and images for it."""
    draw = np.random.default_rng(0)
    (folder / "images").mkdir()
    for i in range(40):
        Image.fromarray(draw.integers(0, 255, (8, 8), dtype=np.uint8)).save(folder / "images" / f"{i:03d}.png")
    torch.manual_seed(0)
    model = ConvAutoencoder(ConvNetwork(channels=1, size=8, width=2, bottleneck=6))
    fitted = Detector.fit(model, Normalised(torch.randn(50, 1, 8, 8)), "field")
    fitted.calibrate(Normalised(torch.randn(50, 1, 8, 8))).save(folder / "d")
    return folder / "d", folder / "images"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--detector", type=Path)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--count", type=int, default=500, help="images of the short run; the long one has four times")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        detector, images = made(Path(folder)) if options.tiny else (options.detector, options.images)
        name = repr(Detector.load(detector, device="cpu"))
        found = run(detector.absolute(), images.absolute(), 20 if options.tiny else options.count)
    import ray

    shown = [word if "/" not in word else Path(word).name for word in sys.argv[1:]]
    record = {
        "command": shlex.join(["python", "benchmarks/cluster.py", *shown]),
        "commit": git_commit(),
        "detector": name,
        "load average before": round(before, 2),
        **found,
        "versions": {**environment(), "ray": ray.__version__},
    }
    write_atomic(options.out, (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode())
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
