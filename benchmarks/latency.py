"""How long one image waits, and what a stream waits for: python benchmarks/latency.py [--out …/latency.json]

Four pieces, on generated images (no figure here depends on what they show), one thread, wall time, so for an idle
machine of at least two cores:

* one image through a ``field`` detector on the bundled model: ``Detector.score``, ``as_module`` and the ONNX file in
  ONNX Runtime, medians and 95th percentiles in turn; and ``Detector.score`` with whole chunks, as streams have it;
* ``traj-ood score DETECTOR one.png`` in a new process beside ``import torch`` in one: seconds, and peak memory;
* features of EfficientNet-Lite0's geometry (random weights, 224 px): every way to call it, and the one that
  ``traj_ood.backbones.tuning`` takes;
* ``score`` on JPEG files of 500 px with ``mahalanobis`` on that backbone: reading alone, the network alone, and both.

``ratios`` are costs, for benchmarks/speed.py.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from traj_ood import Detector, Normalised, SurrogateAutoencoder, SurrogateNetwork, load_autoencoder, load_backbone
from traj_ood.backbones import Backbone
from traj_ood.backbones.timm_models import new_network, save_folder
from traj_ood.backbones.tuning import Calls, fastest, machine
from traj_ood.data.preprocessing import as_picture
from traj_ood.export import export_detector, open_file
from traj_ood.io.files import write_atomic
from traj_ood.io.provenance import environment, git_commit
from traj_ood.stream import Entry, score_rows

# A rehearsal takes seconds; its figures mean nothing.
TINY = "--tiny" in sys.argv
ROUNDS, STARTS, FEATURES, FILES = (3, 1, 6, 6) if TINY else (200, 5, 24, 240)
NETWORK, PIXELS = ("test_efficientnet", 96) if TINY else ("efficientnet_lite0", 224)
FILE_SIDE = 500
DATA = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "crop_pct": 0.875, "crop_mode": "center"}


def one_image(folder: Path) -> tuple[dict[str, Any], dict[str, float]]:
    """Milliseconds of a call with one image."""
    detector = Detector.fit(load_autoencoder("fashion-mae"), pictures(120, 1, 28), "field")
    detector.calibrate(pictures(60, 1, 28, seed=1)).save(folder / "detector")
    image = pictures(1, 1, 28, seed=2)
    export_detector(detector, folder / "detector.onnx", images=pictures(4, 1, 28, seed=3))
    onnx, module = open_file("onnx", folder / "detector.onnx")[0], detector.as_module()
    array = image.numpy()
    ways: dict[str, Callable[[], object]] = {
        "Detector.score": lambda: detector.score(array),
        "Detector.score, whole chunks": lambda: detector.score(array, whole_chunks=True),
        "as_module": lambda: module(image),
        "ONNX Runtime": lambda: onnx(image),
    }
    times = in_turn(ways, ROUNDS)
    found = {name: {"median_ms": 1e3 * statistics.median(t), "p95_ms": 1e3 * p95(t)} for name, t in times.items()}
    median = {name: said["median_ms"] for name, said in found.items()}
    whole = median["Detector.score, whole chunks"]
    ratios = {
        "one image: Detector.score over ONNX Runtime": median["Detector.score"] / median["ONNX Runtime"],
        "one image: as_module over ONNX Runtime": median["as_module"] / median["ONNX Runtime"],
        "one image: Detector.score over whole chunks": median["Detector.score"] / whole,
    }
    return found, ratios


def cold(folder: Path) -> tuple[dict[str, Any], dict[str, float]]:
    """A new process that scores one PNG, beside one that imports torch; in turn, medians."""
    as_picture(pictures(1, 1, 28, seed=2)[0]).save(folder / "one.png")
    commands = {
        "traj-ood score": [sys.executable, "-m", "traj_ood", "score", "detector", "one.png"],
        "import torch": [sys.executable, "-c", "import torch"],
    }
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    for _ in range(STARTS + 1):  # the first round reads from the disk
        for name, command in commands.items():
            seen[name].append(process(command, folder))
    found = {
        name: {key: statistics.median(run[key] for run in runs[1:]) for key in runs[0]} for name, runs in seen.items()
    }
    ours, torch_alone = found["traj-ood score"], found["import torch"]
    ratios = {
        "cold traj-ood score over import torch, CPU seconds": ours["cpu_seconds"] / torch_alone["cpu_seconds"],
        "cold traj-ood score over import torch, peak memory": ours["peak_mb"] / torch_alone["peak_mb"],
    }
    return found, ratios


def features(folder: Path) -> tuple[dict[str, Any], dict[str, float]]:
    """Images a second of every way to call the network."""
    backbone = random_backbone(folder)
    began = time.perf_counter()
    chosen = fastest(backbone)
    taken = time.perf_counter() - began
    images = torch.randn(FEATURES, *backbone.input_shape, generator=torch.Generator().manual_seed(0))
    calls = [Calls(rows, last) for rows in (1, 6, 24) for last in (False, True)]
    ways = {str(way): run for way, run in ((way, extraction(backbone, images, way)) for way in calls)}
    seconds = {name: min(t) for name, t in in_turn(ways, 2).items()}
    own = seconds.get(str(chosen), min(seconds.values()))  # of a quick network, the way it has anyhow
    record = {
        "images_a_second": {name: FEATURES / t for name, t in seconds.items()},
        "chosen": str(chosen),
        "seconds_to_choose": taken,
    }
    ratios = {
        "features: the way chosen over the fastest": own / min(seconds.values()),
        "features: the way chosen over 24 rows in the usual order": own / seconds[str(Calls(24, False))],
    }
    return record, ratios


def overlap(folder: Path) -> tuple[dict[str, Any], dict[str, float]]:
    """Seconds of a stream of JPEG files, and of its two parts alone."""
    backbone = random_backbone(folder)
    chosen = fastest(backbone)
    backbone.chunk, backbone.channels_last = chosen.rows, chosen.channels_last
    network = SurrogateNetwork(backbone.feature_dim)
    network.set_statistics(torch.randn(64, backbone.feature_dim, generator=torch.Generator().manual_seed(0)))
    count = 8 if TINY else 48
    training = pictures(count, 3, PIXELS)
    detector = Detector.fit(SurrogateAutoencoder(backbone, network), training, "mahalanobis", batch_size=24)
    places = []
    for number, picture in enumerate(pictures(8, 3, FILE_SIDE)):
        as_picture(picture).save(folder / f"{number}.jpg", quality=90)
        places.append(str(folder / f"{number}.jpg"))
    entries = [Entry(places[number % 8]) for number in range(FILES)]
    prepared = Normalised(torch.stack([detector.autoencoder.transform(as_picture(p)) for p in pictures(8, 3, 500)]))
    batch = Normalised(prepared.images.repeat(3, 1, 1, 1))

    def read() -> None:
        stand_in = _Reader(detector)
        for _ in score_rows(stand_in, entries, batch_size=24, workers=1):  # type: ignore[arg-type]
            pass

    def judge() -> None:
        for _ in range(-(-FILES // 24)):
            detector.judge(batch, whole_chunks=True)

    def both() -> None:
        for _ in score_rows(detector, entries, batch_size=24, workers=1):
            pass

    seconds = {name: min(t) for name, t in in_turn({"read": read, "judge": judge, "both": both}, 1).items()}
    slowest = max(seconds["read"], seconds["judge"])
    record = {"files": FILES, "seconds": seconds, "images_a_second": FILES / seconds["both"]}
    return record, {"score on JPEG files over the slower of reading and the network": seconds["both"] / slowest}


class _Reader:
    """What ``score_rows`` needs of a detector, without a network."""

    def __init__(self, detector: Detector) -> None:
        self.autoencoder, self.reading = detector.autoencoder, detector.reading
        self._said = detector.judge(Normalised(torch.zeros(24, *detector.autoencoder.input_shape)))

    def judge(self, images: Normalised, **options: Any) -> Any:
        return replace(self._said, scores=self._said.scores[: len(images)])


PIECES: Mapping[str, Callable[[Path], tuple[dict[str, Any], dict[str, float]]]] = {
    "one image": one_image,
    "cold start": cold,
    "features": features,
    "overlap": overlap,
}


def pictures(count: int, channels: int, side: int, seed: int = 0) -> Tensor:
    """(count, channels, side, side) floats in [0, 1]: noise, enlarged."""
    coarse = torch.rand(count, channels, 7, 7, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear").clamp(0, 1)


def random_backbone(folder: Path) -> Backbone:
    """The geometry with random weights, always the same."""
    place = folder / "backbone"
    if not place.is_dir():
        torch.manual_seed(0)
        network = new_network(NETWORK, num_classes=10)
        save_folder(network, place, NETWORK, {"num_classes": 10}, {"input_size": [3, PIXELS, PIXELS], **DATA})
    return load_backbone(f"timm:{place}")


def extraction(backbone: Backbone, images: Tensor, way: Calls) -> Callable[[], object]:
    def run() -> object:
        backbone.chunk, backbone.channels_last = way.rows, way.channels_last
        return backbone.extract(images)

    return run


def in_turn(ways: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way, in turn so that a drift of the machine's speed hits all alike; the first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - began)
    return {name: values[1:] for name, values in times.items()}


def p95(values: list[float]) -> float:
    return sorted(values)[min(len(values) - 1, round(0.95 * len(values)))]


# A process counts as at least as large as the one that it was split from: a small one starts it.
_STARTER = """
import json, os, subprocess, sys, time
began = time.perf_counter()
started = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(started.pid, 0)
taken = time.perf_counter() - began
print(json.dumps([os.waitstatus_to_exitcode(status), taken, usage.ru_utime + usage.ru_stime, usage.ru_maxrss]))
"""


def process(command: list[str], folder: Path) -> dict[str, float]:
    """Wall and CPU seconds and peak memory of a process of its own.

    Raises:
        RuntimeError: it failed.
    """
    done = subprocess.run(
        [sys.executable, "-S", "-c", _STARTER, *command], cwd=folder, capture_output=True, text=True, check=True
    )
    code, taken, cpu, peak = json.loads(done.stdout)
    if code:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr}")
    scale = 2**20 if sys.platform == "darwin" else 2**10
    return {"seconds": taken, "cpu_seconds": cpu, "peak_mb": peak / scale}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks/latency.json"))
    parser.add_argument("--only", nargs="+", choices=PIECES, default=list(PIECES))
    parser.add_argument("--tiny", action="store_true", help="a rehearsal, whose figures mean nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    record: dict[str, Any] = {"ratios": {}}
    with tempfile.TemporaryDirectory() as name:
        for piece in [
            p for p in PIECES if p in arguments.only or (p == "one image" and "cold start" in arguments.only)
        ]:
            record[piece], ratios = PIECES[piece](Path(name))
            record["ratios"] |= ratios
            print(f"{piece}: {json.dumps(record[piece])}", flush=True)
    record |= {
        "machine": machine(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],  # of a minute; above 1 others were at work, and only ratios say something
        "versions": environment(),
        "commit": git_commit(Path(__file__).parent),
        "command": f"OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', '')} python benchmarks/latency.py",
    }
    write_atomic(arguments.out, (json.dumps(record, indent=2) + "\n").encode())
    print(json.dumps(record["ratios"], indent=2))


if __name__ == "__main__":
    main()
