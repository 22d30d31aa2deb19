"""What matters to the scores, one choice at a time: python benchmarks/ablations.py [--part horizon,attractors,…]

Parts, all on one model and the same test images:

  horizon     AUROC and FPR@95 of the trajectory score after 0 … 500 steps, in each view, from one recorded pass
  attractors  50 … 10,000 training images; smaller samples are contained in larger ones
  tolerance   1e-1 … 1e-7, for training and for test trajectories
  view        latent views of the scorers that have them
  masking     share of patches that f hides (one fixed mask)
  recipe      the training recipe, one choice moved at a time, with the health of the resulting dictionary: does a
              healthier dynamical system detect better?

None of this chooses a setting of any scorer: defaults were fixed before (see benchmarks/protocol.py). The parts say how
much a choice matters, on test images. Sizes are small by default (300 images a set, 2,000 training images, three epochs
for each recipe) and recorded; a model of three epochs is a short training, not the bundled model.

OUT/<part>.json, .csv and .png (default results/ablations). A part whose JSON is there is skipped unless ``--fresh``;
``--redraw`` draws its plot again. Models of the part recipe are kept below --models-dir and continue from their last
epoch.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from traj_ood import (
    AttractorDictionary,
    Autoencoder,
    Normalised,
    ScorerSet,
    TrajOODError,
    load_autoencoder,
    load_benchmark,
)
from traj_ood.data import Benchmark, Split
from traj_ood.evaluation.metrics import compute_metrics
from traj_ood.io.files import write_atomic
from traj_ood.io.provenance import environment, git_commit
from traj_ood.io.trees import read_json
from traj_ood.scorers import Evidence
from traj_ood.training.autoencoder import train_model
from traj_ood.training.config import TrainConfig

HORIZONS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 500)
COUNTS = (50, 100, 200, 500, 1000, 2000, 5000, 10000)
TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
MASK_RATIOS = (0.0, 0.25, 0.5, 0.75)
VIEW_SCORERS = {
    "trajectory:horizon=16": ("tokens", "mean", "cls"),
    "start-distance": ("tokens", "mean", "cls"),
    "early-trajectory": ("tokens", "mean", "cls"),
    "early-path": ("grid", "mean", "cls"),
    "mahalanobis": ("grid", "tokens", "mean", "cls"),
    "knn": ("tokens", "mean", "cls"),
}
COMPARED = ("trajectory", "trajectory:horizon=16", "field", "mahalanobis", "mahalanobis:view=grid", "knn")
SHORT = tuple(s for s in COMPARED if s != "trajectory")

# Name → what differs from the base config, in its recipe and its model. The base: loss on all patches, denoising with
# standard deviation 1, weight decay 0.05, 96 dimensions a token.
RECIPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "base": ({}, {}),
    "masked loss": ({"loss": "masked", "mask_ratios": (0.75,), "input_noise": 0.0}, {}),
    "masked loss, noise 1": ({"loss": "masked", "mask_ratios": (0.75,)}, {}),
    "noise 0": ({"input_noise": 0.0}, {}),
    "noise 0.3": ({"input_noise": 0.3}, {}),
    "weight decay 0": ({"weight_decay": 0.0}, {}),
    "weight decay 0.3": ({"weight_decay": 0.3}, {}),
    "hidden 48": ({}, {"hidden_size": 48, "intermediate_size": 192}),
}

Row = dict[str, Any]


# ---------------------------------------------------------------------------------------------- the images


@dataclass(frozen=True)
class Workplace:
    """What every part works with: the model, its benchmark, and the options of the command."""

    arguments: argparse.Namespace
    benchmark: Benchmark
    model: Autoencoder

    def train_images(self, count: int | None = None) -> Split:
        """The sample of training images; a smaller one is part of a larger one."""
        return self._sample(self.arguments.attractors if count is None else count).train

    def test_splits(self) -> list[Split]:
        sample = self._sample(2)
        return [sample.test, *sample.ood]

    def _sample(self, train: int) -> Benchmark:
        return self.benchmark.subsample(train=train, per_set=self.arguments.per_set, seed=self.arguments.seed)

    def scorers(self, model: Autoencoder, specs: Sequence[str], tol: float = 1e-5) -> ScorerSet:
        return ScorerSet(model, specs, tol=tol, max_steps=self.arguments.max_steps)


def images_of(model: Autoencoder, split: Split) -> Normalised:
    return Normalised(torch.stack([model.transform(split.images.load(i)) for i in range(len(split.images))]))


def fit(scorers: ScorerSet, split: Split) -> ScorerSet:
    return scorers.fit(images_of(scorers.autoencoder, split), split.images.ids)


def health_of(scorers: ScorerSet) -> Row:
    """Share converged and number of distinct attractors; empty when nothing needed attractors."""
    if scorers.dictionary is None:
        return {}
    health = scorers.dictionary.health()
    return {"converged": health.converged, "distinct": health.distinct, "healthy": health.healthy}


def score(work: Workplace, scorers: ScorerSet, **setting: Any) -> list[Row]:
    """One row per scorer: its figures over all OOD sets and on each, and its cost."""
    scores: dict[str, dict[str, np.ndarray]] = {label: {} for label in scorers.labels}
    costs: dict[str, list[float]] = {label: [] for label in scorers.labels}
    for split in work.test_splits():
        found = scorers.score(images_of(scorers.autoencoder, split))
        for scorer in scorers.scorers:
            scores[scorer.label][split.name] = found.scores[scorer.label].numpy()
            costs[scorer.label] += [scorer.f_evaluations(found.evidence)] * len(split.images)
    health = health_of(scorers)
    return [
        {**setting, "scorer": label, "f_evaluations": statistics.fmean(costs[label]), **figures(work, own), **health}
        for label, own in scores.items()
    ]


def figures(work: Workplace, scores: dict[str, np.ndarray]) -> Row:
    """Mean AUROC and the paper's FPR@95 over the OOD sets, then both on each set."""
    test, *sets = work.test_splits()
    each = {s.name: compute_metrics(scores[test.name], scores[s.name]) for s in sets}
    row: Row = {key: statistics.fmean(getattr(m, key) for m in each.values()) for key in ("auroc", "fpr95")}
    for name, metrics in each.items():
        row |= {f"{name}_auroc": metrics.auroc, f"{name}_fpr95": metrics.fpr95}
    return row


