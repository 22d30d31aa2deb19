"""Leaderboards from result files: one row per benchmark, model and scorer, averaged over seeds only.

Two results share a row only if they differ in nothing but their seed: same benchmark, model weights, configuration,
scorer options and test images (by hash). Otherwise they get separate rows, whose ``variant`` names the difference.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from traj_ood.data import OOD_ROLES
from traj_ood.errors import TrajOODError, unknown_name
from traj_ood.evaluation.metrics import METRIC_NAMES, Metrics
from traj_ood.evaluation.results import CONTROL, REGIONS, Result, ScorerResult, near_first, sets_in_words
from traj_ood.evaluation.text_tables import Bold, TextTable
from traj_ood.io.files import write_atomic
from traj_ood.text import printable, quote_formula

if TYPE_CHECKING:
    import pandas as pd

START, END = "<!-- leaderboard:start -->", "<!-- leaderboard:end -->"

DEFAULT_COLUMNS = (
    *("near_auroc", "far_auroc", "all_auroc"),
    *("near_fpr95", "far_fpr95", "all_fpr95", "all_fpr95_openood"),  # the paper's FPR95, and OpenOOD's for comparison
    *("all_aupr_in", "all_aupr_out"),
)

OPENOOD_COLUMNS = (
    *("Training", "Scorer", "Near-OOD_AUROC", "Far-OOD_AUROC"),
    *("ID_Accuracy", "Outlier_Data", "Arch", "Additional_Description"),
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
    "**f / image** is the mean number of evaluations of f = E∘D that the score costs.",
)


@dataclass(frozen=True)
class Group:
    """The runs of one row: the same scorer in results that differ only in their seed, by ascending seed."""

    scorer: str
    runs: tuple[tuple[Result, ScorerResult], ...]
    variant: str

    def head(self) -> dict[str, Any]:
        """The columns that identify the row."""
        result, scorer = self.runs[0]
        return {
            "benchmark": result.benchmark,
            "model": result.model["name"],
            "fingerprint": result.model["fingerprint"],
            "scorer": self.scorer,
            "label": scorer.label,
            "variant": self.variant,
            "seeds": len(self.runs),
        }

    def sets(self) -> dict[str, str]:
        """The role of each OOD set, in the order of every table."""
        return near_first({name: score.role for name, score in self.runs[0][1].sets.items()})

    def tail(self) -> dict[str, Any]:
        """The columns after the figures: cost, sets that the means leave out, health of the dictionaries, and what the
        scorer measures."""
        costs = [s.f_evaluations for _, s in self.runs if s.f_evaluations is not None]
        dictionaries = [(r.seed, r.dictionary) for r, _ in self.runs]
        warnings = [f"seed {seed}: {text}" for seed, d in dictionaries for text in d["warnings"]]
        return {
            "f_evaluations": float(np.mean(costs)) if costs else float("nan"),
            "diagnostics": " ".join(n for n, role in self.sets().items() if role == "diagnostic"),
            "healthy": all(d["healthy"] for _, d in dictionaries),
            "warnings": "; ".join(warnings),
            "note": self.runs[0][1].note,
        }


def leaderboard(results: Sequence[Result]) -> pd.DataFrame:
    """One row per benchmark × model × scorer (× variant), best ``all_auroc`` first within a benchmark and model.

    Columns: ``benchmark``, ``model``, ``fingerprint``, ``scorer``, ``label``, ``variant`` (how the row differs from
    others of its benchmark and model, else empty), ``seeds`` (their number); for near, far and all and each metric
    ``<region>_<metric>`` and ``<region>_<metric>_std``, the mean and the sample standard deviation (n − 1) over seeds,
    as fractions, NaN if undefined; ``f_evaluations`` per image, ``diagnostics`` (sets that the means leave out),
    ``healthy``, ``warnings``, ``note``.

    Raises ``TrajOODError`` if there are no results, or a row has the same seed twice.
    """
    import pandas as pd

    rows = []
    for group in groups_of(results):
        row = group.head()
        for region in REGIONS:
            row |= _over_seeds([getattr(scorer, region) for _, scorer in group.runs], prefix=f"{region}_")
        rows.append(row | group.tail())
    table = pd.DataFrame(rows)
    order = ["benchmark", "model", "all_auroc", "scorer", "variant"]
    return table.sort_values(order, ascending=[True, True, False, True, True], ignore_index=True)


def per_set(results: Sequence[Result]) -> pd.DataFrame:
    """The rows of :func:`leaderboard` by OOD set: ``set``, ``role``, ``count``, ``<metric>``, ``<metric>_std``.

    ``count`` is the smallest number of scored images over the seeds. Near sets come first, diagnostics last. Raises as
    :func:`leaderboard`.
    """
    import pandas as pd

    rows = []
    for group in groups_of(results):
        for name, role in group.sets().items():
            scores = [scorer.sets[name] for _, scorer in group.runs]
            place = {"set": name, "role": role, "count": min(s.count for s in scores)}
            rows.append(group.head() | place | _over_seeds([s.metrics for s in scores]))
    return pd.DataFrame(rows)


def write_csv(results: Sequence[Result], path: str | Path, *, quote_formulas: bool = True) -> None:
    """Write ``leaderboard(results)`` as a CSV file, fractions with 6 decimals.

    Raises as :func:`leaderboard` and :func:`write_atomic`.

    Args:
        results: the results.
        path: the file.
        quote_formulas: put a ``'`` before texts that a spreadsheet would evaluate, such as a model named ``=1+1``
            (:func:`traj_ood.text.quote_formula`). Default True, as names can come from anyone. Numbers are not quoted.
    """
    write_atomic(path, csv_text(results, quote_formulas=quote_formulas).encode())


def openood_csv(results: Sequence[Result], *, quote_formulas: bool = True) -> str:
    """The rows of :func:`leaderboard` in the columns of OpenOOD's leaderboard CSV files, for submission.

    AUROCs are in percent with 2 decimals, ``±`` over seeds; ``Training`` is the model's family and ``Arch`` its name.
    Missing values are ``/``, as there: a mean over no sets, and the accuracy, which results do not contain. No scorer
    here is fitted on outliers. As OpenOOD has one file per benchmark, the description begins with the benchmark's name;
    it ends with the variant, a note on unhealthy attractors and the diagnostics. ``quote_formulas`` as in
    :func:`write_csv`. Raises as :func:`leaderboard`.
    """
    import pandas as pd

    families = {r.model["fingerprint"]: str(r.model.get("family", "/")) for r in results}
    rows = []
    for _, row in leaderboard(results).iterrows():
        seeds = f"{row['seeds']} seed{'s' if row['seeds'] > 1 else ''}"
        notes = [row["benchmark"], seeds, row["variant"], "" if row["healthy"] else "unhealthy attractors"]
        notes += [f"means without {row['diagnostics']}"] if row["diagnostics"] else []
        near, far = (_openood_percent(row[f"{r}_auroc"], row[f"{r}_auroc_std"]) for r in ("near", "far"))
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
    return _csv(pd.DataFrame(rows, columns=list(OPENOOD_COLUMNS)), quote_formulas)


def write_openood_csv(results: Sequence[Result], path: str | Path, *, quote_formulas: bool = True) -> None:
    """Write ``openood_csv(results)`` to a file. Raises as :func:`openood_csv` and :func:`write_atomic`."""
    write_atomic(path, openood_csv(results, quote_formulas=quote_formulas).encode())


def _csv(table: pd.DataFrame, quote_formulas: bool, **options: Any) -> str:
    texts = {
        name: [quote_formula(cell) if isinstance(cell, str) else cell for cell in table[name]]
        for name in table.columns
        if table[name].dtype.kind not in "biuf"
    }
    return str((table.assign(**texts) if quote_formulas else table).to_csv(index=False, **options))


def update_readme(readme_path: str | Path, markdown: str) -> None:
    """Replace the text between the two leaderboard markers of a README by ``markdown``.

    Raises ``TrajOODError`` if the file cannot be read, or does not contain each marker once, start before end.
    """
    path = Path(readme_path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TrajOODError(f"{path}: expected a README in UTF-8, got {error}; check the path") from error
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        raise TrajOODError(
            f"{path}: expected {START} once and {END} once after it, got {text.count(START)} and {text.count(END)}; "
            "put both markers where the table belongs"
        )
    before, after = text[: text.index(START)], text[text.index(END) :]
    write_atomic(path, f"{before}{START}\n{markdown.strip()}\n{after}".encode())


# ---------------------------------------------------------------------------------------------- grouping


def _run_identity(result: Result, ambiguous: Set[str]) -> dict[str, str]:
    """What runs must have in common to be compared or averaged, as texts by dotted name.

    The seed is left out, and so are settings without effect on scores: the other scorers, the control and the number of
    resamples. Images are identified by the digest of their list, and by that of their content if a list is
    ``ambiguous``; older results have only the list.
    """
    idle = ("seed", "scorers", "resamples", "control")
    config = {key: value for key, value in result.config.items() if key not in idle}
    tests = {
        name: data.get("contents", data["sha256"]) if data["sha256"] in ambiguous else data["sha256"]
        for name, data in result.data.items()
        if data["role"] in ("test", *OOD_ROLES)
    }
    return _flat({"model": result.model["fingerprint"], "config": config, "data": tests})


def _ambiguous_lists(results: Sequence[Result]) -> set[str]:
    """Digests of image lists that occur with different contents: the same names, but other images."""
    contents: dict[str, set[str]] = {}
    for data in (data for result in results for data in result.data.values() if "contents" in data):
        contents.setdefault(data["sha256"], set()).add(data["contents"])
    return {listed for listed, found in contents.items() if len(found) > 1}


def _scorer_identity(scorer: ScorerResult) -> dict[str, str]:
    """What a scorer must have in common with one of the same label in another run: its options and OOD sets."""
    return _flat({"options": scorer.options, "sets": {name: score.role for name, score in scorer.sets.items()}})


def _flat(tree: Any, place: str = "") -> dict[str, str]:
    """Flatten nested mappings: ``{"config": {"tol": 1}}`` → ``{"config.tol": "1"}``."""
    if not isinstance(tree, dict):
        return {place: tree if isinstance(tree, str) else json.dumps(tree, sort_keys=True, default=str)}
    flat: dict[str, str] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{place}.{key}" if place else str(key))
    return flat


def groups_of(results: Sequence[Result]) -> list[Group]:
    """Group results into rows of equal identity; the ``variant`` of each row names how it differs from others.

    A difference between runs is named for every scorer of the benchmark and model, even if no scorer is in both, so
    that figures on different data never appear side by side unmarked.
    """
    if not results:
        raise TrajOODError("leaderboard: expected at least 1 result, got 0; run `traj-ood bench` first")
    ambiguous = _ambiguous_lists(results)
    members: dict[str, list[Result]] = {}
    runs: dict[tuple[str, ...], list[dict[str, str]]] = {}  # identities by (benchmark, model)
    scorers: dict[tuple[str, ...], list[dict[str, str]]] = {}  # identities by (benchmark, model, scorer)
    for result in results:
        place, run = (result.benchmark, result.model["name"]), _run_identity(result, ambiguous)
        runs.setdefault(place, []).append(run)
        for name, scorer in result.scorers.items():
            own = _scorer_identity(scorer)
            scorers.setdefault((*place, name), []).append(own)
            members.setdefault(json.dumps([*place, name, run, own], sort_keys=True), []).append(result)
    groups = []
    for key, same in members.items():
        benchmark, model, name, run, own = json.loads(key)
        variant = [*_differences(run, runs[benchmark, model]), *_differences(own, scorers[benchmark, model, name])]
        members_by_seed = _one_per_seed(same, name)
        groups.append(Group(name, tuple((r, r.scorers[name]) for r in members_by_seed), ", ".join(variant)))
    return groups


def _one_per_seed(results: Iterable[Result], scorer: str) -> list[Result]:
    """The results by ascending seed; a repeated seed, which would count twice in the mean, is refused."""
    by_seed: dict[int, Result] = {}
    for result in results:
        if result.seed in by_seed:
            raise TrajOODError(
                f"leaderboard: expected one result per seed for {result.benchmark}, {result.model['name']}, {scorer}; "
                f"got seed {result.seed} twice ({by_seed[result.seed].name!r} and {result.name!r}); remove one of them"
            )
        by_seed[result.seed] = result
    return [by_seed[seed] for seed in sorted(by_seed)]


def _differences(identity: dict[str, str], others: Sequence[dict[str, str]]) -> list[str]:
    """The entries in which identities differ, as ``["config.tol=1e-05", "data.digits=0a1b2c3d"]`` of this one."""
    places = sorted({place for other in others for place in other})
    differing = [p for p in places if len({other.get(p) for other in others}) > 1]
    return [f"{p}={_short(p, identity.get(p, 'absent'))}" for p in differing]


def _short(place: str, value: str) -> str:
    """``value``, with hashes shortened to 8 digits."""
    return value[:8] if place == "model" or place.startswith("data.") else value


def _over_seeds(metrics: Sequence[Metrics | None], prefix: str = "") -> dict[str, float]:
    """Mean and sample standard deviation of each metric; NaN if undefined (no such set; a single seed)."""
    figures: dict[str, float] = {}
    for name in METRIC_NAMES:
        values = [getattr(m, name) for m in metrics if m is not None]
        figures[f"{prefix}{name}"] = float(np.mean(values)) if values else float("nan")
        figures[f"{prefix}{name}_std"] = float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")
    return figures


# ---------------------------------------------------------------------------------------------- text


@dataclass(frozen=True)
class Choice:
    """Which part of the leaderboard to show.

    Attributes:
        columns: ``<region>_<metric>`` columns of :func:`leaderboard`.
        sort: the column to sort by; ``fpr95``, ``f_evaluations`` and texts ascend, others descend. Default: best mean
            AUROC first.
        scorers: labels to show. Default: all.
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
        names = {*table["label"], *table["scorer"]}
        for label in self.scorers:
            if label not in names:
                raise unknown_name("scorer of these results", label, names)
        if self.scorers:
            table = table[table["label"].isin(self.scorers) | table["scorer"].isin(self.scorers)]
        ascending = "fpr95" in self.sort or not self.sort.endswith(METRIC_NAMES)
        order = ["benchmark", "model", self.sort, "scorer", "variant"]
        table = table.sort_values(order, ascending=[True, True, ascending, True, True], ignore_index=True)
        return table if self.top is None else table.groupby(["benchmark", "model"], sort=False).head(self.top)


