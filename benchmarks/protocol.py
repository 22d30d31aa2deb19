"""Does a scorer of the dynamics beat the static ones? python benchmarks/protocol.py --suite fashion [--train]
[--data-root ROOT] [--models DIR …] [--scorers NAME …] [--whole-path] [--tables-only]

Separately trained models (the same config, seeds 0, 1, 2) times samples of the training images (seeds 0, 1, 2) are nine
runs for each suite. In every run one pass serves every declared scorer: those of the path that cost at most 16
evaluations of f an image (``--whole-path`` adds the paper's, up to 500), and every static one in every latent view.

* The form of the candidate, ``field``, was settled on outliers made from ID validation images, but test sets of both
  suites were looked at while its form was tried: its lead is no blind result.
* The rival is the *best* static scorer, and which one that is, is read from the very test sets it is then compared on:
  over all sets of all suites but diagnostics (crops of few pictures, noise), and once more within each suite and each
  set. A static scorer is one that reads neither a path nor attractors. ``field:start_only=true`` reads neither too, but
  is the candidate's own form without the field: a control, compared like a rival and never chosen as one.
* Tests are paired: DeLong on each set in each run, and a bootstrap over images (all runs are evaluated on the same
  draws, and crops of one picture stay together) for means over sets; see delong.py and traj_ood/evaluation/compare.py.
  They cover the chance of test images. That of training and of the training sample is shown by the standard deviation
  over the nine runs.
* How much of the lead hangs on single sets: the same with each set left out, with all sets of crops left out, and the
  median over sets.
* A control repeats the first run with untrained weights of the same geometry.

``--train`` trains the models that are missing below --models-dir; the bundled ``fashion-mae`` is seed 0 of its config.
RUNS/<suite>/ (default runs/protocol, not for git) holds what the evaluator writes. OUT/<suite>/ (default
results/protocol) holds each run's result as <run>.json and, since the scores of all scorers would be 60 MB, those of
the compared scorers alone as <run>.parquet. They are not called result.json, so that `traj-ood leaderboard results`
does not take them, and the untrained control, for runs of its own. OUT/summary.json, tables.md and scorers.csv are
derived from those files alone, for all suites that lie there: ``--tables-only`` does just that. Everything is
resumable: the same command continues an interrupted one. A finished run is taken as it is; after a change of a scorer
use ``--fresh``.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
from delong import DeLong, delong

from traj_ood import Autoencoder, Evaluator, RunConfig, TrajOODError, load_autoencoder, load_benchmark
from traj_ood.autoencoders import MODELS
from traj_ood.dynamics.device import resolve_device
from traj_ood.evaluation.compare import BootstrapComparison, Comparison, Difference, PairedScores, paired_bootstrap
from traj_ood.evaluation.metrics import compute_metrics
from traj_ood.evaluation.results import CONTROL as FILES
from traj_ood.evaluation.results import FILE_NAME, Result, is_in, near_first, sets_in_words
from traj_ood.io.files import write_atomic
from traj_ood.io.provenance import environment, git_commit
from traj_ood.scorers import SCORERS, create_scorer, default_suite
from traj_ood.scorers.base import FeatureScorer, Needs
from traj_ood.training.autoencoder import build_autoencoder, train_model
from traj_ood.training.config import TrainConfig

CANDIDATE = "field"
SUITES = {"fashion": "fashion-mae", "cifar10-local": "cifar10-mae"}  # suite → training config of its models
MOST_EVALUATIONS = 16
SIGNIFICANT = 0.01
CONTROL = "control: the candidate without the field"  # what such a scorer was chosen as
RELATIVES = ("early-path",)  # scorers of the path whose scores of each image are kept and compared, too
RELATIVE = "another score of the path"  # what such a scorer was chosen as
UNTRAINED = "-untrained"
UNRECORDED = ("out", "runs", "models_dir", "data_root", "quiet", "fresh", "tables_only")  # folders and manners


# ---------------------------------------------------------------------------------------------- scorers


def is_static(spec: str) -> bool:
    """Whether a scorer reads neither points of a path nor attractors: nothing that f's repetition makes."""
    needs = create_scorer(spec).needs()
    return needs == Needs(features=needs.features, reconstruction=needs.reconstruction)


def kind_of(spec: str) -> str:
    """``path``, ``static``, or ``control``.

    A static form of the candidate (``field:start_only=true``) is the candidate's own form without the field. It was
    made to show what the field adds, with the candidate: no rival that was there before, however well it scores.
    """
    if spec == FILES:
        return "control"
    if not is_static(spec):
        return "path"
    return "control" if spec.split(":")[0] == CANDIDATE else "static"


def declared_scorers(model: Autoencoder, whole_path: bool) -> tuple[str, ...]:
    """The path's scorers of the default suite, at most 16 steps long unless asked, and static ones in every view."""
    suite = default_suite(model)
    found = [
        spec
        for spec in suite
        if not is_static(spec) and (whole_path or create_scorer(spec).needs().steps <= MOST_EVALUATIONS)
    ]
    for spec in (s for s in suite if is_static(s) and ":view=" not in s):
        cls = SCORERS[spec.split(":")[0]]
        in_views = issubclass(cls, FeatureScorer) and model.has_cls  # a latent of one token has one view
        found += [f"{spec}:view={v}" for v in cls.views if v != "backbone"] if in_views else [spec]
    return tuple(create_scorer(spec).label for spec in found)


