"""A drill: fit, calibrate, export, serve and monitor on real images that drift, by the commands an operator types.

    python benchmarks/drill.py --cifar10 FOLDER --model timm:FOLDER      # some minutes on one core
    python benchmarks/drill.py --tiny                                    # a rehearsal on generated images

FOLDER holds ``train/<class>/`` and ``test/<class>/`` of CIFAR-10 as JPEG files. Vehicles are ID, animals OOD. A
detector is fitted on training images of vehicles, calibrated on others, exported, and served as a process on loopback.
An hour of traffic is simulated, a request of several images at a time: test images, 20 minutes of vehicles, 20 in which
the share of animals rises to a half, 20 at a half. After every minute `traj-ood monitor` reads the service's rows, as
cron would. Then the service's folder is damaged, and replaced by a new calibration. Writes
results/benchmarks/drill.json.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from click.testing import CliRunner
from PIL import Image

from traj_ood.cli import main as main_command
from traj_ood.io.provenance import environment, git_commit

OUT = Path(__file__).parents[1] / "results" / "benchmarks" / "drill.json"
VEHICLES = ("airplane", "automobile", "ship", "truck")
MINUTES = 60
ALARM = 4  # exit code of `traj-ood monitor`


@dataclass(frozen=True)
class Plan:
    """How many images: to fit on, to calibrate on, in a minute of traffic; and in a request."""

    fit: int = 2000
    held: int = 1000
    minute: int = 40
    request: int = 8


def share_of_ood(minute: int) -> float:
    """0 for 20 minutes, then rising to a half in 20, then a half."""
    return 0.5 * min(1.0, max(0.0, (minute - 19) / 20))


def command(*words: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    """A command of traj-ood in a process of its own; it has to end with ``code``."""
    done = subprocess.run(
        [sys.executable, "-m", "traj_ood", *map(str, words)], capture_output=True, text=True, check=False
    )
    if done.returncode != code:
        raise SystemExit(f"traj-ood {words[0]}: exit code {done.returncode}: {done.stderr.strip()[-800:]}")
    return done


@contextmanager
def service(detector: Path, rows: Path) -> Iterator[str]:
    """The address of `traj-ood serve`; SIGTERM ends it, and it has to end well."""
    words = [sys.executable, "-m", "traj_ood", "serve", str(detector), "--port", "0", "--log", str(rows)]
    words += ["--look", "0.5", "--threads", "1", "--device", "cpu"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        line = next((text for text in process.stderr if "serving" in text), "")
        try:
            yield line.split(" on ")[1].split(",")[0]
        finally:
            process.send_signal(signal.SIGTERM)
            if process.wait(60) not in (0, -signal.SIGTERM):
                raise SystemExit(f"the service ended with {process.returncode}")


def send(client: httpx.Client, paths: Sequence[Path]) -> list[dict[str, Any]]:
    """The decisions for images, in one request."""
    files = [("images", (path.name, path.read_bytes())) for path in paths]
    answer = client.post("/v1/score", files=files).raise_for_status()
    return list(answer.json()["decisions"])


def traffic(plan: Plan, vehicles: list[Path], animals: list[Path], draw: random.Random) -> list[list[Path]]:
    """The images of each minute, none twice."""
    hour = []
    for minute in range(MINUTES):
        odd = round(plan.minute * share_of_ood(minute))
        images = [animals.pop() for _ in range(odd)] + [vehicles.pop() for _ in range(plan.minute - odd)]
        draw.shuffle(images)
        hour.append(images)
    return hour


def run_hour(url: str, hour: list[list[Path]], plan: Plan, detector: Path, rows: Path) -> dict[str, Any]:
    """Traffic and the monitor's look after every minute."""
    first: dict[str, Any] | None = None
    minutes: list[dict[str, Any]] = []
    seconds: list[float] = []
    with httpx.Client(base_url=url, timeout=120) as client:
        _wait(client)
        digest = client.get("/readyz").json()["detector"]
        for minute, images in enumerate(hour):
            for start in range(0, len(images), plan.request):
                began = time.perf_counter()
                send(client, images[start : start + plan.request])
                seconds.append(time.perf_counter() - began)
            words = ("monitor", detector, rows / digest, "--format", "json")
            done = CliRunner().invoke(main_command, [*map(str, words)])  # sixty processes would say the same
            if done.exit_code not in (0, ALARM):
                raise SystemExit(f"monitor: {done.output}")
            said = json.loads(done.stdout)
            minutes.append(
                {
                    "minute": minute + 1,
                    "share sent": share_of_ood(minute),
                    "rate": round(said["rate"], 4),
                    "log10 capital": round(math.log10(max(said["capital"], 1e-300)), 2),
                    "alarm": said["alarm"],
                }
            )
            if said["alarm"] and first is None:
                first = {"minute": minute + 1, "alarms": said["alarms"], "operator sees": done.stderr.strip()}
        metrics = client.get("/metrics").text
    seconds.sort()
    return {
        "alarm": first,
        "minutes": minutes,
        "seconds of a request": {"median": round(seconds[len(seconds) // 2], 4), "max": round(seconds[-1], 4)},
        "metrics": [line for line in metrics.splitlines() if line.startswith("traj_ood_images_total")],
    }


def replace_detector(url: str, damaged: Path, new: Path, image: Path) -> dict[str, Any]:
    """The served folder is damaged, then replaced: who answers, and what /readyz says."""
    with httpx.Client(base_url=url, timeout=120) as client:
        before = client.get("/readyz").json()["detector"]
        record = damaged / "detector.json"
        record.write_text(record.read_text().replace('"tpr"', '"tpr" '))
        refused = _until(client, lambda ready: bool(ready["refused"]))
        still = client.post("/v1/score", files=[("images", (image.name, image.read_bytes()))]).json()["detector"]
        command("calibrate", damaged.with_name("kept"), new, "--tpr", 0.9, "--out", damaged.with_name("fresh"))
        damaged.rename(damaged.with_name("broken"))
        damaged.with_name("fresh").rename(damaged)
        taken = _until(client, lambda ready: ready["detector"] != before)
    return {
        "refused": refused["refused"].replace(str(damaged), damaged.name),
        "answered meanwhile by the one before": still == before,
        "new one taken": taken["detector"] != before,
    }


def _wait(client: httpx.Client) -> None:
    for _ in range(600):
        try:
            client.get("/readyz").raise_for_status()
            return
        except httpx.TransportError:
            time.sleep(0.1)
    raise SystemExit("the service does not answer")


def _until(client: httpx.Client, wanted: Any) -> dict[str, Any]:
    for _ in range(600):
        ready = dict(client.get("/readyz").json())
        if wanted(ready):
            return ready
        time.sleep(0.2)
    raise SystemExit(f"the service still says {ready}")


def images_of(folder: Path, classes: Sequence[str], draw: random.Random) -> list[Path]:
    """All images of some classes, shuffled."""
    found = [path for name in classes for path in sorted((folder / name).iterdir())]
    draw.shuffle(found)
    return found


def made_images(folder: Path) -> None:
    """Dark vehicles and bright animals, for a rehearsal."""
    draw = np.random.default_rng(0)
    for part, count in (("train", 80), ("test", 220)):
        for name in (*VEHICLES, "cat", "dog"):
            place = folder / part / name
            place.mkdir(parents=True)
            high = 90 if name in VEHICLES else 250
            for i, pixels in enumerate(draw.uniform(0, high, (count, 8, 8)) * draw.uniform(0.2, 1, (count, 1, 1))):
                Image.fromarray(pixels.astype(np.uint8)).save(place / f"{i:04d}.png")


def drill(cifar10: Path, model: Sequence[str], scorer: str, plan: Plan, place: Path) -> dict[str, Any]:
    """All of it; ``place`` is an empty folder for what is made."""
    draw = random.Random(0)
    train = images_of(cifar10 / "train", VEHICLES, draw)
    for name, part in (("fit", train[: plan.fit]), ("held", train[plan.fit : plan.fit + plan.held])):
        (place / f"{name}.txt").write_text("".join(f"{p.relative_to(cifar10).as_posix()} 0\n" for p in part))
    vehicles = images_of(cifar10 / "test", VEHICLES, draw)
    others = sorted(p.name for p in (cifar10 / "test").iterdir() if p.is_dir() and p.name not in VEHICLES)
    animals = images_of(cifar10 / "test", others, draw)
    root = ("--data-root", cifar10)
    fitted = command(
        *("fit", place / "fit.txt", *root, *model, "--scorer", scorer, "--calibrate", place / "held.txt"),
        *("--out", place / "first", "--threads", 1, "--quiet"),
    )
    calibrated = command(
        "calibrate", place / "first", place / "held.txt", *root, "--tpr", 0.95, "--out", place / "served"
    )
    exported = command("export", place / "served", "--format", "onnx", "--out", place / "d.onnx", "--threads", 1)
    command("calibrate", place / "served", place / "held.txt", *root, "--tpr", 0.95, "--out", place / "kept")
    hour = traffic(plan, vehicles, animals, draw)
    with service(place / "served", place / "rows") as url:
        found = run_hour(url, hour, plan, place / "kept", place / "rows")
        new = place / "new"
        new.mkdir()
        for i, path in enumerate(vehicles[: plan.held]):
            (new / f"{i}{path.suffix}").write_bytes(path.read_bytes())
        found["another detector"] = replace_detector(url, place / "served", new, hour[0][0])
    lines = {name: done.stdout.strip() for name, done in (("fit", fitted), ("calibrate", calibrated))}
    lines["export"] = next(line for line in exported.stdout.splitlines() if line.startswith("Agrees"))
    return {"said": {name: text.replace(str(place) + "/", "") for name, text in lines.items()}, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar10", type=Path, help="folder with train/ and test/")
    parser.add_argument("--model", help="as of traj-ood fit")
    parser.add_argument("--input-size", type=int, help="as of traj-ood fit")
    parser.add_argument("--scorer", default="mahalanobis")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal on generated images")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "place"
        place.mkdir()
        if options.tiny:
            from traj_ood import ConvAutoencoder, ConvNetwork

            made_images(Path(folder) / "images")
            torch.manual_seed(0)
            ConvAutoencoder(ConvNetwork(channels=1, size=8, width=2, bottleneck=6)).save_pretrained(
                Path(folder) / "conv"
            )
            found = drill(
                Path(folder) / "images",
                ["--model", f"{Path(folder) / 'conv'}"],
                "mahalanobis",
                Plan(fit=200, held=100, minute=10, request=5),
                place,
            )
        else:
            model = [
                "--model",
                options.model,
                *(["--input-size", str(options.input_size)] if options.input_size else []),
            ]
            found = drill(options.cifar10.resolve(), model, options.scorer, Plan(), place)
    shown = [word if "/" not in word else Path(word).name for word in sys.argv[1:]]
    record = {
        "command": shlex.join(["python", "benchmarks/drill.py", *shown]),
        "commit": git_commit(),
        "plan": {"ID": VEHICLES, "minutes": MINUTES, "tiny": options.tiny},
        **found,
        "seconds of CPU time, without the commands": round(time.process_time() - started, 1),
        "versions": environment(),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    print(json.dumps(found["alarm"], indent=1))


if __name__ == "__main__":
    main()
