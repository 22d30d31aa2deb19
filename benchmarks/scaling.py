"""How cost grows: with images, attractors, the latent's size and processes: python benchmarks/scaling.py
[--out results/benchmarks/scaling.json]

Costs are CPU seconds, of all processes together. Beside the record stands one picture of all curves, with their slopes:
of log cost against log size, between the first and the last point, and between the last two, where an overhead counts
less. Cost that grows faster than its size, a last slope above 1.15, is named. With processes the work stays the same:
there a slope above 0.15 is.

- images: the bundled model's score, a few steps of each path, over generated images
- attractors: an index is built and searched; ten end points on each attractor, 256 dimensions
- latent: one step of the engine around an f that costs hardly anything, with distances to 500 attractors
- processes: one ``bench`` split among them, on one thread each
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from traj_ood import CallableAutoencoder, Normalised, ScorerSet, iterate, load_autoencoder
from traj_ood.attractors import NearestAttractor
from traj_ood.drawing.charts import Curve, Panel, curves
from traj_ood.drawing.style import save_figure
from traj_ood.index import NeighborIndex
from traj_ood.io.files import write_atomic
from traj_ood.io.provenance import environment, git_commit

STEEP = 1.15
"""Slope of what grows faster than linear; below, it may be caches that no longer hold everything."""
BATCH = 500
Costs = dict[str, list[float]]
"""Curve → CPU seconds at each size."""


@dataclass(frozen=True)
class Sizes:
    images: tuple[int, ...]
    attractors: tuple[int, ...]
    latent: tuple[int, ...]
    processes: tuple[int, ...]
    steps: int
    bench: tuple[str, ...]


FULL = Sizes(
    (1000, 4000, 14_000, 50_000),
    (1000, 4000, 20_000, 100_000),
    (1024, 8192, 32_768, 151_296),
    (1, 2, 4),
    3,
    ("--attractors", "300", "--per-set", "60", "--max-steps", "24"),
)
TINY = Sizes((4, 8), (30, 60), (64, 128), (), 1, ())


def cpu(call: Callable[[], object]) -> float:
    began = time.process_time()
    call()
    return time.process_time() - began


def images(sizes: Sizes) -> Costs:
    model = load_autoencoder("fashion-mae")
    draws = torch.Generator().manual_seed(0)
    some = torch.randn(min(BATCH, max(sizes.images)), *model.input_shape, generator=draws)
    scorers = ScorerSet(model, ["trajectory"], max_steps=sizes.steps).fit(Normalised(some[: min(100, len(some))]))

    def score(count: int) -> None:
        batches = (model.examine(some[: min(len(some), count - i)]) for i in range(0, count, len(some)))
        for scored in scorers.score_all(batches):
            assert bool(scored.scores["trajectory"].isfinite().all())

    score(min(sizes.images))  # warms up
    return {"score": [cpu(partial(score, count)) for count in sizes.images]}


def attractors(sizes: Sizes) -> Costs:
    found: Costs = {"build": [], "nearest": [], "10 nearest": []}
    for count in sizes.attractors:
        draws = torch.Generator().manual_seed(0)
        centres = torch.randn(-(-count // 10), 256, generator=draws).repeat(10, 1)[:count]
        points = centres + 1e-4 * torch.randn(centres.shape, generator=draws)
        queries = torch.randn(min(2000, count), 256, generator=draws)
        index = NeighborIndex(points)
        found["build"].append(cpu(partial(_build, index, queries[:1])))
        found["nearest"].append(cpu(partial(index.nearest, queries)) / len(queries))
        found["10 nearest"].append(cpu(partial(index.search, queries, 10)) / len(queries))
    return found


def _build(index: NeighborIndex, query: Tensor) -> None:
    """Both of its parts, which are made when they are first needed."""
    index.nearest(query)
    index.search(query, 1)


def latent(sizes: Sizes) -> Costs:
    found: Costs = {"engine": [], "engine and distances": []}
    rows, limit = 24, 2 + 8 * sizes.steps
    for size in sizes.latent:
        draws = torch.Generator().manual_seed(0)
        points = torch.randn(500 if size > 1000 else 20, size, generator=draws)
        start = points[:rows] + 1.0
        model = CallableAutoencoder(_flat, partial(_unflat, size), (1, 1, size))
        watch = NearestAttractor(model, NeighborIndex(points), "tokens")
        for name, observers in (("engine", []), ("engine and distances", [watch])):
            steps = partial(iterate, _shrink, start, tol=0.0, max_steps=limit, observers=observers, chunk=rows)
            steps()
            found[name].append(cpu(steps) / limit)
    return found


def _flat(images: Tensor) -> Tensor:
    return images.flatten(1)


def _unflat(size: int, latents: Tensor) -> Tensor:
    return latents.reshape(-1, 1, 1, size)


def _shrink(latents: Tensor) -> Tensor:
    return 0.9 * latents


def processes(sizes: Sizes) -> Costs:
    found = []
    for count in sizes.processes:
        with tempfile.TemporaryDirectory() as folder:
            words = ["-m", "traj_ood", "bench", "fashion", *sizes.bench, "--scorers", "trajectory", "--quiet"]
            start = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)] if count > 1 else []
            command = [sys.executable, *start, *words, "--no-plots", "--threads", "1", "--device", "cpu"]
            before = _children()
            environ = os.environ | {"OMP_NUM_THREADS": "1"}
            subprocess.run([*command, "--out", folder], check=True, capture_output=True, env=environ)
            found.append(_children() - before)
    return {"bench": found}


def _children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


AXES: dict[str, Callable[[Sizes], Costs]] = {f.__name__: f for f in (images, attractors, latent, processes)}
PER = {"images": "", "attractors": " (searches: a query)", "latent": " a step of 24 samples", "processes": ", together"}


def slopes(sizes: Iterable[float], costs: Iterable[float]) -> tuple[float, float]:
    """Of log cost against log size: between the first and the last point, and between the last two."""
    x, y = [math.log(v) for v in sizes], [math.log(max(v, 1e-9)) for v in costs]
    return (y[-1] - y[0]) / (x[-1] - x[0]), (y[-1] - y[-2]) / (x[-1] - x[-2])


def faster_than_linear(axis: str, name: str, steps: tuple[float, float]) -> str:
    """A sentence, or nothing. Work that is split among processes stays the same: its slope should be 0, not 1."""
    expected = STEEP - 1 if axis == "processes" else STEEP
    if steps[1] <= expected:
        return ""
    return f"{axis}, {name}: cost grows with exponent {steps[1]:.2f} at the end ({steps[0]:.2f} over all)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks/scaling.json"))
    parser.add_argument("--only", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--tiny", action="store_true", help="a rehearsal of seconds, whose figures mean nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sizes = TINY if arguments.tiny else FULL
    record: dict[str, Any] = {"axes": {}, "faster_than_linear": []}
    panels = []
    for axis in arguments.only:
        x = getattr(sizes, axis)
        if not x:
            continue
        costs = AXES[axis](sizes)
        found = {name: slopes(x, values) for name, values in costs.items()}
        record["axes"][axis] = {
            name: {"sizes": x, "cpu_seconds": costs[name], "slope": found[name][0], "last_slope": found[name][1]}
            for name in costs
        }
        record["faster_than_linear"] += filter(None, (faster_than_linear(axis, n, s) for n, s in found.items()))
        drawn = [Curve(f"{name}: slope {found[name][0]:.2f}", x, costs[name]) for name in costs]
        panels.append(
            Panel(drawn[0].label if len(drawn) == 1 else "", axis, f"CPU seconds{PER[axis]}", drawn, "10", True)
        )
        print(f"{axis}: {json.dumps(record['axes'][axis])}", flush=True)
    record |= {"versions": environment(), "commit": git_commit(Path(__file__).parent)}
    write_atomic(arguments.out, (json.dumps(record, indent=2, sort_keys=True) + "\n").encode())
    save_figure(curves(panels, "How cost grows"), arguments.out.with_suffix(".png"))
    print("\n".join(record["faster_than_linear"]) or "Nothing grows faster than linear.")


if __name__ == "__main__":
    main()
