"""The pre-registered protocol on natural images: python benchmarks/natural.py --suites tiny-imagenet imagenet-sample
--models timm:FOLDER diffusers:FOLDER … [--data-root ROOT] [--surrogate-seeds 0 1 2] [--seeds 0 1 2] [--tables-only]

Scorers, claims and tests stand in preregistered.yaml, which is frozen: every record holds the digest of its content,
and records of another one are refused. Each suite is run with every model on every sample of training images; a
backbone gets an autoencoder of its features for each of --surrogate-seeds. A scorer that reads what a model or a suite
does not have, or that cannot be fitted on so few training images, is left out there, and named.

Beside them stands a control on files alone, of the slope of the power spectrum, roughness, blockiness and size of the
images as they are read: the Mahalanobis distance to those of the training images. Every table has it.

OUT/<suite>/<run>.json and .parquet (default results/natural) hold figures and scores of each run; OUT/summary.json,
tables.md and ranks-*.png are derived from them alone. RUNS (default runs/natural, not for git) is what the evaluator
writes. Finished runs are taken as they are. ``--tiny`` rehearses: few images and resamples, marked in every table.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml

sys.path.insert(0, str(Path(__file__).parent))

import verdicts
from verdicts import BETTER

from traj_ood import Autoencoder, Evaluator, RunConfig, TrajOODError, load_autoencoder, load_benchmark
from traj_ood.backbones import is_backbone_spec, load_backbone
from traj_ood.data import OOD_ROLES, Benchmark
from traj_ood.data.images import ImageSource
from traj_ood.data.spectrum import image_statistics
from traj_ood.dynamics.device import resolve_device
from traj_ood.evaluation.compare import PairedScores, paired_bootstrap
from traj_ood.evaluation.metrics import compute_metrics
from traj_ood.evaluation.results import CONTROL, FILE_NAME, Result
from traj_ood.evaluation.versus import holm
from traj_ood.io.files import write_atomic
from traj_ood.io.provenance import environment, git_commit
from traj_ood.scorers import create_scorer, create_scorers
from traj_ood.scorers.gaussians import distances_to_gaussians, learn_gaussians
from traj_ood.scorers.registry import lacking

PLAN = Path(__file__).parent / "preregistered.yaml"
TINY = {"attractors": 40, "per_set": 12, "max_steps": 20}


@dataclass(frozen=True)
class Plan:
    """``preregistered.yaml``: scorers by spec (kind, network), claims, tests, and the digest of all of it."""

    scorers: dict[str, dict[str, str]]
    claims: list[dict[str, Any]]
    tests: dict[str, Any]
    digest: str

    @classmethod
    def load(cls, path: Path | None = None) -> Plan:
        """Raises ``TrajOODError`` for a claim about scorers that are not declared. Default: ``PLAN``."""
        path = path or PLAN
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        digest = hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
        scorers = {entry["spec"]: {"network": "both", **entry} for entry in tree["scorers"]}
        for spec in scorers:
            create_scorer(spec)
        for claim in tree["claims"]:
            unknown = [s for s in (*claim["candidates"], *claim.get("rivals", ())) if s not in scorers]
            if unknown:
                raise TrajOODError(f"{path}: claim {claim['id']}: expected declared scorers, got {', '.join(unknown)}")
        return cls(scorers, tree["claims"], tree["tests"], digest)

    def rivals(self, claim: Mapping[str, Any], there: Sequence[str]) -> list[str]:
        """The claim's own, or every static scorer, as far as they are among those that ran."""
        named = claim.get("rivals") or [s for s, entry in self.scorers.items() if entry["kind"] == "static"]
        return [spec for spec in named if spec in there]


# ---------------------------------------------------------------------------------------------- runs


def kind_of(model: Autoencoder) -> str:
    return "backbone" if model.feature_dim else "autoencoder"


