"""Compare two scorers, or one scorer in two runs, on the same images: tests over all sets and per set, and a verdict.

The tests are those of :mod:`traj_ood.evaluation.compare`, corrected for the number of sets and expressed in words.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import Any, Literal

import pandas as pd

from traj_ood.errors import TrajOODError, unknown_name
from traj_ood.evaluation.cautions import cautions, other_contents, other_settings
from traj_ood.evaluation.compare import BootstrapComparison, Difference, PairedScores, paired_bootstrap
from traj_ood.evaluation.results import Result, is_same_run
from traj_ood.evaluation.runs import Run
from traj_ood.evaluation.text_tables import Bold, TextTable

Metric = Literal["auroc", "fpr95"]
RESAMPLES = 2000
"""Default number of resamples: the smallest p, 2 / 2,001, stays below 0.05 when multiplied by 40 sets (Holm)."""
ALPHA = 0.05
_NAMES = {"auroc": "AUROC", "fpr95": "FPR95"}
_ROW = ("split", "role", "id")


@dataclass(frozen=True)
class SetDifference:
    """The difference on one OOD set; ``holm`` is its p-value corrected for the number of sets."""

    benchmark: str
    name: str
    role: str
    difference: Difference
    holm: float


@dataclass(frozen=True)
class Versus:
    """Result of :func:`compare_scorers` and :func:`compare_runs`.

    Attributes:
        a, b: names of what is compared.
        runs: number of runs over which figures are averaged, by benchmark.
        models: names of the models over which figures are averaged, by benchmark.
        mean: difference over the near and far sets of all benchmarks with equal weight, by metric.
        sets: difference on each OOD set, diagnostics included, by metric.
        resamples: resamples of the bootstrap.
        cautions: what else to know about the runs, see :mod:`traj_ood.evaluation.cautions`.
    """

    a: str
    b: str
    runs: Mapping[str, int]
    models: Mapping[str, Sequence[str]]
    mean: Mapping[str, Difference]
    sets: Mapping[str, Sequence[SetDifference]]
    resamples: int
    cautions: Sequence[str] = ()

    def outcome(self, metric: Metric = "auroc") -> int:
        """1 if a is better in the mean over sets, -1 if b is, 0 if no difference is shown (p >= 0.05)."""
        return _sign(self.mean[metric], self.mean[metric].p, metric)

    def verdict(self, metric: Metric = "auroc") -> str:
        """Sentences on which is better, by how much, with which p-value, and on the single sets."""
        d, count = self.mean[metric], sum(row.role != "diagnostic" for row in self.sets[metric])
        sign = _sign(d, d.p, metric)
        over = f"mean {_NAMES[metric]} over {count} OOD set{'s' if count > 1 else ''}"
        points = f"{_points(d.difference)} points [{_points(d.low)}, {_points(d.high)}], p = {d.p:.2g}"
        if sign == 0:
            first = f"No difference between {self.a} and {self.b} is shown in the {over}: {points}."
        else:
            better, worse = (self.a, self.b) if sign > 0 else (self.b, self.a)
            first = f"{better} is better than {worse} in the {over}: {points} ({self.a} minus {self.b})."
        found: dict[int, list[str]] = {1: [], -1: [], 0: []}
        for row in self.sets[metric]:
            found[_sign(row.difference, row.holm, metric)].append(self._named(row))
        parts = [
            f"{name} is better on {len(found[key])} ({', '.join(found[key])})"
            for key, name in ((1, self.a), (-1, self.b))
            if found[key]
        ]
        parts += [f"no difference is shown on {len(found[0])}"] if found[0] else []
        if len(self.sets[metric]) == 1:
            return first
        return f"{first} On single sets, corrected for their number (Holm), {'; '.join(parts)}."

    def frame(self) -> pd.DataFrame:
        """Table with a row per metric and OOD set, and one for the mean over sets; figures are fractions."""
        rows: list[dict[str, Any]] = []
        for metric, sets in self.sets.items():
            for row in sets:
                place = {"metric": metric, "benchmark": row.benchmark, "set": row.name, "role": row.role}
                rows.append(place | self._figures(row.difference) | {"p_holm": row.holm})
            rows.append({"metric": metric, "set": "mean over sets", **self._figures(self.mean[metric])})
        return pd.DataFrame(rows)

    def _figures(self, d: Difference) -> dict[str, Any]:
        return {"scorer_a": self.a, "scorer_b": self.b, **asdict(d)}

    def tables(self) -> list[TextTable]:
        """One table per metric, with the sets and their mean."""
        tables = []
        for metric, rows in self.sets.items():
            arrow = "↑" if metric == "auroc" else "↓"
            header = ["OOD set", f"{self.a} {arrow}", f"{self.b} {arrow}", "difference [95 %]", "p", "p (Holm)"]
            lines = [
                [f"{self._named(r)} ({r.role})", *_cells(r.difference, metric, r.holm), f"{r.holm:.2g}"] for r in rows
            ]
            d = self.mean[metric]
            lines.append(["mean over sets", *_cells(d, metric, d.p), ""])
            tables.append(TextTable(header, lines, caption=f"{_NAMES[metric]} in percent"))
        return tables

    def notes(self) -> list[str]:
        """Explanation of the tables."""
        own = [self._named(row) for row in self.sets["auroc"] if row.role == "diagnostic"]
        left = f" The mean over sets leaves out diagnostics: {', '.join(own)}." if own else ""
        runs = ", ".join(
            f"{n} run{'s' if n > 1 else ''} of {name}"
            + (f" ({len(models)} models: {', '.join(models)})" if len(models := self.models[name]) > 1 else "")
            for name, n in self.runs.items()
        )
        return [
            f"Means over {runs}. Differences are {self.a} minus {self.b}, in points, with 95 % intervals of a paired "
            f"bootstrap over images ({self.resamples:,} resamples; crops of one picture stay together). They show "
            "whether the choice of test images could explain the difference, not what another training would give."
            + left,
            *self.cautions,
        ]

    def _named(self, row: SetDifference) -> str:
        """A set's name, with its benchmark where there are several, whose sets may have the same names."""
        return f"{row.benchmark}: {row.name}" if len(self.runs) > 1 else row.name

    def as_dict(self) -> dict[str, Any]:
        """All attributes and the verdicts, as JSON data."""
        return asdict(self) | {"verdict": {metric: self.verdict(metric) for metric in ("auroc", "fpr95")}}


