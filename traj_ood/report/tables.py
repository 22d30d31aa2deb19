"""The figures of the report, out of results: nothing is computed here but means of what is recorded."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from traj_ood.attractors import Verdict
from traj_ood.evaluation.leaderboard import REGIONS, groups_of, leaderboard
from traj_ood.evaluation.metrics import METRIC_NAMES
from traj_ood.evaluation.results import Result, ScorerResult, SetScore, mean_interval, near_first
from traj_ood.evaluation.runs import Run

NAN = float("nan")


@dataclass(frozen=True)
class Estimate:
    """A mean as a fraction, its 95 % interval (NaN where none was recorded) and its deviation over seeds (NaN for
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
class Row:
    """One line of a leaderboard: a scorer over seeds. ``figures`` by ``<region>_<metric>``, ``sets`` AUROC by set.

    ``tag`` is the letter of what sets the row apart from its namesakes (see :class:`Board`), empty when nothing does.
    """

    label: str
    tag: str
    note: str
    seeds: int
    cost: float
    healthy: bool
    warnings: str
    figures: dict[str, Estimate]
    sets: dict[str, Estimate]

    @property
    def name(self) -> str:
        return f"{self.label} ({self.tag})" if self.tag else self.label


@dataclass(frozen=True)
class Board:
    """The leaderboard of one benchmark and model: rows best first, the runs behind them, and the role of each set.

    ``tags`` explain the letters of rows on different data or settings; without them all rows are comparable.
    """

    benchmark: str
    model: str
    rows: list[Row]
    tags: dict[str, str]
    runs: list[Run]
    sets: dict[str, str]

    @property
    def seeds(self) -> int:
        return max(row.seeds for row in self.rows)

    @property
    def scorers(self) -> int:
        """How many different scorers there are."""
        return len({row.label for row in self.rows})

    def best(self, column: str) -> float:
        """The best value of a column of figures; NaN where the rows are not comparable."""
        values = [row.figures[column].value for row in self.rows if row.figures[column].known]
        if self.tags or not values:
            return NAN
        return min(values) if "fpr" in column else max(values)


def boards(runs: Sequence[Run]) -> list[Board]:
    """One board per benchmark and model, as ``traj-ood leaderboard`` groups them. Raises as it."""
    results = [run.result for run in runs]
    table = leaderboard(results)
    # The table averages; the intervals are with the results that stand behind each of its rows.
    behind = {tuple(group.head().values()): group.runs for group in groups_of(results)}
    keys = ["benchmark", "model", "fingerprint", "scorer", "label", "variant", "seeds"]
    found: list[Board] = []
    for (benchmark, model), part in table.groupby(["benchmark", "model"], sort=False):
        own = [r for r in runs if (r.result.benchmark, r.result.model["name"]) == (benchmark, model)]
        sets: dict[str, str] = {}
        for run in own:
            sets |= run.sets()
        letters = {v: _letters(n) for n, v in enumerate(dict.fromkeys(part["variant"])) if v}
        lines: list[Any] = part.to_dict("records")
        rows = [_row(line, letters.get(line["variant"], ""), behind[tuple(line[k] for k in keys)]) for line in lines]
        tags = {letter: variant for variant, letter in letters.items()}
        found.append(Board(str(benchmark), str(model), rows, tags, own, near_first(sets)))
    return found


def _letters(n: int) -> str:
    """A, B, …, Z, AA, AB, …"""
    return (_letters(n // 26 - 1) if n >= 26 else "") + chr(ord("A") + n % 26)


def _row(line: dict[str, Any], tag: str, members: Sequence[tuple[Result, ScorerResult]]) -> Row:
    scorers = [scorer for _, scorer in members]
    figures = {}
    for region in REGIONS:
        scores = [s for scorer in scorers for s in scorer.sets.values() if region in ("all", s.role)]
        for metric in METRIC_NAMES:
            low, high = mean_interval(scores, metric)
            name = f"{region}_{metric}"
            figures[name] = Estimate(line[name], low, high, line[f"{name}_std"])
    by_set: dict[str, list[SetScore]] = {}
    for scorer in scorers:
        for name, score in scorer.sets.items():
            by_set.setdefault(name, []).append(score)
    return Row(
        label=line["label"],
        tag=tag,
        note=line["note"],
        seeds=line["seeds"],
        cost=line["f_evaluations"],
        healthy=line["healthy"],
        warnings=line["warnings"],
        figures=figures,
        sets={name: _mean_estimate(scores, "auroc") for name, scores in by_set.items()},
    )


def _mean_estimate(scores: Sequence[SetScore], metric: str) -> Estimate:
    values = [getattr(s.metrics, metric) for s in scores]
    mean = sum(values) / len(values)
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else NAN
    return Estimate(mean, *mean_interval(scores, metric), spread)


# ---------------------------------------------------------------------------------------------- the dictionary


@dataclass(frozen=True)
class HealthCard:
    """A run's attractors in words: a state for its colour, a title, a sentence, and (name, figure) facts."""

    state: str
    title: str
    text: str
    facts: list[tuple[str, str]]


def health_card(result: Result) -> HealthCard:
    """The verdict as it was recorded; runs older than the verdict have its reasons alone."""
    record = result.dictionary
    if record.get("used") is False:
        return HealthCard("none", "No attractors", "No scorer of this run reads attractors.", [])
    facts = _health_facts(record)
    if "verdict" in record:
        verdict = Verdict(**record["verdict"])
        state = "good" if verdict.meaningful else "bad"
        return HealthCard(state, verdict.word.capitalize(), _sentence(verdict.text, verdict.word), facts)
    if record["healthy"]:
        return HealthCard("good", "Healthy", _recorded(record), facts)
    reasons = "; ".join(record["warnings"]) or "no reason was recorded"
    text = f"{reasons}. Scores against these attractors mean nothing."
    return HealthCard("bad", "Unhealthy", text[:1].upper() + text[1:], facts)


def _sentence(text: str, word: str) -> str:
    """A verdict's text without the word that the title says."""
    rest = text.removeprefix(f"{word}: ")
    return rest[:1].upper() + rest[1:]


def _recorded(record: dict[str, Any]) -> str:
    if not {"converged", "count", "distinct"} <= record.keys():
        return "The attractors passed every check."
    return (
        f"{record['converged']:.1%} of {record['count']:,} training trajectories end at {record['distinct']:,} "
        "distinct attractors."
    )


def _health_facts(record: dict[str, Any]) -> list[tuple[str, str]]:
    facts = []
    if "count" in record:
        facts.append(("End points", f"{record['count']:,}"))
    if "converged" in record:
        facts.append(("Converged", f"{record['converged']:.1%}"))
    if "distinct" in record:
        facts.append(("Distinct", f"{record['distinct']:,}"))
    steps, moved = record.get("steps_quantiles"), record.get("displacement_quantiles")
    if steps:
        facts.append(("Steps, median (5–95 %)", f"{steps[2]:.0f} ({steps[0]:.0f}–{steps[4]:.0f})"))
    if moved:
        facts.append(("Moved, median", f"{moved[2]:.2f} of ‖z₀‖"))
    return facts


def provenance(run: Run) -> list[tuple[str, str]]:
    """How a run was made, as (name, text)."""
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
