"""The verdicts of `traj-ood diagnose` on models whose dynamics are known to be good, random, collapsed and restless:

    python benchmarks/diagnose_models.py [--models-dir runs/diagnose] [--out results/benchmarks/diagnose.json]

* bundled: healthy. random: the bundled geometry with untrained weights.
* masked-loss: the same, trained ten epochs on hidden patches only, without input noise: nothing settles.
* bottleneck-2: a convolutional autoencoder with two latent dimensions and much input noise: few attractors.

Models that are missing are trained first (15 minutes on two cores); everything is seeded. Exit code 1 when a verdict is
not the expected one.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import torch

from traj_ood import load_autoencoder, load_benchmark
from traj_ood.evaluation.diagnose import diagnose
from traj_ood.io.files import write_atomic
from traj_ood.io.provenance import environment, git_commit
from traj_ood.training.autoencoder import build_autoencoder, train_model
from traj_ood.training.config import TrainConfig

EXPECTED = {
    "fashion-mae": "healthy",
    "random": "random-like",
    "masked-loss": "not converging",
    "bottleneck-2": "collapsed",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models-dir", type=Path, default=Path("runs/diagnose"))
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks/diagnose.json"))
    options = parser.parse_args()
    data = load_benchmark("fashion")
    found = {}
    for name in EXPECTED:
        diagnosis = diagnose(load_autoencoder(_model(name, options.models_dir)), data, images=options.images)
        found[name] = diagnosis.as_dict()
        print(f"## {name}\n{diagnosis.report()}\n", flush=True)
    record = {
        "command": "python " + shlex.join([f"benchmarks/{Path(__file__).name}", "--images", str(options.images)]),
        "commit": git_commit(Path(__file__).parent),
        "versions": environment(),
        "expected": EXPECTED,
        "diagnoses": found,
    }
    write_atomic(options.out, (json.dumps(record, indent=2, sort_keys=True) + "\n").encode())
    words = {name: diagnosis["verdict"]["word"] for name, diagnosis in found.items()}
    if words != EXPECTED:
        sys.exit(f"expected {EXPECTED}, got {words}")


def _model(name: str, folder: Path) -> str:
    """The name or folder of a model, trained if it is not there."""
    if name == "fashion-mae" or (folder / name / "config.json").is_file():
        return name if name == "fashion-mae" else str(folder / name)
    mae, conv = TrainConfig.load("fashion-mae"), TrainConfig.load("fashion-conv")
    if name == "random":
        torch.manual_seed(1)
        build_autoencoder(mae, (0.3,), (0.35,)).save_pretrained(folder / name)  # type: ignore[attr-defined]
    elif name == "masked-loss":
        recipe = replace(mae.recipe, loss="masked", mask_ratios=(0.75,), input_noise=0.0)
        train_model(replace(mae, name=name, recipe=recipe), folder / name)
    else:
        recipe = replace(conv.recipe, epochs=2, input_noise=1.0, learning_rate=2e-3)
        train_model(replace(conv, name=name, model={"width": 8, "bottleneck": 2}, recipe=recipe), folder / name)
    return str(folder / name)


if __name__ == "__main__":
    main()