# ---------------------------------------------------------------------------------------------- models


def models_of(arguments: argparse.Namespace, suite: str) -> list[str]:
    """Names or folders of the suite's models, trained where they are missing and ``--train`` says so.

    Raises ``TrajOODError`` for a missing model without ``--train``, or a suite whose training config is not known.
    """
    if arguments.models:
        return [str(m) for m in arguments.models]
    config = config_of(arguments, suite)
    return [_model(arguments, config, seed) for seed in arguments.model_seeds]


def config_of(arguments: argparse.Namespace, suite: str) -> TrainConfig:
    source = arguments.config or SUITES.get(suite)
    if source is None:
        raise TrajOODError(f"suite {suite}: expected --config (how its models are trained) or --models, got neither")
    return TrainConfig.load(source)


def _model(arguments: argparse.Namespace, config: TrainConfig, seed: int) -> str:
    if seed == config.seed and config.name in MODELS:
        return config.name
    name = f"{config.name}-s{seed}"
    folder = arguments.models_dir / name
    if (folder / "training.json").is_file():  # written last
        return str(folder)
    if not arguments.train:
        raise TrajOODError(f"{folder}: expected a trained model, found none: add --train, or name models with --models")
    print(f"protocol: training {name}", file=sys.stderr)
    train_model(
        replace(config, name=name, seed=seed),
        folder,
        data_root=arguments.data_root,
        device=resolve_device(arguments.device),
        quiet=arguments.quiet,
    )
    return str(folder)


def untrained_twin(model: Autoencoder, source: str) -> Autoencoder:
    """Random weights (seed 0) of the model's own geometry and normalisation, under a name that says so.

    Raises ``TrajOODError`` when the model has no training record to read its geometry from.
    """
    import torch

    folder = Path(MODELS[source].source if source in MODELS else source)
    try:
        config = json.loads((folder / "training.json").read_text())["config"]
    except (OSError, ValueError, KeyError) as error:
        raise TrajOODError(
            f"{folder}: expected training.json, for a control of untrained weights ({error!r}): use --no-control"
        ) from error
    keys = ("benchmark", "family", "image_size", "channels", "model")
    torch.manual_seed(0)
    options = model.options()
    twin = TrainConfig(name=model.name + UNTRAINED, **{key: config[key] for key in keys})
    return build_autoencoder(twin, tuple(options["mean"]), tuple(options["std"]))


# ---------------------------------------------------------------------------------------------- runs


def run_suite(arguments: argparse.Namespace, suite: str) -> None:
    """Every run of a suite, then its results below OUT; what is finished is left as it is."""
    benchmark = load_benchmark(suite, arguments.data_root)
    sources = models_of(arguments, suite)
    device = resolve_device(arguments.device)
    loaded = [load_autoencoder(source).to(device) for source in sources]
    _expect_different(loaded, sources)
    if arguments.fresh:
        shutil.rmtree(arguments.out / benchmark.name, ignore_errors=True)
    plan = [(model, seed, "") for model in loaded for seed in arguments.seeds]
    if not arguments.no_control:
        plan.append((untrained_twin(loaded[0], sources[0]).to(device), arguments.seeds[0], "control"))
    for number, (model, seed, part) in enumerate(plan, 1):
        config = RunConfig(
            scorers=tuple(arguments.scorers or declared_scorers(model, arguments.whole_path)),
            attractors=arguments.attractors,
            per_set=arguments.per_set,
            seed=seed,
            max_steps=arguments.max_steps,
            resamples=arguments.run_resamples,
        )
        evaluator = Evaluator(
            model,
            benchmark,
            config,
            out=arguments.runs / benchmark.name / part,
            quiet=arguments.quiet,
            command=command_line(arguments),
        )
        print(f"protocol: {benchmark.name} {number}/{len(plan)}: {evaluator.name}", file=sys.stderr)
        evaluator.run(fresh=arguments.fresh)
        target = arguments.out / benchmark.name / part / f"{evaluator.name}.json"
        write_atomic(target, (evaluator.folder / FILE_NAME).read_bytes())


def _expect_different(models: Sequence[Autoencoder], sources: Sequence[str]) -> None:
    prints = [m.fingerprint() for m in models]
    for i, own in enumerate(prints):
        if own in prints[:i]:
            raise TrajOODError(
                f"models {sources[prints.index(own)]} and {sources[i]} have the same weights: expected separately "
                "trained ones; name each model once"
            )


def command_line(arguments: argparse.Namespace) -> str:
    """The command, with models and configs by name alone: the record is read on other machines."""
    texts = []
    for key, value in vars(arguments).items():
        if value is None or value is False or key in UNRECORDED:
            continue
        words = [] if value is True else [str(v) for v in value] if isinstance(value, list) else [str(value)]
        texts.append(shlex.join([f"--{key.replace('_', '-')}", *(Path(w).name for w in words)]))
    return " ".join(["python benchmarks/protocol.py", *texts])


