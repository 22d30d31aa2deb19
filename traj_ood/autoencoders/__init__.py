"""Autoencoders by name: the protocol, one file per family, and the loader."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from traj_ood.autoencoders.base import (
    FEATURE_VIEWS,
    VIEWS,
    Autoencoder,
    CallableAutoencoder,
    Encoding,
    FeatureView,
    View,
)
from traj_ood.autoencoders.conv import ConvAutoencoder, ConvNetwork
from traj_ood.autoencoders.surrogate import SurrogateAutoencoder, SurrogateNetwork
from traj_ood.autoencoders.vit_mae import ViTMAE
from traj_ood.errors import TrajOODError, unknown_name

__all__ = [
    "FEATURE_VIEWS",
    "MODELS",
    "VIEWS",
    "Autoencoder",
    "CallableAutoencoder",
    "ConvAutoencoder",
    "ConvNetwork",
    "Encoding",
    "FeatureView",
    "ModelInfo",
    "SurrogateAutoencoder",
    "SurrogateNetwork",
    "ViTMAE",
    "View",
    "load_autoencoder",
]

_BUNDLED = Path(__file__).parents[1] / "models"


@dataclass(frozen=True)
class ModelInfo:
    """A named model: where its weights are and what it is."""

    source: str
    summary: str


MODELS: dict[str, ModelInfo] = {
    "fashion-mae": ModelInfo(
        str(_BUNDLED / "fashion-mae"), "bundled small ViT-MAE, trained on the ID classes of the benchmark fashion"
    ),
    "vit-mae-base": ModelInfo(
        "facebook/vit-mae-base", "the paper's model, 112 M parameters, from the Hugging Face hub"
    ),
    "vit-mae-large": ModelInfo("facebook/vit-mae-large", "ViT-MAE large, from the Hugging Face hub"),
    "vit-mae-huge": ModelInfo("facebook/vit-mae-huge", "ViT-MAE huge, from the Hugging Face hub"),
}

_FAMILIES = {"vit_mae": ViTMAE, "traj_ood_conv": ConvAutoencoder, "traj_ood_surrogate": SurrogateAutoencoder}


def load_autoencoder(model: str | Path, **options: Any) -> Autoencoder:
    """An autoencoder by registered name, local folder, or hub name (``owner/name``, a ViT-MAE).

    Args:
        model: for instance ``fashion-mae``, ``runs/conv`` or ``facebook/vit-mae-base``.
        options: passed to the family, such as ``mask_ratio=0.5`` for a ViT-MAE.
    Raises:
        TrajOODError: unknown name (with near ones), or files that are missing, damaged or of another architecture.
    """
    name = str(model)
    if name in MODELS:
        options.setdefault("name", name)
        return _load(MODELS[name].source, options)
    if Path(name).expanduser().is_dir() or (name.count("/") == 1 and not name.startswith((".", "/", "~"))):
        return _load(name, options)
    if "/" in name:
        raise TrajOODError(f"model {name!r}: no such folder; expected one with config.json and model.safetensors")
    raise unknown_name("model", name, MODELS)


def _load(source: str, options: dict[str, Any]) -> Autoencoder:
    folder = Path(source).expanduser()
    family: Any = ViTMAE
    if folder.is_dir():
        try:
            kind = json.loads((folder / "config.json").read_text())["model_type"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TrajOODError(f"{folder}: expected a config.json with a model_type ({error!r})") from error
        if kind not in _FAMILIES:
            raise unknown_name("model family", str(kind), _FAMILIES)
        family = _FAMILIES[kind]
    try:
        return family.from_pretrained(folder if folder.is_dir() else source, **options)
    except TypeError as error:
        if "unexpected keyword" in str(error):
            raise TrajOODError(f"model {source!r} ({family.family}): {str(error).split(') ')[-1]}") from error
        raise
