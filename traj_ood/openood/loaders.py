"""Read OpenOOD's data loaders independently of their order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Subset

from traj_ood.autoencoders import Autoencoder
from traj_ood.errors import TrajOODError


def count_of(loader: Any) -> int:
    """The number of images of a loader."""
    try:
        return len(loader.dataset)
    except (AttributeError, TypeError) as error:
        raise TrajOODError(f"train loader: expected a data set with a length, got {type(loader).__name__}") from error


def read(loader: Any, indices: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Batches of the images at ``indices``, in that order, so that a fit does not depend on the loader's shuffling."""
    yield from DataLoader(
        Subset(loader.dataset, indices),
        batch_size=loader.batch_size or 1,
        num_workers=loader.num_workers if len(indices) > 1 else 0,
        collate_fn=loader.collate_fn,
    )


def check_normalisation(loader: Any, model: Autoencoder) -> None:
    """Check that a data set normalises images as the autoencoder does, if its transform declares mean and std.
    OpenOOD's tensors are in the units of its normalisation, so that a mismatch cannot be seen in the values."""
    found = _normalisation(loader)
    if found is None or model.preprocessing is None:
        return
    own = model.preprocessing.affine
    same = all(len(a) == len(b) and np.allclose(a, b, atol=1e-3) for a, b in zip(found, own, strict=True))
    if not same:
        mean, std = ([round(float(v), 4) for v in values] for values in found)
        raise TrajOODError(
            f"{model.name}: expected images normalised by mean {list(own[0])} and std {list(own[1])}, got a loader "
            f"with mean {mean} and std {std}: use traj_ood.openood.preprocessor(net) as the preprocessor"
        )


def _normalisation(loader: Any) -> tuple[Any, Any] | None:
    """Mean and standard deviation of the loader's transform, or None if it does not declare them."""
    data: Any = getattr(loader, "dataset", None)
    while hasattr(data, "dataset"):  # torch's Subset
        data = data.dataset
    for name in ("preprocessor", "transform_image", "transform"):
        transform = getattr(data, name, None)
        parts = [
            *getattr(transform, "transforms", ()),
            *getattr(getattr(transform, "transform", None), "transforms", ()),
        ]
        for part in (*reversed(parts), transform):
            mean, std = getattr(part, "mean", None), getattr(part, "std", None)
            if mean is not None and std is not None:
                return np.atleast_1d(mean), np.atleast_1d(std)
    return None


def ids_of(batch: Mapping[str, Any]) -> tuple[str, ...]:
    names = batch["image_name"] if "image_name" in batch else batch["index"].tolist()
    return tuple(str(name) for name in names)
