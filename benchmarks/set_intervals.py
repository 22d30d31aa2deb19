"""How sure the recorded lead of `field` is when sets, models and samples are drawn anew: python
benchmarks/set_intervals.py [--out results/protocol]

The intervals in tables.md carry the chance of test images alone. Here the sets of each suite, the models and the
samples of training images are drawn with replacement (benchmarks/verdicts.py), from the runs that lie below OUT; once
over all sets, and once without crops of few pictures and noise. Writes OUT/set-intervals.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).parent))

import verdicts

from traj_ood.evaluation.results import Result
from traj_ood.io.files import write_atomic

CANDIDATE = "field"
RIVALS = ("mahalanobis", "mahalanobis:view=grid")
DIAGNOSTICS = ("textures", "photos", "noise")
RESAMPLES = 10_000


def figures_below(out: Path) -> pd.DataFrame:
    """A row for each suite, set, model, sample and scorer."""
    rows = []
    for path in sorted(out.glob("*/*.json")):
        run = Result.load(path)
        for scorer in (CANDIDATE, *RIVALS):
            for name, own in run.scorers[scorer].sets.items():
                place = {"suite": run.benchmark, "set": name, "model": run.model["name"], "seed": run.seed}
                rows.append({**place, "scorer": scorer, "auroc": own.metrics.auroc, "fpr95": own.metrics.fpr95})
    return pd.DataFrame(rows)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/protocol"), help="default: results/protocol")
    out = parser.parse_args(argv).out
    whole = figures_below(out)
    found = []
    for what, figures in (("all sets", whole), ("without crops and noise", whole[~whole["set"].isin(DIAGNOSTICS)])):
        for figure in verdicts.BETTER:
            table = verdicts.block_table(figures, figure, [CANDIDATE, *RIVALS])
            bounds = verdicts.intervals(figures, figure, CANDIDATE, RIVALS, RESAMPLES)
            for rival, (low, high) in bounds.items():
                gain = verdicts.BETTER[figure] * (table[CANDIDATE] - table[rival])
                own = {"gain": float(gain.mean()), "low": low, "high": high, "sets": len(table)}
                found.append({"over": what, "figure": figure, "rival": rival, **own})
                print(f"{what}, {figure}, {rival}: {100 * own['gain']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]")
    write_atomic(out / "set-intervals.json", (json.dumps(found, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
