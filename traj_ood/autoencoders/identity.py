"""What identifies a model in records and stored results: weights, transform, and the answers of a user's own code."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor

from traj_ood.autoencoders.base import Autoencoder
from traj_ood.autoencoders.surrogate import SurrogateAutoencoder
from traj_ood.data.preprocessing import check_repeats
from traj_ood.dynamics.behaviour import answers, transform_digest
from traj_ood.dynamics.own_functions import OwnFunctions, written_code


def model_identity(model: Autoencoder) -> dict[str, Any]:
    """Name, family, fingerprint of the weights, number of parameters, digest of the transform, and for a user's own
    code its digest and its ``answers`` to a fixed image, as JSON data."""
    identity = {
        "name": model.name,
        "family": model.family,
        "fingerprint": model.fingerprint(),
        "parameters": model.parameter_count(),
        "transform": transform_digest(model.transform, model.input_shape),
    }
    if not model.has_own_code():
        return identity

    def answer(images: Tensor) -> tuple[Tensor, Tensor]:
        """E(x) and D(E(x)) of images x."""
        start = model.examine(images).latents
        return start, model.decode(start)

    check_repeats(model.name, model.transform)
    # Digests of another Python's instructions, or made by another version of written_code, cannot be compared.
    made_by = f"{sys.version_info.major}.{sys.version_info.minor}/2"
    code = f"{made_by} {written_code(*code_of(model))[:16]}"
    return {**identity, "answers": answers(answer, model.input_shape), "own_code": code}


def code_of(model: Autoencoder) -> list[Any]:
    """The classes, modules and functions whose code the model runs, for :func:`written_code`."""
    used = [model, model.backbone] if isinstance(model, SurrogateAutoencoder) else [model]
    functions = [f for part in used if isinstance(part, OwnFunctions) for f in part.functions()]
    return [*map(type, used), *model.modules_used(), *functions]
