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
from traj_ood.backbones.packing import are_close, describe, rebuild
from traj_ood.data.preprocessing import preprocessing_record
from traj_ood.dynamics.fixed_function import trial_rows
from traj_ood.errors import TrajOODError
from traj_ood.io.extensions import origin_of
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

    Raises:
        TrajOODError: the folder cannot be written, or a user's own family does not rebuild the same model from it.
    """
    own = FAMILIES.get(autoencoder.family) is type(autoencoder)
    made = own and not folder.exists()
    if made:  # for a user's family, which need not do it
        with folder_errors(folder):
            folder.mkdir(parents=True)
    with folder_errors(folder):
        added = autoencoder.pack(folder) if own else None
    if added is not None:
        forget_paths(folder)
    elif made:
        folder.rmdir()
    described = {
        "kind": CALLABLE if added is None else autoencoder.family,
        "family": autoencoder.family,
        **describe(autoencoder),
        "input_shape": list(autoencoder.input_shape),
        "preprocessing": preprocessing_record(autoencoder),
        **(added or {}),
    }
    if added is not None and origin_of(type(autoencoder)) is not None:
        _check_rebuilt(autoencoder, described, folder)
    return described


def _check_rebuilt(autoencoder: Autoencoder, described: Mapping[str, Any], folder: Path) -> None:
    """Check that a user's family rebuilds a model from its files, up to the rounding of devices. Equal weights are not
    enough, because other values that decide the latents may not be among them."""
    try:
        rebuilt = unpack(described, folder)
        images = trial_rows(autoencoder.input_shape, rebuilt.module)
        pairs = [(autoencoder.encode(images), rebuilt.encode(images))]
        pairs += [(autoencoder.decode(pairs[0][0]), rebuilt.decode(pairs[0][0]))]
        differing = [what for what, pair in zip(("latents", "images"), pairs, strict=True) if not are_close(*pair)]
        reason = f"the rebuilt one gives other {differing[0]}" if differing else ""
    except TrajOODError as error:
        reason = str(error)
    if reason:
        raise TrajOODError(
            f"{autoencoder.name}: expected that {type(autoencoder).__qualname__}.from_pretrained rebuilds what "
            f"save_pretrained wrote, got: {reason}: write and read all weights and options that decide the latents"
        )


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
