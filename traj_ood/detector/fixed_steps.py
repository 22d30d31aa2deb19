"""The scorer that a graph of fixed length computes, or the reason why there is none."""

from __future__ import annotations

import copy
from dataclasses import fields, replace
from typing import TYPE_CHECKING

from traj_ood.errors import TrajOODError
from traj_ood.scorers import KNN, WHOLE_PATH, IsolationForest, KNNAuto, Reconstruction, Scorer, Steps

if TYPE_CHECKING:
    from traj_ood.scorers.scorer_set import ScorerSet


def one_scorer(scorers: ScorerSet) -> Scorer:
    """The scorer of a set that holds one.

    Raises:
        TrajOODError: several, none, or not fitted.
    """
    if len(scorers.scorers) != 1:
        raise TrajOODError(f"export: expected a detector with one scorer, got {', '.join(scorers.labels) or 'none'}")
    if scorers.needs_dictionary and scorers.dictionary is None:
        raise TrajOODError(f"export: scorer {scorers.labels[0]} is not fitted: call fit with ID training images first")
    return scorers.scorers[0]


def check_exportable(scorer: Scorer) -> None:
    """Refuse a scorer that cannot be computed by a graph of tensor operations.

    Raises:
        TrajOODError: names the scorer and the reason.
    """
    reason = None
    if isinstance(scorer, IsolationForest):
        reason = "its trees are walked until every sample reaches a leaf, which a graph of fixed length cannot do"
    elif isinstance(scorer, Steps):
        reason = "it counts the steps until a sample settles, and a graph of fixed length always takes as many"
    elif isinstance(scorer, Reconstruction) and scorer.masked:
        reason = "it encodes each image four times under masks of its own; reconstruction without masked can be"
    elif scorer.needs().divergence:
        reason = "it evaluates f beside the path, which the graph does not hold"
    if reason:
        raise TrajOODError(f"export: scorer {scorer.label} cannot be exported: {reason}")


def steps_of(scorers: ScorerSet, steps: int | None) -> int:
    """Number of evaluations of f in the graph.

    Args:
        steps: the limit asked for. None takes what the scorer reads under the detector's own limit.
    Raises:
        TrajOODError: none given for a scorer that reads the path until it settles, below 1, or above the detector's
            limit.
    """
    scorer = one_scorer(scorers)
    reads = scorer.needs().steps
    if steps is not None and steps < 1:
        raise TrajOODError(f"export: expected at least 1 step, got {steps}")
    if steps is not None and steps > scorers.max_steps:
        raise TrajOODError(
            f"export: expected at most {scorers.max_steps} steps, the detector's own limit, got {steps}: fit one with "
            "a higher --max-steps"
        )
    if steps is None and reads == WHOLE_PATH:
        raise TrajOODError(
            f"export: scorer {scorer.label} reads a path until it settles, and a graph has a fixed number of steps: "
            f"say how many, for instance --steps 16; the threshold belongs to the whole path"
        )
    return min(reads, scorers.max_steps if steps is None else steps)


def at_fixed_steps(scorer: Scorer, steps: int) -> Scorer:
    """The scorer that reads exactly ``steps`` steps of each sample.

    One that averages over a sample's own length takes ``horizon = steps``: where a sample settles is decided by the
    last bits of a residual, and a mean over its own length would jump with it from one runtime to the next, while one
    in which it stays at its end point does not.
    """
    if isinstance(scorer, KNNAuto):  # the k that it chose is known by now
        chosen = KNN(view=scorer.view, k=int(scorer.state["k"]))
        return chosen.with_state({"bank": scorer.state["bank"]})
    if _reads_own_length(scorer):
        return replace(scorer, horizon=max(1, steps)).with_state(scorer.state)  # type: ignore[call-arg]
    return scorer


def same_score(scorers: ScorerSet, steps: int) -> bool:
    """Whether a graph of ``steps`` steps computes the detector's own score, for which its threshold holds."""
    scorer = one_scorer(scorers)
    return not _reads_own_length(scorer) and steps == min(scorer.needs().steps, scorers.max_steps)


def reference(scorers: ScorerSet, steps: int) -> ScorerSet:
    """The Python scorer that a graph of ``steps`` steps must agree with: the same attractors and state, stopped after
    them."""
    other = copy.copy(scorers)
    other.scorers = [at_fixed_steps(one_scorer(scorers), steps)]
    other.needs = replace(scorers.needs, steps=other.scorers[0].needs().steps)
    other.max_steps, other.precision = max(1, steps), "fp32"
    return other


def _reads_own_length(scorer: Scorer) -> bool:
    return any(f.name == "horizon" for f in fields(scorer)) and getattr(scorer, "horizon", 0) is None