def models_of(arguments: argparse.Namespace, benchmark: Benchmark) -> list[Autoencoder]:
    """The models of a suite: autoencoders as they are, backbones with an autoencoder of their features per seed."""
    from traj_ood.training.surrogate_cache import surrogate_for

    device, found = resolve_device(arguments.device), []
    for source in arguments.models:
        if not is_backbone_spec(source):
            found.append(load_autoencoder(source, **_image_size(arguments, source)).to(device))
            continue
        for seed in arguments.surrogate_seeds:
            backbone = load_backbone(source)
            model = surrogate_for(
                backbone, benchmark, out=arguments.runs, seed=seed, device=device, quiet=arguments.quiet
            )
            model.name = f"{Path(model.name).name.replace(':', '-')}-s{seed}"
            found.append(model)
    return found


def _image_size(arguments: argparse.Namespace, source: str) -> dict[str, int]:
    return {"image_size": arguments.image_size} if arguments.image_size and source.startswith("diffusers:") else {}


def run_suite(arguments: argparse.Namespace, plan: Plan, suite: str) -> None:
    """Every run of a suite; those whose record is there are left as they are."""
    benchmark = load_benchmark(suite, arguments.data_root, allow_missing=arguments.allow_missing)
    for model in models_of(arguments, benchmark):
        specs, missing = scorers_for(plan, model, bool(benchmark.train.images.labels))
        for seed in arguments.seeds:
            target = arguments.out / benchmark.name / f"{model.name}--seed{seed}"
            if target.with_suffix(".json").is_file():
                _expect_plan(plan, json.loads(target.with_suffix(".json").read_text()), target)
                continue
            print(f"natural: {benchmark.name}: {model.name}, seed {seed}", file=sys.stderr)
            _run(arguments, plan, benchmark, model, seed, specs, missing, target)


def scorers_for(plan: Plan, model: Autoencoder, labelled: bool) -> tuple[dict[str, str], dict[str, str]]:
    """Spec → label in a run of this model; and spec → why it is left out."""
    found, missing = {}, {}
    for spec, entry in plan.scorers.items():
        if entry["network"] not in ("both", kind_of(model)):
            continue
        scorer = create_scorers([spec], model)[0]
        lack = lacking(model, scorer.needs())
        if lack is None and scorer.needs().labels and not labelled:
            lack = "the suite has no class labels"
        if lack is None:
            found[spec] = scorer.label
        else:
            missing[spec] = lack
    return found, missing


def _run(
    arguments: argparse.Namespace,
    plan: Plan,
    benchmark: Benchmark,
    model: Autoencoder,
    seed: int,
    specs: Mapping[str, str],
    missing: Mapping[str, str],
    target: Path,
) -> None:
    limits = TINY if arguments.tiny else {"attractors": arguments.attractors, "per_set": arguments.per_set}
    if arguments.max_steps:
        limits["max_steps"] = arguments.max_steps
    # The control below is the study's own: of all training images, where that of ``bench`` takes a run's sample.
    config = RunConfig(scorers=tuple(specs), seed=seed, resamples=0, control=False, **limits)
    folder = arguments.runs / benchmark.name / f"{len(specs)}-scorers"  # one that left a scorer out is another run
    try:
        evaluator = Evaluator(model, benchmark, config, out=folder, quiet=arguments.quiet)
        evaluator.run(fresh=arguments.fresh)
    except TrajOODError as error:
        spec = _culprit(str(error), specs)
        if spec is None:
            raise
        print(f"natural: {spec} is left out: {error}", file=sys.stderr)
        rest = {s: label for s, label in specs.items() if s != spec}
        _run(arguments, plan, benchmark, model, seed, rest, {**missing, spec: str(error)}, target)
        return
    result = Result.load(evaluator.folder / FILE_NAME)
    table = pd.read_parquet(evaluator.folder / "scores.parquet").rename(columns={v: k for k, v in specs.items()})
    table = table[["split", "role", "id", *specs]]
    table[CONTROL] = _control(benchmark, config, table)
    write_atomic(target.with_suffix(".parquet"), lambda file: table.to_parquet(file, index=False, compression="zstd"))
    record = {
        "plan": plan.digest,
        "rehearsal": bool(arguments.tiny),
        "suite": benchmark.name,
        "note": benchmark.note,
        "model": result.model,
        "kind": kind_of(model),
        "seed": seed,
        "config": {k: v for k, v in result.config.items() if k != "scorers"},
        "data": result.data,
        "dictionary": result.dictionary,
        "missing": dict(missing),
        "f_evaluations": {spec: result.scorers[label].f_evaluations for spec, label in specs.items()},
        "figures": figures_of(table, [*specs, CONTROL]),
        "commit": git_commit(Path(__file__).parent),
        "versions": environment(),
    }
    write_atomic(target.with_suffix(".json"), (json.dumps(record, indent=1, sort_keys=True) + "\n").encode())


