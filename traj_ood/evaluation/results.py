"""One JSON per run: what was measured, on what, with what. Every table and plot is derived from these files.

A result file is complete or absent (``write_atomic``), the same run gives the same bytes apart from its times, and
loading is strict: a file that was cut, edited or written by another version is refused by name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from traj_ood.errors import TrajOODError
from traj_ood.evaluation.metrics import METRIC_NAMES, Metrics, mean_metrics
from traj_ood.io.files import write_atomic
from traj_ood.io.trees import read_json

SCHEMA = 1
FILE_NAME = "result.json"

_MEANS = ("near", "far", "all")


@dataclass(frozen=True)
class SetScore:
    """One scorer on one OOD set: its role (``near`` or ``far``), the images scored, the metrics and their intervals.

    ``intervals`` holds (low, high) by metric name, fractions in [0, 1]; empty when no bootstrap was run.
    """

    role: str
    count: int
    metrics: Metrics
    intervals: dict[str, tuple[float, float]]


@dataclass(frozen=True)
class ScorerResult:
    """One scorer: its label in tables, its options, one sentence on what it measures, its cost and its figures by set.

    ``f_evaluations`` is the mean number of evaluations of f = E∘D per image; None when the scorer has no such cost.
    """

    label: str
    options: dict[str, Any]
    note: str
    f_evaluations: float | None
    sets: dict[str, SetScore]

    @property
    def near(self) -> Metrics | None:
        """The mean over the near sets, each with equal weight; None without any."""
        return self._mean("near")

    @property
    def far(self) -> Metrics | None:
        """The mean over the far sets, each with equal weight; None without any."""
        return self._mean("far")

    @property
    def all(self) -> Metrics | None:
        """The mean over all sets, each with equal weight (not the mean of ``near`` and ``far``); None without any."""
        return self._mean("near", "far")

    def _mean(self, *roles: str) -> Metrics | None:
        metrics = [s.metrics for s in self.sets.values() if s.role in roles]
        return mean_metrics(metrics) if metrics else None


@dataclass(frozen=True, kw_only=True)
class Result:
    """Everything one run says about itself; see ``results/README.md`` for each key.

    ``model`` holds at least ``name`` and ``fingerprint``; ``data`` maps a split to ``{role, count, sha256}``,
    since content digests also ``contents`` and, where there are any, ``copies``: how many of its images another split
    holds, too;
    ``dictionary`` holds the health figures of the attractors with at least ``healthy`` (bool) and ``warnings``
    (list of str); ``failures`` lists ``{id, error}`` of images that could not be scored; ``created`` is ISO 8601 in
    UTC; ``seconds`` are wall-clock times by stage.
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
        """Write the result as JSON: sorted keys, 2 spaces, the derived means beside each scorer's sets.

        Raises ``TrajOODError`` when a figure is NaN or infinite (JSON has no such number, and a table would hide it),
        when a value is not plain data, or when the folder cannot be written.
        """
        tree = asdict(self)
        for scorer, written in zip(self.scorers.values(), tree["scorers"].values(), strict=True):
            written.update({k: asdict(m) if (m := getattr(scorer, k)) else None for k in _MEANS})
        where = _first_non_finite(tree)
        if where:
            raise TrajOODError(
                f"result {self.name!r}: expected finite numbers, got NaN or infinity at {where}; "
                "store None where a figure is undefined"
            )
        try:
            text = json.dumps(tree, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False, default=_plain)
        except TypeError as error:
            raise TrajOODError(
                f"result {self.name!r}: expected numbers, text, lists and string keys, got something else "
                f"({error}); convert it before saving"
            ) from error
        write_atomic(path, (text + "\n").encode())

    @classmethod
    def load(cls, path: str | Path) -> Result:
        """Read one result file; strict, so that a table never rests on a damaged one.

        Raises ``TrajOODError`` naming the file: unreadable, not JSON, another schema, missing or unknown keys, values
        of the wrong type, NaN, or means that do not follow from the sets.
        """
        path = Path(path)
        tree = read_json(path, "a result file", "restore the file or run again")
        schema = tree.get("schema")
        if schema != SCHEMA:
            raise TrajOODError(f"{path}: expected a result of schema {SCHEMA}, got schema {schema}; run it again")
        return _result(tree, path)

    @classmethod
    def load_all(cls, folder: str | Path) -> list[Result]:
        """Every ``result.json`` below ``folder``, sorted by path.

        Raises ``TrajOODError`` when there is none, or when one of them does not load.
        """
        paths = sorted(Path(folder).rglob(FILE_NAME))
        if not paths:
            raise TrajOODError(
                f"{folder}: expected at least one {FILE_NAME} in this folder or below, got none; "
                "run `traj-ood bench` first or name another folder"
            )
        return [cls.load(path) for path in paths]


def near_first(sets: Mapping[str, str]) -> dict[str, str]:
    """OOD sets, name → role, in the order of every figure and table: near ones first, then by name."""
    return dict(sorted(sets.items(), key=lambda item: (item[1] == "far", item[0])))


def mean_interval(scores: Sequence[SetScore], metric: str) -> tuple[float, float]:
    """The mean of the sets' intervals of a metric: at least as wide as the interval of their mean.

    The deviation of a mean is at most the mean of the deviations, whatever the sets share (here their ID images), so
    this errs to the wide side. NaN unless every set has an interval.
    """
    found = [s.intervals.get(metric) for s in scores]
    if not found or any(interval is None for interval in found):
        return math.nan, math.nan
    low, high = zip(*(i for i in found if i), strict=True)
    return sum(low) / len(low), sum(high) / len(high)


