"""The tables of the report, from results; only means of recorded values are computed here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from traj_ood.attractors import Verdict
from traj_ood.evaluation.cautions import cautions, other_contents
from traj_ood.evaluation.leaderboard import groups_of, ranked
from traj_ood.evaluation.metrics import METRIC_NAMES
from traj_ood.evaluation.results import (
    CONTROL,
    REGIONS,
    Result,
    ScorerResult,
    SetScore,
    is_in,
    mean_interval,
    near_first,
    ways_in_words,
)
from traj_ood.evaluation.runs import Run

NAN = float("nan")
BESIDE = 6
"""Runs that stand side by side, at most; of more, their models do."""


@dataclass(frozen=True)
class Estimate:
    """A mean as a fraction, with its 95 % interval (NaN if not recorded) and standard deviation over seeds (NaN for
    one)."""

    value: float
    low: float = NAN
    high: float = NAN
    std: float = NAN

    @property
    def known(self) -> bool:
        return not math.isnan(self.value)

    @property
    def interval(self) -> bool:
        return not math.isnan(self.low)


@dataclass(frozen=True)
class BoardRow:
    """One line of a leaderboard: a scorer, averaged over seeds, and the ``results`` behind it.

    ``figures`` are by ``<region>_<metric>``, ``sets`` the AUROC and ``roles`` the role by OOD set. ``tag`` is a letter
    for rows of the same scorer with other data or settings (see :class:`Board`), else empty.
    """

    label: str
    tag: str
    note: str
    seeds: int
    cost: float
    healthy: bool
    used: bool
    warnings: str
    figures: dict[str, Estimate]
    sets: dict[str, Estimate]
    roles: dict[str, str]
    results: tuple[Result, ...]

    @property
    def name(self) -> str:
        return f"{self.label} ({self.tag})" if self.tag else self.label

    @property
    def papers(self) -> bool:
        """Whether this is the paper's score with the paper's defaults."""
        return self.label == "trajectory"


@dataclass(frozen=True)
class Board:
    """The leaderboard of one benchmark and model: rows best first, their runs, and the role of each OOD set.

    ``tags`` explain the letters of rows with other data or settings; if empty, all rows are comparable.
    """

    benchmark: str
    model: str
    rows: list[BoardRow]
    tags: dict[str, str]
    runs: list[Run]
    sets: dict[str, str]

    @property
    def seeds(self) -> int:
        return max(row.seeds for row in self.rows)

    @property
    def scorers(self) -> int:
        """The number of different scorers."""
        return len({row.label for row in self.rows} - {CONTROL})

    @property
    def notes(self) -> dict[str, str]:
        """What each scorer measures, by label."""
        return {row.label: row.note for row in self.rows if row.note}

    @property
    def leader(self) -> BoardRow:
        """The first row that is no control."""
        return next((row for row in self.rows if row.label != CONTROL), self.rows[0])

    @property
    def held(self) -> str:
        """Which sets the means include."""
        ways: dict[str, dict[str, str]] = {}
        for row in self.rows:
            ways.setdefault(row.tag, {}).update(row.roles)
        return ways_in_words(ways)

    @property
    def cautions(self) -> list[str]:
        """What else to know about the runs; see :func:`traj_ood.evaluation.cautions.cautions`."""
        return [line.replace("`", "") for line in cautions([run.result for run in self.runs])]

    @property
    def conclusion(self) -> str:
        """Sentences on the best scorer, its lead, whether intervals overlap, and the health of the attractors."""
        return " ".join([_leader(self), health_words(self)])

    def best(self, column: str) -> float:
        """The best value of a column of figures; NaN if the rows are not comparable."""
        values = [r.figures[column].value for r in self.rows if r.figures[column].known and r.label != CONTROL]
        if self.tags or not values:
            return NAN
        return min(values) if "fpr" in column else max(values)


def _leader(board: Board) -> str:
    known = [row for row in board.rows if row.figures["all_auroc"].known and row.label != CONTROL]
    if not known:
        return "No scorer has a mean AUROC."
    first = known[0]
    lead = first.figures["all_auroc"]
    count = sum(is_in(role, "all") for role in board.sets.values())
    text = f"{first.label} leads with a mean AUROC of {100 * lead.value:.1f} % over {count} OOD set{'s'[: count > 1]}"
    others = [row for row in known if row.label.split(":")[0] != first.label.split(":")[0]]
    if not others:
        return f"{text}."
    second = others[0]
    next_best = second.figures["all_auroc"]
    text += f", {100 * (lead.value - next_best.value):.1f} points ahead of {second.label}"
    if board.tags:
        return f"{text}; rows on other data or settings are not comparable."
    if not (lead.interval and next_best.interval):
        return f"{text}; no intervals were recorded."
    apart = lead.low > next_best.high
    return f"{text}; the 95 % intervals {'do not overlap' if apart else 'overlap, so the lead may be chance'}."


def health_words(board: Board) -> str:
    used = [run for run in board.runs if run.result.dictionary.get("used") is not False]
    if not used:
        return "No scorer reads attractors."
    unhealthy = sum(not run.result.dictionary["healthy"] for run in used)
    if not unhealthy:
        return "The attractors are healthy."
    return f"The attractors are unhealthy{f' in {unhealthy} of {len(used)} runs' if len(used) > 1 else ''}: see below."


@dataclass(frozen=True)
class SideBySide:
    """Runs of one benchmark beside each other: the mean AUROC of each scorer that at least two of them have.

    Attributes:
        columns: what tells each run from the others. averaged: columns are models, each the mean over its runs.
        same_images: whether all of them were scored on the same test images.
        rows: label, a figure for each column, and with two columns the difference of the second to the first.
    """

    benchmark: str
    columns: list[str]
    averaged: bool
    same_images: bool
    rows: list[tuple[str, list[Estimate | None], float]]


def side_by_side(found: Sequence[Board]) -> list[SideBySide]:
    """A table per benchmark with a column for each run. With more than :data:`BESIDE` runs there is a column for each
    model instead, without rows on other data or settings than the rest of their board. Scorers are sorted by their mean
    over columns, best first."""
    tables = []
    for benchmark in dict.fromkeys(board.benchmark for board in found):
        own = [board for board in found if board.benchmark == benchmark]
        averaged = sum(len(board.runs) for board in own) > BESIDE
        if averaged:
            columns = {b.model: {r.label: r.figures["all_auroc"] for r in b.rows if not r.tag} for b in own}
        else:
            columns = {_name_among(run, own): _means(run.result) for board in own for run in board.runs}
        labels = dict.fromkeys(label for figures in columns.values() for label in figures)
        lines = [(label, [figures.get(label) for figures in columns.values()]) for label in labels]
        lines = [line for line in lines if sum(f is not None and f.known for f in line[1]) > 1]
        lines.sort(key=lambda line: -fmean(f.value for f in line[1] if f is not None and f.known))
        rows = [(label, figures, _difference(figures)) for label, figures in lines]
        if rows:
            results, tested = [run.result for board in own for run in board.runs], ("test", "near", "far")
            lists = {frozenset((k, d["sha256"]) for k, d in r.data.items() if d["role"] in tested) for r in results}
            same = len(lists) == 1 and not other_contents(results)
            tables.append(SideBySide(benchmark, list(columns), averaged, same, rows))
    return tables


def _name_among(run: Run, own: Sequence[Board]) -> str:
    """Model, seed and the letter of other data or settings, as far as they tell a run apart; else its folder."""

    def parts(board: Board, one: Run) -> tuple[str, str, str]:
        tag = next((row.tag for row in board.rows if any(r is one.result for r in row.results)), "")
        return board.model, f"seed {one.result.seed}", f"({tag})" if tag else ""

    every = [parts(board, one) for board in own for one in board.runs]
    mine = next(parts(board, one) for board in own for one in board.runs if one is run)
    if every.count(mine) > 1:
        return run.place
    telling = [part for part, values in zip(mine, zip(*every, strict=True), strict=True) if len({*values}) > 1 and part]
    return " · ".join(telling) or mine[0]


def _means(result: Result) -> dict[str, Estimate]:
    return {
        label: Estimate(mean.auroc, *mean_interval([s for s in scorer.sets.values() if is_in(s.role, "all")], "auroc"))
        for label, scorer in result.scorers.items()
        if (mean := scorer.all) is not None
    }


def _difference(figures: Sequence[Estimate | None]) -> float:
    known = [figure.value for figure in figures if figure is not None and figure.known]
    return known[1] - known[0] if len(figures) == len(known) == 2 else NAN


def boards(runs: Sequence[Run]) -> list[Board]:
    """One board per benchmark and model, grouped as by ``traj-ood leaderboard``; raises as :func:`leaderboard`."""
    groups = groups_of([run.result for run in runs])
    table = ranked(groups)
    found: list[Board] = []
    for (benchmark, model), part in table.groupby(["benchmark", "model"], sort=False):
        own = [r for r in runs if (r.result.benchmark, r.result.model["name"]) == (benchmark, model)]
        sets: dict[str, str] = {}
        for run in own:
            sets |= run.sets()
        letters = {v: _letters(n) for n, v in enumerate(dict.fromkeys(part["variant"])) if v}
        lines: Any = part.to_dict("index")
        rows = [_row(line, letters.get(line["variant"], ""), groups[number].runs) for number, line in lines.items()]
        tags = {letter: variant for variant, letter in letters.items()}
        found.append(Board(str(benchmark), str(model), rows, tags, own, near_first(sets)))
    return found


def _letters(n: int) -> str:
    """A, B, …, Z, AA, AB, …"""
    return (_letters(n // 26 - 1) if n >= 26 else "") + chr(ord("A") + n % 26)


def _row(line: dict[str, Any], tag: str, members: Sequence[tuple[Result, ScorerResult]]) -> BoardRow:
    scorers = [scorer for _, scorer in members]
    figures = {}
    for region in REGIONS:
        scores = [s for scorer in scorers for s in scorer.sets.values() if is_in(s.role, region)]
        for metric in METRIC_NAMES:
            low, high = mean_interval(scores, metric)
            name = f"{region}_{metric}"
            figures[name] = Estimate(line[name], low, high, line[f"{name}_std"])
    by_set: dict[str, list[SetScore]] = {}
    for scorer in scorers:
        for name, score in scorer.sets.items():
            by_set.setdefault(name, []).append(score)
    return BoardRow(
        label=line["label"],
        tag=tag,
        note=line["note"],
        seeds=line["seeds"],
        cost=line["f_evaluations"],
        healthy=line["healthy"],
        used=line["used"],
        warnings=line["warnings"],
        figures=figures,
        sets={name: _mean_auroc(scores) for name, scores in by_set.items()},
        roles={name: score.role for name, score in scorers[0].sets.items()},
        results=tuple(result for result, _ in members),
    )


def _mean_auroc(scores: Sequence[SetScore]) -> Estimate:
    values = [s.metrics.auroc for s in scores]
    return Estimate(fmean(values), *mean_interval(scores, "auroc"), stdev(values) if len(values) > 1 else NAN)


# ---------------------------------------------------------------------------------------------- attractors


@dataclass(frozen=True)
class HealthCard:
    """The health of a run's attractors: a state (for the colour), a title, a sentence, and (name, figure) pairs."""

    state: str
    title: str
    text: str
    facts: list[tuple[str, str]]