# ---------------------------------------------------------------------------------------------- the parts


def horizon(work: Workplace) -> Iterator[Row]:
    """The trajectory score's mean over z_0 … z_H for every H, from one pass that keeps the distances."""
    views = ("tokens", "mean", "cls") if work.model.has_cls else ("tokens",)
    specs = ["trajectory" if v == "tokens" else f"trajectory:view={v}" for v in views]
    scorers = fit(work.scorers(work.model, specs), work.train_images())
    paths = {s.name: scorers.score(images_of(work.model, s)).evidence.path() for s in work.test_splits()}
    steps = torch.cat([p.steps for p in paths.values()]).double()
    health = health_of(scorers)
    limits = [h for h in HORIZONS if h <= work.arguments.max_steps]
    for view in views:
        for limit in [*limits, None]:
            scores = {name: path.mean_over_path(f"distance/{view}", limit).numpy() for name, path in paths.items()}
            cost = float((steps if limit is None else steps.clamp(max=limit)).mean())
            head = {"horizon": "own length" if limit is None else limit, "scorer": f"trajectory:view={view}"}
            yield {**head, "f_evaluations": cost, **figures(work, scores), **health}


def attractors(work: Workplace) -> Iterator[Row]:
    """Fit on ever more training images; each is followed to its attractor once, by the largest sample."""
    most = len(work.benchmark.train.images)
    counts = sorted({min(n, most) for n in (work.arguments.counts or COUNTS)})
    largest = work.train_images(counts[-1])
    scorers = work.scorers(work.model, SHORT)
    encoding = work.model.examine(images_of(work.model, largest).images)
    dictionary, evidence = scorers.explore(encoding, tuple(largest.images.ids))
    assert dictionary is not None  # the trajectory score needs one
    place = {image: row for row, image in enumerate(largest.images.ids)}
    for count in counts:
        rows = torch.tensor([place[image] for image in work.train_images(count).images.ids])
        yield from score(work, scorers.learn(_rows(dictionary, rows), _evidence(evidence, rows)), attractors=count)


