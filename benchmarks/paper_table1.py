"""The paper's Table 1 beside ours: python benchmarks/paper_table1.py --data-root ROOT [--vary] [--dry-run]

ViT-MAE base under the paper's protocol (§4.2, App. D): 2,000 ImageNet training images give the attractors, 2,000 images
of ImageNet and of each OOD set are scored, tolerance 1e-5 on the squared residual, at most 500 steps. ROOT holds
OpenOOD's folders, as for ``traj-ood bench imagenet-paper``.

What the paper leaves open has a default, and is varied from it one choice at a time. Latent views, horizons and the
baselines' own choices cost nothing extra: they are read from the same pass. Masking changes f itself, so each mask
ratio is a run of its own, with ``--vary``: 0.75, which the checkpoint was trained with and transformers applies unless
told otherwise, and 0.25, a mild mask, to see whether the effect grows with what is hidden. One fixed mask each, seed 0.

``--dry-run`` checks data and model, times f for ten seconds and prints the hours to expect; it writes nothing.
``--rehearsal FOLDER`` runs the same code on a few images of any folder or zip file, which stand in for all splits, with
random weights of base geometry. Its figures mean nothing, and everything it writes says so.

Runs are resumable: the same command continues an interrupted one. OUT/<run>/<name>/ holds what the evaluator writes;
OUT/table1.json and OUT/table1.md are derived from those results alone (rehearsal-table1.* for a rehearsal).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import random
import shlex
import shutil
import statistics
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from traj_ood import Autoencoder, Evaluator, RunConfig, TrajOODError, ViTMAE, load_autoencoder, load_benchmark
from traj_ood.autoencoders.vit_mae import RECONSTRUCTION_MASKS, build_model
from traj_ood.data import Benchmark, preflight
from traj_ood.dynamics.device import resolve_device
from traj_ood.evaluation.metrics import Metrics
from traj_ood.evaluation.results import Result, ScorerResult
from traj_ood.io.files import write_atomic

BENCHMARK, MODEL = "imagenet-paper", "vit-mae-base"
BASE_PARAMETERS = 111_907_840  # of ViT-MAE base with its decoder
TOL = 1e-5
SIZES = {"attractors": 2000, "per_set": 2000, "max_steps": 500}
REHEARSAL_SIZES = {"attractors": 16, "per_set": 4, "max_steps": 3}  # 16: knn asks for 10 neighbours
TIMING_SECONDS = 10.0

# OOD split → the paper's name for it.
SETS = {"sun": "SUN397", "places": "Places365", "textures": "Texture", "inaturalist": "iNaturalist"}
# The paper's name of a method → our scorer under the defaults.
METHODS = {
    "d(attractors)": "trajectory",
    "KNN": "knn-paper",
    "Mahalanobis": "mahalanobis",
    "Reconstruction": "reconstruction",
}
# Table 1, percent: (FPR, AUROC) in the order of SETS. It rounds Fig. 5, which has one more decimal.
PAPER = {
    "d(attractors)": ((29.6, 91.2), (29.9, 91.0), (25.9, 92.6), (29.9, 91.3)),
    "KNN": ((100.0, 42.6), (100.0, 32.4), (34.5, 89.4), (86.4, 68.6)),
    "Mahalanobis": ((82.0, 58.0), (88.0, 45.0), (43.0, 90.0), (31.0, 87.0)),
    "Reconstruction": ((91.8, 49.5), (91.6, 50.9), (98.4, 49.1), (99.2, 23.6)),
}

# Where OpenOOD keeps each role's images, and the list that names them (None: a folder, v1.5 has no list).
LAYOUT = {
    "train": ("images_largescale", "imagenet_1k/train/n00000000", "train_imagenet.txt"),
    "test": ("images_largescale", "imagenet_1k/val", "test_imagenet.txt"),
    "sun": ("images_largescale", "sun/images", None),
    "places": ("images_largescale", "places/images", None),
    "textures": ("images_classic", "texture/banded", "test_textures.txt"),
    "inaturalist": ("images_largescale", "inaturalist/images", "test_inaturalist.txt"),
}


@dataclass(frozen=True)
class Run:
    """One pass of the evaluator: its folder below OUT, the share of hidden patches, and its scorers."""

    name: str
    mask_ratio: float
    scorers: tuple[str, ...]


@dataclass(frozen=True)
class Variation:
    """One row of the second table: a method with one choice moved from its default."""

    method: str
    choice: str
    setting: str
    scorer: str
    run: str = "default"


IN_ONE_PASS = (
    Variation("d(attractors)", "default", "all tokens, own length, no mask", "trajectory"),
    Variation("d(attractors)", "latent view", "CLS token", "trajectory:view=cls"),
    Variation("d(attractors)", "latent view", "mean of patch tokens", "trajectory:view=mean"),
    Variation("d(attractors)", "length", "horizon 16", "trajectory:horizon=16"),
    Variation("d(attractors)", "length", "horizon 64", "trajectory:horizon=64"),
    Variation("KNN", "default", "all tokens, not normalised, no mask", "knn-paper"),
    Variation("KNN", "latent view", "CLS token", "knn-paper:view=cls"),
    Variation("KNN", "latent view", "mean of patch tokens", "knn-paper:view=mean"),
    Variation("KNN", "normalisation", "L2", "knn-paper:normalize=true"),
    Variation("KNN", "another method", "Sun et al. 2022: 10th neighbour, L2, mean of patch tokens", "knn"),
    Variation("Mahalanobis", "default", "mean of patch tokens, Ledoit-Wolf, no mask", "mahalanobis"),
    Variation("Mahalanobis", "latent view", "CLS token", "mahalanobis:view=cls"),
    Variation("Mahalanobis", "covariance", "empirical", "mahalanobis:covariance=empirical"),
    Variation("Reconstruction", "default", "whole image, no mask", "reconstruction"),
    Variation("Reconstruction", "error", "on hidden patches, 4 masks of 75 %", "reconstruction:masked=true"),
)
MASKED_RUNS = tuple(Run(f"mask-{ratio:g}", ratio, tuple(METHODS.values())) for ratio in (0.25, 0.75))
MASKINGS = tuple(
    Variation(method, "masking", f"{run.mask_ratio:.0%} hidden".replace("%", " %"), scorer, run.name)
    for method, scorer in METHODS.items()
    for run in MASKED_RUNS
)
DEFAULT_RUN = Run("default", 0.0, tuple(v.scorer for v in IN_ONE_PASS))


# ---------------------------------------------------------------------------------------------- what is run


def load_model(arguments: argparse.Namespace, mask_ratio: float) -> Autoencoder:
    """The model with this share of patches hidden; for a rehearsal without ``--model`` random weights of base geometry.

    Raises ``TrajOODError`` when the model cannot be had; offline, a name from the hub cannot.
    """
    if arguments.rehearsal and arguments.model is None:
        torch.manual_seed(0)
        # transformers' default geometry is that of ViT-MAE base.
        model: Autoencoder = ViTMAE(build_model({}), name=f"random-{MODEL}", mask_ratio=mask_ratio)
        model.chunk = REHEARSAL_SIZES["per_set"]  # the model's own would be filled up with copies, at the same cost
    else:
        model = load_autoencoder(arguments.model or MODEL, mask_ratio=mask_ratio)
    return model.to(resolve_device(arguments.device))


@contextlib.contextmanager
def benchmark_of(arguments: argparse.Namespace) -> Iterator[Benchmark]:
    """The benchmark; that of a rehearsal has files for as long as the context lasts, and a name of its own."""
    if arguments.rehearsal is None:
        yield load_benchmark(BENCHMARK, arguments.data_root, follow_links=arguments.follow_links)
        return
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        lay_out(arguments.rehearsal, root, arguments.attractors, arguments.per_set)
        benchmark = load_benchmark(BENCHMARK, root / "openood")
        yield replace(
            benchmark, name=f"rehearsal-{BENCHMARK}", note="A rehearsal: images of one folder stand in for all sets."
        )


def lay_out(source: Path, root: Path, train: int, per_set: int) -> None:
    """Copy different images of a folder or zip file to where OpenOOD keeps each role's, and write the lists."""
    folder = source
    if source.is_file():
        folder = root / "unzipped"
        try:
            zipfile.ZipFile(source).extractall(folder)
        except zipfile.BadZipFile as error:
            raise TrajOODError(f"--rehearsal {source}: expected a folder or zip file of images, got {error}") from error
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".jpeg", ".jpg", ".png"))
    needed = train + (len(LAYOUT) - 1) * per_set
    if len(found) < needed:
        raise TrajOODError(
            f"--rehearsal {source}: expected at least {needed} JPEG or PNG images ({train} attractors, "
            f"{len(LAYOUT) - 1} x {per_set} to score), got {len(found)}; name another folder or ask for fewer"
        )
    random.Random(0).shuffle(found)
    stream = iter(enumerate(found))
    for role, (base, place, image_list) in LAYOUT.items():
        lines = []
        for _ in range(train if role == "train" else per_set):
            number, path = next(stream)
            name = f"{place}/{number:05d}{path.suffix}"  # folders of the source may repeat names
            target = root / "openood" / base / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
            lines.append(f"{name} {0 if role in ('train', 'test') else -1}\n")
        if image_list:
            write_atomic(root / "openood/benchmark_imglist/imagenet" / image_list, "".join(lines).encode())


