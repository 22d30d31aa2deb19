"""Speed and memory of the engine: python benchmarks/engine.py [--out results/benchmarks/engine.json]

Part 1, the bundled model on Fashion-MNIST with 2,000 attractors: time per evaluation of f inside the engine (residuals,
stopping, distances) over a bare loop of f on the same batch, and a whole scoring run against the naive way: iterate the
whole batch until its slowest sample stops, keep every point, then torch.cdist.

Part 2, the bundled model's f through ``torch.compile`` beside f itself, both in the model's chunks; what compiling
costs, after how many rows that is earned back, and how far scores move.

Part 3, ViT-MAE base geometry with random weights and 2,000 random attractors of 151,296 dimensions: the share of a step
that distances take, and the peak memory of the process.

Seconds are CPU seconds, of as many threads as OMP_NUM_THREADS says.

Every measured piece runs in a process of its own, so that peak memory belongs to it alone.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from traj_ood import AttractorDictionary, Autoencoder, Norm, Normalised, ScorerSet, ViTMAE, iterate, load_autoencoder
from traj_ood.attractors import NearestAttractor
from traj_ood.data import ImageSource, load_benchmark
from traj_ood.dynamics.chunks import apply_in_chunks
from traj_ood.dynamics.compiled import CompiledMap
from traj_ood.index import NeighborIndex
from traj_ood.io.files import write_atomic
from traj_ood.io.provenance import environment, git_commit

# A rehearsal takes seconds; its figures mean nothing.
TINY = "--tiny" in sys.argv
BATCH, STEPS, ATTRACTORS, LIMIT = (8, 3, 12, 6) if TINY else (512, 100, 2000, 500)
BASE = {
    "image_size": 224,
    "patch_size": 16,
    "num_channels": 3,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "decoder_hidden_size": 512,
    "decoder_num_hidden_layers": 8,
    "decoder_num_attention_heads": 16,
    "decoder_intermediate_size": 2048,
}


def overhead() -> dict[str, Any]:
    """Time per step: engine with distances over a bare loop, both on 512 images for exactly 100 steps."""
    model, start, dictionary = _bundled()
    index = dictionary.index(model)

    def engine(observed: bool) -> None:
        observers = [Norm(), NearestAttractor(model, index, "tokens")] if observed else []
        iterate(model.self_map, start, tol=0.0, max_steps=STEPS, observers=observers, chunk=model.chunk)

    def bare(chunked: bool) -> None:
        z = start
        with torch.inference_mode():
            for _ in range(STEPS):
                z = apply_in_chunks(model.self_map, z, model.chunk) if chunked else model.self_map(z)

    ways: dict[str, Callable[[], None]] = {
        "bare_whole_batch": lambda: bare(False),
        "bare_in_chunks": lambda: bare(True),
        "engine_without_distances": lambda: engine(False),
        "engine": lambda: engine(True),
    }
    seconds = _interleaved(ways)
    fastest = min(seconds["bare_whole_batch"], seconds["bare_in_chunks"])
    return {
        "batch": BATCH,
        "steps": STEPS,
        "chunk": model.chunk,
        "attractors": len(dictionary),
        "groups": index.groups,
        "index_backend": index.backend,
        "ms_per_step": {k: 1e3 * v / STEPS for k, v in seconds.items()},
        "engine_over_fastest_bare_loop": seconds["engine"] / fastest,
    }


def score_engine() -> dict[str, Any]:
    """The trajectory score of 512 images, this package's way."""
    model, _, dictionary = _bundled()
    images = _images(model, load_benchmark("fashion").test.images, BATCH)
    scorers = ScorerSet(model, ["trajectory"], max_steps=LIMIT).learn(dictionary, _no_evidence())
    began = time.process_time()
    scores = scorers.score(Normalised(images)).scores["trajectory"]
    return {"seconds": time.process_time() - began, "scores": scores.tolist()}


