"""Adapt a scorer to a fixed number of steps for export, or refuse it with the reason."""

from __future__ import annotations

import copy
from dataclasses import fields, replace

from traj_ood.errors import TrajOODError
from traj_ood.scorers import KNN, WHOLE_PATH, IsolationForest, KNNAuto, Reconstruction, Scorer, Steps
from traj_ood.scorers.scorer_set import ScorerSet


def the_scorer(scorers: ScorerSet) -> Scorer:
    """The one fitted scorer of a set."""
    if len(scorers.scorers) != 1:
        raise TrajOODError(f"export: expected a detector with one scorer, got {', '.join(scorers.labels) or 'none'}")
    if scorers.needs.dictionary and scorers.dictionary is None:
        raise TrajOODError(f"export: scorer {scorers.labels[0]} is not fitted: call fit with ID training images first")
    return scorers.scorers[0]


def check_exportable(scorer: Scorer) -> None:
    """Check that a scorer can be computed by a graph of tensor operations."""
    reason = None
    if isinstance(scorer, IsolationForest):
        reason = "its trees are descended until every sample reaches a leaf, which a fixed graph cannot do"
    elif isinstance(scorer, Steps):
        reason = "it counts the steps until convergence, and a fixed graph always takes the same number"
    elif isinstance(scorer, Reconstruction) and scorer.masked:
        reason = "it encodes each image under four masks; reconstruction without masked can be exported"
    elif scorer.needs().divergence:
        reason = "it evaluates f at points next to the path, which are not part of the graph"
    if reason:
        raise TrajOODError(f"export: scorer {scorer.label} cannot be exported: {reason}")


def steps_of(scorers: ScorerSet, steps: int | None) -> int:
    """The number of evaluations of f in the graph: ``steps``, or by default what the scorer reads, within the
    detector's limit."""
    scorer = the_scorer(scorers)
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
            f"export: scorer {scorer.label} iterates until convergence, and a graph has a fixed number of steps: "
            f"give one, such as --steps 16; the threshold holds for the whole path only"
        )
    return min(reads, scorers.max_steps if steps is None else steps)


def at_fixed_steps(scorer: Scorer, steps: int) -> Scorer:
    """The scorer that reads exactly ``steps`` steps of each sample.

    A scorer that averages over the length of each path gets ``horizon = steps``, with which a sample stays at its end
    point after convergence. The step of convergence depends on the last bits of a residual, so that a mean over the
    path's own length would jump between runtimes.
    """
    if isinstance(scorer, KNNAuto):  # its k is chosen in the fit
        chosen = KNN(view=scorer.view, k=int(scorer.state["k"]))
        return chosen.with_state({"bank": scorer.state["bank"]})
    if _reads_own_length(scorer):
        return replace(scorer, horizon=max(1, steps)).with_state(scorer.state)  # type: ignore[call-arg]
    return scorer


def same_score(scorers: ScorerSet, steps: int) -> bool:
    """Whether a graph of ``steps`` steps computes the detector's own score, so that its threshold holds."""
    scorer = the_scorer(scorers)
    return not _reads_own_length(scorer) and steps == min(scorer.needs().steps, scorers.max_steps)


def reference(scorers: ScorerSet, steps: int) -> ScorerSet:
    """The Python scorer that a graph of ``steps`` steps has to agree with: same state and attractors, same limit."""
    other = copy.copy(scorers)
    other.scorers = [at_fixed_steps(the_scorer(scorers), steps)]
    other.needs = replace(scorers.needs, steps=other.scorers[0].needs().steps)
    other.max_steps, other.precision = max(1, steps), "fp32"
    return other


def _reads_own_length(scorer: Scorer) -> bool:
    return any(f.name == "horizon" for f in fields(scorer)) and getattr(scorer, "horizon", 0) is None