def _culprit(message: str, specs: Mapping[str, str]) -> str | None:
    """The one scorer that an error of fitting names, by its label or by its name."""
    named = message.removeprefix("scorer ").split(": ", 1)[0] if message.startswith("scorer ") else None
    found = [spec for spec, label in specs.items() if label == named] or [
        spec for spec in specs if spec.split(":", 1)[0] == named
    ]
    return found[0] if len(found) == 1 else None


def figures_of(table: pd.DataFrame, scorers: Sequence[str]) -> dict[str, dict[str, dict[str, float]]]:
    """Scorer → set → figure, of a run's scores."""
    test = table[table["role"] == "test"]
    found: dict[str, dict[str, dict[str, float]]] = {}
    for scorer in scorers:
        found[scorer] = {}
        for name, rows in table[table["role"].isin(OOD_ROLES)].groupby("split", sort=False):
            metrics = compute_metrics(test[scorer].to_numpy(), rows[scorer].to_numpy())
            found[scorer][str(name)] = {figure: float(getattr(metrics, figure)) for figure in BETTER}
    return found


def _control(benchmark: Benchmark, config: RunConfig, table: pd.DataFrame) -> np.ndarray:
    """Scores of the images' files alone, row for row of the table."""
    sample = benchmark.subsample(train=config.attractors, per_set=config.per_set, seed=config.seed)
    learnt = learn_gaussians(torch.from_numpy(_statistics(sample.train.images)), shrink=False)
    scores: dict[tuple[str, str], float] = {}
    for split in sample.splits():
        if split.role in ("test", *OOD_ROLES):
            values = distances_to_gaussians(learnt, torch.from_numpy(_statistics(split.images)))[:, 0]
            scores |= {(split.name, i): float(v) for i, v in zip(split.images.ids, values, strict=True)}
    return np.array([scores[split, i] for split, i in zip(table["split"], table["id"], strict=True)])


def _statistics(images: ImageSource) -> np.ndarray:
    return np.stack([image_statistics(images.load(i)) for i in range(len(images))])


# ---------------------------------------------------------------------------------------------- records


def _expect_plan(plan: Plan, record: Mapping[str, Any], path: Path) -> None:
    if record["plan"] != plan.digest:
        raise TrajOODError(
            f"{path}: expected a record of this preregistered.yaml ({plan.digest[:12]}…), got one of another "
            f"({record['plan'][:12]}…): a changed plan is a new study, with an --out of its own"
        )


