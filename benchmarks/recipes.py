"""Is there a recipe under which the path tells more than the features it starts from? python benchmarks/recipes.py
--suite tiny-imagenet --model timm:FOLDER --data-root ROOT [--recipes NAME …] [--seeds 0 1 2] [--steps 2000]

Surrogates of one frozen backbone, one choice of their training moved at a time (RECIPES): level and number of noise
levels, penalties on Jacobians, latent normalisation, width. The backbone sees every image once: its features are kept
below RUNS and every recipe is trained and scored on them. Scored by the path's scorers of preregistered.yaml, which are
not changed by what is found here, and by the static ones that a path has to beat (RIVALS), whose figures are the same
for every recipe.

A search, not a test: many recipes are looked at on the test sets, so a recipe that leads here is a hypothesis for other
sets. OUT/<suite>/<recipe>--seed<k>.json (default results/recipes) holds each run, with the health of its attractors;
OUT/summary.json, recipes.csv and tables.md are derived from them alone. RUNS (default runs/recipes, not for git) is
what training and the evaluator write. Finished runs are taken as they are. ``--tiny`` rehearses, marked in the table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pandas as pd

sys.path.insert(0, str(Path(__file__).parent))

import natural
from verdicts import BETTER

from traj_ood import Evaluator, RunConfig, SurrogateRecipe, TrajOODError, load_benchmark, surrogate_for
from traj_ood.backbones import Backbone, load_backbone
from traj_ood.backbones.feature_cache import FeatureCache
from traj_ood.data import OOD_ROLES, Benchmark
from traj_ood.dynamics.device import resolve_device
from traj_ood.evaluation.results import CONTROL, FILE_NAME, Result
from traj_ood.io.files import write_atomic
from traj_ood.io.provenance import environment, git_commit
from traj_ood.io.trees import as_json

RIVALS = (
    "mahalanobis",
    "mahalanobis:normalize=true",
    "mahalanobis:classes=true",
    "mahalanobis:classes=true:normalize=true",
    "rmds:covariance=ledoit-wolf",
    "knn",
)
FULL = 0  # a width in place of the features' own
RECIPES: dict[str, dict[str, Any]] = {
    "default": {},
    "noise / 4": {"noise_levels": (0.25,)},
    "noise / 2": {"noise_levels": (0.5,)},
    "noise × 2": {"noise_levels": (2.0,)},
    "four noise levels": {"noise_levels": (0.25, 0.5, 1.0, 2.0)},
    "latent noise 0.3": {"latent_noise": 0.3},
    "contractive 0.1": {"contractive": 0.1},
    "contractive 1": {"contractive": 1.0},
    "contractive f 0.1": {"jacobian": 0.1},
    "symmetric 0.1": {"asymmetry": 0.1},
    "symmetric 1": {"asymmetry": 1.0},
    "symmetric 1, four noise levels": {"asymmetry": 1.0, "noise_levels": (0.25, 0.5, 1.0, 2.0)},
    "no latent normalisation": {"latent_norm": False},
    "width 256": {"bottleneck": 256, "hidden": (512,)},
    "width 512": {"bottleneck": 512, "hidden": (512,)},
    "no bottleneck": {"bottleneck": FULL, "hidden": (FULL,)},
    "no bottleneck, noise × 2": {"bottleneck": FULL, "hidden": (FULL,), "noise_levels": (2.0,)},
}
"""Name → what differs from :class:`traj_ood.SurrogateRecipe`'s defaults; see there for what each choice is."""


def recipe_of(name: str, features: int, steps: int) -> SurrogateRecipe:
    """The recipe for features of that width."""
    changes = dict(RECIPES[name])
    if "bottleneck" in changes:
        changes["bottleneck"] = changes["bottleneck"] or features
        changes["hidden"] = tuple(width or features for width in changes["hidden"])
    return replace(SurrogateRecipe(), steps=steps, **changes)


# ---------------------------------------------------------------------------------------------- runs


def run(arguments: argparse.Namespace) -> None:
    """Every recipe and seed; those whose record is there are left as they are."""
    plan = natural.Plan.load()
    benchmark = load_benchmark(arguments.suite, arguments.data_root, allow_missing=arguments.allow_missing)
    backbone = load_backbone(arguments.model)
    for name in arguments.recipes:
        for seed in arguments.seeds:
            target = arguments.out / benchmark.name / f"{slug(name)}--seed{seed}.json"
            if target.is_file():
                expect_same(json.loads(target.read_text()), plan, backbone, arguments, target)
                continue
            print(f"recipes: {benchmark.name}: {name}, seed {seed}", file=sys.stderr)
            record = run_one(arguments, plan, benchmark, backbone, name, seed)
            write_atomic(target, (json.dumps(record, indent=1, sort_keys=True) + "\n").encode())


