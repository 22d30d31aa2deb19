"""``traj-ood report``: write finished runs as one HTML page."""

from __future__ import annotations

from pathlib import Path

import click

from traj_ood.cli.base import PATH, comma_separated, examples, main
from traj_ood.cli.console import say
from traj_ood.errors import TrajOODError


@main.command(
    epilog=examples(
        "traj-ood report runs",
        "traj-ood report runs/fashion--fashion-mae--seed0 --out fashion.html",
        "traj-ood report results --scorers field,knn,mahalanobis",
    )
)
@click.argument("results", type=PATH)
@click.option("--out", type=PATH, help="The page.  [default: report.html in RESULTS]")
@click.option(
    "--scorers",
    help="Comma-separated labels to show in detail, or all.  [default: the best three, field and the paper's]",
)
def report(results: Path, out: Path | None, scorers: str | None) -> None:
    """Write one HTML page of every result.json in RESULTS or below: leaderboard, curves, paths, pictures.

    The page is self-contained and loads nothing from a network. It is made from the runs' folders alone, without the
    model and the data.
    """
    from traj_ood.io.sealed import refuse_inside
    from traj_ood.report import write_report

    refuse_inside(results if out is None else out.parent)
    labels = None if scorers is None else list(comma_separated(scorers))
    if labels == []:
        raise TrajOODError("--scorers: expected labels, got none: give some, all, or leave it out")
    path = write_report(results, out, labels)
    say(f"Written to {path} ({path.stat().st_size / 2**20:.1f} MiB)", kept=f"the page is {path}")