# ---------------------------------------------------------------------------------------------- what was stored


@dataclass(frozen=True)
class Stored:
    """A suite below OUT: its runs, each a result and its file, and the control's."""

    name: str
    runs: tuple[tuple[Result, Path], ...]
    control: tuple[Result, ...]

    @property
    def results(self) -> list[Result]:
        return [result for result, _ in self.runs]

    @property
    def sets(self) -> dict[str, str]:
        """OOD set → role: near, far, diagnostics."""
        return near_first({n: s.role for n, s in self.results[0].scorers[CANDIDATE].sets.items()})


def stored_suites(out: Path) -> list[Stored]:
    """Every suite below OUT.

    Raises ``TrajOODError`` when there is none, or when the runs of one differ in more than model and seed.
    """
    suites = []
    for folder in sorted(p for p in out.glob("*/") if p.is_dir()):
        paths = sorted(folder.glob("*.json"))
        if not paths:
            continue
        runs = tuple((Result.load(path), path) for path in paths)
        control = tuple(Result.load(path) for path in sorted(folder.glob("control/*.json")))
        suites.append(Stored(folder.name, runs, control))
        _expect_one_protocol(suites[-1])
    if not suites:
        raise TrajOODError(f"{out}: expected the runs of at least one suite, found none; run with --suite first")
    # The suite this project began with first, whatever the alphabet says.
    return sorted(suites, key=lambda s: (list(SUITES).index(s.name) if s.name in SUITES else len(SUITES), s.name))


def _expect_one_protocol(suite: Stored) -> None:
    first, path = suite.runs[0]
    for result, other in suite.runs[1:]:
        config = {k: v for k, v in result.config.items() if k != "model_options"}
        wanted = {k: v for k, v in first.config.items() if k != "model_options"}
        tests = [
            {k: (v["count"], v["sha256"], v["role"]) for k, v in r.data.items() if v["role"] != "train"}
            for r in (result, first)
        ]
        if config != wanted or tests[0] != tests[1]:
            different = [k for k in wanted if config.get(k) != wanted[k]] or ["data"]
            raise TrajOODError(
                f"{other}: expected the same protocol as {path.name}, got another {', '.join(different)}: choose "
                "another --out, or delete the runs that do not belong there"
            )


def compared_scores(suite: Stored, labels: Sequence[str], runs: Path) -> list[pd.DataFrame]:
    """The scores of these scorers in every run; published beside its result, for the tables to be made again.

    Raises ``TrajOODError`` when neither RUNS nor OUT holds them, or when they are not those of the result.
    """
    columns = ["split", "role", "id", *labels]
    tables = []
    for result, path in suite.runs:
        *_, published = places = places_of_scores(suite, result, path, runs)
        source = next((place for place in places if set(columns) <= set(_columns(place))), None)
        if source is None:
            raise TrajOODError(
                f"{published}: expected the scores of {', '.join(labels)}, found them neither here nor below {runs}: "
                f"run --suite {suite.name} again"
            )
        table = pd.read_parquet(source, columns=columns)
        _expect_own_scores(table, result, labels, source)
        if not set(columns) <= set(_columns(published)):
            _publish(table, published)
        tables.append(table)
    return tables


def has_scores(suite: Stored, label: str, runs: Path) -> bool:
    """Whether RUNS or OUT hold a scorer's scores of each image in every run."""
    return all(
        any(label in _columns(place) for place in places_of_scores(suite, result, path, runs))
        for result, path in suite.runs
    )


def places_of_scores(suite: Stored, result: Result, path: Path, runs: Path) -> tuple[Path, Path]:
    """Where a run's scores of each image may lie: below RUNS those of all scorers, below OUT those published."""
    return runs / suite.name / result.name / "scores.parquet", path.with_suffix(".parquet")


def _expect_own_scores(table: pd.DataFrame, result: Result, labels: Sequence[str], path: Path) -> None:
    """Refuse scores of another run than the result's: their AUROCs differ."""
    by_split = dict(list(table.groupby("split")))
    test = str(table.loc[table["role"] == "test", "split"].iloc[0])
    for label in labels:
        for name, own in result.scorers[label].sets.items():
            found = compute_metrics(by_split[test][label], by_split[name][label]).auroc
            if abs(found - own.metrics.auroc) > 1e-9:
                raise TrajOODError(
                    f"{path}: expected the scores behind the result of {result.name}, got others (AUROC of {label} on "
                    f"{name} {found:.6f}, not {own.metrics.auroc:.6f}): run --suite {result.benchmark} again with "
                    "--fresh"
                )


def _publish(table: pd.DataFrame, path: Path) -> None:
    write_atomic(path, lambda file: table.to_parquet(file, index=False, compression="zstd"))


def _columns(path: Path) -> list[str]:
    from pyarrow import parquet

    return list(parquet.read_schema(path).names) if path.is_file() else []


# ---------------------------------------------------------------------------------------------- figures


FIGURES = ("auroc", "fpr95")


