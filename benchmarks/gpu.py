"""What one GPU does with this package, in at most 8 minutes: python benchmarks/gpu.py
[--out results/benchmarks/gpu.json]

Needs only what is on the machine: what is missing, or fails, is named in the record, and the rest goes on. Random
weights in ViT-MAE base's geometry; the bundled model and Fashion-MNIST, where they can be had, for parity and a run.

Parts: the scores of the bundled model on GPU and CPU; steps of f a second and its share of the card's product rate in
fp32, TF32 and bfloat16, compiled, and with CUDA graphs; the torch index against FAISS's; how often the host waits in a
step (``torch.cuda.set_sync_debug_mode``), by steps between two looks; peak memory; ``bench fashion`` from end to end.
``--device cpu --tiny`` rehearses all of it in seconds.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rates import product_rate, wait_for
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from traj_ood import Normalised, ScorerSet, ViTMAE, iterate, load_autoencoder
from traj_ood.attractors import NearestAttractor
from traj_ood.autoencoders.vit_mae import build_model
from traj_ood.cli import main as command
from traj_ood.data import load_benchmark
from traj_ood.dynamics.compiled import CompiledMap
from traj_ood.dynamics.device import bfloat16_map, resolve_device, set_tf32
from traj_ood.index import NeighborIndex
from traj_ood.io.files import write_atomic
from traj_ood.io.provenance import environment, git_commit

SECONDS = 480.0


@dataclass(frozen=True)
class Size:
    """How much is measured: of ``base`` layers, image size, rows of f, attractors; images of the bundled model."""

    layers: tuple[int, int]
    image: int
    rows: int
    attractors: int
    images: int
    repeats: int
    product: int


FULL = Size((12, 8), 224, 64, 2000, 256, 5, 8192)
TINY = Size((1, 1), 32, 2, 6, 20, 1, 64)


class Card:
    """One device, and what is measured on it."""

    def __init__(self, device: torch.device, size: Size) -> None:
        self.device, self.size = device, size
        self.is_cuda = device.type == "cuda"

    def seconds(self, call: Callable[[], object]) -> float:
        """The fastest of some calls, after one that warms up."""
        found = []
        for _ in range(self.size.repeats + 1):
            wait_for(self.device)
            began = time.perf_counter()
            call()
            wait_for(self.device)
            found.append(time.perf_counter() - began)
        return min(found[1:])

    def rate(self, dtype: torch.dtype) -> float:
        return product_rate(self.size.product, device=self.device, dtype=dtype, clock=time.perf_counter)

    def base(self) -> ViTMAE:
        encoder, decoder = self.size.layers
        torch.manual_seed(0)
        network = build_model(
            {
                "image_size": self.size.image,
                "patch_size": 16,
                "num_channels": 3,
                "hidden_size": 768,
                "num_hidden_layers": encoder,
                "num_attention_heads": 12,
                "intermediate_size": 3072,
                "decoder_hidden_size": 512,
                "decoder_num_hidden_layers": decoder,
                "decoder_num_attention_heads": 16,
                "decoder_intermediate_size": 2048,
            }
        )
        return ViTMAE(network, name="random-base").to(self.device)


def parity(card: Card) -> dict[str, Any]:
    """The bundled model's scores here and on the CPU: largest and median relative difference, scores over 16 steps."""
    images = _images(card.size.images)
    scores = []
    for device in (torch.device("cpu"), card.device):
        model = load_autoencoder("fashion-mae").to(device)
        scorers = ScorerSet(model, ["field", "trajectory:horizon=16", "knn:k=1", "mahalanobis"])
        half = len(images) // 2
        scores.append(scorers.fit(Normalised(images[:half])).score(Normalised(images[half:])).scores)
    apart = {k: ((scores[0][k] - v).abs() / scores[0][k].abs().clamp(min=1e-9)) for k, v in scores[1].items()}
    return {name: {"largest": float(d.max()), "median": float(d.median())} for name, d in apart.items()}


