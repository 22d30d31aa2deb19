"""Reading OpenOOD's data loaders without depending on their order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from traj_ood.errors import TrajOODError


def count_of(loader: Any) -> int:
    """Number of images behind a loader.

    Raises:
        TrajOODError: its data set has no length.
    """
    try:
        return len(loader.dataset)
    except (AttributeError, TypeError) as error:
        raise TrajOODError(f"train loader: expected a data set with a length, got {type(loader).__name__}") from error


def read(loader: Any, indices: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Batches of the images at ``indices``, in that order: what is learnt must not depend on the loader's shuffling."""
    from torch.utils.data import DataLoader, Subset

    yield from DataLoader(
        Subset(loader.dataset, indices),
        batch_size=loader.batch_size or 1,
        num_workers=loader.num_workers if len(indices) > 1 else 0,
        collate_fn=loader.collate_fn,
    )


def ids_of(batch: Mapping[str, Any]) -> tuple[str, ...]:
    names = batch["image_name"] if "image_name" in batch else batch["index"].tolist()
    return tuple(str(name) for name in names)
