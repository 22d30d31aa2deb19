"""The scorer set of a detector, which has exactly one scorer, and the class labels that it is fitted on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from traj_ood.autoencoders import Autoencoder
from traj_ood.data.batches import Images, has_own_labels
from traj_ood.dynamics.trajectory import check_stopping
from traj_ood.errors import TrajOODError, check_word
from traj_ood.index import Approximate, Backend
from traj_ood.scorers.labels import class_numbers
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
    check_stopping(tol, max_steps)
    check_word("backend", backend, Backend)
    check_word("approximate search", approximate, Approximate)
    settings: dict[str, Any] = {"tol": tol, "max_steps": max_steps, "backend": backend, "approximate": approximate}
    return ScorerSet(autoencoder, [spec], **settings, compile=compile)


def forget_fit(scorers: ScorerSet) -> None:
    """Reduce the set's needs to those of scoring, and drop attractors that only the fit reads."""
    scorers.needs = replace(scorers.needs, attractors=frozenset(), train_path=False, labels=False, head=False)
    if not scorers.needs.distances:
        scorers.dictionary = None


def label_list(labels: Tensor | Sequence[Any], count: int) -> list[Any]:
    """The labels, one integer or text per image, as a list."""
    class_numbers(labels, count)
    tolist = getattr(labels, "tolist", None)
    return list(labels if tolist is None else tolist())


def classes_given(
    scorers: ScorerSet, images: Images, labels: Tensor | Sequence[Any] | None, count: int
) -> Tensor | None:
    """(N,) int64 classes; None if there are none, or if the items of a Dataset or DataLoader have them."""
    own = has_own_labels(images)
    given = labels if labels is not None else () if own else getattr(images, "labels", ())
    if labels is None and len(given) == 0 and (own or not scorers.needs.labels):
        return None
    return numbered(given, count, scorers)


def numbered(given: Any, count: int, scorers: ScorerSet) -> Tensor:
    """Labels, integers or texts, as (N,) int64 classes, see :func:`class_numbers`."""
    if len(given) == 0 and count:
        raise TrajOODError(
            f"scorer {scorers.labels[0]}: needs the class of every training image, got none: pass labels=, or images "
            "from a list with classes (traj_ood.data.read_image_list)"
        )
    return class_numbers(given, count, scorers.autoencoder.classes)
