"""Class labels of training images, as class-conditional scorers read them."""

from __future__ import annotations

from torch import Tensor

from traj_ood.errors import TrajOODError
from traj_ood.scorers.base import Evidence


def labels_of(scorer: str, train: Evidence, count: int) -> Tensor:
    """(N,) int64 labels from 0 on, as the caller numbered them.

    Raises:
        TrajOODError: none, not ``count`` of them, or what is no class.
    """
    if train.labels is None:
        raise TrajOODError(f"scorer {scorer}: expected class labels of the training images, got none")
    labels = train.labels.cpu()
    if labels.shape != (count,) or labels.is_floating_point() or bool((labels < 0).any()):
        smallest = labels.min().item() if labels.numel() else "none"
        got = f"shape {tuple(labels.shape)}, {labels.dtype}, smallest {smallest}"
        raise TrajOODError(f"scorer {scorer}: expected {count} whole labels from 0 on, got {got}")
    return labels


def classes_of(scorer: str, train: Evidence, count: int) -> Tensor:
    """(N,) int64 classes 0 … C − 1, all of which occur: those of the labels that do, in their order.

    Raises:
        TrajOODError: as :func:`labels_of`.
    """
    return labels_of(scorer, train, count).unique(return_inverse=True)[1]