def render_markdown(results: Sequence[Result], *, columns: Sequence[str] = DEFAULT_COLUMNS) -> str:
    """:func:`render` as Markdown, with all rows and tables; raises as :func:`render`."""
    return render(results, "markdown", Choice(columns))


def render(results: Sequence[Result], form: str, choice: Choice | None = None) -> str:
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
            table = _means_table(rows, choice.columns, [_held(here), *_copies(own)])
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
    notes = _NOTES if form == "markdown" else [TextTable((), (), notes=_NOTES).comment(form)]
    return "\n\n".join([*parts, *notes]) + "\n"


def csv_text(results: Sequence[Result], choice: Choice | None = None, *, quote_formulas: bool = True) -> str:
    """:func:`leaderboard` as CSV, fractions with 6 decimals.

    ``choice`` selects and sorts the rows, and selects the figures with their deviations. ``quote_formulas`` as in
    :func:`write_csv`. Raises as :func:`render`.
    """
    table = leaderboard(results)
    if choice is not None:
        table = choice.of(table)
        figures = [c for c in map(str, table.columns) if c.startswith(tuple(f"{region}_" for region in REGIONS))]
        wanted = {name for column in choice.columns for name in (column, f"{column}_std")}
        table = table.drop(columns=[c for c in figures if c not in wanted])
    return _csv(table, quote_formulas, float_format="%.6f")


