"""The registry of autoencoder families, and loading by model name, by family, or by a folder's ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from traj_ood.autoencoders.base import Autoencoder, ModelInfo
from traj_ood.autoencoders.hub import read_config
from traj_ood.autoencoders.language import LANGUAGE_MODELS
from traj_ood.backbones import LIBRARIES, Backbone
from traj_ood.dynamics.device import standard_settings
from traj_ood.errors import TrajOODError, unknown_name
from traj_ood.io.extensions import load_plugins
from traj_ood.io.families import Families, unknown_options_named
from traj_ood.io.pretrained import is_local

FAMILIES: Families[Autoencoder] = Families(
    Autoencoder, "autoencoder family", "model", "family", ("from_pretrained", "save_pretrained")
)
MODELS: dict[str, ModelInfo] = {}
"""Published models of all families, by name."""
_HUB_FAMILY = "vit_mae"  # the family of a hub name owner/name without a family
_MARKS = {"model_type": "model family", "_class_name": "diffusers autoencoder"}  # in order of precedence

_C = TypeVar("_C", bound=type[Autoencoder])


def register_autoencoder(cls: _C) -> _C:
    """Class decorator that registers an autoencoder family and its ``models``; see :class:`Autoencoder` for what it
    must have."""
    FAMILIES.register(cls)
    MODELS.update(cls.models)
    return cls


@standard_settings()
def load_autoencoder(model: str | Path, **options: Any) -> Autoencoder:
    """Load an autoencoder by registered name, local folder, hub name (``owner/name``, a ViT-MAE), or ``family:source``.

    Args:
        model: for instance ``fashion-mae``, ``runs/conv``, ``facebook/vit-mae-base``, ``diffusers:runs/vae`` or
            ``diffusers:stabilityai/sd-vae-ft-mse``; a third part such as ``/vae`` is a folder of the repository.
        options: passed to the family, such as ``mask_ratio=0.5`` for a ViT-MAE.
    Raises:
        TrajOODError: unknown name (the message lists similar ones), or files that are missing, damaged or of another
            architecture.
    """
    if not isinstance(model, str | Path):
        raise TrajOODError(
            f"load_autoencoder: expected a name or folder, got {type(model).__name__}: wrap a network of your own in a "
            "traj_ood.CallableAutoencoder, or one without a decoder in a traj_ood.CallableBackbone"
        )
    name = str(model)
    if name in MODELS:
        options.setdefault("name", name)
        name = MODELS[name].source
    if ":" in name and FAMILIES.knows(name.partition(":")[0]):
        return FAMILIES.load(name, options)
    if ":" in name and name.partition(":")[0] in LANGUAGE_MODELS:
        raise TrajOODError(
            f"model {name!r}: expected a model of images, got a language model: use it with traj-ood analyze dynamics"
        )
    folder = Path(name).expanduser()
    if folder.is_dir():
        name, family = str(folder), family_of(folder)
    elif name.count("/") == 1 and not is_local(name):
        family = FAMILIES.named(_HUB_FAMILY)
    elif "/" in name or is_local(name):
        raise TrajOODError(f"model {name!r}: no such folder; expected a folder with config.json and model.safetensors")
    elif known := next((known for known in (FAMILIES, LIBRARIES) if name in known), None):
        raise TrajOODError(f"{known.model} {name!r}: expected a source after it ({known[name].summary})")
    else:
        own = "; of your own: a folder with config.json, or family:folder of a class that --import FILE.py registers"
        raise unknown_name("model", name, MODELS, own)
    with unknown_options_named(f"model {name!r} ({family.family})"):
        return FAMILIES.complete(family.from_pretrained(name, **options))


def check_autoencoder(model: object) -> None:
    """Check that a model is an :class:`Autoencoder`.

    Raises:
        TrajOODError: it is a name, a network or a backbone, or anything else; the message says what to do with it.
    """
    if isinstance(model, Autoencoder):
        return
    if isinstance(model, str | Path):
        remedy = f"load it, traj_ood.load_autoencoder({str(model)!r})"
    elif isinstance(model, Backbone):
        remedy = "train an autoencoder of its features, traj_ood.surrogate_for(backbone, benchmark)"
    elif isinstance(model, nn.Module):
        remedy = (
            "wrap it, traj_ood.CallableAutoencoder.from_module(network, input_shape=(C, H, W)); a network without a "
            "decoder, such as a classifier, in a traj_ood.CallableBackbone, for which traj_ood.surrogate_for trains one"
        )
    else:
        remedy = "load one, traj_ood.load_autoencoder(name or folder), or wrap your own in CallableAutoencoder"
    raise TrajOODError(f"model: expected a traj_ood.Autoencoder, got {type(model).__name__}: {remedy}")


def family_of(folder: Path, mark: str | None = None) -> type[Autoencoder]:
    """The family of the model in ``folder``, by an entry of its ``config.json`` (:attr:`Autoencoder.marks`): ``mark``,
    by default ``model_type``, or diffusers' ``_class_name`` if there is none."""
    config = _read_config(folder)
    key = mark or next(key for key in _MARKS if key in config)
    kind = str(config.get(key))
    if kind not in _marked(key):
        load_plugins("traj_ood.models")
    known = _marked(key)
    if kind not in known:
        advice = f". A classifier of transformers is transformers:{folder}" if key == "model_type" else ""
        raise unknown_name(_MARKS[key], kind, known, advice)
    return known[kind]


def _marked(key: str) -> dict[str, type[Autoencoder]]:
    """The known values of the entry ``key`` of ``config.json``, with their families."""
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
        advice = f": a network of timm, as this one seems to be, is timm:{folder}" if "architecture" in config else ""
        raise TrajOODError(f"{folder}: expected a config.json with a model_type, found none in it{advice}")
    return config