def score_naive() -> dict[str, Any]:
    """The same score the naive way."""
    model, _, dictionary = _bundled()
    images = _images(model, load_benchmark("fashion").test.images, BATCH)
    attractors = dictionary.usable().flatten(1)
    began = time.process_time()
    with torch.inference_mode():
        path, own = [model.encode(images)], torch.full((BATCH,), LIMIT)
        for step in range(1, LIMIT + 1):
            path.append(model.self_map(path[-1]))
            residual = (path[-1] - path[-2]).flatten(1).square().sum(dim=1)
            if step > 1:
                own = torch.where((residual < 1e-5) & (own == LIMIT), step, own)
            if bool((own < step + 1).all()):
                break
        distances = torch.stack([torch.cdist(z.flatten(1), attractors).min(dim=1).values for z in path], dim=1)
    inside = torch.arange(len(path)) <= own[:, None]
    scores = (distances * inside).sum(dim=1) / inside.sum(dim=1)
    return {"seconds": time.process_time() - began, "scores": scores.tolist()}


def compiled() -> dict[str, Any]:
    """f through torch.compile: CPU seconds of chunks in turn with f's own, and the scores of both."""
    model, start, dictionary = _bundled()
    rows = start[: model.chunk]
    f, began = CompiledMap(model.self_map, rows=model.chunk), time.process_time()
    with torch.inference_mode(), model.fixed():
        f(rows)
        compiling = time.process_time() - began
        ways: dict[str, Callable[[], object]] = {"plain": lambda: model.self_map(rows), "compiled": lambda: f(rows)}
        seconds = _interleaved(ways, repeats=3 if TINY else 100)
    images = Normalised(_images(model, load_benchmark("fashion").test.images, min(BATCH, 96)))
    scores = []
    for compile in (False, True):
        scorers = ScorerSet(model, ["trajectory:horizon=16"], max_steps=LIMIT, compile=compile)
        scores.append(scorers.learn(dictionary, _no_evidence()).score(images).scores["trajectory:horizon=16"])
    saved = (seconds["plain"] - seconds["compiled"]) / len(rows)
    return {
        "fell_back": f.fell_back,
        "ms_per_chunk": {name: 1e3 * value for name, value in seconds.items()},
        "compiled_over_plain": seconds["compiled"] / seconds["plain"],
        "compile_seconds": compiling,
        "rows_to_earn_it_back": compiling / saved if saved > 0 else None,
        "max_relative_score_difference": float(((scores[1] - scores[0]).abs() / scores[0]).max()),
    }


def side_by_side() -> dict[str, Any]:
    """Chunks of f side by side, one thread each, over one after the other with all threads: wall time of four chunks
    per thread, alone and beside one busy process per thread."""
    model, start, _ = _bundled()
    threads = torch.get_num_threads()
    rows = start[:1].expand(4 * threads * model.chunk, *start.shape[1:])

    def seconds(permitted: bool) -> float:
        model.side_by_side = permitted
        began = time.perf_counter()
        with torch.inference_mode(), model.fixed():
            apply_in_chunks(model.self_map, rows, model.chunk)
        return time.perf_counter() - began

    def ratio() -> float:
        pairs = [(seconds(True), seconds(False)) for _ in range(2 if TINY else 20)][1:]
        return statistics.median(a for a, _ in pairs) / statistics.median(b for _, b in pairs)

    alone = ratio()
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(threads)]
    try:
        return {"threads": threads, "alone": alone, "beside_busy_processes": ratio()}
    finally:
        for process in busy:
            process.kill()


def base_geometry() -> dict[str, Any]:
    """ViT-MAE base, random weights: distances against f, per step."""
    from traj_ood.autoencoders.vit_mae import build_model

    torch.manual_seed(0)
    small = {"image_size": 32, "num_hidden_layers": 1, "decoder_num_hidden_layers": 1} if TINY else {}
    model = ViTMAE(build_model(BASE | small), name="random-base")
    latents = model.encode(torch.randn(32, *model.input_shape))
    points = torch.randn(ATTRACTORS, latents[0].numel()).mul_(latents.std()).add_(latents.mean())
    began = time.process_time()
    index = NeighborIndex(points)
    assert index.groups  # made when first asked for
    record: dict[str, Any] = {
        "dimensions": points.shape[1],
        "attractors": ATTRACTORS,
        "index_backend": index.backend,
        "index_build_seconds": time.process_time() - began,
        "chunk": model.chunk,
    }
    for count in (8, 32):  # few rows still running, and a full batch
        record[f"{count}_images"] = _base_step(model, index, latents[:count])
    return record