def scorer_rows(suite: Stored, results: Sequence[Result]) -> list[dict[str, Any]]:
    """One row per scorer, best mean AUROC first; fractions, mean and standard deviation (n − 1) over the runs."""
    rows = []
    for label in results[0].scorers:
        runs = [r.scorers[label] for r in results]
        row: dict[str, Any] = {"suite": suite.name, "scorer": label, "kind": kind_of(label)}
        row |= {"runs": len(runs), "f_evaluations": statistics.fmean(s.f_evaluations or 0.0 for s in runs)}
        for region in ("all", "near", "far"):
            for key in FIGURES:
                values = [getattr(m, key) for s in runs if (m := getattr(s, region)) is not None]
                row |= _spread(f"{region}_{key}", values)
        for name in suite.sets:
            for key in FIGURES:
                row |= _spread(f"{name}_{key}", [getattr(s.sets[name].metrics, key) for s in runs])
        rows.append(row)
    return sorted(rows, key=lambda row: (-row["all_auroc"], row["scorer"]))


def _spread(name: str, values: Sequence[float]) -> dict[str, float | None]:
    mean = statistics.fmean(values) if values else None
    return {name: mean, f"{name}_std": statistics.stdev(values) if len(values) > 1 else None}


@dataclass(frozen=True)
class Rivals:
    """The static scorers that the candidate has to beat, all of them chosen on the test sets.

    ``overall`` and ``suites`` by figure: the best mean over all sets of all suites, or of one; ``sets``: the best
    AUROC on a single set of a suite.
    """

    overall: dict[str, str]
    suites: dict[str, dict[str, str]]
    sets: dict[str, dict[str, str]]

    def labels(self) -> list[str]:
        """Each rival once."""
        found = [*self.overall.values()]
        found += [label for best in (*self.suites.values(), *self.sets.values()) for label in best.values()]
        return list(dict.fromkeys(found))


def rivals_of(tables: dict[str, list[dict[str, Any]]], sets: dict[str, dict[str, str]]) -> Rivals:
    """From the rows of every suite and the roles of its sets; see :class:`Rivals`.

    Raises ``TrajOODError`` without a static scorer in all.
    """
    static = {suite: {r["scorer"]: r for r in rows if r["kind"] == "static"} for suite, rows in tables.items()}
    everywhere = set.intersection(*(set(rows) for rows in static.values()))
    if not everywhere:
        raise TrajOODError("static scorers: expected at least one that every suite has, got none; run them again")

    held = {s: [name for name, role in own.items() if is_in(role, "all")] for s, own in sets.items()}

    def best(key: str, suites: Sequence[str], names: dict[str, list[str]]) -> str:
        sign = 1 if key == "auroc" else -1

        def mean(label: str) -> float:
            return sign * statistics.fmean(static[s][label][f"{name}_{key}"] for s in suites for name in names[s])

        return max(sorted(everywhere), key=mean)

    return Rivals(
        overall={key: best(key, list(tables), held) for key in FIGURES},
        suites={s: {key: best(key, [s], held) for key in FIGURES} for s in tables},
        sets={s: {name: best("auroc", [s], {s: [name]}) for name in sets[s]} for s in tables},
    )


@dataclass(frozen=True)
class Contest:
    """The candidate against one rival: everything that both tests say about it."""

    bootstrap: BootstrapComparison
    crops: list[tuple[int, str]]  # sets made of crops of a few pictures: number of the suite, name
    delong: dict[str, dict[str, list[DeLong]]]  # suite → set → one test for each run


def contest(rival: str, scores: dict[str, list[pd.DataFrame]], resamples: int) -> Contest:
    pairs = {suite: PairedScores.from_tables(tables, CANDIDATE, rival) for suite, tables in scores.items()}
    found = {
        suite: {
            name: [delong(pair.id[0, r], ood[0, r], pair.id[1, r], ood[1, r]) for r in range(pair.runs)]
            for name, ood in pair.ood.items()
        }
        for suite, pair in pairs.items()
    }
    crops = [(i, name) for i, pair in enumerate(pairs.values()) for name in pair.pictures]
    return Contest(paired_bootstrap(list(pairs.values()), resamples=resamples), crops, found)


def comparisons(
    suites: Sequence[Stored], rivals: Rivals, others: Mapping[str, str], contests: dict[str, Contest]
) -> list[dict[str, Any]]:
    """One row per scope and rival or other scorer (label → why it is compared): how it was chosen, both tests, and in
    how many runs the candidate is ahead."""
    rows: list[dict[str, Any]] = []

    def add(scope: str, where: Sequence[Stored], rival: str, chosen: str, found: Comparison) -> dict[str, Any]:
        suite = where[0].name if scope != "all suites" else ""
        own = scope if scope not in ("all suites", "suite") else None
        ahead = runs_ahead([r for s in where for r in s.results], rival, own)
        rows.append({"scope": scope, "suite": suite, "rival": rival, "chosen": chosen, "ahead": ahead, **asdict(found)})
        return rows[-1]

    overall = rivals.overall
    own = list(others.items())
    for rival, chosen in _choices([*((overall[key], f"best {key}") for key in FIGURES), *own]):
        add("all suites", suites, rival, chosen, contests[rival].bootstrap.mean)
    for i, suite in enumerate(suites):
        asked = [(overall[key], f"best {key} of all suites") for key in FIGURES]
        asked += [(rivals.suites[suite.name][key], f"best {key} here") for key in FIGURES]
        for rival, chosen in _choices([*asked, *own]):
            add("suite", [suite], rival, chosen, contests[rival].bootstrap.suites[i])
        for name in suite.sets:
            asked = [(overall["auroc"], "best auroc of all suites"), (rivals.sets[suite.name][name], "best auroc here")]
            for rival, chosen in _choices([*asked, *own]):
                row = add(name, [suite], rival, chosen, contests[rival].bootstrap.sets[i][name])
                row["delong"] = _delong_summary(contests[rival].delong[suite.name][name])
    return rows


