"""A model as a folder that needs nothing else: safetensors and a JSON-able description, rebuilt without any download.

What decides a model is code and weights. The code of the registered families, and of the libraries behind their
backbones, is installed; each family writes what says how to call it. A callable's code cannot be written down, so it
stays with its owner.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from traj_ood.autoencoders import FAMILIES, Autoencoder
from traj_ood.backbones.packing import describe, rebuild
from traj_ood.data.preprocessing import preprocessing_record
from traj_ood.errors import TrajOODError
from traj_ood.io.pretrained import forget_paths, refuse_elsewhere
from traj_ood.io.trees import field_of

CALLABLE = "callable"
"""Kind of the models that no file holds; the others' is the name of their family."""


def pack(autoencoder: Autoencoder, folder: Path) -> dict[str, Any]:
    """Write everything that is needed to rebuild the model offline into ``folder``: safetensors and JSON only.

    Args:
        autoencoder: any. Its class must be that of a registered family: for a subclass, whose code may do anything, or
            a surrogate over a :class:`traj_ood.CallableBackbone`, nothing is written and the ``kind`` is ``callable``.
        folder: made when something is written.
    Returns:
        A JSON-able description: ``kind`` (the family, or ``callable``), ``family``, ``name``, ``options``,
        ``fingerprint``, ``input_shape``, ``preprocessing``, ``chunk`` (results follow it, by rounding) and what the
        family adds.
    Raises:
        TrajOODError: the folder cannot be written, or a backbone cannot be rebuilt from its library.
    """
    own = FAMILIES.get(autoencoder.family) is type(autoencoder)
    added = autoencoder.pack(folder) if own else None
    if added is not None:
        forget_paths(folder)
    return {
        "kind": CALLABLE if added is None else autoencoder.family,
        "family": autoencoder.family,
        **describe(autoencoder),
        "input_shape": list(autoencoder.input_shape),
        "preprocessing": preprocessing_record(autoencoder),
        **(added or {}),
    }


def unpack(description: Mapping[str, Any], folder: Path, device: torch.device | str | None = None) -> Autoencoder:
    """The model that :func:`pack` described, from the files it wrote into ``folder``.

    Args:
        description: as returned by :func:`pack`, or read back from JSON.
        device: where to move the model. Default: it stays on the CPU.
    Raises:
        TrajOODError: a description of the kind ``callable``; files or entries that are missing, damaged or of another
            architecture; weights or options with another fingerprint.
    """
    kind = field_of(description, "kind", str, where := f"{folder}: description of the model")
    if kind == CALLABLE:
        name = field_of(description, "name", str, where)
        raise TrajOODError(
            f"{folder}: the model {name!r} is made of your own code, which no file holds: build it again and pass it "
            "as autoencoder="
        )
    refuse_elsewhere(folder)
    model = rebuild(FAMILIES, description, "kind", folder)
    return model if device is None else model.to(device)
