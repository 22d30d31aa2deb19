"""AUROC on images made from ID images: what `field` was chosen by, and simple inputs as a control.

    python benchmarks/made_images.py                    # outliers of ID validation images: choices are made on these
    python benchmarks/made_images.py --kinds simple     # constant, noisy, blurred, inverted ID test images: a control
    python benchmarks/made_images.py --model runs/cifar10-mae --benchmark cifar10-local --data-root ROOT

No OOD set is read. The candidates for `field` are its two terms, a (distance) and b (typicality, two-sided), and their
sums with weights 1 : 1/2 and 1 : 1. Writes results/benchmarks/made-<kinds>-<benchmark>-<model>.json.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

import numpy as np
import torch
from outliers import OUTLIERS, SIMPLE, made_sets

from traj_ood import Normalised, ScorerSet, TrajOODError, load_autoencoder, load_benchmark
from traj_ood.data import ImageSource
from traj_ood.evaluation.metrics import compute_metrics
from traj_ood.io.files import write_atomic
from traj_ood.io.provenance import environment, git_commit
from traj_ood.scorers import Field

SCORERS = {
    "outliers": ("mahalanobis", "mahalanobis:view=grid", "early-path", "field"),
    "simple": (
        *("field", "early-path", "first-residual", "trajectory:horizon=16", "early-trajectory"),
        *("early-trajectory:reference=features", "early-trajectory:reference=centroids", "start-distance"),
        *("mahalanobis", "mahalanobis:view=grid", "knn", "gmm", "reconstruction"),
    ),
}


def main() -> None:
    options = _options()
    model = load_autoencoder(options.model)
    data = load_benchmark(options.benchmark, options.data_root)
    data = data.subsample(train=options.train, per_set=options.per_set, seed=0)
    split = data.test if options.kinds == "simple" else data.val
    if split is None:
        raise TrajOODError(f"benchmark {data.name}: expected an ID validation split to make outliers from, got none")

    def images(source: ImageSource) -> Normalised:
        return Normalised(torch.stack([model.transform(source.load(i)) for i in range(len(source))]))

    scorers = ScorerSet(model, SCORERS[options.kinds]).fit(images(data.train.images))
    field = next(s for s in scorers.scorers if isinstance(s, Field))

    def candidates(source: ImageSource) -> dict[str, np.ndarray]:
        scored = scorers.score(images(source))
        parts = field.terms(scored.evidence).numpy()  # (B, 2): a / E[a] and b / E[b]
        found = {f"scorer {label}": values.numpy() for label, values in scored.scores.items()}
        found |= {"a": parts[:, 0], "b": parts[:, 1]}
        return found | {"a + b/2": parts[:, 0] + parts[:, 1] / 2, "a + b": parts.sum(axis=1)}

    inside = candidates(split.images)
    table: dict[str, dict[str, float]] = {name: {} for name in inside}
    for made in made_sets(split.images, SIMPLE if options.kinds == "simple" else OUTLIERS):
        for name, values in candidates(made.images).items():
            table[name][made.name] = compute_metrics(inside[name], values).auroc
    for row in table.values():
        row["mean"] = float(np.mean(list(row.values())))
    record = {
        "command": "python " + shlex.join([f"benchmarks/{Path(__file__).name}", *sys.argv[1:]]),
        "commit": git_commit(Path(__file__).parent),
        "versions": environment(),
        "model": {"name": model.name, "fingerprint": model.fingerprint()},
        "images": {"train": len(data.train.images), split.name: len(split.images)},
        "auroc": table,
    }
    path = options.out / f"made-{options.kinds}-{data.name}-{model.name}.json"
    write_atomic(path, (json.dumps(record, indent=2, sort_keys=True) + "\n").encode())
    for name, row in table.items():
        print(f"{name:28}", " ".join(f"{kind} {100 * value:5.1f}" for kind, value in row.items()))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", choices=("outliers", "simple"), default="outliers")
    parser.add_argument("--model", default="fashion-mae")
    parser.add_argument("--benchmark", default="fashion")
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--train", type=int, default=2000)
    parser.add_argument("--per-set", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
