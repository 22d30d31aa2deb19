"""How long a surrogate takes to train: images a second, projected minutes, and rows per call of f.

Features are a generated mixture of Gaussians with low-rank covariances: time does not depend on what the numbers mean.
The whole default recipe is timed unless ``--steps`` says fewer; ``projected_minutes`` is what the whole one would take
at the measured rate. For a quick look:

    python benchmarks/surrogate_training.py --count 5000 --steps 20
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rates import product_rate
from torch import Tensor, nn

from traj_ood.autoencoders import SurrogateAutoencoder
from traj_ood.backbones import CallableBackbone, Features
from traj_ood.dynamics.chunks import apply_in_chunks
from traj_ood.io.files import write_atomic
from traj_ood.io.provenance import environment, git_commit
from traj_ood.training.surrogate import SurrogateRecipe, fit_surrogate

CHUNKS = (32, 64, 128, 256, 512, 1024)
CLUSTERS, RANK = 100, 16


def features(count: int, width: int) -> Tensor:
    """(count, width): made in blocks, so that the features are the largest thing in memory."""
    draws = torch.Generator().manual_seed(0)
    centres = torch.randn(CLUSTERS, width, generator=draws)
    bases = torch.randn(CLUSTERS, RANK, width, generator=draws) / RANK**0.5
    values = torch.empty(count, width)
    for block in values.split(1000):
        which = torch.randint(CLUSTERS, (len(block),), generator=draws)
        inside = torch.bmm(torch.randn(len(block), 1, RANK, generator=draws), bases[which])[:, 0]
        block.copy_(centres[which] + inside + 0.2 * torch.randn(block.shape, generator=draws))
    return values


def training(values: Tensor, recipe: SurrogateRecipe) -> tuple[SurrogateAutoencoder, dict[str, Any]]:
    """One training run, checks of the held-out loss included; the trajectories of the health check timed apart."""
    width = values.shape[1]
    backbone = CallableBackbone(
        lambda images: Features(images.flatten(1), None), (1, 1, width), width, module=nn.Module(), name="identity"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a short run has no attractors to speak of
        model = fit_surrogate(backbone, values, recipe)
    record = model.record
    log = record["log"]
    steps = log[-1]["step"]
    # In tenths: those of a rehearsal are none.
    rate = steps * min(recipe.batch_size, record["data"]["trained_on"]) / max(record["seconds"], 0.1)
    return model, {
        "network": record["network"],
        "parameters": record["parameters"],
        "steps": steps,
        "best_step": record["best_step"],
        "seconds": record["seconds"],
        "images_per_second": rate,
        "projected_minutes": SurrogateRecipe().steps * recipe.batch_size / rate / 60,
        "validation_loss": record["validation_loss"],
        "health": record["health"],
        "health_seconds": record["health_seconds"],
    }


def chunks(model: SurrogateAutoencoder, rows: int = 1024, repeats: int = 5) -> dict[str, float]:
    """Milliseconds of one f-step of ``rows`` latents, by rows per call; ways in turn, median of the rounds."""
    latents = torch.randn(rows, model.network.bottleneck, generator=torch.Generator().manual_seed(0))
    times: dict[int, list[float]] = {chunk: [] for chunk in CHUNKS}
    with torch.inference_mode():
        for _ in range(repeats + 1):  # the first round warms up
            for chunk in CHUNKS:
                began = time.perf_counter()
                apply_in_chunks(model.self_map, latents, chunk)
                times[chunk].append(time.perf_counter() - began)
    return {str(chunk): 1e3 * statistics.median(t[1:]) for chunk, t in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks/surrogate_training.json"))
    parser.add_argument("--count", type=int, default=50_000, help="features")
    parser.add_argument("--width", type=int, default=2048, help="of the features")
    parser.add_argument("--steps", type=int, default=SurrogateRecipe().steps, help="of training")
    arguments = parser.parse_args()
    recipe = replace(SurrogateRecipe(), steps=arguments.steps)
    model, measured = training(features(arguments.count, arguments.width), recipe)
    steps = f"{arguments.steps} steps of training over a product of their size"
    rate, batch = product_rate(min(arguments.width, 1024)), min(recipe.batch_size, arguments.count)
    # Forward and twice backward, two operations for each weight and image.
    ideal = 6 * measured["parameters"] * batch * measured["steps"] / rate
    record = {
        "ratios": {f"surrogate: {steps}": measured["seconds"] / ideal},
        "count": arguments.count,
        "width": arguments.width,
        "training": measured,
        "f_step_ms_of_1024_rows_by_chunk": chunks(model),
        "chunk": model.chunk,
        "peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "versions": environment() | {"threads": str(torch.get_num_threads())},
        "commit": git_commit(Path(__file__).parent),
    }
    content = json.dumps(record, indent=2, sort_keys=True)
    write_atomic(arguments.out, (content + "\n").encode())
    print(content)


if __name__ == "__main__":
    main()
