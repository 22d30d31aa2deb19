"""Shared by the scripts beside it: answer one question and record it below results/figures.

Every script is ``python benchmarks/figures/<question>.py``; options are those of ``traj-ood analyze <question>``, with
--out results/figures/<question> and --work runs/analysis/<question> as defaults. The record (finding.json) holds the
command, the seed, the commit, the versions, and every difference from the paper.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

import torch

from traj_ood.analysis import Workspace, find_question, options_from
from traj_ood.dynamics.device import resolve_device
from traj_ood.errors import TrajOODError


def record(question: str) -> None:
    """Run the script of ``question``."""
    parser = argparse.ArgumentParser(prog=f"benchmarks/figures/{question}.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("results/figures") / question)
    parser.add_argument("--work", type=Path, default=Path("runs/analysis") / question)
    parser.add_argument("--option", "-o", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--paper", action="store_true", help="the paper's settings")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--fresh", action="store_true", help="discard the finished units of an earlier run")
    parser.add_argument("--quiet", action="store_true")
    chosen = parser.parse_args()
    if chosen.threads is not None and chosen.threads < 1:
        sys.exit(f"error: --threads: expected at least 1, got {chosen.threads}")
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    try:
        pairs = [f"seed={chosen.seed}", *chosen.option]
        asked = options_from(find_question(question), pairs, paper=chosen.paper)
        work = Workspace(chosen.work, resolve_device(chosen.device), chosen.data_root, chosen.quiet)
        if chosen.fresh:
            work.discard()
        command = shlex.join(["python", f"benchmarks/figures/{Path(sys.argv[0]).name}", *sys.argv[1:]])
        finding = asked.run(work, chosen.out, command=command)
    except TrajOODError as error:
        sys.exit(f"error: {error}")
    print(finding.sentence)