def evaluator_of(arguments: argparse.Namespace, run: Run, model: Autoencoder, benchmark: Benchmark) -> Evaluator:
    config = RunConfig(
        scorers=run.scorers,
        attractors=arguments.attractors,
        per_set=arguments.per_set,
        seed=arguments.seed,
        tol=TOL,
        max_steps=arguments.max_steps,
    )
    return Evaluator(
        model, benchmark, config, out=arguments.out / run.name, quiet=arguments.quiet, command=command_line(arguments)
    )


def command_line(arguments: argparse.Namespace) -> str:
    """The command with its folders by name only: the record is read on other machines."""
    texts = []
    for key, value in vars(arguments).items():
        if value is None or value is False or key in ("out", "quiet", "fresh"):
            continue
        text = Path(value).name if key in ("data_root", "rehearsal", "model") else str(value)
        texts.append(f"--{key.replace('_', '-')}" + ("" if value is True else f" {shlex.quote(text)}"))
    return " ".join(["python benchmarks/paper_table1.py", *texts])


# ---------------------------------------------------------------------------------------------- dry run


def dry_run(arguments: argparse.Namespace) -> int:
    """Check data and model, time f, print the hours to expect; the exit status. Every problem is named, not the first.

    The model is timed without the data too: whether the hours are worth a download is known before it.
    """
    problems: list[TrajOODError] = []
    model: Autoencoder | None = None
    try:
        model = load_model(arguments, 0.0)
    except TrajOODError as error:
        problems.append(error)
    try:
        with benchmark_of(arguments) as benchmark:
            if model is not None:
                sample = evaluator_of(arguments, DEFAULT_RUN, model, benchmark).sample
            else:
                sample = benchmark.subsample(train=arguments.attractors, per_set=arguments.per_set, seed=arguments.seed)
            preflight(sample)
            counts = ", ".join(f"{s.name} {len(s.images):,}" for s in sample.splits())
            print(f"Data: every image is there ({counts}). {benchmark.note}")
    except TrajOODError as error:
        problems.append(error)
    if model is not None:
        print(f"Model: {model.name}, {model.parameter_count():,} parameters, on {model.device}.")
        print(expected_hours(arguments, model))
    for problem in problems:
        report(problem)
    return 2 if problems else 0