def run_one(
    arguments: argparse.Namespace, plan: natural.Plan, benchmark: Benchmark, backbone: Backbone, name: str, seed: int
) -> dict[str, Any]:
    recipe = recipe_of(name, backbone.feature_dim, arguments.steps)
    device = resolve_device(arguments.device)
    model = surrogate_for(
        backbone, benchmark, out=arguments.runs, recipe=recipe, seed=seed, device=device, quiet=arguments.quiet
    )
    model.name = f"{slug(name)}-s{seed}"
    found, missing = natural.scorers_for(plan, model, bool(benchmark.train.images.labels))
    wanted = [s for s in found if plan.scorers[s]["kind"] == "path" or s in RIVALS]
    limits = natural.TINY if arguments.tiny else {"attractors": arguments.attractors, "per_set": arguments.per_set}
    evaluator = Evaluator(
        model,
        benchmark,
        RunConfig(scorers=tuple(wanted), seed=seed, resamples=0, control=True, **limits),
        out=arguments.runs / benchmark.name,
        quiet=arguments.quiet,
        cache=FeatureCache(arguments.runs / "features"),
        pictures=False,
    )
    evaluator.run(fresh=arguments.fresh)
    result = Result.load(evaluator.folder / FILE_NAME)
    return {
        "plan": plan.digest,
        "rehearsal": bool(arguments.tiny),
        "suite": benchmark.name,
        "backbone": {"name": backbone.name, "fingerprint": model.backbone_fingerprint},
        "recipe": name,
        "options": as_json(asdict(recipe)),
        "seed": seed,
        "training": {k: model.record[k] for k in ("best_step", "validation_loss", "validation_clean")},
        "config": {k: v for k, v in result.config.items() if k != "scorers"},
        "data": result.data,
        "dictionary": result.dictionary,
        "missing": {s: why for s, why in missing.items() if s in RIVALS or plan.scorers[s]["kind"] == "path"},
        "figures": {spec: sets_of(result, found[spec]) for spec in wanted} | {CONTROL: sets_of(result, CONTROL)},
        "kinds": {spec: plan.scorers[spec]["kind"] for spec in wanted} | {CONTROL: "control"},
        "commit": git_commit(Path(__file__).parent),
        "versions": environment(),
    }


def sets_of(result: Result, label: str) -> dict[str, dict[str, float]]:
    """Set → figure of one scorer."""
    sets = result.scorers[label].sets
    return {name: {f: float(getattr(score.metrics, f)) for f in BETTER} for name, score in sets.items()}


def expect_same(
    record: Mapping[str, Any], plan: natural.Plan, backbone: Backbone, arguments: argparse.Namespace, path: Path
) -> None:
    """Refuse a record of another backbone, plan, or recipe under the same name."""
    recipe = as_json(asdict(recipe_of(record["recipe"], backbone.feature_dim, arguments.steps)))
    mine = {"plan": plan.digest, "backbone": backbone.fingerprint(), "options": recipe}
    theirs = {"plan": record["plan"], "backbone": record["backbone"]["fingerprint"], "options": record["options"]}
    other = [key for key, value in mine.items() if theirs[key] != value]
    if other:
        raise TrajOODError(
            f"{path}: expected a record of the same {', '.join(other)}, got another: choose another --out, or delete it"
        )


def slug(name: str) -> str:
    """As a file name."""
    for sign, word in ((" / ", "-over-"), (" × ", "-times-"), (", ", "-"), (" ", "-")):
        name = name.replace(sign, word)
    return name


# ---------------------------------------------------------------------------------------------- tables