def steps(card: Card) -> dict[str, Any]:
    """Rows of f a second at ViT-MAE base's geometry, and its share of the rate of one large product of that type."""
    model = card.base()
    latents = model.encode(torch.randn(card.size.rows, *model.input_shape, device=card.device))
    counter = FlopCounterMode(display=False)
    with counter, torch.inference_mode():
        model.self_map(latents)
    work = counter.get_total_flops()
    low = bfloat16_map(model.self_map, card.device)
    compiled = CompiledMap(model.self_map)
    ways: dict[str, tuple[Callable[[Tensor], Tensor], torch.dtype, bool]] = {
        "fp32": (model.self_map, torch.float32, False),
        "tf32": (model.self_map, torch.float32, True),
        "bf16": (low, torch.bfloat16, False),
        "fp32, compiled": (compiled, torch.float32, False),
        "bf16, compiled": (CompiledMap(low), torch.bfloat16, False),
        "bf16, compiled, graphs": (CompiledMap(low, graphs=True), torch.bfloat16, False),
    }
    found: dict[str, Any] = {"rows": card.size.rows, "gigaflop_a_row": work / card.size.rows / 1e9}
    for name, (f, dtype, tf32) in ways.items():
        if not card.is_cuda and (tf32 or "graphs" in name):
            found[name] = "only on CUDA"
            continue
        if not card.is_cuda and "compiled" in name and card.size is TINY:
            found[name] = "left out of the rehearsal: compiling takes longer than all of it"
            continue
        set_tf32(tf32)
        try:
            with torch.inference_mode(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                taken, rate = card.seconds(lambda f=f: f(latents)), card.rate(dtype)  # type: ignore[misc]
        finally:
            set_tf32(False)
        found[name] = {"rows_a_second": card.size.rows / taken, "share_of_product_rate": work / taken / rate}
        found[name]["product_teraflops"] = rate / 1e12
        if isinstance(f, CompiledMap) and f.fell_back:
            found[name]["fell_back"] = f.fell_back
    return found


def indices(card: Card) -> dict[str, Any]:
    """Seconds of a search for the nearest of all attractors, by backend; the distances agree."""
    model = card.base()
    draws = torch.Generator().manual_seed(0)
    dimension = int(model.encode(torch.zeros(1, *model.input_shape, device=card.device)).numel())
    points = torch.randn(card.size.attractors, dimension, generator=draws).to(card.device)
    queries = points[: card.size.rows] + 0.1
    found: dict[str, Any] = {"attractors": len(points), "dimension": dimension, "queries": len(queries)}
    for backend in ("torch", "faiss"):
        try:
            index = NeighborIndex(points, backend=backend)
            distances = index.nearest(queries).distances
            found[backend] = {"runs_as": index.backend, "seconds": card.seconds(lambda i=index: i.nearest(queries))}  # type: ignore[misc]
            found[backend]["seconds_of_2_nearest"] = card.seconds(lambda i=index: i.search(queries, 2))  # type: ignore[misc]
            found[backend]["mean_distance"] = float(distances.mean())
        except Exception as error:
            found[backend] = f"{type(error).__name__}: {error}"
    return found


def waits(card: Card) -> dict[str, Any]:
    """Times that the host waited for the device, for each step of the engine, by steps between two looks."""
    model = load_autoencoder("fashion-mae").to(card.device)
    start = model.encode(torch.randn(card.size.images, *model.input_shape, device=card.device))
    with torch.inference_mode():
        points = model.self_map(start[: model.chunk]).flatten(1)
    index = NeighborIndex(points)
    limit = 8 if card.size is TINY else 64
    found: dict[str, Any] = {}
    for look in (1, 8) if card.size is TINY else (1, 4, 8, 16):
        for observed in (False, True):
            observers = [NearestAttractor(model, index, "tokens")] if observed else []

            def run(look: int = look, observers: list[Any] = observers) -> None:
                iterate(
                    model.self_map,
                    start,
                    tol=0.0,
                    max_steps=limit,
                    observers=observers,
                    chunk=model.chunk,
                    look=look,
                )

            run()
            with counted_waits(card) as waited:
                run()
            name = f"look={look}{', distances' if observed else ''}"
            found[name] = {"seconds": card.seconds(run), "waits_a_step": len(waited) / limit if card.is_cuda else None}
    return found


@contextmanager
def counted_waits(card: Card) -> Iterator[list[Any]]:
    """The warnings that torch gives when the host waits for the device."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if card.is_cuda:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield caught
        finally:
            if card.is_cuda:
                torch.cuda.set_sync_debug_mode("default")


def memory(card: Card) -> dict[str, Any]:
    """Peak gigabytes of a few steps with distances at ViT-MAE base's geometry."""
    model = card.base()
    if card.is_cuda:
        torch.cuda.reset_peak_memory_stats(card.device)
    start = model.encode(torch.randn(card.size.rows, *model.input_shape, device=card.device))
    points = torch.randn(card.size.attractors, start[0].numel(), device=card.device)
    watch = NearestAttractor(model, NeighborIndex(points), "tokens")
    iterate(model.self_map, start, tol=0.0, max_steps=4, observers=[watch], chunk=model.chunk)
    peak = torch.cuda.max_memory_allocated(card.device) / 2**30 if card.is_cuda else None
    return {"rows": len(start), "attractors": len(points), "peak_gb": peak}


def run(card: Card) -> dict[str, Any]:
    """``bench fashion`` from end to end, with two scorers."""
    sizes = ["--attractors", "12", "--per-set", "3", "--max-steps", "8"] if card.size is TINY else ["--quick"]
    words = ["bench", "fashion", *sizes, "--scorers", "trajectory,field", "--device", str(card.device)]
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        try:
            command([*words, "--out", folder, "--quiet", "--no-plots"])
        except SystemExit as end:
            if end.code:
                raise RuntimeError(f"exit code {end.code}") from end
        seconds = {}
        for path in Path(folder).glob("*/result.json"):
            seconds = json.loads(path.read_text()).get("seconds", {})
    return {"seconds": time.perf_counter() - began, "stages": seconds}


PARTS: dict[str, Callable[[Card], dict[str, Any]]] = {
    f.__name__: f for f in (parity, steps, indices, waits, memory, run)
}


def _images(count: int) -> Tensor:
    model, source = load_autoencoder("fashion-mae"), load_benchmark("fashion").test.images
    return torch.stack([model.transform(source.load(i)) for i in range(count)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks/gpu.json"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--tiny", action="store_true", help="a rehearsal of seconds, whose figures mean nothing")
    arguments = parser.parse_args()
    card = Card(resolve_device(arguments.device), TINY if arguments.tiny else FULL)
    record: dict[str, Any] = {
        "device": torch.cuda.get_device_name(card.device) if card.is_cuda else str(card.device),
        "versions": environment(),
        "commit": git_commit(Path(__file__).parent),
    }
    began = time.monotonic()
    for name in arguments.only:
        started = time.monotonic()
        if started - began > SECONDS:
            record[name] = f"left out: {SECONDS:.0f} seconds are over"
            continue
        try:
            record[name] = PARTS[name](card)
        except Exception as error:  # whatever is missing here: the other parts are worth having
            record[name] = f"failed: {type(error).__name__}: {error}"
        print(f"{name} ({time.monotonic() - started:.0f} s): {json.dumps(record[name])}", flush=True)
        write_atomic(arguments.out, (json.dumps(record, indent=2, sort_keys=True) + "\n").encode())


if __name__ == "__main__":
    main()
