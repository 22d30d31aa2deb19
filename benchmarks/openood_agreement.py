"""Do OpenOOD's Evaluator and ours agree? python benchmarks/openood_agreement.py --openood CLONE --cifar10 F --images F

Lays real images out as OpenOOD lays out its cifar10 benchmark, runs the unmodified ``openood.evaluation_api.Evaluator``
on them for traj_ood's scorers by name, runs ``traj_ood.Evaluator`` on the same folder, and compares AUROC, FPR@95 (in
OpenOOD's meaning) and both AUPRs, set by set. Ends with exit code 1 when any two differ by more than 1e-6.

The ID images are CIFAR-10's. All other sets are STAND-INS: the folders named cifar100, tin, mnist, … hold images of
``--images``. What is shown is that two programs compute the same numbers, not how good a scorer is, and no figure is a
result on the set whose name it bears.

OpenOOD declares too few dependencies, and some do not build or run with current libraries. Those of its imports that
nothing here calls (imgaug, libmr) are replaced by empty modules where they fail; the record names them.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import itertools
import json
import shlex
import shutil
import sys
import tempfile
import time
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

import traj_ood.openood
from traj_ood import Evaluator, Result, RunConfig, load_autoencoder, load_benchmark
from traj_ood.autoencoders import Autoencoder
from traj_ood.io.files import write_atomic
from traj_ood.io.provenance import environment, git_commit

SCORERS = ("trajectory", "knn", "mahalanobis")
TOLERANCE = 1e-6
SUFFIXES = (".JPEG", ".jpeg", ".jpg", ".png")
OOD = {"near": ("cifar100", "tin"), "far": ("mnist", "svhn", "texture", "places365")}
# OpenOOD's columns, and what ours are called.
METRICS = {"FPR@95": "fpr95_openood", "AUROC": "auroc", "AUPR_IN": "aupr_in", "AUPR_OUT": "aupr_out"}
NEVER_CALLED = {"imgaug": ("augmenters",), "libmr": ()}


def stand_in() -> dict[str, str]:
    """Empty modules for imports of OpenOOD that fail and that nothing here calls: name → why."""
    replaced = {}
    for name, parts in NEVER_CALLED.items():
        try:
            importlib.import_module(name)
        except Exception as error:
            replaced[name] = f"{type(error).__name__}: {error}"
            for stale in [m for m in sys.modules if m.split(".")[0] == name]:
                del sys.modules[stale]
            sys.modules[name] = module = types.ModuleType(name)
            for part in parts:
                sys.modules[f"{name}.{part}"] = types.ModuleType(f"{name}.{part}")
                setattr(module, part, sys.modules[f"{name}.{part}"])
    return replaced


def lay_out(root: Path, cifar10: Path, images: Path, *, train: int, per_set: int, seed: int) -> dict[str, int]:
    """OpenOOD's cifar10 benchmark under ``root``, small: list name → number of images."""
    classes = sorted(p.name for p in (cifar10 / "train").iterdir() if p.is_dir())
    labels = {name: label for label, name in enumerate(classes)}
    ids = [
        drawn(sorted(p for p in (cifar10 / part).glob("*/*") if p.suffix in SUFFIXES), seed, part)
        for part in ("train", "test")
    ]
    others = drawn(sorted(p for p in images.iterdir() if p.suffix in SUFFIXES), seed, "ood")
    lists = {"train_cifar10": take(ids[0], train), "val_cifar10": take(ids[1], per_set)}
    lists |= {"test_cifar10": take(ids[1], per_set), "test_cifar10c": take(ids[1], 8), "val_tin": take(others, per_set)}
    lists |= {f"test_{name}": take(others, per_set) for names in OOD.values() for name in names}
    for name, paths in lists.items():
        lines = []
        for path in paths:
            known = path.parent.name in labels and cifar10 in path.parents
            own = Path(name.split("_")[1], name.split("_")[0], path.parent.name if known else "images", path.name)
            (target := root / "images_classic" / own).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
            lines.append(f"{own.as_posix()} {labels[path.parent.name] if known else -1}\n")
        (target := root / "benchmark_imglist" / "cifar10" / f"{name}.txt").parent.mkdir(parents=True, exist_ok=True)
        target.write_text("".join(lines))
    return {name: len(paths) for name, paths in lists.items()}


def drawn(paths: Sequence[Path], seed: int, stream: str) -> Iterator[Path]:
    """The paths in an order drawn by ``seed``."""
    order = np.random.default_rng([seed, len(stream)]).permutation(len(paths))
    return iter([paths[i] for i in order])


def take(paths: Iterator[Path], count: int) -> list[Path]:
    found = list(itertools.islice(paths, count))
    if len(found) < count:
        raise SystemExit(f"expected {count} more images, got {len(found)}: fewer --per-set, or more images")
    return found