def _means_table(rows: pd.DataFrame, columns: Sequence[str], notes: Sequence[str]) -> TextTable:
    """The table of means, with a footnote for each reason of unhealthy attractors, and the ``notes``.

    The best figure of a column is bold if all rows have the same data and configuration.
    """
    reasons = list(dict.fromkeys(rows.loc[~rows["healthy"], "warnings"]))
    titles = [f"{c.partition('_')[0]} {_TITLES[c.partition('_')[2]]}" for c in columns]
    header = ["Scorer", *titles, "f / image", "Dictionary", "Seeds"]
    comparable = bool((rows["variant"] == "").all())
    scorers = rows[rows["label"] != CONTROL]
    best = {c: scorers[c].min() if "fpr" in c else scorers[c].max() for c in columns}
    lines = []
    for _, row in rows.iterrows():
        ranked = comparable and row["label"] != CONTROL
        cells = [_percent(row[c], row[f"{c}_std"], bold=ranked and row[c] == best[c]) for c in columns]
        cost = "—" if np.isnan(row["f_evaluations"]) else f"{row['f_evaluations']:.1f}"
        health = "healthy" if row["healthy"] else f"⚠ unhealthy [{reasons.index(row['warnings']) + 1}]"
        lines.append([_name(row), *cells, cost, health, str(row["seeds"])])
    footnotes = [
        f"⚠ [{number}] Unhealthy attractor dictionary; scores that use attractors are not to be trusted here: "
        f"{reason or 'no reason was recorded'}."
        for number, reason in enumerate(reasons, 1)
    ]
    return TextTable(header, lines, notes=[*footnotes, *notes])


