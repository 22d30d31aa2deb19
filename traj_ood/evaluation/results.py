"""Results: one JSON file per run, from which every table and plot is made.

A result file is complete or absent (``write_atomic``), and the same run gives the same bytes apart from its times.
Loading is strict: files that are incomplete, edited or of another schema are refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from traj_ood.data import OOD_ROLES, OODRole
from traj_ood.errors import TrajOODError, unknown_name
from traj_ood.evaluation.metrics import Metrics, mean_metrics
from traj_ood.io.files import files_below
from traj_ood.io.options import read_options
from traj_ood.io.trees import field_of, read_json, write_json

SCHEMA = 1
FILE_NAME = "result.json"

CONTROL = "control: files"
"""Label of the control on image files (:mod:`traj_ood.evaluation.file_control`), a row of tables but no scorer."""
REGIONS = ("near", "far", "all")
"""The groups of OOD sets over which metrics are averaged."""
_RANKS: dict[str, int] = {role: n for n, role in enumerate(OOD_ROLES)}
_REQUIRED: dict[str, dict[str, type]] = {
    "model": {"name": str, "fingerprint": str},
    "data": {"role": str, "count": int, "sha256": str},
    "dictionary": {"healthy": bool, "warnings": list},
}


@dataclass(frozen=True)
class SetScore:
    """One scorer on one OOD set: the set's role (``near``, ``far`` or ``diagnostic``), the number of images, and the
    metrics.

    ``intervals`` are (low, high) by metric name, fractions in [0, 1]; empty without bootstrap.
    """

    role: OODRole
    count: int
    metrics: Metrics
    intervals: dict[str, tuple[float, float]]


@dataclass(frozen=True)
class ScorerResult:
    """One scorer: its label in tables, its options, one sentence on what it measures, its cost and its results by set.

    ``f_evaluations`` is the mean number of evaluations of f = E∘D per image; None if it was not recorded.
    """

    label: str
    options: dict[str, Any]
    note: str
    f_evaluations: float | None
    sets: dict[str, SetScore]

    @property
    def near(self) -> Metrics | None:
        """The mean over near sets, each with equal weight; None if there are none."""
        return self._mean("near")

    @property
    def far(self) -> Metrics | None:
        """The mean over far sets, each with equal weight; None if there are none."""
        return self._mean("far")

    @property
    def all(self) -> Metrics | None:
        """The mean over near and far sets, each with equal weight (not the mean of ``near`` and ``far``); None without
        such sets. Diagnostics are not part of any mean."""
        return self._mean("near", "far")

    def _mean(self, *roles: str) -> Metrics | None:
        metrics = [s.metrics for s in self.sets.values() if s.role in roles]
        return mean_metrics(metrics) if metrics else None


@dataclass(frozen=True, kw_only=True)
class Result:
    """The complete record of a run; ``results/README.md`` describes each key.

    Attributes:
        name: name of the run and of its folder, ``<benchmark>--<model>--seed<seed>``.
        benchmark: name of the benchmark.
        model: has at least ``name`` and ``fingerprint``.
        config: the settings, see :class:`traj_ood.RunConfig`.
        seed: seed of the training sample.
        command: the command line or script that made it.
        commit: the commit of the code; None if unknown.
        versions: versions of the code and of the libraries, with device, threads and processes.
        data: ``{role, count, sha256}`` by split; newer results also have ``contents`` and, if there are any,
            ``copies``, the number of images shared with another split.
        dictionary: health of the attractors, with at least ``healthy`` (bool) and ``warnings`` (list of str).
        failures: ``{id, error}`` of each image that could not be scored.
        created: time in ISO 8601, UTC.
        seconds: wall-clock times by stage.
        scorers: results by label.
        schema: version of the file format.
    """

    name: str
    benchmark: str
    model: dict[str, Any]
    config: dict[str, Any]
    seed: int
    command: str
    commit: str | None
    versions: dict[str, str]
    created: str
    seconds: dict[str, float]
    data: dict[str, dict[str, Any]]
    dictionary: dict[str, Any]
    failures: list[dict[str, str]]
    scorers: dict[str, ScorerResult]
    schema: int = SCHEMA

    def save(self, path: str | Path) -> None:
        """Write the result as JSON with sorted keys and 2 spaces, including the means of each scorer.

        Raises ``TrajOODError`` if a value is NaN or infinite (which JSON cannot represent and a table would hide) or
        not plain data, or the folder cannot be written.
        """
        tree = asdict(self)
        for scorer, written in zip(self.scorers.values(), tree["scorers"].values(), strict=True):
            written.update({k: asdict(m) if (m := getattr(scorer, k)) else None for k in REGIONS})
        try:
            tree = json.loads(json.dumps(tree, sort_keys=True, default=_plain))
        except TypeError as error:
            raise TrajOODError(
                f"result {self.name!r}: expected numbers, text, lists and string keys, got something else "
                f"({error}); convert it before saving"
            ) from error
        where = _first_non_finite(tree)
        if where:
            raise TrajOODError(
                f"result {self.name!r}: expected finite numbers, got NaN or infinity at {where}; "
                "store None for undefined values"
            )
        write_json(path, tree, ensure_ascii=False)

    @classmethod
    def load(cls, path: str | Path) -> Result:
        """Read and verify a result file.

        Raises ``TrajOODError`` naming the file if it is unreadable, not JSON or of another schema, has missing or
        unknown keys, values of the wrong type or NaN, or means that do not follow from the sets.
        """
        path = Path(path)
        tree = read_json(path, "a result file", "restore the file, or run it again with --fresh")
        schema = tree.get("schema")
        if schema != SCHEMA:
            raise TrajOODError(
                f"{path}: expected a result of schema {SCHEMA}, got schema {schema}; run it again with --fresh"
            )
        return _result(tree, path)

    @classmethod
    def load_all(cls, *folders: str | Path) -> list[Result]:
        """Read every ``result.json`` in and below each folder, sorted by path.

        Raises ``TrajOODError`` if a folder has none, one is invalid, or two are one run.
        """
        results = {path.parent: cls.load(path) for folder in folders for path in result_files(folder)}
        refuse_copies(results)
        return [*results.values()]


def result_files(folder: str | Path) -> list[Path]:
    """Every ``result.json`` in and below ``folder``, sorted. Raises ``TrajOODError`` if there are none."""
    paths = sorted(path for path in files_below(folder) if path.name == FILE_NAME)
    if not paths:
        raise TrajOODError(
            f"{folder}: expected at least one {FILE_NAME} in this folder or below, got none; "
            "run `traj-ood bench` first or name another folder"
        )
    return paths


def refuse_copies(results: Mapping[Any, Result]) -> None:
    """Raise ``TrajOODError``, which names both places, if two of the results (by place) are of one run: copied, or
    computed twice."""
    for (first, one), (second, other) in combinations(results.items(), 2):
        if is_same_run(one, other):
            raise TrajOODError(
                f"{first} and {second} hold one run, which would count twice in every mean: remove one of them"
            )


def is_same_run(one: Result, other: Result) -> bool:
    """Whether two results have the same settings, data and figures, whenever and wherever they were computed."""
    if one.name != other.name:
        return False
    when: dict[str, Any] = {"command": "", "commit": None, "versions": {}, "created": "", "seconds": {}}
    return replace(one, **when) == replace(other, **when)


def near_first(sets: Mapping[str, str]) -> dict[str, str]:
    """OOD sets (role by name) in the order of all figures and tables: near, far, diagnostic, each by name."""
    return dict(sorted(sets.items(), key=lambda item: (_RANKS[item[1]], item[0])))


def is_in(role: str, region: str) -> bool:
    """Whether the mean over a region (near, far, all) includes sets of this role.

    >>> is_in("far", "all"), is_in("near", "far"), is_in("diagnostic", "all")
    (True, False, False)
    """
    return role == region or (region == "all" and role != "diagnostic")


def sets_in_words(sets: Mapping[str, str]) -> str:
    """A sentence on which OOD sets (role by name) the means include and leave out.

    >>> sets_in_words({"digits": "far", "bag": "near", "noise": "diagnostic"})
    'Means include bag (near) and digits (far); noise is a diagnostic and is left out.'
    """
    named: dict[str, list[str]] = {role: [] for role in OOD_ROLES}
    for name, role in near_first(sets).items():
        named[role].append(name)
    included = " and ".join(f"{', '.join(named[role])} ({role})" for role in ("near", "far") if named[role])
    own = named["diagnostic"]
    verb = "are diagnostics and are" if len(own) > 1 else "is a diagnostic and is"
    return f"Means include {included or 'no set'}" + (f"; {', '.join(own)} {verb} left out." if own else ".")


def ways_in_words(ways: Mapping[str, Mapping[str, str]]) -> str:
    """:func:`sets_in_words` for rows of a table, by their mark; several sentences, each with the marks of its rows, if
    these divide the sets in different ways, as records of different versions may."""
    marks: dict[str, list[str]] = {}
    for mark, sets in ways.items():
        marks.setdefault(sets_in_words(sets), []).append(mark)
    if len(marks) == 1:
        return next(iter(marks))
    return " ".join(f"{sentence[:-1]} ({'; or '.join(own)})." for sentence, own in marks.items())


def with_diagnostics(results: Sequence[Result], names: Collection[str]) -> list[Result]:
    """The same runs with these OOD sets as diagnostics, so that means leave them out; for records older than that role.

    Raises:
        TrajOODError: a set is in none of the runs (with similar names).
    """
    known = {name for result in results for scorer in result.scorers.values() for name in scorer.sets}
    for name in names:
        if name not in known:
            raise unknown_name("OOD set of these results", name, known)

    def sets(scorer: ScorerResult) -> dict[str, SetScore]:
        return {n: replace(s, role="diagnostic") if n in names else s for n, s in scorer.sets.items()}

    def data(result: Result) -> dict[str, dict[str, Any]]:
        return {n: {**d, "role": "diagnostic"} if n in names else d for n, d in result.data.items()}

    return [
        replace(r, data=data(r), scorers={k: replace(s, sets=sets(s)) for k, s in r.scorers.items()}) for r in results
    ]


def mean_interval(scores: Sequence[SetScore], metric: str) -> tuple[float, float]:
    """The mean of the intervals of a metric over sets, a conservative interval of its mean; NaN if one is missing.

    The standard deviation of a mean is at most the mean of the standard deviations, whatever the dependence (sets share
    their ID images), so that this interval is rather too wide.
    """
    found = [s.intervals.get(metric) for s in scores]
    if not found or any(interval is None for interval in found):
        return math.nan, math.nan
    low, high = zip(*(i for i in found if i), strict=True)
    return sum(low) / len(low), sum(high) / len(high)


# ---------------------------------------------------------------------------------------------- reading


def _result(tree: dict[str, Any], path: Path) -> Result:
    """The result from a parsed file; errors name ``path`` and the key."""
    scorers = tree.get("scorers")
    written = {
        name: {key: scorer.pop(key, "nothing") for key in REGIONS}
        for name, scorer in (scorers.items() if isinstance(scorers, dict) else ())
        if isinstance(scorer, dict)
    }
    try:
        result = Result(**read_options(Result, tree, str(path), noun="key", strict=True))
        data = {f"data.{split}": facts for split, facts in result.data.items()}
        for place, facts in {"model": result.model, "dictionary": result.dictionary, **data}.items():
            for key, kind in _REQUIRED[place.split(".")[0]].items():
                field_of(facts, key, kind, f"{path}: {place}")
    except TrajOODError as error:
        raise TrajOODError(f"{error}; run it again with --fresh") from error
    for name, scorer in result.scorers.items():
        for key in REGIONS:
            mean = getattr(scorer, key)
            if written[name][key] != (None if mean is None else asdict(mean)):
                raise TrajOODError(
                    f"{path}: expected scorers.{name}.{key} to be the mean over its sets, got other figures; the file "
                    "was edited, run it again with --fresh"
                )
    return result


# ---------------------------------------------------------------------------------------------- writing


def _plain(value: Any) -> Any:
    """A NumPy scalar as a Python number; TypeError for anything else that JSON cannot represent."""
    item = getattr(value, "item", None)
    if item is None or getattr(value, "ndim", 0) != 0:
        raise TypeError(f"{type(value).__name__} is not plain data")
    return item()


def _first_non_finite(tree: Any, where: str = "") -> str | None:
    """The dotted key of the first NaN or infinity in JSON data; None if all numbers are finite."""
    if isinstance(tree, dict):
        children = [(f"{where}.{key}" if where else key, value) for key, value in tree.items()]
    elif isinstance(tree, list):
        children = [(f"{where}[{i}]", value) for i, value in enumerate(tree)]
    else:
        return where if isinstance(tree, float) and not math.isfinite(tree) else None
    return next((found for place, value in children if (found := _first_non_finite(value, place))), None)
