"""The scorer that a graph with a fixed number of steps computes, or the reason why there is none."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from traj_ood.errors import TrajOODError
from traj_ood.io.extensions import own_code
from traj_ood.scorers import WHOLE_PATH, Scorer
from traj_ood.scorers.scorer_set import ScorerSet


def the_scorer(scorers: ScorerSet) -> Scorer:
    """The one fitted scorer of a set, which a graph can compute."""
    if len(scorers.scorers) != 1:
        raise TrajOODError(f"export: expected a detector with one scorer, got {', '.join(scorers.labels) or 'none'}")
    (scorer,) = scorers.scorers
    if scorers.needs.dictionary and scorers.dictionary is None:
        raise TrajOODError(f"export: scorer {scorer.label} is not fitted: call fit with ID training images first")
    obstacle = _obstacle(scorer)
    if obstacle:
        raise TrajOODError(f"export: scorer {scorer.label} cannot be exported: {obstacle}")
    return scorer


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


def form_of(scorers: ScorerSet, steps: int) -> Scorer:
    """The scorer that a graph of ``steps`` steps computes (:meth:`traj_ood.Scorer.graph_form`)."""
    scorer = the_scorer(scorers)
    with own_code(type(scorer), f"scorer {scorer.label}: graph_form()"):
        form: Any = scorer.graph_form(steps)
    if not isinstance(form, Scorer):
        raise TrajOODError(
            f"scorer {scorer.label}: expected graph_form() to return a fitted scorer, got {form!r:.80}: correct it"
        )
    return form


def same_score(scorers: ScorerSet, steps: int) -> bool:
    """Whether a graph of ``steps`` steps computes the detector's own score, so that its threshold holds."""
    reads = the_scorer(scorers).needs().steps
    return form_of(scorers, steps).needs().steps == reads and steps == min(reads, scorers.max_steps)


def reference(scorers: ScorerSet, steps: int) -> ScorerSet:
    """The Python scorer that a graph of ``steps`` steps has to agree with: same state and attractors, same limit."""
    other = copy.copy(scorers)
    other.scorers = [form_of(scorers, steps)]
    other.needs = replace(scorers.needs, steps=other.scorers[0].needs().steps)
    other.max_steps, other.precision = max(1, steps), "fp32"
    return other


def _obstacle(scorer: Scorer) -> str:
    """Why a graph cannot compute a scorer: its own obstacle, or evidence that a graph does not have; empty if it
    can."""
    needs = scorer.needs()
    if "masked" in needs.reconstruction:
        return "it encodes each image under four masks; reconstruction without masked can be exported"
    if needs.divergence:
        return "it evaluates f at points next to the path, which are not part of the graph"
    return scorer.graph_obstacle
