"""``traj-ood analyze``: answer a question of the paper about the latent vector field."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from traj_ood.cli.base import PATH, examples, main, set_up, shared
from traj_ood.cli.console import note, say

if TYPE_CHECKING:
    from traj_ood.analysis import Question


@main.command(
    epilog=examples(
        "traj-ood analyze",
        "traj-ood analyze memorization --show",
        "traj-ood analyze memorization --out runs/memorization --option bottlenecks=2,16,128 --option epochs=10",
        "traj-ood analyze training --paper --option data=mnist --device cuda --out runs/training",
    )
)
@click.argument("question", required=False)
@click.option("--option", "-o", "pairs", multiple=True, metavar="KEY=VALUE", help="Repeatable; see --show.")
@click.option("--paper", is_flag=True, help="Start from the paper's settings instead of those for two cores.")
@click.option("--show", is_flag=True, help="Print the options, the paper's values and the choices; compute nothing.")
@click.option("--out", type=PATH, help="Results folder.  [default: runs/analysis/<question>]")
@click.option("--work", type=PATH, help="Folder of finished units of work.  [default: OUT/units]")
@click.option("--data-root", type=PATH, help="Folder of the images.")
@shared("device", "threads")
@click.option("--fresh", is_flag=True, help="Discard the finished units of an earlier run.")
@shared("quiet")
def analyze(question: str | None, pairs: tuple[str, ...], paper: bool, show: bool, **options: Any) -> None:
    """Answer QUESTION about autoencoders, as in the paper: what attractors memorise, where trajectories go.

    Writes finding.json (figures, and every difference from the paper) and pictures to OUT and prints one sentence. An
    interrupted run continues where it stopped. Without QUESTION, lists the questions.
    """
    from traj_ood.analysis import QUESTIONS, find_question, options_from

    if question is None:
        for name, found in QUESTIONS.items():
            say(f"  {name:<14} {found.summary} ({found.figure})")
        return
    asked = options_from(find_question(question), pairs, paper=paper)
    if show:
        _show(asked)
    else:
        _run(asked, options)


def _show(asked: Question) -> None:
    from traj_ood.io.options import write_option

    theirs, where = asked.paper().options(), {key: "--paper, not stated" for key in asked.unstated}
    say(f"{asked.name}: {asked.summary} ({asked.figure})")
    for key, value in asked.options().items():
        same = theirs[key] == value or key == "seed"
        note = "" if same else f"   ({where.get(key, 'paper')}: {asked.shown(key, theirs[key])})"
        say(f"  {key:<14} {write_option(value, ',')}{note}")
    for choice in asked.choices:
        say(f"  - {choice}")


def _run(asked: Question, options: dict[str, Any]) -> None:
    from traj_ood.analysis import Workspace
    from traj_ood.dynamics.device import resolve_device

    set_up(options["threads"])
    folder: Path = options["out"] or Path("runs") / "analysis" / asked.name
    device = resolve_device(options["device"])
    space = Workspace(options["work"] or folder / "units", device, options["data_root"], options["quiet"])
    if options["fresh"]:
        space.discard()
    finding = asked.run(space, folder, command="traj-ood " + shlex.join(sys.argv[1:]))
    say(finding.sentence, kept=f"all results are in {folder}")
    for difference in finding.differences:
        note(f"  differs: {difference}")
    note(f"Written to {folder}")