def compare_scorers(runs: Sequence[Run], a: str, b: str, *, resamples: int = RESAMPLES, seed: int = 0) -> Versus:
    """Compare scorer ``a`` with ``b`` in all given runs; figures are averaged over the runs of a benchmark, then sets.

    Args:
        runs: runs of one or several benchmarks; those of one benchmark must have the same test images.
        a, b: labels of the two scorers, which every run must have; the name of a scorer stands for its only label.
        resamples, seed: see :func:`traj_ood.evaluation.compare.paired_bootstrap`.
    Raises:
        TrajOODError: there are no runs, ``a`` is ``b``, two runs are one, a run lacks a scorer, a name has several
            labels, or images differ.
    """
    a, b = _label(a, runs), _label(b, runs)
    if a == b:
        raise TrajOODError(f"compare: expected two scorers, got {a!r} twice: name another")
    for one, other in combinations(runs, 2):
        if is_same_run(one.result, other.result):
            raise TrajOODError(
                f"compare: {one.place} and {other.place} hold one run, which would count twice in every mean: give it "
                "once"
            )
    suites: dict[str, list[Run]] = {}
    for run in runs:
        suites.setdefault(run.result.benchmark, []).append(run)
    paired = {name: PairedScores.from_tables([_table(run, a, b) for run in own], a, b) for name, own in suites.items()}
    return _versus(a, b, paired, suites, resamples, seed)


def compare_runs(first: Run, second: Run, scorer: str, *, resamples: int = RESAMPLES, seed: int = 0) -> Versus:
    """Compare one scorer in two runs on the same images, such as with two models; arguments as :func:`compare_scorers`.

    Raises:
        TrajOODError: the runs have different benchmarks or images, or lack the scorer, or its name has several labels.
    """
    scorer = _label(scorer, (first, second))
    if first.result.benchmark != second.result.benchmark:
        raise TrajOODError(
            f"compare: expected two runs of one benchmark, got {first.result.benchmark} and {second.result.benchmark}: "
            "compare runs on the same images only"
        )
    roles, others = first.sets(), second.sets()
    for name in roles.keys() & others.keys():
        if roles[name] != others[name]:
            raise TrajOODError(
                f"compare: {name} is {roles[name]} in {first.place} and {others[name]} in {second.place}, so their "
                "means are over other sets: run one of them again"
            )
    names = [f"{scorer} ({name})" for name in _distinct_names(first, second)]
    tables = [_table(run, scorer).rename(columns={scorer: n}) for run, n in zip((first, second), names, strict=True)]
    both = tables[0].merge(tables[1], on=list(_ROW), how="outer", indicator=True)
    apart = int((both["_merge"] != "both").sum())
    if apart:
        raise TrajOODError(
            f"compare: {apart} of {len(both)} images are in one of {first.place} and {second.place} only: compare runs "
            "on the same images only"
        )
    benchmark = first.result.benchmark
    paired = {benchmark: PairedScores.from_tables([both.drop(columns="_merge")], *names)}
    found = _versus(names[0], names[1], paired, {benchmark: [first]}, resamples, seed)
    return replace(found, cautions=_cautions([first.result, second.result]))


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down correction of m p-values (Holm 1979).

    The probability that any corrected value is below 0.05 by chance is at most 0.05, whatever their dependence.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    corrected, largest = [0.0] * len(p), 0.0
    for rank, index in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        largest = max(largest, min(1.0, (len(p) - rank) * p[index]))
        corrected[index] = largest
    return corrected