def _rows(dictionary: AttractorDictionary, rows: Tensor) -> AttractorDictionary:
    tensors = {name: values[rows] for name, values in dictionary.tensors().items()}
    ids = tuple(dictionary.ids[i] for i in rows.tolist())
    return AttractorDictionary(ids=ids, provenance=dictionary.provenance, **tensors)


def _evidence(evidence: Evidence, rows: Tensor) -> Evidence:
    return Evidence(
        features={view: values[rows] for view, values in evidence.features.items()},
        points={key: values[rows] for key, values in evidence.points.items()},
    )


def tolerance(work: Workplace) -> Iterator[Row]:
    for tol in TOLERANCES:
        scorers = fit(
            work.scorers(work.model, ("trajectory", "trajectory:horizon=16", "end-distance"), tol), work.train_images()
        )
        yield from score(work, scorers, tolerance=tol)


def view(work: Workplace) -> Iterator[Row]:
    known = None if work.model.has_cls else ("tokens", "grid")  # one token: its views are the same
    specs = {f"{s}:view={v}": (s, v) for s, views in VIEW_SCORERS.items() for v in views if not known or v in known}
    scorers = fit(work.scorers(work.model, list(specs)), work.train_images())
    for row, (name, own) in zip(score(work, scorers), specs.values(), strict=True):
        yield {"view": own, **row, "scorer": name}


def masking(work: Workplace) -> Iterator[Row]:
    for ratio in MASK_RATIOS:
        model = load_autoencoder(work.arguments.model, mask_ratio=ratio)
        yield from score(work, fit(work.scorers(model, COMPARED), work.train_images()), mask_ratio=ratio)


def recipe(work: Workplace) -> Iterator[Row]:
    """Each recipe trained from the same seed for the same number of epochs."""
    base = TrainConfig.load(work.arguments.config)
    for name, (changes, geometry) in RECIPES.items():
        folder = work.arguments.models_dir / name.replace(",", "").replace(" ", "-")
        config = replace(
            base,
            name=folder.name,
            recipe=replace(base.recipe, epochs=work.arguments.epochs, **changes),
            model={**base.model, **geometry},
            health_images=0,  # the dictionary below says it
        )
        if not (folder / "training.json").is_file():
            print(f"ablations: training {name}", file=sys.stderr)
            train_model(config, folder, data_root=work.arguments.data_root, quiet=work.arguments.quiet)
        model = load_autoencoder(folder)
        record = json.loads((folder / "training.json").read_text())
        if record["config"]["recipe"]["epochs"] != work.arguments.epochs:
            raise TrajOODError(
                f"{folder}: expected a model of {work.arguments.epochs} epochs, got one of "
                f"{record['config']['recipe']['epochs']}: choose another --models-dir, or --epochs"
            )
        setting = {"recipe": name, "epochs": work.arguments.epochs, "validation_loss": record["validation_loss"]}
        yield from score(work, fit(work.scorers(model, COMPARED), work.train_images()), **setting)


PARTS: dict[str, Callable[[Workplace], Iterator[Row]]] = {
    p.__name__: p for p in (horizon, attractors, tolerance, view, masking, recipe)
}
AXES = {  # part → column on the x axis, its title, its scale
    "horizon": ("horizon", "steps H", "symlog"),
    "attractors": ("attractors", "training images", "log"),
    "tolerance": ("tolerance", "tolerance on the squared residual", "log"),
    "view": ("view", "latent view", "names"),
    "masking": ("mask_ratio", "share of hidden patches", "linear"),
    "recipe": ("recipe", "training recipe", "names"),
}


