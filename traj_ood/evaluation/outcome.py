"""The results of a run: the table of scores, the metrics of each scorer, and the verdict on the attractors."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from traj_ood.attractors import AttractorDictionary
from traj_ood.attractors.health import (
    Facts,
    drawn_attractors,
    explained,
    explained_hidden,
    judge,
    reconstruction_errors,
)
from traj_ood.data import Benchmark
from traj_ood.dynamics.jacobian import spectral_radii
from traj_ood.dynamics.trajectory import Status
from traj_ood.evaluation.metrics import bootstrap, check_scores, compute_metrics
from traj_ood.evaluation.passes import PartsBySplit, Passes
from traj_ood.evaluation.results import ScorerResult, SetScore
from traj_ood.scorers.scorer_set import ScorerSet

# ID images on which the explained variance of reconstructions is measured, to a few percent.
_RECONSTRUCTED_IMAGES = 200


def score_table(sample: Benchmark, scored: PartsBySplit, labels: list[str]) -> pd.DataFrame:
    """Table with one row per image: split, role, id, trajectory_steps, trajectory_status and one column per scorer,
    from the parts of all splits except the training split."""
    roles = {s.name: s.role for s in sample.splits()}
    rows = []
    for name, pieces in scored.items():
        for part in (p for p in pieces if p.ids):
            columns: dict[str, Any] = {"split": name, "role": roles[name], "id": list(part.ids)}
            columns |= {f"trajectory_{k}": part.tensors[k].numpy() for k in ("steps", "status") if k in part.tensors}
            columns |= {label: part.tensors[f"score/{label}"].numpy() for label in labels}
            rows.append(pd.DataFrame(columns))
    return pd.concat(rows, ignore_index=True)


def measure(
    scorers: ScorerSet, sample: Benchmark, table: pd.DataFrame, scored: PartsBySplit, *, resamples: int, quiet: bool
) -> dict[str, ScorerResult]:
    """Metrics of every scorer on every OOD set, with its options and cost, by label. ``table`` is the
    :func:`score_table` of the parts ``scored``, which hold the costs.

    Raises:
        TrajOODError: scores are empty or not finite.
    """
    pieces = [p for some in scored.values() for p in some if p.ids]
    weights = np.array([len(p.ids) for p in pieces], dtype=float)
    results = {}
    for scorer in tqdm(scorers.scorers, desc="metrics", unit="scorer", delay=2, disable=quiet, dynamic_ncols=True):
        label = scorer.label
        sets = measure_sets(table[["split", label]], sample, resamples)
        cost = float(np.average([p.notes["f_evaluations"][label] for p in pieces], weights=weights))
        results[label] = ScorerResult(label, scorer.options(), scorer.summary, cost, sets)
    return results


def measure_sets(table: pd.DataFrame, sample: Benchmark, resamples: int) -> dict[str, SetScore]:
    """The metrics on every OOD set of the second column of a table, whose first is ``split``.

    Raises:
        TrajOODError: scores that no metric can be computed of.
    """
    by_split = {str(name): own.iloc[:, 1] for name, own in table.groupby("split", sort=False)}
    id_scores = check_scores(by_split[sample.test.name], "ID test")
    sets = {}
    for split in sample.ood:
        scores = by_split[split.name].to_numpy()
        intervals = bootstrap(id_scores, scores, resamples=resamples) if resamples else {}
        role: Any = split.role  # one of OOD_ROLES
        sets[split.name] = SetScore(role, len(scores), compute_metrics(id_scores, scores), intervals)
    return sets


def judged(passes: Passes, dictionary: AttractorDictionary, seed: int) -> dict[str, Any]:
    """The dictionary's health with the verdict of ``traj-ood diagnose``, which tests more than the health.

    ID test images are used as held-out images. Spectral radii, at attractors sampled by ``seed``, are computed only if
    the health is good.
    """
    health, model, test = dictionary.health(), passes.scorers.autoencoder, passes.sample.test
    count = len(test.images)
    # Spread over the list, which may be sorted by class. Cached features of all images cost less than reading a few.
    step = 1 if passes.cache is not None else -(-count // _RECONSTRUCTED_IMAGES)
    encoding = passes.examine(test, range(0, count, step))[1]
    share, hidden = math.nan, None
    if encoding is not None:
        mean = encoding.target.cpu().double().mean(dim=0)
        share = explained(reconstruction_errors(model, encoding), encoding.target, mean)
        hidden = explained_hidden(model, encoding.target, mean)
    radii: tuple[float, ...] = ()
    if health.verdict.meaningful:
        ends = dictionary.points[dictionary.statuses == Status.CONVERGED]
        drawn = torch.tensor([leader for leader, _ in drawn_attractors(ends, seed)])
        points = ends[drawn].to(model.device)
        radii = tuple(spectral_radii(model.self_map, points, chunk=model.chunk).values.tolist())
    verdict = judge(health, Facts(passes.still_falling, radii, share, hidden))
    found = health.as_dict() | {"verdict": asdict(verdict), "healthy": verdict.meaningful}
    if not verdict.meaningful and not found["warnings"]:
        found["warnings"] = [verdict.reason]
    return found