def run_openood(model: Autoencoder, scorer: str, root: Path, configs: Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The table of OpenOOD's Evaluator (fractions), and the confidences by set."""
    from openood.evaluation_api import Evaluator as OpenOODEvaluator

    name = f"traj_ood_{scorer}"
    made = traj_ood.openood.evaluator(
        model, "cifar10", name, data_root=root, config_root=configs, batch_size=128, num_workers=0
    )
    if type(made) is not OpenOODEvaluator:
        raise SystemExit(f"expected OpenOOD's own Evaluator, got {type(made)}")
    table = made.eval_ood(progress=False)
    confidences = {"test": made.scores["id"]["test"][1]}
    confidences |= {k: v[1] for region in OOD for k, v in made.scores["ood"][region].items()}
    return table / 100, confidences


def compare(table: pd.DataFrame, confidences: dict[str, Any], ours: Result, scores: pd.DataFrame, scorer: str) -> Any:
    """OpenOOD's and our figures by set, and the largest differences."""
    own = ours.scorers[scorer]
    places = {name: own.sets[name].metrics for names in OOD.values() for name in names}
    places |= {"nearood": own.near, "farood": own.far}
    sets, largest = {}, 0.0
    for place, metrics in places.items():
        pairs = {c: [float(table.loc[place, c]), float(getattr(metrics, m))] for c, m in METRICS.items()}
        largest = max([largest, *(abs(a - b) for a, b in pairs.values())])
        sets[place] = {column: {"openood": a, "traj_ood": b} for column, (a, b) in pairs.items()}
    apart = [np.abs(scores.loc[scores["split"] == n, scorer].to_numpy() + c).max() for n, c in confidences.items()]
    return {"sets": sets, "max_difference": largest, "max_score_difference": float(max(apart))}


def command_line(arguments: argparse.Namespace) -> str:
    """The command with its folders by name only: the record is read on other machines."""
    texts = [
        f"--{key.replace('_', '-')} {value.name if isinstance(value, Path) else shlex.quote(str(value))}"
        for key, value in vars(arguments).items()
        if value is not None and key != "out"
    ]
    return " ".join(["python benchmarks/openood_agreement.py", *texts])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--openood", type=Path, help="clone of OpenOOD; default: the installed one")
    parser.add_argument("--cifar10", type=Path, required=True, help="folder with {train,test}/<class>/*.jpg")
    parser.add_argument("--images", type=Path, required=True, help="folder of other images")
    parser.add_argument("--model", default="fashion-mae")
    parser.add_argument("--train", type=int, default=200, help="ID training images in the list")
    parser.add_argument("--attractors", type=int, default=128, help="how many of them are learnt from")
    parser.add_argument("--per-set", type=int, default=128, help="a model's chunk: fewer cost the same")
    parser.add_argument("--max-steps", type=int, default=100, help="cut short: agreement does not wait for convergence")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks/openood_agreement.json"))
    arguments = parser.parse_args()
    if arguments.openood:
        sys.path.insert(0, str(arguments.openood))
    replaced = stand_in()
    model = load_autoencoder(arguments.model)
    with tempfile.TemporaryDirectory() as scratch:
        root, configs = Path(scratch, "data"), Path(scratch, "configs")
        counts = lay_out(
            root,
            arguments.cifar10,
            arguments.images,
            train=arguments.train,
            per_set=arguments.per_set,
            seed=arguments.seed,
        )
        learning = {k: getattr(arguments, k) for k in ("attractors", "seed", "max_steps")}
        traj_ood.openood.register(configs)
        for path in configs.rglob("traj_ood_*.yml"):
            config = yaml.safe_load(path.read_text())
            config["postprocessor"]["learning"] |= learning
            path.write_text(yaml.safe_dump(config))
        began = time.perf_counter()
        theirs = {scorer: run_openood(model, scorer, root, configs) for scorer in SCORERS}
        middle = time.perf_counter()
        config = RunConfig(SCORERS, resamples=0, **learning)
        run = Evaluator(model, load_benchmark("cifar10", root), config, out=Path(scratch, "runs"), quiet=True)
        ours = run.run()
        seconds = {"openood": round(middle - began, 1), "traj_ood": round(time.perf_counter() - middle, 1)}
        scores = pd.read_parquet(run.folder / "scores.parquet")
    compared = {scorer: compare(*theirs[scorer], ours, scores, scorer) for scorer in SCORERS}
    import openood

    package = Path(openood.__file__).parent
    largest = max(entry["max_difference"] for entry in compared.values())
    record = {
        "what": "agreement of OpenOOD's Evaluator with traj_ood's on the same images; STAND-IN images fill every set "
        "but cifar10's, so no figure here is a result on the set whose name it bears",
        "command": command_line(arguments),
        "commit": git_commit(Path(__file__).parent),
        "openood": {
            "commit": git_commit(package),
            "sha256": hashlib.sha256(b"".join(p.read_bytes() for p in sorted(package.rglob("*.py")))).hexdigest(),
            "stand_in_modules": replaced,
            "evaluator": "openood.evaluation_api.Evaluator, unmodified",
        },
        "images": counts,
        "model": ours.model,
        "learning": learning,
        "dictionary_warnings": ours.dictionary["warnings"],
        "scorers": compared,
        "tolerance": TOLERANCE,
        "max_difference": largest,
        "agree": largest <= TOLERANCE,
        "seconds": seconds,
        "versions": environment(),
    }
    write_atomic(arguments.out, (json.dumps(record, indent=2, sort_keys=True) + "\n").encode())
    for scorer, entry in compared.items():
        print(
            f"{scorer}: largest difference {entry['max_difference']:.1e}, of scores {entry['max_score_difference']:.1e}"
        )
    if not record["agree"]:
        sys.exit(f"OpenOOD and traj_ood differ by {largest:.2e}, more than {TOLERANCE:g}: see {arguments.out}")


if __name__ == "__main__":
    main()
