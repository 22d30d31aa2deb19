"""What an approximate index saves and loses: python benchmarks/approximate_index.py [--points 200000]

Synthetic attractors, seeded: clusters, within them attractors, half of them reached by two trajectories that end a
small distance apart. Queries leave an attractor by a random step (ID-like); OOD-like ones also go up to half of the way
to another attractor, so they lie between clusters, where an approximate index errs most, and the AUROC of the nearest
distance lies between chance and 1 and can move. For the exact search and for each approximate one: seconds to build and
to search, the recall of the nearest point, the excess of the distances, and the change of the AUROC.

Every index is measured in a process of its own, so that peak memory belongs to it alone.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from traj_ood.evaluation.metrics import compute_metrics
from traj_ood.index import Approximate, NeighborIndex, search
from traj_ood.io.files import write_atomic
from traj_ood.io.provenance import environment, git_commit

KINDS = ("none", "ivf", "hnsw")
ATTRACTORS_PER_CLUSTER = 100
# Standard deviations per coordinate, those of the clusters' centres being 1.
CLUSTER_SPREAD, ATTRACTOR_SPREAD, STEP = 0.3, 1e-4, 0.2
PULLS = {"id": 0.0, "ood": 0.5}  # the largest share of the way to another attractor


def attractors(count: int, dimension: int, seed: int) -> Tensor:
    """(count, dimension) end points in random order; every third shares its attractor with another."""
    draw = torch.Generator().manual_seed(seed)
    distinct = -(-2 * count // 3)
    centres = torch.randn(-(-distinct // ATTRACTORS_PER_CLUSTER), dimension, generator=draw)
    cluster = torch.randint(len(centres), (distinct,), generator=draw)
    places = centres[cluster] + CLUSTER_SPREAD * torch.randn(distinct, dimension, generator=draw)
    points = torch.cat([places, places[: count - distinct]])
    points += ATTRACTOR_SPREAD * torch.randn(points.shape, generator=draw)
    return points[torch.randperm(count, generator=draw)]


def queries(points: Tensor, count: int, pull: float, seed: int) -> Tensor:
    """(count, d) places on the way from a random point to another, up to the share ``pull`` of it, and a step away."""
    draw = torch.Generator().manual_seed(seed)
    start, other = points[torch.randint(len(points), (2, count), generator=draw)]
    places = torch.lerp(start, other, pull * torch.rand(count, 1, generator=draw))
    lengths = 2 * STEP * torch.rand(count, 1, generator=draw)
    return places + lengths * torch.randn(start.shape, generator=draw)


def measure(kind: Approximate, arguments: argparse.Namespace) -> dict[str, Any]:
    """One index: its times, its recall, and the nearest distances of ID-like and OOD-like queries."""
    points = attractors(arguments.points, arguments.dimension, arguments.seed)
    asked = {
        name: queries(points, arguments.queries // 2, pull, arguments.seed + offset)
        for offset, (name, pull) in enumerate(PULLS.items(), start=1)
    }
    search.APPROXIMATE_FROM = 0  # so that a small rehearsal measures the same code
    began = time.perf_counter()
    built = NeighborIndex(points, backend="faiss", approximate=kind)
    groups = built.groups  # made when first asked for
    record: dict[str, Any] = {"build_seconds": time.perf_counter() - began, "groups": groups}
    began = time.perf_counter()
    found = {name: built.nearest(q).distances[:, 0] for name, q in asked.items()}
    record["search_seconds"] = time.perf_counter() - began
    record["peak_memory_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    record["recall"] = {name: asdict(built.recall(q)) for name, q in asked.items()}
    record["auroc"] = compute_metrics(found["id"].numpy(), found["ood"].numpy()).auroc
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks/approximate_index.json"))
    parser.add_argument("--points", type=int, default=200_000)
    parser.add_argument("--queries", type=int, default=2_000, help="half ID-like, half OOD-like")
    parser.add_argument("--dimension", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--piece", choices=KINDS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.piece:
        print(json.dumps(measure(arguments.piece, arguments)))
        return
    indexes: dict[str, Any] = {}
    for kind in KINDS:
        done = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--piece", kind], capture_output=True, text=True, check=False
        )
        if done.returncode:
            sys.exit(f"{kind} failed:\n{done.stderr}")
        indexes[kind] = json.loads(done.stdout.splitlines()[-1])
        indexes[kind]["auroc_change"] = indexes[kind]["auroc"] - indexes["none"]["auroc"]
    record = {
        "command": " ".join(["python", "benchmarks/approximate_index.py", *sys.argv[1:]]),
        "points": arguments.points,
        "queries": arguments.queries,
        "dimension": arguments.dimension,
        "seed": arguments.seed,
        "indexes": indexes,
        "versions": environment() | {"threads": str(torch.get_num_threads())},
        "commit": git_commit(Path(__file__).parent),
    }
    write_atomic(arguments.out, (json.dumps(record, indent=2, sort_keys=True) + "\n").encode())
    print(json.dumps(record, indent=2, sort_keys=True))


if __name__ == "__main__":
    main()
