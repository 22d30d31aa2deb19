"""The scorer set of a detector, which has exactly one scorer."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from traj_ood.autoencoders import Autoencoder
from traj_ood.errors import TrajOODError, check_word
from traj_ood.index import Approximate, Backend
from traj_ood.scorers import WHOLE_PATH
from traj_ood.scorers.scorer_set import ScorerSet


def one_scorer(
    autoencoder: Autoencoder,
    spec: str,
    tol: float,
    max_steps: int,
    backend: Backend,
    approximate: Approximate,
    compile: bool = False,
) -> ScorerSet:
    """An unfitted :class:`traj_ood.ScorerSet` with the one scorer ``spec``."""
    if not isinstance(spec, str) or spec.strip() == "all":
        raise TrajOODError(f"scorer: expected one name such as 'field', got {spec!r}: a detector has one scorer")
    if isinstance(tol, bool) or not (isinstance(tol, int | float) and 0 <= tol < math.inf):
        raise TrajOODError(f"tol: expected a squared residual >= 0, got {tol!r}")
    if type(max_steps) is not int or not 1 <= max_steps <= WHOLE_PATH:
        raise TrajOODError(f"max_steps: expected a whole number of at least 1, got {max_steps!r}")
    check_word("backend", backend, Backend)
    check_word("approximate search", approximate, Approximate)
    settings: dict[str, Any] = {"tol": tol, "max_steps": max_steps, "backend": backend, "approximate": approximate}
    return ScorerSet(autoencoder, [spec], **settings, compile=compile)


def forget_fit(scorers: ScorerSet) -> None:
    """Reduce the set's needs to those of scoring, and drop attractors that only the fit reads."""
    scorers.needs = replace(scorers.needs, attractors=frozenset(), train_path=False, labels=False, head=False)
    if not scorers.needs.distances:
        scorers.dictionary = None