def rows_of(records: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """A row for each suite, recipe, seed and scorer: means over the sets that are no diagnostics."""
    rows = []
    for record in records:
        held = [name for name, facts in record["data"].items() if facts["role"] in OOD_ROLES[:2]]
        health = {k: record["dictionary"].get(k) for k in ("converged", "distinct", "healthy")}
        for scorer, sets in record["figures"].items():
            place = {"suite": record["suite"], "recipe": record["recipe"], "seed": record["seed"], "scorer": scorer}
            means = {f: statistics.fmean(sets[name][f] for name in held) for f in BETTER}
            rows.append({**place, "kind": record["kinds"][scorer], **means, **health})
    return pd.DataFrame(rows)


def summarise(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """A row for each suite and recipe: the best scorer of the path and the best rival in each figure, seeds averaged,
    the scorers of the path that lead in all figures, and how the attractors fare."""
    found = []
    for (suite, recipe), own in rows.groupby(["suite", "recipe"], sort=False):
        means = own.groupby(["kind", "scorer"])[list(BETTER)].mean()
        row: dict[str, Any] = {"suite": suite, "recipe": recipe, "seeds": int(own["seed"].nunique())}
        for figure, sign in BETTER.items():
            best = {kind: sign * (sign * means.loc[kind][figure]).max() for kind in ("path", "static")}
            names = {kind: (sign * means.loc[kind][figure]).idxmax() for kind in best}
            row[figure] = {
                "path": names["path"],
                "rival": names["static"],
                "of_path": float(best["path"]),
                "of_rival": float(best["static"]),
                "ahead": float(sign * (best["path"] - best["static"])),
            }
        path = means.loc["path"]
        leads = [sign * path[figure] > sign * row[figure]["of_rival"] for figure, sign in BETTER.items()]
        row["leads_in_all"] = path.index[pd.concat(leads, axis=1).all(axis=1)].tolist()
        row["control"] = float(own.loc[own["scorer"] == CONTROL, "auroc"].mean())
        row |= {k: float(own[k].astype(float).mean()) for k in ("converged", "distinct", "healthy")}
        found.append(row)
    return found


def render(summary: Mapping[str, Any]) -> str:
    lines = ["# Recipes of surrogates: the path against its static rivals", ""]
    if summary["rehearsal"]:
        lines += ["**A rehearsal** of few images and steps: no figure below is a result.", ""]
    lines += [
        "Percent, means over OOD sets and seeds. The best scorer of the path and the best rival are chosen on these "
        "very sets, in each figure: a search, not a test. Files: the control on image files.",
        "",
        "| suite | recipe | seeds | path, AUROC ↑ | rival, AUROC ↑ | ahead | path, FPR95 ↓ | rival, FPR95 ↓ | ahead "
        "| files, AUROC | converged | distinct |",
        "| :-- | :-- | --: | :-- | :-- | --: | :-- | :-- | --: | --: | --: | --: |",
    ]
    for row in summary["recipes"]:
        cells = [row["suite"], row["recipe"], str(row["seeds"])]
        for figure in BETTER:
            own = row[figure]
            cells += [f"{100 * own[f'of_{who}']:.1f} `{own[who]}`" for who in ("path", "rival")]
            cells.append(f"{100 * own['ahead']:+.1f}")
        cells += [f"{100 * row['control']:.1f}", f"{row['converged']:.0%}", f"{row['distinct']:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    each = [r for r in summary["recipes"] if all(r[f]["ahead"] > 0 for f in BETTER)]
    one = [r for r in summary["recipes"] if r["leads_in_all"]]
    lines += ["", f"Recipes with a scorer of the path ahead of every rival in each figure: {_named(each)}.", ""]
    lines += [f"Recipes with one scorer of the path that is ahead in both figures: {_named(one)}.", ""]
    return "\n".join(lines)


def _named(rows: Sequence[Mapping[str, Any]]) -> str:
    return "; ".join(f"{row['recipe']} ({row['suite']})" for row in rows) or "none"


def write_tables(out: Path) -> str:
    """summary.json, recipes.csv and tables.md below OUT; returns the Markdown.

    Raises ``TrajOODError`` when there is no record.
    """
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(out.glob("*/*.json"))]
    if not records:
        raise TrajOODError(f"{out}: expected the records of at least one recipe, found none; run with --suite first")
    order = list(RECIPES)
    records.sort(key=lambda r: (r["suite"], order.index(r["recipe"]), r["seed"]))
    rows = rows_of(records)
    summary = {"rehearsal": any(r["rehearsal"] for r in records), "recipes": summarise(rows)}
    write_atomic(out / "summary.json", (json.dumps(summary, indent=1, sort_keys=True) + "\n").encode())
    write_atomic(out / "recipes.csv", rows.to_csv(index=False).encode())
    text = render(summary)
    write_atomic(out / "tables.md", text.encode())
    return text


# ---------------------------------------------------------------------------------------------- the command


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", help="a benchmark's name or YAML file")
    parser.add_argument("--model", help="a backbone, such as timm:FOLDER")
    parser.add_argument("--data-root", type=Path, help="where the suite's images are")
    parser.add_argument("--allow-missing", action="store_true", help="leave out OOD sets that are not there")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES), metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of surrogate and sample; default: 0")
    parser.add_argument("--steps", type=int, default=2000, help="of training, at most; default: 2000")
    parser.add_argument("--attractors", type=int, help="training images of scorers; default: the suite's own number")
    parser.add_argument("--per-set", type=int, default=500, help="most test images a set; default: 500")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument("--runs", type=Path, default=Path("runs/recipes"), help="default: runs/recipes")
    parser.add_argument("--out", type=Path, default=Path("results/recipes"), help="default: results/recipes")
    parser.add_argument("--tables-only", action="store_true", help="make the tables again from what OUT holds")
    parser.add_argument("--tiny", action="store_true", help="rehearse with few images and 40 steps")
    parser.add_argument("--fresh", action="store_true", help="discard what an interrupted run left in RUNS")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    arguments = parser.parse_args(argv)
    if not arguments.tables_only and not (arguments.suite and arguments.model):
        parser.error("give --suite and --model, or --tables-only")
    if arguments.tiny:
        arguments.steps = min(arguments.steps, 40)
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    try:
        if not arguments.tables_only:
            run(arguments)
        text = write_tables(arguments.out)
    except TrajOODError as error:
        print(f"recipes: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    print(text, end="")


if __name__ == "__main__":
    main()
