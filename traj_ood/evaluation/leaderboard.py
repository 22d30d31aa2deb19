"""Leaderboards from result files: one row per benchmark, model and scorer, averaged over seeds only.

Two results share a row only if they differ in nothing but their seed: same benchmark, model weights, configuration,
scorer options and test images (by hash). Otherwise they get separate rows, whose ``variant`` names the difference.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from traj_ood.data import OOD_ROLES
from traj_ood.errors import TrajOODError
from traj_ood.evaluation.identity import effective_settings
from traj_ood.evaluation.metrics import METRIC_NAMES, Metrics
from traj_ood.evaluation.results import CONTROL, REGIONS, Result, ScorerResult, near_first
from traj_ood.scorers import create_scorer

if TYPE_CHECKING:
    import pandas as pd


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
        # Of scorers that read no attractors, the health of these says nothing.
        reads = self.scorer != CONTROL and _reads_attractors(self.scorer)
        dictionaries = [(r.seed, r.dictionary) for r, _ in self.runs if reads]
        warnings = [f"seed {seed}: {text}" for seed, d in dictionaries for text in d["warnings"]]
        return {
            "f_evaluations": float(np.mean(costs)) if costs else float("nan"),
            "diagnostics": " ".join(n for n, role in self.sets().items() if role == "diagnostic"),
            "healthy": all(d["healthy"] for _, d in dictionaries),
            "used": any(d.get("used") is not False for _, d in dictionaries),
            "warnings": "; ".join(warnings),
            "note": self.runs[0][1].note,
        }


def leaderboard(results: Sequence[Result]) -> pd.DataFrame:
    """One row per benchmark × model × scorer (× variant), best ``all_auroc`` first within a benchmark and model.

    Columns: ``benchmark``, ``model``, ``fingerprint``, ``scorer``, ``label``, ``variant`` (how the row differs from
    others of its benchmark and model, else empty), ``seeds`` (their number); for near, far and all and each metric
    ``<region>_<metric>`` and ``<region>_<metric>_std``, the mean and the sample standard deviation (n − 1) over seeds,
    as fractions, NaN if undefined; ``f_evaluations`` per image, ``diagnostics`` (sets that the means leave out),
    ``healthy`` (true where no attractors are read), ``used`` (whether the scorer reads attractors), ``warnings``,
    ``note``.

    Raises ``TrajOODError`` if there are no results, or a row has the same seed twice.
    """
    return ranked(groups_of(results)).reset_index(drop=True)


def ranked(groups: Sequence[Group]) -> pd.DataFrame:
    """The rows of :func:`leaderboard`, each with the number of its group as its index."""
    import pandas as pd

    rows = []
    for group in groups:
        row = group.head()
        for region in REGIONS:
            row |= _over_seeds([getattr(scorer, region) for _, scorer in group.runs], prefix=f"{region}_")
        rows.append(row | group.tail())
    table = pd.DataFrame(rows)
    order = ["benchmark", "model", "all_auroc", "scorer", "variant"]
    return table.sort_values(order, ascending=[True, True, False, True, True])


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


def _run_identity(result: Result, ambiguous: Set[str]) -> dict[str, str]:
    """What runs must have in common to be compared or averaged, as texts by dotted name: all but the seed and settings
    without effect on scores. Images are identified by the digest of their list, and by that of their content if a list
    is ``ambiguous``; older results have only the list."""
    tests = {
        name: data.get("contents", data["sha256"]) if data["sha256"] in ambiguous else data["sha256"]
        for name, data in result.data.items()
        if data["role"] in ("test", *OOD_ROLES)
    }
    return _flat({"model": result.model["fingerprint"], "config": effective_settings(result), "data": tests})


def _ambiguous_lists(results: Sequence[Result]) -> set[str]:
    """Digests of image lists that occur with different contents: the same names, but other images."""
    contents: dict[str, set[str]] = {}
    for data in (data for result in results for data in result.data.values() if "contents" in data):
        contents.setdefault(data["sha256"], set()).add(data["contents"])
    return {listed for listed, found in contents.items() if len(found) > 1}


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
            own = _flat({"options": scorer.options, "sets": {n: score.role for n, score in scorer.sets.items()}})
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
                f"got seed {result.seed} twice ({by_seed[result.seed].name!r} of {by_seed[result.seed].created} and "
                f"{result.name!r} of {result.created}); remove one of them"
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


def _reads_attractors(scorer: str) -> bool:
    """Whether a recorded scorer reads attractors; one that is unknown here, such as a user's own, may."""
    try:
        return create_scorer(scorer).needs().attractors_read
    except TrajOODError:
        return True


def _over_seeds(metrics: Sequence[Metrics | None], prefix: str = "") -> dict[str, float]:
    """Mean and sample standard deviation of each metric; NaN if undefined (no such set; a single seed)."""
    figures: dict[str, float] = {}
    for name in METRIC_NAMES:
        values = [getattr(m, name) for m in metrics if m is not None]
        figures[f"{prefix}{name}"] = float(np.mean(values)) if values else float("nan")
        figures[f"{prefix}{name}_std"] = float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")
    return figures