def expected_hours(arguments: argparse.Namespace, model: Autoencoder) -> str:
    seconds, calls = seconds_per_call(model)
    # Each image: the steps, one encoding and decoding, and the masked reconstructions, which cost less than f each.
    evaluations = arguments.max_steps + 1 + RECONSTRUCTION_MASKS
    chunks = sum(math.ceil(n / model.chunk) for n in [arguments.attractors, *[arguments.per_set] * (len(SETS) + 1)])
    hours = chunks * evaluations * seconds / 3600
    images = arguments.attractors + (len(SETS) + 1) * arguments.per_set
    return "\n".join(
        [
            f"Timing: f on {model.chunk} images takes {seconds:.3g} s ({calls} calls; {model.device}, "
            f"{torch.get_num_threads()} CPU threads).",
            f"Expected: at most {hours:.3g} hours for the default run ({images:,} images), at most "
            f"{hours * (1 + len(MASKED_RUNS)):.3g} hours for all {1 + len(MASKED_RUNS)} runs of --vary.",
            f"Assumption: the worst case, in which every image runs all {arguments.max_steps} steps; images that "
            "converge stop earlier. Masked runs count as the default one, though their encoder sees fewer patches. "
            "Distances to the attractors (some percent of a step, see benchmarks/engine.py) and reading images are "
            "left out.",
        ]
    )