def _base_step(model: Autoencoder, index: NeighborIndex, latents: torch.Tensor) -> dict[str, float]:
    def step() -> None:
        with torch.inference_mode():
            apply_in_chunks(model.self_map, latents, model.chunk)

    seconds = _interleaved({"f": step, "distances": lambda: index.nearest(latents.flatten(1))}, repeats=3)
    share = seconds["distances"] / (seconds["f"] + seconds["distances"])
    return {**{f"{k}_seconds": v for k, v in seconds.items()}, "distances_share_of_step": share}


PIECES: dict[str, Callable[[], dict[str, Any]]] = {
    f.__name__: f for f in (overhead, score_engine, score_naive, compiled, side_by_side, base_geometry)
}


def _interleaved(ways: dict[str, Callable[[], object]], repeats: int = 5) -> dict[str, float]:
    """Median CPU seconds of each way, run in turn so that a drift of the machine's speed hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats + 1):  # the first round warms up
        for name, way in ways.items():
            began = time.process_time()
            way()
            times[name].append(time.process_time() - began)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def _bundled() -> tuple[Autoencoder, torch.Tensor, AttractorDictionary]:
    """The bundled model, z0 of 512 test images, and the dictionary of 2,000 training images (cached per run)."""
    model = load_autoencoder("fashion-mae")
    cache = Path(_arguments().cache)
    benchmark = load_benchmark("fashion").subsample(train=ATTRACTORS, per_set=BATCH, seed=0)
    if not cache.is_file():
        images = _images(model, benchmark.train.images, ATTRACTORS)
        dictionary, _ = ScorerSet(model, ["trajectory"], max_steps=LIMIT).explore(
            model.examine(images), tuple(benchmark.train.images.ids)
        )
        assert dictionary is not None
        dictionary.save(cache)
    start = model.encode(_images(model, benchmark.test.images, BATCH))
    return model, start, AttractorDictionary.load(cache)


def _images(model: Autoencoder, source: ImageSource, count: int) -> torch.Tensor:
    return torch.stack([model.transform(source.load(i)) for i in range(count)])


def _no_evidence() -> Any:
    from traj_ood import Evidence

    return Evidence()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks/engine.json"))
    name = f"runs/engine-attractors{'-tiny' if TINY else ''}.safetensors"
    parser.add_argument("--cache", default=name, help="where part 1's dictionary is kept")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal of seconds, whose figures mean nothing")
    parser.add_argument("--piece", choices=PIECES, help=argparse.SUPPRESS)
    return parser.parse_args()


def _in_process(piece: str, cache: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, __file__, "--piece", piece, "--cache", cache, *["--tiny"] * TINY],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{piece} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    arguments = _arguments()
    if arguments.piece:
        measured = PIECES[arguments.piece]()
        measured["peak_memory_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps(measured))
        return
    _bundled()  # so that no measured process computes the dictionary
    record: dict[str, Any] = {piece: _in_process(piece, arguments.cache) for piece in PIECES}
    ours, naive = record["score_engine"], record["score_naive"]
    pairs = list(zip(ours.pop("scores"), naive.pop("scores"), strict=True))
    # Some samples stop a step earlier or later when rounding differs next to the tolerance: compare the median.
    record["naive_over_engine"] = {
        "seconds": naive["seconds"] / ours["seconds"],
        "peak_memory": naive["peak_memory_gb"] / ours["peak_memory_gb"],
        "median_relative_score_difference": statistics.median(abs(a - b) / b for a, b in pairs),
    }
    record["versions"] = environment() | {"threads": str(torch.get_num_threads())}
    record["commit"] = git_commit(Path(__file__).parent)
    write_atomic(arguments.out, (json.dumps(record, indent=2, sort_keys=True) + "\n").encode())
    print(json.dumps(record, indent=2, sort_keys=True))


if __name__ == "__main__":
    main()