def _versus(
    a: str,
    b: str,
    paired: Mapping[str, PairedScores],
    suites: Mapping[str, Sequence[Run]],
    resamples: int,
    seed: int,
) -> Versus:
    models = {name: _models([run.result.model for run in runs]) for name, runs in suites.items()}
    found: BootstrapComparison = paired_bootstrap(list(paired.values()), resamples=resamples, seed=seed)
    sets: dict[str, list[SetDifference]] = {}
    for metric in _NAMES:
        each = [
            (benchmark, name, role, getattr(own[name], metric))
            for (benchmark, runs), own in zip(suites.items(), found.sets, strict=True)
            for name, role in runs[0].sets().items()
        ]
        corrected = holm([d.p for *_, d in each])
        sets[metric] = [SetDifference(*row, p) for row, p in zip(each, corrected, strict=True)]
    mean = {metric: getattr(found.mean, metric) for metric in _NAMES}
    lines = [
        line if len(suites) == 1 else f"{name}: {line}"
        for name, own in suites.items()
        for line in _cautions([run.result for run in own])
    ]
    return Versus(a, b, {name: pair.runs for name, pair in paired.items()}, models, mean, sets, resamples, lines)


def _models(models: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of the models; the beginning of its fingerprint after a name that several have."""
    prints = sorted({(str(model["name"]), str(model["fingerprint"])) for model in models})
    names = Counter(name for name, _ in prints)
    return [name if names[name] == 1 else f"{name} {mark[:8]}" for name, mark in prints]


def _cautions(results: Sequence[Result]) -> list[str]:
    apart = [
        f"⚠ Images or labels of `{name}` differ between runs under the same names: differences may come from them."
        for name in other_contents(results)
    ]
    return [*apart, *other_settings(results), *cautions(results)]


def _distinct_names(first: Run, second: Run) -> tuple[str, str]:
    """Different names for two runs: their models, else their folders, else ``first`` and ``second``."""
    runs = (first, second)
    for name in (lambda r: str(r.result.model["name"]), lambda r: r.place.rsplit("/", 1)[-1], lambda r: r.place):
        a, b = map(name, runs)
        if a != b:
            return a, b
    return "first", "second"


def _label(name: str, runs: Sequence[Run]) -> str:
    """The only label in the runs of scorer ``name``, such as ``mahalanobis:view=backbone``; else ``name`` itself."""
    known = {label for run in runs for label in run.result.scorers}
    labels = sorted(label for label in known if label.split(":")[0] == name)
    if name in known or not labels:
        return name
    if len(labels) > 1:
        raise TrajOODError(f"scorer {name!r}: expected one label of it in the runs, got {', '.join(labels)}: give one")
    return labels[0]


def _table(run: Run, *scorers: str) -> pd.DataFrame:
    if run.scores is None:
        raise TrajOODError(
            f"{run.place}: expected scores.parquet of a finished run, found none: run it again with --fresh"
        )
    for label in scorers:
        if label not in run.result.scorers:
            raise unknown_name(f"scorer of {run.place}", label, run.result.scorers)
    return run.scores[[*_ROW, *scorers]]


def _sign(d: Difference, p: float, metric: str) -> int:
    if p >= ALPHA or d.difference == 0:
        return 0
    return 1 if (d.difference > 0) == (metric == "auroc") else -1


def _points(share: float) -> str:
    return f"{100 * share:+.1f}".replace("-", "−")


def _cells(d: Difference, metric: str, p: float) -> list[str]:
    sign = _sign(d, p, metric)
    own = [f"{100 * d.a:.1f}", f"{100 * d.b:.1f}"]
    shown = [Bold(own[0]) if sign > 0 else own[0], Bold(own[1]) if sign < 0 else own[1]]
    return [*shown, f"{_points(d.difference)} [{_points(d.low)}, {_points(d.high)}]", f"{d.p:.2g}"]