def stored(out: Path, plan: Plan) -> tuple[list[dict[str, Any]], pd.DataFrame]:
    """Every record below OUT, and their figures in rows.

    Raises ``TrajOODError`` when there is none, or one of another plan.
    """
    records, rows = [], []
    for path in sorted(out.glob("*/*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        _expect_plan(plan, record, path)
        records.append({**record, "path": path})
        own_diagnostics = [name for name, facts in record.get("data", {}).items() if facts["role"] == "diagnostic"]
        for scorer, sets in record["figures"].items():
            for name, figures in sets.items():
                if name not in (*plan.tests["diagnostics"], *own_diagnostics):
                    place = {"suite": record["suite"], "set": name, "kind": record["kind"]}
                    own = {"model": record["model"]["name"], "seed": record["seed"], "scorer": scorer}
                    rows.append({**place, **own, **figures})
    if not records:
        raise TrajOODError(f"{out}: expected the records of at least one run, found none; run with --suites first")
    return records, pd.DataFrame(rows)


def judge(claim: Mapping[str, Any], plan: Plan, records: Sequence[Mapping[str, Any]], figures: pd.DataFrame) -> Any:
    """A claim's verdict and all that it rests on."""
    own = figures[figures["kind"] == claim["network"]]
    there = sorted(own["scorer"].unique()) if len(own) else []
    candidates = [c for c in claim["candidates"] if c in there]
    rivals = plan.rivals(claim, there)
    costs: dict[str, float] = {}
    for record in records:
        for spec in candidates:
            costs[spec] = max(costs.get(spec, 0.0), record["f_evaluations"].get(spec) or 0.0)
    found = {f: verdicts.compare(own, f, candidates, rivals, plan.tests) for f in plan.tests["figures"]}
    found = found if candidates and rivals else {}
    word, winner, reason = verdicts.verdict(found, costs, plan.tests)
    return {
        "id": claim["id"],
        "text": claim["text"],
        "network": claim["network"],
        "verdict": word,
        "candidate": winner,
        "reason": reason,
        "differences": {f: {c: [asdict(d) for d in ds] for c, ds in each.items()} for f, each in found.items()},
        "per_set": _per_set(claim, plan, records, candidates, found),
    }


def _per_set(
    claim: Mapping[str, Any],
    plan: Plan,
    records: Sequence[Mapping[str, Any]],
    candidates: Sequence[str],
    found: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Each candidate against the rival that comes nearest to it in mean AUROC, set by set: paired bootstrap over
    images, all runs of a suite on the same draws, Holm over all sets."""
    rows: list[dict[str, Any]] = []
    for candidate in candidates:
        differences = found.get("auroc", {}).get(candidate, [])
        if not differences:
            continue
        rival = min(differences, key=lambda d: d.mean).rival
        own: list[dict[str, Any]] = []
        for suite in sorted({r["suite"] for r in records}):
            paths = [
                r["path"].with_suffix(".parquet")
                for r in records
                if (r["suite"], r["kind"]) == (suite, claim["network"])
            ]
            tables = [pd.read_parquet(path) for path in paths]
            tables = [t for t in tables if {candidate, rival} <= set(t.columns)]
            if not tables:
                continue
            pairs = PairedScores.from_tables(tables, candidate, rival)
            compared = paired_bootstrap([pairs], resamples=int(plan.tests["resamples"]))
            for name, comparison in compared.sets[0].items():
                place = {"candidate": candidate, "rival": rival, "suite": suite, "set": name, "runs": len(tables)}
                own.append(place | {f: asdict(getattr(comparison, f)) for f in plan.tests["figures"]})
        for figure in plan.tests["figures"]:
            for row, p in zip(own, holm([row[figure]["p"] for row in own]) if own else [], strict=True):
                row[figure]["p_holm"] = p
        rows += own
    return rows


# ---------------------------------------------------------------------------------------------- tables


def write_tables(arguments: argparse.Namespace, plan: Plan) -> str:
    """summary.json, tables.md and the diagrams below OUT; returns the Markdown."""
    if arguments.tiny:
        plan.tests.update(resamples=50)
    records, figures = stored(arguments.out, plan)
    claims = [judge(claim, plan, records, figures) for claim in plan.claims]
    rehearsal = any(r["rehearsal"] for r in records)
    summary = {"plan": plan.digest, "rehearsal": rehearsal, "claims": claims, "scorers": _means(plan, figures)}
    write_atomic(arguments.out / "summary.json", (json.dumps(summary, indent=1, sort_keys=True) + "\n").encode())
    for kind in sorted(figures["kind"].unique()):
        own = figures[figures["kind"] == kind]
        table = verdicts.block_table(own, "auroc", sorted(own["scorer"].unique()))
        if len(table) >= 3 and table.shape[1] >= 3:
            verdicts.diagram(table, "auroc", arguments.out / f"ranks-{kind}.png", float(plan.tests["alpha"]))
    text = render(summary, records, plan)
    write_atomic(arguments.out / "tables.md", text.encode())
    return text


def _means(plan: Plan, figures: pd.DataFrame) -> list[dict[str, Any]]:
    """A row for each kind of model and scorer: means over the blocks, each a mean over models and seeds."""
    rows = []
    for (kind, scorer), own in figures.groupby(["kind", "scorer"]):
        scorer = str(scorer)
        blocks = own.groupby(["suite", "set"])[list(BETTER)].mean()
        role = "control" if scorer == CONTROL else plan.scorers[scorer]["kind"]
        means = {f: float(blocks[f].mean()) for f in BETTER}
        rows.append({"kind": kind, "scorer": scorer, "role": role, "blocks": len(blocks), **means})
    return sorted(rows, key=lambda r: (r["kind"], -r["auroc"]))


def render(summary: Mapping[str, Any], records: Sequence[Mapping[str, Any]], plan: Plan) -> str:
    lines = ["# Natural images: the pre-registered protocol", ""]
    if summary["rehearsal"]:
        lines += ["**A rehearsal** of few images: no figure below is a result.", ""]
    lines += ["## Claims", "", "| claim | on | verdict | why |", "| :-- | :-- | :-- | :-- |"]
    for claim in summary["claims"]:
        winner = f"`{claim['candidate']}` " if claim["candidate"] else ""
        lines.append(f"| {claim['text']} | {claim['network']} | **{claim['verdict']}** | {winner}{claim['reason']} |")
    lines += ["", "## All scorers", "", "Percent; means over sets. The control reads files alone.", ""]
    lines += ["| on | scorer | role | sets | AUROC ↑ | FPR95 ↓ |", "| :-- | :-- | :-- | --: | --: | --: |"]
    for row in summary["scorers"]:
        figures = f"{100 * row['auroc']:.1f} | {100 * row['fpr95']:.1f}"
        lines.append(f"| {row['kind']} | `{row['scorer']}` | {row['role']} | {row['blocks']} | {figures} |")
    lines += ["", "## What was run", ""]
    for record in records:
        left = (
            f"; left out: {', '.join(f'`{s}` ({why})' for s, why in record['missing'].items())}"
            if record["missing"]
            else ""
        )
        lines.append(f"- {record['suite']}: {record['model']['name']}, seed {record['seed']}. {record['note']}{left}")
    alpha, blocks = plan.tests["alpha"], plan.tests["least_blocks"]
    lines += [
        "",
        f"A claim holds where one candidate is ahead of every rival in every figure with p < {alpha:g} (Conover "
        f"after Friedman over at least {blocks} sets, Holm), and does not where each is behind one with a whole "
        "95 % interval, sets, models and seeds drawn anew. Anything else cannot be told.",
        "",
    ]
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------- the command


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suites", nargs="+", default=[], help="tiny-imagenet, imagenet-sample, cifar10, a YAML file")
    parser.add_argument("--models", nargs="+", default=[], help="backbones (timm:…) and autoencoders (diffusers:…, …)")
    parser.add_argument("--data-root", type=Path, help="where the suites' images are")
    parser.add_argument("--allow-missing", action="store_true", help="leave out OOD sets that are not there")
    parser.add_argument("--image-size", type=int, help="of diffusers' autoencoders; default: their own, at most 256")
    parser.add_argument("--surrogate-seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of training samples; default: 0 1 2")
    parser.add_argument("--attractors", type=int, help="training images; default: the suite's own number")
    parser.add_argument("--per-set", type=int, default=1000, help="most test images a set; default: 1000")
    parser.add_argument("--max-steps", type=int, help="longest trajectories; default: the evaluator's")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument("--runs", type=Path, default=Path("runs/natural"), help="default: runs/natural")
    parser.add_argument("--out", type=Path, default=Path("results/natural"), help="default: results/natural")
    parser.add_argument("--tables-only", action="store_true", help="make the tables again from what OUT holds")
    parser.add_argument("--tiny", action="store_true", help="rehearse with few images")
    parser.add_argument("--fresh", action="store_true", help="discard what an interrupted run left in RUNS")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    arguments = parser.parse_args(argv)
    if not arguments.tables_only and not (arguments.suites and arguments.models):
        parser.error("give --suites and --models, or --tables-only")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    try:
        plan = Plan.load()
        for suite in () if arguments.tables_only else arguments.suites:
            run_suite(arguments, plan, suite)
        text = write_tables(arguments, plan)
    except TrajOODError as error:
        print(f"natural: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    print(text, end="")


if __name__ == "__main__":
    main()
