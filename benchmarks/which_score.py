"""The picture of README's "Which score?", drawn from the records alone (docs/which-score.png).

    python benchmarks/which_score.py [--out docs/which-score.png]

A dot is a mean AUROC over the OOD sets of a suite, and over the runs on it. The rows are those that README speaks of,
chosen from all scorers of the records (results/protocol/scorers.csv, results/natural/tables.md).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd
from set_intervals import DIAGNOSTICS

from traj_ood.drawing.charts import DotPanel, dots
from traj_ood.drawing.style import save_figure

RESULTS = Path(__file__).parents[1] / "results"
ROWS = {
    "trajectory:horizon=16": "the paper's score, 16 steps",
    "field": "field",
    "early-path": "early-path",
    "entry-path:parts=energy+static:horizon=16": "the path from x (entry-path)",
    "mahalanobis": "mahalanobis",
    "mahalanobis:normalize=true": "… of unit features",
    "knn": "knn",
    "reconstruction": "reconstruction",
    "nnguide": "nnguide (with a classifier)",
    "control: files": "the image files alone",
}
"""Label in the records → name in the picture."""
SUITES = ("tiny-imagenet", "imagenet-sample", "cifar10-partial")  # with the same colour in every panel
CHANCE = 50.0

Means = dict[str, dict[str, float]]
"""Suite → label → mean AUROC in percent."""


def small_autoencoders() -> Means:
    """The protocol on three models of half a million parameters, three training samples each."""
    table = pd.read_csv(RESULTS / "protocol" / "scorers.csv")
    table = table[~table["set"].isin(["all", "near", "far", *DIAGNOSTICS])]
    means = 100 * table.groupby(["suite", "scorer"])["auroc"].mean()
    return {str(suite): means[suite].to_dict() for suite in table["suite"].unique()}


def photographs(kind: str) -> Means:
    """The pre-registered protocol on models of ``kind``, ``autoencoder`` or ``backbone``."""
    found: dict[str, dict[str, list[float]]] = {}
    for record in _records(kind):
        suite = found.setdefault(record["suite"], {})
        for label, sets in record["figures"].items():
            suite.setdefault(label, []).append(100 * fmean(figures["auroc"] for figures in sets.values()))
    return {suite: {label: fmean(runs) for label, runs in found[suite].items()} for suite in SUITES if suite in found}


def _records(kind: str) -> Iterator[dict[str, Any]]:
    for path in sorted((RESULTS / "natural").glob("*/*.json")):
        record = json.loads(path.read_text())
        if record["kind"] == kind:
            yield record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/which-score.png"))
    out = parser.parse_args().out
    panels = [
        _panel("Small autoencoders", small_autoencoders()),
        _panel("Autoencoders of photographs", photographs("autoencoder")),
        _panel("A frozen ImageNet network", photographs("backbone")),
    ]
    save_figure(dots(list(ROWS.values()), panels, len(panels), "AUROC in percent, means over OOD sets"), out)
    print(f"Written to {out}")


def _panel(title: str, means: Means) -> DotPanel:
    series = {
        suite: [[suite_means[label]] if label in suite_means else [] for label in ROWS]
        for suite, suite_means in means.items()
    }
    return DotPanel(title, series, mark=CHANCE, limits=(10.0, 103.0))


if __name__ == "__main__":
    main()
