"""Checks of the class labels of training images, for class-conditional scorers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from traj_ood.errors import TrajOODError
from traj_ood.scorers.base import Evidence


def labels_of(scorer: str, train: Evidence, count: int) -> Tensor:
    """The labels (N,) int64 >= 0, as the caller numbered them.

    Raises:
        TrajOODError: no labels, not ``count`` of them, or other values than whole numbers >= 0.
    """
    if train.labels is None:
        raise no_labels(scorer)
    labels = train.labels.cpu()
    if labels.shape != (count,) or labels.is_floating_point() or bool((labels < 0).any()):
        smallest = labels.min().item() if labels.numel() else "none"
        got = f"shape {tuple(labels.shape)}, {labels.dtype}, smallest {smallest}"
        raise TrajOODError(f"scorer {scorer}: expected {count} labels, whole numbers from 0, got {got}")
    return labels


def no_labels(scorer: str) -> TrajOODError:
    """The error of a scorer that needs the class labels of the training images."""
    return TrajOODError(
        f"scorer {scorer}: expected class labels of the training images, got none: pass labels=, or take "
        "the images from a list with classes, or from subfolders by `{folder: …, classes: true}` in a benchmark's file"
    )


def classes_of(scorer: str, train: Evidence, count: int) -> Tensor:
    """Class indices (N,) int64 in 0 … C − 1: the labels that occur, renumbered without gaps, in their order.

    Raises:
        TrajOODError: as :func:`labels_of`.
    """
    return labels_of(scorer, train, count).unique(return_inverse=True)[1]


def class_numbers(labels: Any, count: int) -> Tensor:
    """Convert N class labels, whole numbers or texts, to class indices (N,) int64 in 0 … C − 1.

    Args:
        labels: a list, tensor, NumPy array or pandas column.
        count: N.
    Raises:
        TrajOODError: not ``count`` labels, or labels of another type.
    """
    values = labels.tolist() if hasattr(labels, "tolist") else labels
    values = list(values) if isinstance(values, Iterable) else [values]
    if len(values) != count or any(not isinstance(v, int | str) or isinstance(v, bool) for v in values):
        raise TrajOODError(
            f"labels: expected {count} whole numbers or texts, one per image, got {len(values)} of "
            f"{', '.join(sorted({type(v).__name__ for v in values})) or 'nothing'}"
        )
    # Numbers are sorted as numbers, so that the same classes get the same indices as numbers or texts.
    order = sorted({str(v) for v in values}, key=lambda text: (len(text), text))
    number = {text: i for i, text in enumerate(order)}
    return torch.tensor([number[str(v)] for v in values])


def check_one_labelling(given: Any, own: Any) -> None:
    """Refuse labels ``given`` for N images that contradict their ``own``, those that a Dataset or DataLoader yields
    with them. One of the two may divide the classes of the other.

    Raises:
        TrajOODError: neither does, as when a loader shuffles and the given labels do not follow.
    """
    try:
        pairs = [class_numbers(labels, len(own)).tolist() for labels in (given, own)] if len(own) else []
    except (
        TrajOODError
    ):  # such as regression targets, which are no classes; given labels are checked where they are read
        return
    if pairs and len({*zip(*pairs, strict=True)}) > max(len({*numbers}) for numbers in pairs):
        raise TrajOODError(
            "labels: contradict those that the images bring with them: expected labels in the order of the images, "
            "which a DataLoader with shuffle=True does not keep: leave out labels=, or correct it"
        )