# ---------------------------------------------------------------------------------------------- files


def run_part(name: str, work: Workplace) -> None:
    """Compute one part and write its three files; the JSON last, since it says that the part is done."""
    out, arguments = work.arguments.out, work.arguments
    if (out / f"{name}.json").is_file() and not arguments.fresh:
        print(f"ablations: {name} is there, skipped", file=sys.stderr)
        return
    print(f"ablations: {name}", file=sys.stderr)
    began = time.perf_counter()
    rows = list(PARTS[name](work))
    sizes = {s.name: len(s.images) for s in work.test_splits()}
    record = {
        "part": name,
        "rows": rows,
        "model": {"name": work.model.name, "fingerprint": work.model.fingerprint()},
        "benchmark": work.benchmark.name,
        "images": sizes,
        "settings": {k: getattr(arguments, k) for k in ("attractors", "per_set", "max_steps", "seed", "epochs")},
        "command": command_line(arguments, name),
        "commit": git_commit(Path(__file__).parent),
        "versions": environment(),
        "seconds": round(time.perf_counter() - began, 1),
    }
    write_atomic(out / f"{name}.csv", _csv(rows).encode())
    plot(record, out / f"{name}.png")
    write_atomic(out / f"{name}.json", (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode())
    print(markdown(name, rows))


def _csv(rows: Sequence[Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(k for row in rows for k in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def markdown(name: str, rows: Sequence[Row]) -> str:
    """The part's table, percent; the CSV holds each set as well."""
    column = AXES[name][0]
    health = [k for k in ("converged", "distinct") if k in rows[0] and name in ("attractors", "masking", "recipe")]
    health += ["converged"] if name == "tolerance" else []
    lines = [" | ".join([column, "scorer", "AUROC", "FPR95", "f / image", *health])]
    lines.append(" | ".join([":--", ":--", "--:", "--:", "--:", *["--:"] * len(health)]))
    for row in rows:
        cells = [f"{100 * row[k]:.2f}" for k in ("auroc", "fpr95")] + [f"{row['f_evaluations']:.1f}"]
        cells += [f"{100 * row[k]:.1f} %" if k == "converged" else str(row[k]) for k in health]
        lines.append(" | ".join([str(row[column]), f"`{row['scorer']}`", *cells]))
    return "\n".join(f"| {line} |" for line in [*lines]) + "\n"


def command_line(arguments: argparse.Namespace, part: str) -> str:
    """The command of one part, with models and configs by name alone."""
    texts = ["python benchmarks/ablations.py", f"--part {part}"]
    for key in ("suite", "model", "config", "attractors", "per_set", "max_steps", "seed", "epochs", "counts"):
        value = getattr(arguments, key)
        if value is not None:
            words = [str(v) for v in value] if isinstance(value, list) else [Path(str(value)).name]
            texts.append(shlex.join([f"--{key.replace('_', '-')}", *words]))
    return " ".join(texts)


# ---------------------------------------------------------------------------------------------- plots


def plot(record: dict[str, Any], path: Path) -> None:
    """AUROC and FPR@95 over the part's choice, one line per scorer; for recipes also over the dictionary's health."""
    from traj_ood.drawing.charts import look_of
    from traj_ood.drawing.style import Frame, canvas, save_figure

    name, rows, settings = record["part"], record["rows"], record["settings"]
    column, title, scale = AXES[name]
    panels: list[tuple[str, str, str, str]] = [(column, title, scale, key) for key in ("auroc", "fpr95")]
    if name == "recipe":
        panels += [("converged", "share of training trajectories that converge", "linear", "auroc")]
        panels += [("distinct", "distinct attractors", "symlog", "auroc")]
    line = {"linestyle": "" if scale == "names" else "-"}
    looks = {s: {**look_of(n), **line} for n, s in enumerate(dict.fromkeys(row["scorer"] for row in rows))}
    images = f"{settings['per_set']:,} images a set at most"
    if name != "attractors":  # which shows them on its axis
        images += f", {settings['attractors']:,} training images"
    what = f"{record['benchmark']}, {'recipes' if name == 'recipe' else record['model']['name']}"
    figure, axes = canvas(Frame(5.0, 3.8), len(panels), 2, f"{name}: {what}\n{images}", looks)
    for axis, (x, label, own_scale, key) in zip(axes, panels, strict=True):
        _panel(axis, rows, x, own_scale, key, looks)
        axis.set(xlabel=label, ylabel={"auroc": "mean AUROC (%)", "fpr95": "mean FPR95 (%)"}[key])
    save_figure(figure, path)


def _panel(axis: Any, rows: Sequence[Row], x: str, scale: str, key: str, looks: dict[str, Any]) -> None:
    names = list(dict.fromkeys(str(row[x]) for row in rows))
    for scorer, look in looks.items():
        # A path's own length is no number of steps: it stands in the table alone.
        own = [r for r in rows if r["scorer"] == scorer and (scale == "names" or not isinstance(r[x], str))]
        places = [names.index(str(r[x])) if scale == "names" else r[x] for r in own]
        axis.plot(places, [100 * r[key] for r in own], **look)
    if scale == "names":
        axis.set_xticks(range(len(names)), names, rotation=30, ha="right")
    else:
        axis.set_xscale(scale)


# ---------------------------------------------------------------------------------------------- the command


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", default=",".join(PARTS), help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--suite", default="fashion", help="benchmark, a name or a YAML file; default: fashion")
    parser.add_argument("--data-root", type=Path, help="where the benchmark's images are")
    parser.add_argument("--model", default="fashion-mae", help="name or folder; default: fashion-mae")
    parser.add_argument("--config", default="fashion-mae", help="training config that recipes differ from")
    parser.add_argument("--epochs", type=int, default=3, help="of each recipe; default: 3")
    parser.add_argument("--attractors", type=int, default=2000, help="training images; default: 2000")
    parser.add_argument("--counts", type=int, nargs="+", help="training images in the part attractors")
    parser.add_argument("--per-set", type=int, default=300, help="most test images a set; default: 300")
    parser.add_argument("--max-steps", type=int, default=500, help="default: 500")
    parser.add_argument("--seed", type=int, default=0, help="of the training sample; default: 0")
    parser.add_argument("--models-dir", type=Path, default=Path("runs/ablations/models"), help="of the part recipe")
    parser.add_argument("--out", type=Path, default=Path("results/ablations"))
    parser.add_argument("--fresh", action="store_true", help="compute parts again that are there (models are kept)")
    parser.add_argument("--redraw", action="store_true", help="draw the recorded parts again, and compute nothing")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    arguments = parser.parse_args(argv)
    arguments.parts = [part.strip() for part in arguments.part.split(",") if part.strip()]
    for part in arguments.parts:
        if part not in PARTS:
            parser.error(f"unknown part {part!r}: expected some of {', '.join(PARTS)}")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    try:
        if arguments.redraw:
            for part in arguments.parts:
                path = arguments.out / f"{part}.json"
                plot(read_json(path, "a recorded part", "run it first"), path.with_suffix(".png"))
            return
        benchmark = load_benchmark(arguments.suite, arguments.data_root)
        work = Workplace(arguments, benchmark, load_autoencoder(arguments.model))
        for part in arguments.parts:
            run_part(part, work)
    except TrajOODError as error:
        print(f"ablations: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("ablations: interrupted; finished parts and models are kept", file=sys.stderr)
        sys.exit(130)
    print(f"Written to {arguments.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