def seconds_per_call(model: Autoencoder) -> tuple[float, int]:
    """Mean seconds of f on one full chunk, over ``TIMING_SECONDS`` after a warm-up, and the number of calls."""
    latents = model.encode(torch.rand(model.chunk, *model.input_shape))
    calls = -1
    with torch.inference_mode():
        while True:
            latents = model.self_map(latents)
            latents.sum().item()  # waits for the device
            calls += 1
            if calls == 0:
                began = time.perf_counter()
            elapsed = time.perf_counter() - began
            if calls and elapsed >= TIMING_SECONDS:
                return elapsed / calls, calls


# ---------------------------------------------------------------------------------------------- the summary


def summarize(arguments: argparse.Namespace, results: dict[str, Result], paths: dict[str, str]) -> dict[str, Any]:
    """Both tables as plain data, fractions in [0, 1] like those of the results, and what made each run."""
    rehearsal = arguments.rehearsal is not None
    default = results["default"]
    what = "Table 1 of the paper beside ours"
    if rehearsal:
        what = f"REHEARSAL of {what}: images and weights that mean nothing; only times and files are of interest"
    return {
        "what": what,
        "rehearsal": rehearsal,
        "departures": departures(default, rehearsal),
        "seed": default.seed,
        "protocol": {k: default.config[k] for k in ("attractors", "per_set", "tol", "max_steps")},
        "table": [row for method, scorer in METHODS.items() for row in table_rows(method, default.scorers[scorer])],
        "variations": [
            asdict(v) | {"sets": figures_by_set(results[v.run].scorers[v.scorer])}
            for v in sorted((*IN_ONE_PASS, *MASKINGS), key=lambda v: list(METHODS).index(v.method))
            if v.run in results
        ],
        "runs": {name: provenance(result, paths[name]) for name, result in results.items()},
    }


def departures(result: Result, rehearsal: bool) -> list[str]:
    """How the run differs from what the paper states; with any, its figures are not to be compared."""
    config, found = result.config, []
    if rehearsal:
        found.append("a rehearsal: images of one folder stand in for every set")
    if result.model["parameters"] != BASE_PARAMETERS:
        found.append(f"model of {result.model['parameters']:,} parameters, not ViT-MAE base's {BASE_PARAMETERS:,}")
    if result.model["name"].startswith("random-"):
        found.append("random weights")
    if config["attractors"] != SIZES["attractors"]:
        found.append(f"{config['attractors']:,} attractors, not {SIZES['attractors']:,}")
    counts = {name: count for name, count in images_of(result).items() if name != "train"}
    small = [f"{name} {count:,}" for name, count in counts.items() if count != SIZES["per_set"]]
    if small:
        found.append(f"{', '.join(small)} images, not {SIZES['per_set']:,}")
    if config["max_steps"] != SIZES["max_steps"]:
        found.append(f"at most {config['max_steps']:,} steps, not {SIZES['max_steps']:,}")
    return found


def images_of(result: Result) -> dict[str, int]:
    """Images of each split in the benchmark's order, which a result read from its file has lost."""
    return {name: result.data[name]["count"] for name in LAYOUT}