# ---------------------------------------------------------------------------------------------- reading


def _result(tree: dict[str, Any], path: Path) -> Result:
    """The record of a parsed file; every error names ``path`` and the key."""
    _expect_keys(tree, {f.name for f in fields(Result)}, path, "result")
    _expect_types(tree, {"name": str, "benchmark": str, "command": str, "created": str, "seed": int}, path, "result")
    _expect_types(tree, {"failures": list, "commit": (str, type(None))}, path, "result")
    mappings = ("model", "config", "versions", "seconds", "data", "dictionary", "scorers")
    _expect_types(tree, dict.fromkeys(mappings, dict), path, "result")
    _expect_types(tree["model"], {"name": str, "fingerprint": str}, path, "model")
    _expect_types(tree["dictionary"], {"healthy": bool, "warnings": list}, path, "dictionary")
    for split, data in tree["data"].items():
        _expect_types(data, {"role": str, "count": int, "sha256": str}, path, f"data.{split}")
    scorers = {name: _scorer(scorer, path, f"scorers.{name}") for name, scorer in tree["scorers"].items()}
    return Result(**{**tree, "scorers": scorers})


def _scorer(tree: Any, path: Path, where: str) -> ScorerResult:
    _expect_types(tree, {"label": str, "options": dict, "note": str, "sets": dict}, path, where)
    _expect_keys(tree, {f.name for f in fields(ScorerResult)} | set(_MEANS), path, where)
    _expect_types(tree, {"f_evaluations": (int, float, type(None))}, path, where)
    sets = {name: _set(score, path, f"{where}.sets.{name}") for name, score in tree["sets"].items()}
    scorer = ScorerResult(**{**{k: v for k, v in tree.items() if k not in _MEANS}, "sets": sets})
    for key in _MEANS:
        written = None if tree[key] is None else _metrics(tree[key], path, f"{where}.{key}")
        if written != getattr(scorer, key):
            raise TrajOODError(
                f"{path}: expected {where}.{key} to be the mean over its sets, got other figures; "
                "the file was edited, run it again"
            )
    return scorer


def _set(tree: Any, path: Path, where: str) -> SetScore:
    _expect_types(tree, {"role": str, "count": int, "metrics": dict, "intervals": dict}, path, where)
    _expect_keys(tree, {f.name for f in fields(SetScore)}, path, where)
    if tree["role"] not in ("near", "far"):
        raise TrajOODError(f"{path}: expected {where}.role to be near or far, got {tree['role']!r}; run it again")
    for name, interval in tree["intervals"].items():
        if not (isinstance(interval, list) and len(interval) == 2 and all(map(_is_number, interval))):
            raise TrajOODError(f"{path}: expected {where}.intervals.{name} to be [low, high], got {interval!r}")
    intervals = {name: (float(low), float(high)) for name, (low, high) in tree["intervals"].items()}
    return SetScore(tree["role"], tree["count"], _metrics(tree["metrics"], path, f"{where}.metrics"), intervals)


def _metrics(tree: Any, path: Path, where: str) -> Metrics:
    _expect_types(tree, dict.fromkeys(METRIC_NAMES, (int, float)), path, where)
    _expect_keys(tree, set(METRIC_NAMES), path, where)
    return Metrics(**{name: float(value) for name, value in tree.items()})


def _expect_keys(tree: Mapping[str, Any], expected: set[str], path: Path, where: str) -> None:
    missing, unknown = sorted(expected - set(tree)), sorted(set(tree) - expected)
    if missing or unknown:
        named = [f"{kind} {', '.join(keys)}" for kind, keys in (("missing", missing), ("unknown", unknown)) if keys]
        raise TrajOODError(f"{path}: expected the keys of schema {SCHEMA} in {where}, got {'; '.join(named)}")


def _expect_types(tree: Any, types: Mapping[str, Any], path: Path, where: str) -> None:
    """Every named key is there with its type; a bool never passes for a number."""
    if not isinstance(tree, dict):
        raise TrajOODError(f"{path}: expected {where} to be an object, got {type(tree).__name__}; run it again")
    for key, kind in types.items():
        if key not in tree:
            raise TrajOODError(f"{path}: expected the key {key} in {where}, got none; run it again")
        value = tree[key]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            kinds = kind if isinstance(kind, tuple) else (kind,)
            names = " or ".join("null" if k is type(None) else k.__name__ for k in kinds)
            raise TrajOODError(f"{path}: expected {where}.{key} to be {names}, got {value!r}; run it again")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


# ---------------------------------------------------------------------------------------------- writing


def _plain(value: Any) -> Any:
    """NumPy scalars as Python numbers; everything else that JSON does not know is refused."""
    item = getattr(value, "item", None)
    if item is None or getattr(value, "ndim", 0) != 0:
        raise TypeError(f"{type(value).__name__} is not plain data")
    return item()


def _first_non_finite(tree: Any, where: str = "") -> str | None:
    """The dotted place of the first NaN or infinity in nested mappings and lists; None when all numbers are finite."""
    if isinstance(tree, Mapping):
        children = [(f"{where}.{key}" if where else str(key), value) for key, value in tree.items()]
    elif isinstance(tree, (list, tuple)):
        children = [(f"{where}[{i}]", value) for i, value in enumerate(tree)]
    else:
        number = _plain(tree) if hasattr(tree, "dtype") and getattr(tree, "ndim", 0) == 0 else tree
        return where if isinstance(number, float) and not math.isfinite(number) else None
    return next((found for place, value in children if (found := _first_non_finite(value, place))), None)
