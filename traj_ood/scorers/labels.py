"""Checks of the class labels of training images, for class-conditional scorers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from traj_ood.data.batches import Images, shuffles
from traj_ood.errors import TrajOODError
from traj_ood.scorers.base import Evidence

_MAX_DIGITS = 18  # of a class name that counts as a number


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


def class_order(names: Iterable[str]) -> list[str]:
    """Distinct class names in the order of their indices: whole numbers first, ascending, then texts, as in
    torchvision's ``ImageFolder``."""

    def place(name: str) -> tuple[bool, int, str]:
        number = _whole(name)
        return number is None, number or 0, name

    return sorted(set(names), key=place)


def _whole(name: str) -> int | None:
    """The whole number that a class name is; None for other texts."""
    digits = name.removeprefix("-")
    return int(name) if digits.isdecimal() and len(digits) <= _MAX_DIGITS else None


def class_numbers(labels: Any, count: int, classes: int = 0) -> Tensor:
    """Convert N class labels, whole numbers or texts, to class indices (N,) int64: in :func:`class_order`, without
    gaps.

    Args:
        labels: a list, tensor, NumPy array or pandas column.
        count: N.
        classes: number C of classes of the model's classifier. Labels that are all numbers below C stay as they are,
            because they number its classes, of which some may have no image; as many names as classes are 0 … C − 1;
            of any others it is not known which classes they are, and their indices begin at C. Default 0.
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
    names = [str(v) for v in values]
    order = class_order(names)
    whole = [_whole(name) for name in order]
    if len({*whole}) == len(order) and all(number is not None and 0 <= number < classes for number in whole):
        indices: Iterable[Any] = whole
    else:
        first = 0 if len(order) == classes else classes
        indices = range(first, first + len(order))
    number = dict(zip(order, indices, strict=True))
    return torch.tensor([number[name] for name in names], dtype=torch.int64, device="cpu")


def check_one_labelling(given: Any, own: Any, images: Images) -> None:
    """Refuse labels ``given`` for N images that contradict their ``own``, those that a Dataset or DataLoader yields
    with them. One of the two may divide the classes of the other.

    Raises:
        TrajOODError: neither does, as when a loader shuffles and the given labels do not follow; or it shuffles and
            yields no labels to compare with.
    """
    if not len(own) and shuffles(images):
        raise TrajOODError(
            "labels: expected images in the order of their labels, got a DataLoader that shuffles: set shuffle=False, "
            "or let its data set yield the label with each image"
        )
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
