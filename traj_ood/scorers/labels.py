"""Checks of the class labels of training images, for class-conditional scorers."""

from __future__ import annotations

from torch import Tensor

from traj_ood.errors import TrajOODError
from traj_ood.scorers.base import Evidence


def labels_of(scorer: str, train: Evidence, count: int) -> Tensor:
    """The labels (N,) int64 >= 0, as the caller numbered them.

    Raises:
        TrajOODError: no labels, not ``count`` of them, or other values than whole numbers >= 0.
    """
    if train.labels is None:
        raise TrajOODError(f"scorer {scorer}: expected class labels of the training images, got none")
    labels = train.labels.cpu()
    if labels.shape != (count,) or labels.is_floating_point() or bool((labels < 0).any()):
        smallest = labels.min().item() if labels.numel() else "none"
        got = f"shape {tuple(labels.shape)}, {labels.dtype}, smallest {smallest}"
        raise TrajOODError(f"scorer {scorer}: expected {count} labels, whole numbers from 0, got {got}")
    return labels


def classes_of(scorer: str, train: Evidence, count: int) -> Tensor:
    """Class indices (N,) int64 in 0 … C − 1: the labels that occur, renumbered without gaps, in their order.

    Raises:
        TrajOODError: as :func:`labels_of`.
    """
    return labels_of(scorer, train, count).unique(return_inverse=True)[1]
