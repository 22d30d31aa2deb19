"""A trial of a user's scorer on its first batch: a score that depends on more than its image is a wrong number."""

from __future__ import annotations

import torch
from torch import Tensor

from traj_ood.errors import TrajOODError
from traj_ood.io.extensions import origin_of
from traj_ood.scorers.base import Evidence, Scorer

_ROWS = 8
_ALLOWED = 3.5e-4  # of the largest score: half of float32's digits, as for models; mistakes move scores by far more
_REMEDY = "return from learn() all that score() reads, and read it from self.state"


def tried_scores(scorer: Scorer, evidence: Evidence) -> Tensor:
    """:meth:`Scorer.scores_of`; a user's class is tried on its first batch of two images or more.

    Raises:
        TrajOODError: as :meth:`Scorer.scores_of` and :func:`try_scores`.
    """
    scores = scorer.scores_of(evidence)
    if not scorer.tried and len(evidence) > 1:
        if origin_of(type(scorer)) is not None:
            try_scores(scorer, evidence, scores)
        scorer.tried = True
    return scores


def try_scores(scorer: Scorer, evidence: Evidence, scores: Tensor) -> None:
    """Check that a scorer draws nothing at random, reads what it has learnt from its state alone, and scores an image
    without regard to those beside it.

    Args:
        scorer: the fitted scorer.
        evidence: of B >= 2 images, of which the first half, at most 8, are scored three times again.
        scores: (B,) its scores of them.
    Raises:
        TrajOODError: scores differ between such calls by more than 3.5e-4 of the largest, or only the first succeeds.
    """
    few = evidence.first(min(_ROWS, len(evidence) // 2))
    alone = scorer.scores_of(few)
    _compare(scorer, alone, scorer.scores_of(few), "draws random numbers: two calls on the same images differ")
    restored = type(scorer)(**scorer.options()).with_state(scorer.state)
    try:
        again = restored.scores_of(few)
    except TrajOODError as error:
        text = f"{error}. It can be scored before it is saved, and not after: {_REMEDY}"
        raise TrajOODError(text) from error
    _compare(scorer, alone, again, f"reads more than options and state, which a file keeps ({_REMEDY}): scores differ")
    _compare(
        scorer, scores[: len(few)], alone, "depends on batch-mates: scores of images among others and alone differ"
    )


def _compare(scorer: Scorer, a: Tensor, b: Tensor, what: str) -> None:
    moved = _difference(a.cpu().double(), b.cpu().double())
    if moved > _ALLOWED:
        raise TrajOODError(f"scorer {scorer.label}: score() {what} by {moved:.1e} of the largest: correct it")


def _difference(a: Tensor, b: Tensor) -> float:
    """Largest |a − b| relative to the largest |b|, 1 if only one of them is finite somewhere; (B,) float64 each."""
    if not torch.equal(a.isfinite(), b.isfinite()):
        return 1.0
    known = a.isfinite()
    if not bool(known.any()):
        return 0.0
    return float((a - b)[known].abs().max() / b[known].abs().max().clamp(min=torch.finfo(b.dtype).tiny))