def table_rows(method: str, scorer: ScorerResult) -> list[dict[str, Any]]:
    """One row per OOD set, and their mean (the paper prints none; its mean is ours of its four figures)."""
    ours = figures_by_set(scorer)
    theirs = dict(zip(SETS, PAPER[method], strict=True))
    theirs["mean"] = tuple(statistics.fmean(values) for values in zip(*PAPER[method], strict=True))  # type: ignore[assignment]
    return [
        {
            "method": method,
            "scorer": scorer.label,
            "set": name,
            "ours": figures,
            "paper": {"fpr95": round(theirs[name][0] / 100, 6), "auroc": round(theirs[name][1] / 100, 6)},
        }
        for name, figures in ours.items()
    ]


def figures_by_set(scorer: ScorerResult) -> dict[str, dict[str, Any]]:
    def figures(metrics: Metrics) -> dict[str, Any]:
        return {"fpr95": metrics.fpr95, "auroc": metrics.auroc}

    found = {}
    for name in SETS:
        one = scorer.sets[name]
        intervals = {k: list(one.intervals[k]) for k in ("fpr95", "auroc") if k in one.intervals}
        found[name] = figures(one.metrics) | {"intervals": intervals}
    assert scorer.all is not None  # the benchmark has four sets
    return found | {"mean": figures(scorer.all) | {"intervals": {}}}


def provenance(result: Result, path: str) -> dict[str, Any]:
    keys = ("name", "model", "command", "commit", "versions", "created", "seconds", "seed", "dictionary")
    options = {"mask_ratio": result.config["model_options"].get("mask_ratio", 0.0)}
    return {"result": path, "images": images_of(result), **options, **{k: getattr(result, k) for k in keys}}


# ---------------------------------------------------------------------------------------------- the tables


def render(summary: dict[str, Any]) -> str:
    """Both tables in Markdown, with everything that a reader has to know to take them for what they are."""
    reasons = summary["departures"]
    title = "Table 1: the paper's and ours"
    if summary["rehearsal"]:
        title = "REHEARSAL of Table 1: these figures mean nothing"
    default, protocol = summary["runs"]["default"], summary["protocol"]
    lines = [f"## {title}", "", _run_line(default, protocol, summary["seed"]), ""]
    if reasons:
        lines += [f"**Not comparable with the paper**: {'; '.join(reasons)}.", ""]
    paper = "paper (not comparable)" if reasons else "paper"
    lines += [
        "FPR95 is the paper's: the threshold keeps 95 % of ID images, the figure is the share of OOD images accepted. "
        "It is not OpenOOD's, which `result.json` holds as `fpr95_openood`. Percent, with 95 % bootstrap intervals "
        "over images. The paper prints no mean; it is that of its four figures.",
        "",
        f"| OOD set | Method | FPR95 ↓ ours | FPR95 ↓ {paper} | AUROC ↑ ours | AUROC ↑ {paper} |",
        "| :-- | :-- | --: | --: | --: | --: |",
    ]
    for name, heading in (SETS | {"mean": "mean"}).items():
        for row in (r for r in summary["table"] if r["set"] == name):
            cells = [f for k in ("fpr95", "auroc") for f in (_ours(row["ours"], k), f"{100 * row['paper'][k]:.2f}")]
            lines.append(f"| {heading} | {' | '.join([row['method'], *cells])} |")
    lines += ["", *_variations(summary), "", *_warnings(summary)]
    return "\n".join(lines).rstrip() + "\n"


def _run_line(default: dict[str, Any], protocol: dict[str, Any], seed: int) -> str:
    counts = ", ".join(f"{name} {count:,}" for name, count in default["images"].items())
    return (
        f"{default['model']['name']} (fingerprint {default['model']['fingerprint'][:12]}), {protocol['attractors']:,} "
        f"attractors, tolerance {protocol['tol']:g}, at most {protocol['max_steps']:,} steps, seed {seed}. "
        f"Images: {counts}."
    )


def _ours(figures: dict[str, Any], key: str) -> str:
    interval = figures["intervals"].get(key)
    return f"{100 * figures[key]:.2f}" + (f" [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]" if interval else "")


