"""Saving models so that they can be rebuilt offline, and checks that a rebuilt model is the one that was saved."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from traj_ood.backbones.base import Backbone
from traj_ood.backbones.registry import LIBRARIES
from traj_ood.data.preprocessing import preprocessing_differences
from traj_ood.dynamics.fixed_function import trial_rows
from traj_ood.errors import TrajOODError, foreign_errors
from traj_ood.io.families import Families, M
from traj_ood.io.trees import as_json, field_of

_MAX_CHUNK = 2**20


def pack_backbone(backbone: Backbone, folder: Path) -> dict[str, Any]:
    """Write a backbone of a registered library and describe it as JSON data (``library``, ``name``, ``options``,
    ``fingerprint``, ``chunk``, ``channels_last``, ``recipe``), after checking that the network rebuilt from the files
    is the same, which needs memory for a second copy."""
    described = {
        "library": backbone.library,
        **describe(backbone),
        "channels_last": backbone.channels_last,
        "recipe": as_json(backbone.pack(folder)),
    }
    try:
        if _same_answers(backbone, unpack_backbone(described, folder)):
            return described
        reason = "the network rebuilt from its weights gives other features"
    except TrajOODError as error:
        reason = str(error)
    raise TrajOODError(
        f"{backbone.name}: cannot be rebuilt offline from its weights ({reason}); wrap the network in a "
        "traj_ood.CallableBackbone, which is passed again at loading"
    )


def unpack_backbone(described: Mapping[str, Any], folder: Path) -> Backbone:
    """The backbone that :func:`pack_backbone` described; raises as :func:`rebuild`."""
    made = rebuild(LIBRARIES, described, "library", folder)
    made.channels_last = described.get("channels_last") is True  # older versions did not write it
    return made


def describe(model: Any) -> dict[str, Any]:
    """The part of the description that autoencoders and backbones share, JSON-serialisable."""
    return {
        "name": model.name,
        "options": as_json(model.options()),
        "fingerprint": model.fingerprint(),
        "chunk": model.chunk,
    }


def rebuild(families: Families[M], described: Mapping[str, Any], key: str, folder: Path) -> M:
    """Rebuild a described model on the CPU, by the ``unpack`` of the family that the entry ``key`` names, and check
    that it is the one described."""
    where = f"{folder}: description of the {families.model}"
    family: Any = families.named(field_of(described, key, str, where))
    name, chunk = field_of(described, "name", str, where), field_of(described, "chunk", int, where)
    field_of(described, "options", dict, where)
    if not 1 <= chunk <= _MAX_CHUNK:
        raise TrajOODError(f"{where}: chunk: expected 1 to {_MAX_CHUNK} rows, got {chunk}: the file is damaged")
    then = ": pack the model again or pass it as autoencoder="
    with foreign_errors(f"{folder}: the {families.model} {name!r} cannot be rebuilt", then):
        model = family.unpack(described, folder)
    model.chunk = chunk
    check_same(described, model, str(folder))
    return model


def check_same(described: Mapping[str, Any], model: Any, where: str) -> None:
    """Check that a model is the one described, by input shape, preprocessing and fingerprint; the message names
    differing options."""
    if "input_shape" in described and field_of(described, "input_shape", list, where) != list(model.input_shape):
        raise TrajOODError(
            f"{where}: expected a model for images {str(tuple(described['input_shape']))[:60]}, got {model.name} for "
            f"{model.input_shape}"
        )
    if "preprocessing" in described:  # older versions did not write it
        other = preprocessing_differences(field_of(described, "preprocessing", dict, where), model)
        if other:
            raise TrajOODError(
                f"{where}: expected {model.name} with the preprocessing that it was saved with, got another "
                f"({', '.join(other)} differ), which would change the scores: pass the model as it was"
            )
    expected, found = field_of(described, "fingerprint", str, where), model.fingerprint()
    if found != expected:
        own, packed = as_json(model.options()), field_of(described, "options", dict, where)
        differing = sorted(k for k in own.keys() | packed.keys() if own.get(k) != packed.get(k))
        what = f"options {', '.join(differing)} differ" if differing else "its weights differ"
        raise TrajOODError(
            f"{where}: expected the model {described.get('name')!r} with fingerprint {expected[:12]}…, got "
            f"{model.name!r} with {found[:12]}… ({what}): use the model that was saved, with the same libraries"
        )


def _same_answers(packed: Backbone, rebuilt: Backbone) -> bool:
    """Whether two backbones have the same outputs up to the rounding of devices. Equal weights are not enough, because
    arguments such as the activation do not show in them."""
    shapes = [(backbone.feature_dim, backbone.classes, backbone.input_shape) for backbone in (packed, rebuilt)]
    if shapes[0] != shapes[1]:
        return False
    images = trial_rows(packed.input_shape, packed.module)
    expected, found = packed.extract(images), rebuilt.extract(images)
    pairs = [(expected.features, found.features)]
    if expected.logits is not None and found.logits is not None:
        pairs.append((expected.logits, found.logits))
    return all(are_close(a, b) for a, b in pairs)


def are_close(a: Tensor, b: Tensor) -> bool:
    """Whether two outputs of one network agree up to the rounding of devices: to 1e-3 of the largest value."""
    return a.shape == b.shape and bool(((a.cpu() - b.cpu()).abs() <= 1e-3 * max(1e-6, float(a.abs().max()))).all())