def health_card(result: Result) -> HealthCard:
    """The recorded verdict; older runs have only its reasons."""
    record = result.dictionary
    if record.get("used") is False:
        return HealthCard("none", "No attractors", "No scorer of this run reads attractors.", [])
    facts = _health_facts(record)
    if "verdict" in record:
        verdict = Verdict(**record["verdict"])
        state = "good" if verdict.meaningful else "bad"
        text = verdict.text.removeprefix(f"{verdict.word}: ")  # the word is the title
        return HealthCard(state, verdict.word.capitalize(), text[:1].upper() + text[1:], facts)
    if record["healthy"]:
        return HealthCard("good", "Healthy", _recorded(record), facts)
    reasons = "; ".join(record["warnings"]) or "no reason was recorded"
    text = f"{reasons}. Scores against these attractors mean nothing."
    return HealthCard("bad", "Unhealthy", text[:1].upper() + text[1:], facts)


def _recorded(record: dict[str, Any]) -> str:
    if not {"converged", "count", "distinct"} <= record.keys():
        return "The attractors passed every check."
    return (
        f"{record['converged']:.1%} of {record['count']:,} training trajectories end at {record['distinct']:,} "
        "distinct attractors."
    )


def _health_facts(record: dict[str, Any]) -> list[tuple[str, str]]:
    forms = {"count": ("End points", ","), "converged": ("Converged", ".1%"), "distinct": ("Distinct", ",")}
    facts = [(title, format(record[key], form)) for key, (title, form) in forms.items() if key in record]
    steps, moved = record.get("steps_quantiles"), record.get("displacement_quantiles")
    if steps:
        facts.append(("Steps, median (5–95 %)", f"{steps[2]:.0f} ({steps[0]:.0f}–{steps[4]:.0f})"))
    if moved:
        facts.append(("Displacement, median", f"{moved[2]:.2f} of ‖z₀‖"))
    return facts


def provenance(run: Run) -> list[tuple[str, str]]:
    """How a run was made, as (name, text) pairs."""
    result = run.result
    config = result.config
    options: Iterable[tuple[str, Any]] = (
        ("Commit", result.commit),
        ("Made", result.created),
        ("Seed", result.seed),
        ("Training images", config.get("attractors")),
        ("Tolerance", config.get("tol")),
        ("Step limit", config.get("max_steps")),
        ("Bootstrap resamples", config.get("resamples")),
        ("Seconds", round(sum(result.seconds.values())) if result.seconds else None),
        ("Model", result.model.get("family")),
        ("Parameters", f"{result.model['parameters']:,}" if isinstance(result.model.get("parameters"), int) else None),
        ("Weights (sha256)", result.model["fingerprint"]),
        ("Versions", ", ".join(f"{k} {v}" for k, v in sorted(result.versions.items()))),
    )
    return [(name, str(value)) for name, value in options if value not in (None, "")]