def _variations(summary: dict[str, Any]) -> list[str]:
    label = "REHEARSAL: " if summary["rehearsal"] else ""
    lines = [
        f"### {label}one choice varied at a time",
        "",
        "FPR95 ↓ / AUROC ↑, percent. Each row moves one choice from its method's default (first row); "
        "**another method** moves several.",
        "",
        f"| Method | Choice | Setting | {' | '.join(SETS.values())} | mean |",
        f"| :-- | :-- | :-- | {' | '.join(['--:'] * (len(SETS) + 1))} |",
    ]
    for row in summary["variations"]:
        cells = [f"{100 * f['fpr95']:.1f} / {100 * f['auroc']:.1f}" for f in row["sets"].values()]
        choice = f"**{row['choice']}**" if row["choice"] == "another method" else row["choice"]
        lines.append(f"| {' | '.join([row['method'], choice, row['setting'], *cells])} |")
    missing = [run.name for run in MASKED_RUNS if run.name not in summary["runs"]]
    return [*lines, "", f"Not run: {', '.join(missing)} (`--vary`)."] if missing else lines


def _warnings(summary: dict[str, Any]) -> list[str]:
    return [
        f"- **Unhealthy attractors in run {name}**: {warning}."
        for name, run in summary["runs"].items()
        for warning in run["dictionary"]["warnings"]
    ]


# ---------------------------------------------------------------------------------------------- the command


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, help="OpenOOD's data folder; default: $TRAJ_OOD_DATA, then ./data")
    parser.add_argument("--follow-links", action="store_true", help="data folders may be links to other places")
    parser.add_argument("--model", help=f"name or local folder of a ViT-MAE; default: {MODEL}")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument("--out", type=Path, help="default: results/paper-table1, or runs/rehearsal-paper-table1")
    parser.add_argument("--vary", action="store_true", help="also the runs with masks, each as long as the default one")
    parser.add_argument("--dry-run", action="store_true", help="check, time and estimate; write nothing")
    parser.add_argument("--rehearsal", type=Path, metavar="FOLDER", help="folder or zip file of any images")
    for key, value in SIZES.items():
        text = f"default: {value}, in a rehearsal {REHEARSAL_SIZES[key]}"
        parser.add_argument(f"--{key.replace('_', '-')}", type=int, help=text)
    parser.add_argument("--seed", type=int, default=0, help="of the training sample")
    parser.add_argument("--fresh", action="store_true", help="discard what earlier runs left in OUT")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    arguments = parser.parse_args(argv)
    if arguments.rehearsal is not None and arguments.data_root is not None:
        parser.error("--rehearsal brings its own data: leave out --data-root")
    for key, value in (SIZES if arguments.rehearsal is None else REHEARSAL_SIZES).items():
        if getattr(arguments, key) is None:
            setattr(arguments, key, value)
    if arguments.out is None:
        arguments.out = Path("results/paper-table1" if arguments.rehearsal is None else "runs/rehearsal-paper-table1")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    try:
        if arguments.dry_run:
            sys.exit(dry_run(arguments))
        results, paths = {}, {}
        with benchmark_of(arguments) as benchmark:
            for run in (DEFAULT_RUN, *(MASKED_RUNS if arguments.vary else ())):
                print(f"paper_table1: run {run.name}", file=sys.stderr)
                evaluator = evaluator_of(arguments, run, load_model(arguments, run.mask_ratio), benchmark)
                results[run.name] = evaluator.run(fresh=arguments.fresh)
                paths[run.name] = (evaluator.folder / "result.json").relative_to(arguments.out).as_posix()
        summary = summarize(arguments, results, paths)
        table = render(summary)
        stem = "rehearsal-table1" if summary["rehearsal"] else "table1"
        write_atomic(arguments.out / f"{stem}.md", table.encode())
        text = json.dumps(summary, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        write_atomic(arguments.out / f"{stem}.json", text.encode())
    except TrajOODError as error:
        report(error)
        sys.exit(2)
    except KeyboardInterrupt:
        print("paper_table1: interrupted; the same command continues where this one stopped", file=sys.stderr)
        sys.exit(130)
    print(table, end="")
    print(f"Written to {arguments.out}", file=sys.stderr)


def report(error: TrajOODError) -> None:
    print(f"paper_table1: error: {' '.join(str(error).split())}", file=sys.stderr)


if __name__ == "__main__":
    main()
