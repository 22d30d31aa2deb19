"""Class labels given by the caller, as a list or tensor or with the images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from traj_ood.data.batches import Images, has_own_labels
from traj_ood.errors import TrajOODError
from traj_ood.scorers.scorer_set import ScorerSet, class_numbers


def labels_of(labels: Tensor | Sequence[Any], count: int) -> list[Any]:
    """The labels, one integer or text per image, as a list."""
    class_numbers(labels, count)
    tolist = getattr(labels, "tolist", None)
    return list(labels if tolist is None else tolist())


def classes_given(
    scorers: ScorerSet, images: Images, labels: Tensor | Sequence[Any] | None, count: int
) -> Tensor | None:
    """(N,) int64 classes 0 … C − 1; None if there are none, or if the items of a Dataset or DataLoader have them."""
    own = has_own_labels(images)
    given = labels if labels is not None else () if own else getattr(images, "labels", ())
    if labels is None and len(given) == 0:
        return None if own else numbered((), count, scorers) if scorers.needs.labels else None
    return numbered(given, count, scorers)


def numbered(given: Any, count: int, scorers: ScorerSet) -> Tensor:
    """Labels, integers or texts, as (N,) int64 classes 0 … C − 1."""
    if len(given) == 0 and count:
        raise TrajOODError(
            f"scorer {scorers.labels[0]}: needs the class of every training image, got none: pass labels=, or images "
            "from a list with classes (traj_ood.data.read_image_list)"
        )
    return class_numbers(given, count)
