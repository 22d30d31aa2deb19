"""Leaderboards as text: Markdown, LaTeX, HTML and CSV tables, and the rows of OpenOOD's leaderboard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Any

import numpy as np

from traj_ood.data import OOD_ROLES
from traj_ood.errors import unknown_name
from traj_ood.evaluation.cautions import cautions
from traj_ood.evaluation.leaderboard import leaderboard, per_set
from traj_ood.evaluation.metrics import METRIC_NAMES
from traj_ood.evaluation.results import CONTROL, REGIONS, Result, ways_in_words
from traj_ood.evaluation.text_tables import Bold, TextTable, comment
from traj_ood.text import printable, quote_formula

if TYPE_CHECKING:
    import pandas as pd

DEFAULT_COLUMNS = (
    *("near_auroc", "far_auroc", "all_auroc"),
    *("near_fpr95", "far_fpr95", "all_fpr95", "all_fpr95_openood"),  # the paper's FPR95, and OpenOOD's for comparison
    *("all_aupr_in", "all_aupr_out"),
)

_TITLES = {
    "auroc": "AUROC ↑",
    "aupr_in": "AUPR-in ↑",
    "aupr_out": "AUPR-out ↑",
    "fpr95": "FPR95 ↓",
    "fpr95_openood": "FPR95-OpenOOD ↓",
}
_NOTES = (
    "All figures in percent; near, far and all are means over OOD sets, each set with equal weight, without "
    "diagnostics; ± is the standard deviation over seeds (n − 1).",
    "**FPR95** is the paper's: the threshold keeps 95 % of ID images; the figure is the share of OOD images accepted. "
    "**FPR95-OpenOOD** is OpenOOD's: the threshold catches 95 % of OOD images; the figure is the share of ID images "
    "rejected. Never compare one with the other.",
    "**f / image** is the mean number of evaluations of f = E∘D that the score costs; the single decoding of a "
    "reconstruction, and of where a path begins at x, is not one.",
)


@dataclass(frozen=True)
class Choice:
    """Which part of the leaderboard to show.

    Attributes:
        columns: ``<region>_<metric>`` columns of :func:`leaderboard`.
        sort: the column to sort by; ``fpr95``, ``f_evaluations`` and texts ascend, others descend. Default: best mean
            AUROC first.
        scorers: labels to show; a plain name, such as ``knn``, which is no label, shows all of that scorer.
            Default: all.
        top: number of rows of each table. Default: all.
        tables: ``means`` over sets, AUROC by OOD ``sets``, or both.
    """

    columns: Sequence[str] = DEFAULT_COLUMNS
    sort: str = "all_auroc"
    scorers: Sequence[str] = ()
    top: int | None = None
    tables: Sequence[str] = ("means", "sets")

    def __post_init__(self) -> None:
        known = [f"{region}_{metric}" for region in REGIONS for metric in METRIC_NAMES]
        for column in self.columns:
            if column not in known:
                raise unknown_name("leaderboard column", column, known)
        if self.sort not in (texts := ("scorer", "label", "f_evaluations")) and self.sort not in known:
            raise unknown_name("leaderboard column to sort by", self.sort, [*known, *texts])

    def of(self, table: pd.DataFrame) -> pd.DataFrame:
        """The selected rows of a :func:`leaderboard`, sorted.

        Raises:
            TrajOODError: no row has one of the scorers (similar names are suggested).
        """
        if self.scorers:
            table = table[reduce(or_, (_rows_of(table, label) for label in self.scorers))]
        ascending = "fpr95" in self.sort or not self.sort.endswith(METRIC_NAMES)
        order = ["benchmark", "model", self.sort, "scorer", "variant"]
        table = table.sort_values(order, ascending=[True, True, ascending, True, True], ignore_index=True)
        return table if self.top is None else table.groupby(["benchmark", "model"], sort=False).head(self.top)


def _rows_of(table: pd.DataFrame, label: str) -> pd.Series:
    """Which rows show a label, or, where none has it, the scorer of this plain name."""
    exact = (table["label"] == label) | (table["scorer"] == label)
    found = exact if exact.any() else table["scorer"].str.split(":").str[0] == label
    if not found.any():
        raise unknown_name("scorer of these results", label, {*table["label"], *table["scorer"]})
    return found


def render(results: Sequence[Result], form: str = "markdown", choice: Choice | None = None) -> str:
    """Leaderboard tables for each benchmark and model: means by scorer, best first, then AUROC by OOD set.

    Figures are in percent with one decimal, ``±`` over seeds. Rows with unhealthy attractors have ⚠ and a number that
    refers to the reason below the table.

    Args:
        results: the results.
        form: ``markdown``, ``latex`` (booktabs) or ``html``; for ``csv`` see :func:`csv_text`.
        choice: what to show. Default: everything.
    Raises:
        TrajOODError: there are no results, a seed is repeated, or a column, scorer or format is unknown.
    """
    choice = choice or Choice()
    means, sets = choice.of(leaderboard(results)), per_set(results)
    parts = []
    for (benchmark, model), rows in means.groupby(["benchmark", "model"], sort=False):
        here = sets[(sets["benchmark"] == benchmark) & (sets["model"] == model)]
        own = [r for r in results if (r.benchmark, r.model["name"]) == (benchmark, model)]
        place = f"{benchmark} · {model}"
        tables = []
        if "means" in choice.tables:
            divided = here.groupby("variant", sort=False)[["set", "role"]]
            ways: dict[str, dict[str, str]] = {str(v): dict(part.itertuples(index=False)) for v, part in divided}
            table = _means_table(rows, choice.columns, [ways_in_words(ways), *cautions(own)])
            tables.append(replace(table, caption=f"{place}: means over sets"))
        if "sets" in choice.tables:
            tables.append(replace(_sets_table(rows, here), caption=f"{place}: AUROC by OOD set"))
        if form == "markdown":
            parts.append(f"### {printable(place)}")
            for table in tables:
                parts += ["AUROC by OOD set:"] if table is tables[-1] and "sets" in choice.tables else []
                parts += [table.markdown(), *table.notes]
        else:
            parts += [table.text(form) for table in tables]
    notes = _NOTES if form == "markdown" else [comment(_NOTES, form)]
    return "\n\n".join([*parts, *notes]) + "\n"


def csv_text(results: Sequence[Result], choice: Choice | None = None, *, quote_formulas: bool = True) -> str:
    """:func:`leaderboard` as CSV, fractions with 6 decimals.

    Args:
        results: the results.
        choice: selects and sorts the rows, and selects the figures with their deviations. Default: everything.
        quote_formulas: put a ``'`` before texts that a spreadsheet would evaluate, such as a model named ``=1+1``
            (:func:`traj_ood.text.quote_formula`). Default True, as names can come from anyone. Numbers are not quoted.
    Raises:
        TrajOODError: as :func:`render`.
    """
    table = leaderboard(results)
    if choice is not None:
        table = choice.of(table)
        figures = [c for c in map(str, table.columns) if c.startswith(tuple(f"{region}_" for region in REGIONS))]
        wanted = {name for column in choice.columns for name in (column, f"{column}_std")}
        table = table.drop(columns=[c for c in figures if c not in wanted])
    return _csv(table, quote_formulas, float_format="%.6f")


def _means_table(rows: pd.DataFrame, columns: Sequence[str], notes: Sequence[str]) -> TextTable:
    """The table of means, with a footnote for each reason of unhealthy attractors, and the ``notes``. The best figure
    of a column is bold if all rows have the same data and configuration."""
    reasons = list(dict.fromkeys(rows.loc[~rows["healthy"], "warnings"]))
    titles = [f"{c.partition('_')[0]} {_TITLES[c.partition('_')[2]]}" for c in columns]
    header = ["Scorer", *titles, "f / image", "Dictionary", "Seeds"]
    comparable = bool((rows["variant"] == "").all())
    scorers = rows[rows["label"] != CONTROL]
    best = {c: scorers[c].min() if "fpr" in c else scorers[c].max() for c in columns}
    lines = []
    for _, row in rows.iterrows():
        leads = [comparable and row["label"] != CONTROL and row[c] == best[c] for c in columns]
        texts = [_percent(row[c], row[f"{c}_std"]) for c in columns]
        cells = [Bold(text) if first else text for text, first in zip(texts, leads, strict=True)]
        cost = "—" if np.isnan(row["f_evaluations"]) else f"{row['f_evaluations']:.1f}"
        health = "healthy" if row["healthy"] else f"⚠ unhealthy [{reasons.index(row['warnings']) + 1}]"
        health = health if row["used"] else "not used"
        lines.append([_name(row), *cells, cost, health, str(row["seeds"])])
    footnotes = [
        f"⚠ [{number}] Unhealthy attractor dictionary; scores that use attractors are not to be trusted here: "
        f"{reason or 'no reason was recorded'}."
        for number, reason in enumerate(reasons, 1)
    ]
    return TextTable(header, lines, notes=[*footnotes, *notes])


def _sets_table(rows: pd.DataFrame, sets: pd.DataFrame) -> TextTable:
    """AUROC (scorers × OOD sets), scorers in the order of ``rows``, near sets first and diagnostics last."""
    roles = sets.drop_duplicates(["set", "role"])
    places = sorted(zip(roles["set"], roles["role"], strict=True), key=lambda place: OOD_ROLES.index(place[1]))
    figures = sets.set_index(["scorer", "variant", "set", "role"])[["auroc", "auroc_std"]].to_dict("index")
    nothing = {"auroc": float("nan"), "auroc_std": float("nan")}
    lines = []
    for _, row in rows.iterrows():
        found = [figures.get((row["scorer"], row["variant"], *place), nothing) for place in places]
        mark = "" if row["healthy"] else " ⚠"
        lines.append([_name(row) + mark, *(_percent(f["auroc"], f["auroc_std"]) for f in found)])
    return TextTable(["Scorer", *(f"{name} ({role})" for name, role in places)], lines)


def _name(row: pd.Series) -> str:
    return f"{row['label']} ({row['variant']})" if row["variant"] else str(row["label"])


def _percent(mean: float, std: float, digits: int = 1, missing: str = "—") -> str:
    if np.isnan(mean):
        return missing
    return f"{100 * mean:.{digits}f}" + ("" if np.isnan(std) else f" ± {100 * std:.{digits}f}")


def openood_csv(results: Sequence[Result], choice: Choice | None = None, *, quote_formulas: bool = True) -> str:
    """The rows of :func:`leaderboard` in the columns of OpenOOD's leaderboard CSV files, for submission.

    AUROCs are in percent with 2 decimals, ``±`` over seeds; ``Training`` is the model's family and ``Arch`` its name.
    Missing values are ``/``, as there: a mean over no sets, and the accuracy, which results do not contain. No scorer
    here is fitted on outliers. As OpenOOD has one file per benchmark, the description begins with the benchmark's name;
    it ends with the variant, a note on unhealthy attractors and the diagnostics. ``choice`` selects and sorts the rows;
    ``quote_formulas`` and errors as in :func:`csv_text`.
    """
    import pandas as pd

    families = {r.model["fingerprint"]: str(r.model.get("family", "/")) for r in results}
    rows = []
    for _, row in (choice or Choice()).of(leaderboard(results)).iterrows():
        seeds = f"{row['seeds']} seed{'s' if row['seeds'] > 1 else ''}"
        notes = [row["benchmark"], seeds, row["variant"], "" if row["healthy"] else "unhealthy attractors"]
        notes += [f"means without {row['diagnostics']}"] if row["diagnostics"] else []
        near, far = (_percent(row[f"{r}_auroc"], row[f"{r}_auroc_std"], 2, "/") for r in ("near", "far"))
        rows.append(
            {
                "Training": families[row["fingerprint"]],
                "Scorer": row["label"],
                "Near-OOD_AUROC": near,
                "Far-OOD_AUROC": far,
                "ID_Accuracy": "/",
                "Outlier_Data": "No",
                "Arch": row["model"],
                "Additional_Description": "; ".join(note for note in notes if note),
            }
        )
    return _csv(pd.DataFrame(rows), quote_formulas)


def _csv(table: pd.DataFrame, quote_formulas: bool, **options: Any) -> str:
    texts = {
        name: [quote_formula(cell) if isinstance(cell, str) else cell for cell in table[name]]
        for name in table.columns
        if table[name].dtype.kind not in "biuf"
    }
    return str((table.assign(**texts) if quote_formulas else table).to_csv(index=False, **options))
