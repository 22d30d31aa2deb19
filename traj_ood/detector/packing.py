"""Save a model as a self-contained folder, safetensors and a JSON description, and rebuild it without any download.

Registered families save their weights and the arguments of their classes, whose code is installed. The code of a
callable cannot be saved; its user has to provide it again.
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
from traj_ood.io.files import folder_errors
from traj_ood.io.pretrained import forget_paths, refuse_elsewhere
from traj_ood.io.trees import field_of

CALLABLE = "callable"
"""Kind of the models that cannot be saved; the kind of all others is the name of their family."""


def pack(autoencoder: Autoencoder, folder: Path) -> dict[str, Any]:
    """Write everything needed to rebuild a model offline into ``folder``, safetensors and JSON only, and describe it.

    For a model whose class is not exactly that of a registered family (a subclass may do anything), or a surrogate over
    a :class:`traj_ood.CallableBackbone`, nothing is written and ``kind`` is ``callable``. The description is JSON data:
    ``kind`` (the family, or ``callable``), ``family``, ``name``, ``options``, ``fingerprint``, ``input_shape``,
    ``preprocessing``, ``chunk`` (on which results depend by rounding), and the entries that the family adds.
    """
    own = FAMILIES.get(autoencoder.family) is type(autoencoder)
    made = own and not folder.exists()
    if made:  # for a user's family, which need not do it
        with folder_errors(folder):
            folder.mkdir(parents=True)
    added = autoencoder.pack(folder) if own else None
    if added is not None:
        forget_paths(folder)
    elif made:
        folder.rmdir()
    return {
        "kind": CALLABLE if added is None else autoencoder.family,
        "family": autoencoder.family,
        **describe(autoencoder),
        "input_shape": list(autoencoder.input_shape),
        "preprocessing": preprocessing_record(autoencoder),
        **(added or {}),
    }


def unpack(description: Mapping[str, Any], folder: Path, device: torch.device | str | None = None) -> Autoencoder:
    """Rebuild a model from the description and the files of :func:`pack`, on ``device`` (default: the CPU)."""
    kind = field_of(description, "kind", str, where := f"{folder}: description of the model")
    if kind == CALLABLE:
        name = field_of(description, "name", str, where)
        raise TrajOODError(
            f"{folder}: the model {name!r} is defined by user code, which is not saved: build it again and pass it as "
            "autoencoder= in Python; the commands can load it when it is a registered family, see the guide to own "
            "autoencoders (docs/guides/own-autoencoder.md)"
        )
    refuse_elsewhere(folder)
    model = rebuild(FAMILIES, description, "kind", folder)
    return model if device is None else model.to(device)