def _choices(asked: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Each rival once, with all that it was chosen for."""
    reasons: dict[str, list[str]] = {}
    for rival, chosen in asked:
        reasons.setdefault(rival, []).append(chosen)
    return [(rival, "; ".join(found)) for rival, found in reasons.items()]


def leaving_out(
    suites: Sequence[Stored], rivals: Rivals, controls: Sequence[str], contests: dict[str, Contest]
) -> list[dict[str, Any]]:
    """For each overall rival and control: the difference of means with sets left out, its median over sets, and on how
    many sets the candidate is ahead.

    Each row of ``rows`` names the sets left ``out`` and the ``statistic``; ``extreme`` says of a single set that its
    absence costs the candidate most, or helps it most.
    """

    def entry(out: Sequence[tuple[int, str]], statistic: str, comparison: Comparison) -> dict[str, Any]:
        named = [f"{suites[i].name}/{name}" for i, name in out]
        return {"out": named, "statistic": statistic, "extreme": [], **asdict(comparison)}

    found = []
    for rival in [*dict.fromkeys(rivals.overall.values()), *controls]:
        own = contests[rival].bootstrap
        places = [(i, name) for i, sets in enumerate(own.sets) for name in sets]
        everything = [place for place, held in zip(places, own.held, strict=True) if held]
        crops = [place for place in contests[rival].crops if place in everything]
        rows = [entry([], "mean", own.mean)]
        if len(everything) > 1:
            rows += [entry([one], "mean", own.without(one)) for one in everything]
            for key, sign in (("auroc", 1), ("fpr95", -1)):
                ordered = sorted(rows[1:], key=lambda row: sign * row[key]["difference"])
                ordered[0]["extreme"].append(f"costs most {key}")
                ordered[-1]["extreme"].append(f"helps most {key}")
        if crops and len(crops) < len(everything):
            rows.append(entry(crops, "mean", own.without(*crops)))
        rows.append(entry([], "median", own.median()))
        found.append({"rival": rival, "control": rival in controls, "rows": rows, "sets": _sets_ahead(own)})
    return found


def _sets_ahead(found: BootstrapComparison) -> dict[str, dict[str, int]]:
    """By figure, on how many sets but diagnostics the candidate's mean over runs is better, equal and worse."""
    counts = {}
    each = [c for sets in found.sets for c in sets.values()]
    for key, sign in (("auroc", 1), ("fpr95", -1)):
        gains = [sign * getattr(c, key).difference for c, held in zip(each, found.held, strict=True) if held]
        ahead, behind = sum(g > 1e-12 for g in gains), sum(g < -1e-12 for g in gains)  # what is smaller is rounding
        counts[key] = {"ahead": ahead, "level": len(gains) - ahead - behind, "behind": behind}
    return counts


def runs_ahead(results: Sequence[Result], rival: str, name: str | None) -> dict[str, int]:
    """In how many runs the candidate's figure, mean over sets or on the set ``name``, is better than the rival's."""

    def figure(result: Result, label: str, key: str) -> float:
        scorer = result.scorers[label]
        return getattr(scorer.sets[name].metrics if name else scorer.all, key)

    gains = {key: [figure(r, CANDIDATE, key) - figure(r, rival, key) for r in results] for key in FIGURES}
    return {
        "auroc": sum(g > 0 for g in gains["auroc"]),
        "fpr95": sum(g < 0 for g in gains["fpr95"]),
        "runs": len(results),
    }


def _delong_summary(tests: Sequence[DeLong]) -> dict[str, Any]:
    clear = [t for t in tests if t.p < SIGNIFICANT]
    return {
        "median_p": statistics.median(t.p for t in tests),
        "runs": len(tests),
        "better": sum(t.z > 0 for t in clear),
        "worse": sum(t.z < 0 for t in clear),
        "p": [t.p for t in tests],
        "difference": [t.auroc_a - t.auroc_b for t in tests],
    }


def target(rows: Sequence[dict[str, Any]], evaluations: float, suites: Sequence[Stored]) -> dict[str, Any]:
    """The claim this protocol was made for, and whether it holds against both overall rivals; controls and relatives
    are none."""
    wanting = []
    for row in (r for r in rows if r["scope"] == "all suites" and r["chosen"] not in (CONTROL, RELATIVE)):
        for key, sign in (("auroc", 1), ("fpr95", -1)):
            if not (sign * row[key]["difference"] > 0 and row[key]["p"] < SIGNIFICANT):
                found = f"difference {row[key]['difference']:+.4f}, p = {row[key]['p']:.3g}"
                wanting.append(f"{key} against {row['rival']}: {found}")
    if evaluations > MOST_EVALUATIONS:
        wanting.append(f"{evaluations:.1f} evaluations of f an image")
    wanting += [f"suite {name} was not run" for name in SUITES if name not in [s.name for s in suites]]
    wanting += [f"{len(s.runs)} runs of {s.name}, not 9" for s in suites if len(s.runs) < 9]
    text = f"{CANDIDATE} beats the best static scorers in mean AUROC and mean FPR@95 over all sets of all suites with "
    text += f"p < {SIGNIFICANT:g}, at no more than {MOST_EVALUATIONS} evaluations of f an image"
    return {"claim": text, "met": not wanting, "wanting": wanting}


def summarize(suites: Sequence[Stored], arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything the tables say, as plain data: fractions in [0, 1]."""
    tables = {s.name: scorer_rows(s, s.results) for s in suites}
    rivals = rivals_of(tables, {s.name: s.sets for s in suites})
    in_all = set.intersection(*({r["scorer"] for r in t if r["kind"] == "control"} for t in tables.values()))
    controls = sorted(in_all)
    relatives = [label for label in RELATIVES if all(has_scores(s, label, arguments.runs) for s in suites)]
    others = dict.fromkeys(controls, CONTROL) | dict.fromkeys(relatives, RELATIVE)
    labels = list(dict.fromkeys([*others, *rivals.labels()]))
    scores = {s.name: compared_scores(s, [CANDIDATE, *labels], arguments.runs) for s in suites}
    contests = {label: contest(label, scores, arguments.resamples) for label in labels}
    rows = comparisons(suites, rivals, others, contests)
    cost = max(r["f_evaluations"] for t in tables.values() for r in t if r["scorer"] == CANDIDATE)
    return {
        "candidate": CANDIDATE,
        "target": target(rows, cost, suites),
        "comparisons": rows,
        "leaving_out": leaving_out(suites, rivals, controls, contests),
        "rivals": asdict(rivals),
        "scores_not_kept": [label for label in RELATIVES if label not in relatives],
        "resamples": arguments.resamples,
        "suites": {
            s.name: {
                "protocol": {k: v for k, v in s.results[0].config.items() if k not in ("scorers", "model_options")},
                "sets": s.sets,
                "runs": [_provenance(result) for result in s.results],
                "scorers": tables[s.name],
                "control": scorer_rows(s, s.control) if s.control else [],
                "control_runs": [_provenance(result) for result in s.control],
            }
            for s in suites
        },
        "commit": git_commit(Path(__file__).parent),
        "versions": environment(),
    }


def _provenance(result: Result) -> dict[str, Any]:
    keys = ("converged", "distinct", "healthy", "warnings")
    return {
        "name": result.name,
        "model": result.model,
        "seed": result.seed,
        "command": result.command,
        "commit": result.commit,
        "images": {name: data["count"] for name, data in sorted(result.data.items())},
        "dictionary": {k: result.dictionary[k] for k in keys if k in result.dictionary},
        "seconds": round(sum(result.seconds.values()), 1),
    }


# ---------------------------------------------------------------------------------------------- tables


def render(summary: dict[str, Any]) -> str:
    """The summary as Markdown, percent."""
    claim, suites = summary["target"], summary["suites"]
    lines = ["# Protocol: dynamics against static scorers", ""]
    lines += [f"Claim: {claim['claim']}. **{'It holds' if claim['met'] else 'It does not hold'}.**", ""]
    lines += [f"- wanting: {text}" for text in claim["wanting"]] + ([""] if claim["wanting"] else [])
    lines += [*_what_was_run(summary), ""]
    wide = [r for r in summary["comparisons"] if r["scope"] in ("all suites", "suite")]
    lines += ["## Means over sets", "", *_comparison_table(wide, summary["candidate"]), ""]
    lines += ["## Leaving sets out", "", *_leaving_out_table(summary), ""]
    for name, suite in suites.items():
        lines += [f"## {name}: set by set", ""]
        own = [r for r in summary["comparisons"] if r["suite"] == name and r["scope"] != "suite"]
        lines += [*_comparison_table(own, summary["candidate"]), "", f"## {name}: all scorers", ""]
        lines += [*_scorer_table(suite["scorers"]), ""]
        if suite["control"]:
            lines += [
                f"## {name}: control, untrained weights",
                "",
                "**Not a result**: the first run again with random weights of the same geometry. What scores well here "
                "owes it to the architecture and the images, not to training.",
                "",
                *_scorer_table(suite["control"]),
                "",
            ]
    return "\n".join([*lines, *_notes(summary)]).rstrip() + "\n"


def _what_was_run(summary: dict[str, Any]) -> list[str]:
    lines = []
    for name, suite in summary["suites"].items():
        models = sorted({run["model"]["name"] for run in suite["runs"]})
        seeds = sorted({run["seed"] for run in suite["runs"]})
        protocol, images = suite["protocol"], suite["runs"][0]["images"]
        counts = ", ".join(f"{n} {images[n]:,}" for n in ("test", *suite["sets"]))
        lines.append(
            f"- **{name}**: {len(suite['runs'])} runs = models {', '.join(models)} × training samples "
            f"{', '.join(map(str, seeds))}; {protocol['attractors']:,} training images; images: {counts}."
        )
        sick = [run for run in suite["runs"] if not run["dictionary"].get("healthy", True)]
        lines += [f"  - unhealthy attractors in {r['name']}: {'; '.join(r['dictionary']['warnings'])}" for r in sick]
    return lines


def _comparison_table(rows: Sequence[dict[str, Any]], candidate: str) -> list[str]:
    head = ["scope", "rival", "chosen as", f"AUROC {candidate}", "rival", "difference [95 %]", "p"]
    head += [f"FPR95 {candidate}", "rival", "difference [95 %]", "p", "ahead in AUROC, FPR95"]
    head += ["DeLong: median p", "runs better / worse"]
    lines = [_row(head), _row([":--"] * 3 + ["--:"] * (len(head) - 3))]
    for row in rows:
        cells = [row["suite"] if row["scope"] == "suite" else row["scope"], f"`{row['rival']}`", row["chosen"]]
        for key in FIGURES:
            cells += _difference_cells(row[key])
        cells.append(f"{row['ahead']['auroc']}, {row['ahead']['fpr95']} of {row['ahead']['runs']} runs")
        test = row.get("delong")
        cells += [_p(test["median_p"]), f"{test['better']} / {test['worse']} of {test['runs']}"] if test else ["", ""]
        lines.append(_row(cells))
    return lines


def _leaving_out_table(summary: dict[str, Any]) -> list[str]:
    """Of the single sets only the extreme ones; all of them are in summary.json."""
    found = summary["leaving_out"]
    total = sum(found[0]["sets"]["auroc"].values())
    lines = [
        f"How much of the differences over all {total} sets hangs on single ones. Of the rows with one set left out "
        "only the extreme ones, whose absence costs the candidate most and helps it most; all are in `summary.json`. "
        "The median is that of the differences on each set.",
        "",
    ]
    head = ["sets", "rival", "AUROC difference [95 %]", "p", "FPR95 difference [95 %]", "p"]
    lines += [_row(head), _row([":--"] * 2 + ["--:"] * 4)]
    for rival in found:
        for row in rival["rows"]:
            if len(row["out"]) == 1 and not row["extreme"]:
                continue
            what = f"without {', '.join(row['out'])}" if row["out"] else f"all {total}"
            what = "median over sets" if row["statistic"] == "median" else what
            extreme = "; ".join(row["extreme"]).replace("auroc", "AUROC").replace("fpr95", "FPR95")
            cells = [what + (f" ({extreme})" if extreme else ""), f"`{rival['rival']}`"]
            lines.append(_row([*cells, *(cell for key in FIGURES for cell in _difference_cells(row[key])[2:])]))
    lines.append("")
    for rival in found:
        counts = [(k.upper(), rival["sets"][k]) for k in FIGURES]
        texts = [f"{key} ahead on {n['ahead']}, level on {n['level']}, behind on {n['behind']}" for key, n in counts]
        kind = " (control)" if rival["control"] else ""
        lines.append(f"- Against `{rival['rival']}`{kind}, of {total} sets: {'; '.join(texts)}.")
    return lines


def _difference_cells(d: dict[str, float]) -> list[str]:
    found = Difference(**d)
    low, high = 100 * found.low, 100 * found.high
    difference = f"{100 * found.difference:+.2f} [{low:+.2f}, {high:+.2f}]"
    return [f"{100 * found.a:.2f}", f"{100 * found.b:.2f}", difference, _p(found.p)]


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else f"{value:.1e}"


def _scorer_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    keys = ["all_auroc", "all_fpr95", "near_auroc", "near_fpr95", "far_auroc", "far_fpr95"]
    titles = [f"{k.split('_')[0]} {'AUROC ↑' if k.endswith('auroc') else 'FPR95 ↓'}" for k in keys]
    lines = [_row(["scorer", "kind", "f / image", *titles]), _row([":--", ":--", "--:", *["--:"] * len(keys)])]
    for row in rows:
        figures = [_with_spread(row[k], row[f"{k}_std"]) for k in keys]
        lines.append(_row([f"`{row['scorer']}`", row["kind"], f"{row['f_evaluations']:.1f}", *figures]))
    return lines


def _with_spread(mean: float | None, std: float | None) -> str:
    if mean is None:
        return ""
    return f"{100 * mean:.2f}" + (f" ± {100 * std:.2f}" if std is not None else "")


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _notes(summary: dict[str, Any]) -> list[str]:
    return [
        "## How to read this",
        "",
        "- Percent. Means over OOD sets give each set equal weight. ± is the standard deviation over runs (n − 1).",
        *(f"- {name}: {sets_in_words(suite['sets'])}" for name, suite in summary["suites"].items()),
        "- FPR95 is the paper's: the threshold keeps 95 % of ID images; the figure is the share of OOD images "
        "accepted. `result.json` holds OpenOOD's as `fpr95_openood`.",
        f"- The form of `{summary['candidate']}` was settled on outliers made from ID validation images, but test sets "
        "of both suites were looked at while its form was tried: its lead is no blind result. **Rivals are chosen on "
        "the test sets they are compared on**, which favours them.",
        f"- p beside a difference: paired bootstrap over images, {summary['resamples']:,} resamples (its smallest "
        f"value is {2 / (summary['resamples'] + 1):.2g}), all runs on the same draws; two-sided. Crops of one picture "
        "are drawn together, picture by picture: textures are cut from 3 pictures and photos from 6 or 7, so that the "
        "intervals of these sets rest on as few observations and are a rough guide, rather too narrow; sets cut from "
        "the same pictures are drawn independently. DeLong: each run alone; "
        f"the number of runs in which the candidate is better, or worse, with p < {SIGNIFICANT:g}; it takes "
        "crops of one picture for independent images, so do not read it on textures and photos. p-values of single "
        "sets are not corrected for being many.",
        *_not_kept(summary),
        "- Tests and intervals carry the chance of test images only; ± shows that of training and training samples.",
        "- kind `path`: reads the path or the attractors. kind `static`: reads neither. kind `control`: reads neither, "
        "but is the candidate's own form without the field (`field:start_only=true`), so never a rival and no part of "
        'the claim. f / image counts evaluations of f beyond the one encoding that all share. Chosen as "another score '
        'of the path": compared like a rival, and no part of the claim.',
    ]


def _not_kept(summary: dict[str, Any]) -> list[str]:
    names = ", ".join(f"`{label}`" for label in summary["scores_not_kept"])
    return [f"- The scores of each image by {names} were not kept by these runs: no test against it."] if names else []


def write_tables(arguments: argparse.Namespace) -> str:
    """summary.json, tables.md and scorers.csv below OUT; returns the Markdown."""
    summary = summarize(stored_suites(arguments.out), arguments)
    text = json.dumps(summary, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    write_atomic(arguments.out / "summary.json", text.encode())
    rows = [row for suite in summary["suites"].values() for row in suite["scorers"]]
    # Sets differ between suites: one line for each figure of a set, rather than columns that are mostly empty.
    write_atomic(arguments.out / "scorers.csv", pd.DataFrame(_long(rows)).to_csv(index=False).encode())
    table = render(summary)
    write_atomic(arguments.out / "tables.md", table.encode())
    return table


def _long(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    head = ("suite", "scorer", "kind", "runs", "f_evaluations")
    found = []
    for row in rows:
        names = [k.removesuffix("_auroc") for k in row if k.endswith("_auroc")]
        for name in names:
            figures = {f"{k}{end}": row[f"{name}_{k}{end}"] for k in FIGURES for end in ("", "_std")}
            found.append({k: row[k] for k in head} | {"set": name} | figures)
    return found


# ---------------------------------------------------------------------------------------------- the command


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", help=f"{', '.join(SUITES)}, or a benchmark's YAML file (with --config or --models)")
    parser.add_argument("--data-root", type=Path, help="where the suite's images are")
    parser.add_argument("--models", nargs="+", help="names or folders of trained models, in place of the config's")
    parser.add_argument("--models-dir", type=Path, default=Path("runs/models"), help="default: runs/models")
    parser.add_argument("--config", help="training config, a YAML file or a bundled name; default: the suite's")
    parser.add_argument("--model-seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--train", action="store_true", help="train the models that are missing")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of training samples; default: 0 1 2")
    parser.add_argument("--attractors", type=int, default=2000, help="training images; default: 2000")
    parser.add_argument("--per-set", type=int, default=1000, help="most test images a set; default: 1000")
    parser.add_argument("--max-steps", type=int, default=500, help="of training trajectories; default: 500")
    parser.add_argument("--scorers", nargs="+", help=f"in place of the declared ones; {CANDIDATE} must be among them")
    parser.add_argument("--whole-path", action="store_true", help="also scorers that iterate to convergence")
    parser.add_argument("--no-control", action="store_true", help="leave out the run with untrained weights")
    parser.add_argument("--resamples", type=int, default=2000, help="of the paired bootstrap; default: 2000")
    parser.add_argument("--run-resamples", type=int, default=200, help="of each run's own intervals; default: 200")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument("--runs", type=Path, default=Path("runs/protocol"), help="default: runs/protocol")
    parser.add_argument("--out", type=Path, default=Path("results/protocol"), help="default: results/protocol")
    parser.add_argument("--tables-only", action="store_true", help="make the tables again from what OUT holds")
    parser.add_argument("--fresh", action="store_true", help="discard what earlier runs of this suite left")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    arguments = parser.parse_args(argv)
    if arguments.scorers and CANDIDATE not in arguments.scorers:
        parser.error(f"--scorers: expected {CANDIDATE} among them, got {' '.join(arguments.scorers)}")
    if arguments.suite is None and not arguments.tables_only:
        parser.error("give a --suite to run, or --tables-only")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    try:
        if not arguments.tables_only:
            run_suite(arguments, arguments.suite)
        table = write_tables(arguments)
    except TrajOODError as error:
        print(f"protocol: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("protocol: interrupted; the same command continues where this one stopped", file=sys.stderr)
        sys.exit(130)
    print(table, end="")
    print(f"Written to {arguments.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
