"""``traj-ood compare`` and ``leaderboard``: tables of finished runs."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from traj_ood.cli.base import NAME, PATH, SEED, comma_separated, examples, main, shared
from traj_ood.cli.console import note, say
from traj_ood.errors import TrajOODError

if TYPE_CHECKING:
    from traj_ood.evaluation.versus import Versus

_EXIT = {1: 0, 0: 1, -1: 3}  # outcome → exit code: a is better, no difference shown, b is better; 2 is bad input
_FORMS = ("markdown", "csv", "latex", "html", "openood")


@main.command(
    epilog=examples(
        "traj-ood compare runs/fashion--fashion-mae--seed0 --scorers field,mahalanobis",
        "traj-ood compare runs --scorers field,mahalanobis --format latex",
        "traj-ood compare runs/new runs/old --scorers field --metric fpr95",
    )
)
@click.argument("runs", type=PATH, nargs=-1, required=True)
@click.option(
    "--scorers",
    required=True,
    help="Two labels a,b: compares a with b in all RUNS. One label: compares the first RUN with the second. A plain "
    "name, such as knn, stands for the only label of that scorer.",
)
@click.option(
    "--metric",
    type=click.Choice(["auroc", "fpr95"]),
    default="auroc",
    show_default=True,
    help="Metric of the verdict and the exit code.",
)
@click.option(
    "--resamples",
    type=click.IntRange(1),
    default=2000,
    show_default=True,
    help="Resamples of the paired bootstrap over images.",
)
@click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of the resamples.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["markdown", "csv", "latex", "html"]),
    default="markdown",
    show_default=True,
    help="Format of the tables.",
)
@click.option("--json", "json_path", type=PATH, help="Also write all figures to this file.")
def compare(runs: tuple[Path, ...], scorers: str, metric: str, **options: Any) -> None:
    """Test whether one scorer is better than another on the same images, in RUNS (folders with a result.json in them or
    below).

    Prints a verdict, and for each OOD set and their mean the difference in AUROC and FPR95 with its 95 % interval, the
    p-value of a paired bootstrap over images, and the p-value corrected for the number of sets (Holm).

    Exit code: 0 if the first is better in the mean over sets (p < 0.05), 1 if no difference is shown, 3 if the second
    is better.
    """
    found = _compared(runs, comma_separated(scorers), options)
    form = options["form"]
    if options["json_path"] is not None:
        from traj_ood.io.sealed import refuse_inside
        from traj_ood.io.trees import write_json

        refuse_inside(options["json_path"].parent)
        write_json(options["json_path"], found.as_dict())
    verdict = found.verdict(metric)  # type: ignore[arg-type]
    if form == "csv":
        say(found.frame().to_csv(index=False).rstrip("\n"))
    else:
        tables = [table.text(form) for table in found.tables()]
        say("\n\n".join([verdict, *tables, *found.notes()] if form == "markdown" else tables))
    for line in (verdict, *found.cautions) if form != "markdown" else ():
        note(line)
    sys.exit(_EXIT[found.outcome(metric)])  # type: ignore[arg-type]


def _compared(places: tuple[Path, ...], labels: tuple[str, ...], options: dict[str, Any]) -> Versus:
    from traj_ood.evaluation.runs import Run
    from traj_ood.evaluation.versus import compare_runs, compare_scorers

    settings = {key: options[key] for key in ("resamples", "seed")}
    groups = [(place, Run.load_all(place)) for place in places]
    loaded = [run for _, group in groups for run in group]
    if len(places) > 1:  # the names below each place need not differ
        loaded = [
            replace(run, place=str(place) if len(group) == 1 else f"{place}/{run.place}")
            for place, group in groups
            for run in group
        ]
    if len(labels) == 2:
        return compare_scorers(loaded, *labels, **settings)
    if len(labels) == 1 and len(loaded) == 2:
        return compare_runs(loaded[0], loaded[1], labels[0], **settings)
    raise TrajOODError(
        f"--scorers: expected two labels, or one and two runs, got {len(labels)} label(s) and {len(loaded)} run(s)"
    )


@main.command(
    epilog=examples(
        "traj-ood leaderboard runs",
        "traj-ood leaderboard runs --format latex --columns all_auroc,all_fpr95 --top 10",
        "traj-ood leaderboard results --csv results/leaderboard.csv --readme docs/results.md",
        "traj-ood leaderboard runs/mine results --format openood",
    )
)
@click.argument("folders", type=PATH, nargs=-1)
@click.option("--csv", "csv_path", type=PATH, help="Also write the full table as CSV.")
@click.option("--readme", type=PATH, help="Also put the table between this file's markers.")
@click.option(
    "--format",
    "form",
    type=click.Choice(_FORMS),
    default="markdown",
    show_default=True,
    help="latex needs booktabs; openood: rows in the columns of OpenOOD's leaderboard CSV.",
)
@click.option(
    "--columns",
    type=NAME,
    help="Comma-separated <near|far|all>_<auroc|fpr95|fpr95_openood|aupr_in|aupr_out>.  [default: nine of them]",
)
@click.option(
    "--sort", type=NAME, default="all_auroc", show_default=True, help="One of these, scorer or f_evaluations."
)
@click.option(
    "--scorers",
    type=NAME,
    help="Comma-separated labels to show; a plain name that is no label shows all of that scorer.  [default: all]",
)
@click.option("--top", type=click.IntRange(1), help="Number of rows of each table.  [default: all]")
@click.option(
    "--diagnostics",
    type=NAME,
    help="Comma-separated OOD sets that the means leave out, for runs older than their benchmark's own diagnostics.",
)
@click.option(
    "--tables",
    type=click.Choice(["means", "sets", "both"]),
    default="both",
    show_default=True,
    help="Means over sets, AUROC by set, or both.",
)
@shared("quote_formulas")
def leaderboard(
    folders: tuple[Path, ...], csv_path: Path | None, readme: Path | None, form: str, **options: Any
) -> None:
    """Render every result.json below FOLDERS (default: results) as one leaderboard. Seeds are averaged, different
    settings are not."""
    from traj_ood.evaluation.cautions import cautions
    from traj_ood.evaluation.leaderboard_text import DEFAULT_COLUMNS, Choice, csv_text, openood_csv, render
    from traj_ood.evaluation.results import Result, with_diagnostics
    from traj_ood.evaluation.text_tables import put_between_markers
    from traj_ood.io.files import write_atomic
    from traj_ood.io.sealed import refuse_inside

    quote = options["quote_formulas"]
    if readme is not None and form != "markdown":
        raise TrajOODError(f"--readme takes the Markdown table: leave out --format {form}, or --readme")
    columns, labels = comma_separated(options["columns"]), comma_separated(options["scorers"])
    tables = ("means", "sets") if options["tables"] == "both" else (options["tables"],)
    choice = Choice(columns or DEFAULT_COLUMNS, options["sort"], labels, options["top"], tables)
    if csv_path is not None:
        refuse_inside(csv_path.parent)
    results = with_diagnostics(Result.load_all(*folders or ("results",)), comma_separated(options["diagnostics"]))
    if form in ("csv", "openood"):  # which have no place for them
        for name in dict.fromkeys(result.benchmark for result in results):
            for line in cautions([result for result in results if result.benchmark == name]):
                note(f"{name}: {line}")
    if form == "openood":
        text = openood_csv(results, choice, quote_formulas=quote)
        if csv_path is not None:
            write_atomic(csv_path, text.encode())
        say(text, end="")
        return
    text = csv_text(results, choice, quote_formulas=quote) if form == "csv" else render(results, form, choice)
    if csv_path is not None:
        write_atomic(csv_path, csv_text(results, quote_formulas=quote).encode())
    if readme is not None:
        put_between_markers(readme, "leaderboard", text)
    say(text, end="" if form == "csv" else "\n")