def _held(sets: pd.DataFrame) -> str:
    """Which sets the means hold, in the words of each way in which the rows divide them (records of several ages)."""
    ways = {
        json.dumps(dict(zip(own["set"], own["role"], strict=True))): str(variant)
        for variant, own in sets.groupby("variant", sort=False)
    }
    if len(ways) == 1:
        return sets_in_words(json.loads(next(iter(ways))))
    return " ".join(f"{sets_in_words(json.loads(way))[:-1]} ({variant})." for way, variant in ways.items())


def _copies(results: Sequence[Result]) -> list[str]:
    """A line for each pair of splits that share images by content, with the largest number found by a run."""
    most: dict[tuple[str, str], tuple[int, int]] = {}
    for result in results:
        for name, data in result.data.items():
            for other, count in data.get("copies", {}).items():
                most[name, other] = max(most.get((name, other), (0, 0)), (count, data["count"]))
    return [
        f"⚠ {count} of {total} images of `{name}` are copies of images of `{other}`."
        for (name, other), (count, total) in most.items()
    ]


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


def _percent(mean: float, std: float, *, bold: bool = False) -> str:
    if np.isnan(mean):
        return "—"
    text = f"{100 * mean:.1f}" if np.isnan(std) else f"{100 * mean:.1f} ± {100 * std:.1f}"
    return Bold(text) if bold else text


def _openood_percent(mean: float, std: float) -> str:
    if np.isnan(mean):
        return "/"
    return f"{100 * mean:.2f}" if np.isnan(std) else f"{100 * mean:.2f} ± {100 * std:.2f}"
