"""Autoencoders by name, by family, and by what a folder's ``config.json`` says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from traj_ood.autoencoders.base import Autoencoder, ModelInfo
from traj_ood.autoencoders.hub import read_config
from traj_ood.autoencoders.language import LANGUAGE_MODELS
from traj_ood.errors import TrajOODError, unknown_name
from traj_ood.io.extensions import load_plugins
from traj_ood.io.families import Families, unknown_options_named

FAMILIES: Families[Autoencoder] = Families(
    Autoencoder, "autoencoder family", "model", "family", ("from_pretrained", "save_pretrained")
)
MODELS: dict[str, ModelInfo] = {}
"""The published models of all families, by name."""
_HUB_FAMILY = "vit_mae"  # of owner/name without a family
_MARKS = {"model_type": "model family", "_class_name": "diffusers autoencoder"}  # the first that a config.json has

_C = TypeVar("_C", bound=type[Autoencoder])


def register_autoencoder(cls: _C) -> _C:
    """Class decorator: make a family available by its ``family``, with its ``models`` (see :class:`Autoencoder`).

    Raises:
        TrajOODError: a name, a summary or a method is missing, or the name is taken.
    """
    FAMILIES.register(cls)
    MODELS.update(cls.models)
    return cls


def load_autoencoder(model: str | Path, **options: Any) -> Autoencoder:
    """An autoencoder by registered name, local folder, hub name (``owner/name``, a ViT-MAE), or ``family:source``.

    Args:
        model: for instance ``fashion-mae``, ``runs/conv``, ``facebook/vit-mae-base``, ``diffusers:runs/vae`` or
            ``diffusers:stabilityai/sd-vae-ft-mse`` (a third part names a folder of the repository, such as ``/vae``).
        options: passed to the family, such as ``mask_ratio=0.5`` for a ViT-MAE.
    Raises:
        TrajOODError: unknown name (with near ones), or files that are missing, damaged or of another architecture.
    """
    name = str(model)
    if name in MODELS:
        options.setdefault("name", name)
        name = MODELS[name].source
    if ":" in name and FAMILIES.knows(name.partition(":")[0]):
        return FAMILIES.load(name, options)
    if ":" in name and name.partition(":")[0] in LANGUAGE_MODELS:
        raise TrajOODError(f"model {name!r}: a language model has no images: only traj-ood analyze dynamics takes it")
    folder = Path(name).expanduser()
    if folder.is_dir():
        name, family = str(folder), family_of(folder)
    elif name.count("/") == 1 and not name.startswith((".", "/", "~")):
        family = FAMILIES.named(_HUB_FAMILY)
    elif "/" in name:
        raise TrajOODError(f"model {name!r}: no such folder; expected one with config.json and model.safetensors")
    else:
        raise unknown_name("model", name, MODELS)
    with unknown_options_named(f"model {name!r} ({family.family})"):
        return family.from_pretrained(name, **options)


def family_of(folder: Path, mark: str | None = None) -> type[Autoencoder]:
    """The family whose mark is in the ``config.json`` of ``folder``.

    Args:
        mark: the entry to go by. Default: ``model_type``, and without one diffusers' ``_class_name``.
    Raises:
        TrajOODError: no such file, no such entry, or an unknown one (with near ones).
    """
    config = _read_config(folder)
    key = mark or next(key for key in _MARKS if key in config)
    kind = str(config.get(key))
    if kind not in _marked(key):
        load_plugins("traj_ood.models")
    known = _marked(key)
    if kind not in known:
        raise unknown_name(_MARKS[key], kind, known)
    return known[kind]


def _marked(key: str) -> dict[str, type[Autoencoder]]:
    """What ``config.json`` may say under ``key``, and the family of each."""
    found: dict[str, type[Autoencoder]] = {}
    for family in FAMILIES.values():
        marks = family.marks.get(key, ())
        found |= dict.fromkeys((marks,) if isinstance(marks, str) else marks, family)
    return found


def _read_config(folder: Path) -> Mapping[str, Any]:
    try:
        config = read_config(folder)
    except TrajOODError as error:
        raise TrajOODError(f"{folder}: expected a config.json with a model_type ({error})") from error
    if not config.keys() & _MARKS.keys():
        raise TrajOODError(f"{folder}: expected a config.json with a model_type, found none in it")
    return config
