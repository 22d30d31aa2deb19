"""How much of f a run needs, and how long it takes over that: python benchmarks/streaming.py
[--out results/benchmarks/streaming.json]

One ``bench`` in this process, on one thread. Counted are the rows that f is given, and the steps that the trajectories
have taken: the rest are copies that fill up chunks. The time is set against the needed steps' floating-point operations
(as torch counts them) at the rate of a large float32 product on this machine, measured before and after.

Where the rest goes is recorded beside it: the time of f alone over that of its products at that rate, and the shares in
f of its products as they are, its attention, activations, normalisations, and of sums and copies.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rates import product_rate
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from traj_ood import Autoencoder, Trajectory, ViTMAE, load_autoencoder
from traj_ood.cli import main as command
from traj_ood.dynamics.iterate import iterate
from traj_ood.io.files import write_atomic
from traj_ood.io.provenance import environment, git_commit

BENCH = ("fashion", "--quick")
TINY = ("fashion", "--attractors", "12", "--per-set", "3", "--max-steps", "12", "--scorers", "trajectory")


class Counts:
    """Rows that f is given, and steps that trajectories take."""

    def __init__(self) -> None:
        self.rows, self.steps = 0, 0

    def self_map(self, model: ViTMAE, latents: Tensor) -> Tensor:
        self.rows += len(latents)
        return Autoencoder.self_map(model, latents)

    def iterate(self, self_map: Any, start: Tensor | Iterable[Tensor], **options: Any) -> Any:
        if isinstance(start, Tensor):
            return self._counted(iterate(self_map, start, **options))
        return (self._counted(trajectory) for trajectory in iterate(self_map, start, **options))

    def _counted(self, trajectory: Trajectory) -> Trajectory:
        self.steps += int(trajectory.steps.sum())
        return trajectory


def counted_run(words: Iterable[str]) -> tuple[Counts, float, float]:
    """Counts of one bench, its CPU seconds and its wall seconds."""
    counts = Counts()
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["bench", *words, "--out", folder, "--quiet", "--no-plots", "--threads", "1"]
        with (
            mock.patch.object(ViTMAE, "self_map", lambda model, latents: counts.self_map(model, latents)),
            mock.patch("traj_ood.scorers.scorer_set.iterate", counts.iterate),
        ):
            cpu, wall = time.process_time(), time.perf_counter()
            try:
                command(arguments)
            except SystemExit as end:
                if end.code:
                    raise
            return counts, time.process_time() - cpu, time.perf_counter() - wall


KINDS = {
    "products": ("aten::addmm", "aten::mm", "aten::mkldnn_convolution"),
    "attention": ("aten::_scaled_dot_product_flash_attention_for_cpu",),
    "activations": ("aten::gelu",),
    "normalisations": ("aten::native_layer_norm",),
}
CALLS = 200


@torch.inference_mode()
def one_call() -> dict[str, Any]:
    """Of f on a whole chunk of the bundled model: floating-point operations and microseconds a row (the best of five
    rounds), and the shares in it of each kind of operation."""
    model = load_autoencoder("fashion-mae")
    latents = model.encode(torch.rand(model.chunk, *model.input_shape, generator=torch.Generator().manual_seed(0)))
    with FlopCounterMode(display=False) as counter:
        model.self_map(latents)
    rounds = []
    for _ in range(5):
        began = time.process_time()
        for _ in range(CALLS // 5):
            model.self_map(latents)
        rounds.append((time.process_time() - began) / (CALLS // 5))
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(CALLS // 5):
            model.self_map(latents)
    times = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
    shares = {kind: sum(times.get(name, 0.0) for name in names) / sum(times.values()) for kind, names in KINDS.items()}
    return {
        "operations_per_row": counter.get_total_flops() / model.chunk,
        "microseconds_per_row": 1e6 * min(rounds) / model.chunk,
        "shares": {**shares, "sums, copies and calls": 1 - sum(shares.values())},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks/streaming.json"))
    parser.add_argument("--tiny", action="store_true", help="a rehearsal of seconds, whose figures mean nothing")
    arguments = parser.parse_args()
    if os.environ.get("OMP_NUM_THREADS") != "1":
        os.environ["OMP_NUM_THREADS"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.argv])
    torch.set_num_threads(1)
    size = 256 if arguments.tiny else 1536
    before = product_rate(size)
    counts, cpu, wall = counted_run(TINY if arguments.tiny else BENCH)
    rate = (before + product_rate(size)) / 2
    f = one_call()
    ideal = counts.steps * f["operations_per_row"] / rate
    record = {
        "rows_given_to_f": counts.rows,
        "steps_taken": counts.steps,
        "share_of_rows_used": counts.steps / counts.rows,
        "cpu_seconds": cpu,
        "wall_seconds": wall,
        "gigaflops_of_a_product": rate / 1e9,
        "seconds_at_that_rate": ideal,
        "f": {**f, "over_its_products": 1e-6 * f["microseconds_per_row"] * rate / f["operations_per_row"]},
        "ratios": {
            "bench fashion --quick: rows given to f over those used": counts.rows / counts.steps,
            "bench fashion --quick: time over that of its products": cpu / ideal,
        },
        "versions": environment(),
        "commit": git_commit(Path(__file__).parent),
    }
    write_atomic(arguments.out, (json.dumps(record, indent=2, sort_keys=True) + "\n").encode())
    print(json.dumps(record, indent=2, sort_keys=True))


if __name__ == "__main__":
    main()
