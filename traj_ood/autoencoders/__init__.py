"""Autoencoders by name: the protocol, one file per family, and the loader."""

from __future__ import annotations

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
from traj_ood.autoencoders.diffusers_vae import FILES as DIFFUSERS_FILES
from traj_ood.autoencoders.diffusers_vae import DiffusersVAE
from traj_ood.autoencoders.hub import local_copy, read_config
from traj_ood.autoencoders.language import PREFIX as LANGUAGE_PREFIX
from traj_ood.autoencoders.pairs import MODEL_TYPE as PAIR_TYPE
from traj_ood.autoencoders.pairs import PairAutoencoder
from traj_ood.autoencoders.surrogate import SurrogateAutoencoder, SurrogateNetwork
from traj_ood.autoencoders.vit_mae import ViTMAE
from traj_ood.errors import TrajOODError, unknown_name
from traj_ood.io.provenance import PACKAGE

__all__ = [
    "FEATURE_VIEWS",
    "MODELS",
    "VIEWS",
    "Autoencoder",
    "CallableAutoencoder",
    "ConvAutoencoder",
    "ConvNetwork",
    "DiffusersVAE",
    "Encoding",
    "FeatureView",
    "ModelInfo",
    "PairAutoencoder",
    "SurrogateAutoencoder",
    "SurrogateNetwork",
    "ViTMAE",
    "View",
    "load_autoencoder",
]

_BUNDLED = PACKAGE / "models"


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
    "sd-vae": ModelInfo(
        "diffusers:CompVis/stable-diffusion-v1-4/vae", "the paper's Stable Diffusion autoencoder, 84 M, from the hub"
    ),
    "sdxl-vae": ModelInfo("diffusers:stabilityai/sdxl-vae", "SDXL's autoencoder, 84 M parameters, from the hub"),
    "rae-dinov2": ModelInfo(
        "diffusers:nyu-visionx/RAE-dinov2-wReg-base-ViTXL-n08", "DINOv2 base with RAE's ViT-XL decoder, from the hub"
    ),
    "rae-siglip2": ModelInfo(
        "diffusers:nyu-visionx/RAE-siglip2-base-p16-i256-ViTXL-n08",
        "SigLIP2 base with RAE's ViT-XL decoder, from the hub",
    ),
}

DIFFUSERS = "diffusers:"
_FAMILIES = {
    "vit_mae": ViTMAE,
    "traj_ood_conv": ConvAutoencoder,
    "traj_ood_surrogate": SurrogateAutoencoder,
    PAIR_TYPE: PairAutoencoder,
}
_DIFFUSERS_FAMILIES: dict[str, type[DiffusersVAE] | type[PairAutoencoder]] = {
    "AutoencoderKL": DiffusersVAE,
    "AutoencoderRAE": PairAutoencoder,
}


def load_autoencoder(model: str | Path, **options: Any) -> Autoencoder:
    """An autoencoder by registered name, local folder, hub name (``owner/name``, a ViT-MAE), or ``diffusers:SOURCE``.

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
    if name.startswith(DIFFUSERS):
        return _load_diffusers(name.removeprefix(DIFFUSERS), options)
    if name.startswith(LANGUAGE_PREFIX):
        raise TrajOODError(f"model {name!r}: a language model has no images: only traj-ood analyze dynamics takes it")
    if Path(name).expanduser().is_dir() or (name.count("/") == 1 and not name.startswith((".", "/", "~"))):
        return _load(name, options)
    if "/" in name:
        raise TrajOODError(f"model {name!r}: no such folder; expected one with config.json and model.safetensors")
    raise unknown_name("model", name, MODELS)


def _load(source: str, options: dict[str, Any]) -> Autoencoder:
    folder = Path(source).expanduser()
    family: Any = ViTMAE
    if folder.is_dir():
        config = _read_config(folder)
        if "_class_name" in config and "model_type" not in config:
            return _load_diffusers(source, options)
        kind = config.get("model_type")
        if kind not in _FAMILIES:
            raise unknown_name("model family", str(kind), _FAMILIES)
        family = _FAMILIES[kind]
    return _built(family, str(folder) if folder.is_dir() else source, options)


def _load_diffusers(source: str, options: dict[str, Any]) -> Autoencoder:
    """A folder or repository in diffusers' layout; of a whole pipeline on disk its ``vae``."""
    folder = local_copy(source, DIFFUSERS_FILES)
    if (folder / "model_index.json").is_file() and (folder / "vae").is_dir():
        folder = folder / "vae"
    options.setdefault("name", Path(source).expanduser().name if Path(source).expanduser().is_dir() else source)
    kind = str(_read_config(folder).get("_class_name"))
    if kind not in _DIFFUSERS_FAMILIES:
        raise unknown_name("diffusers autoencoder", kind, _DIFFUSERS_FAMILIES)
    return _built(_DIFFUSERS_FAMILIES[kind], str(folder), options)


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = read_config(folder)
    except TrajOODError as error:
        raise TrajOODError(f"{folder}: expected a config.json with a model_type ({error})") from error
    if not config.keys() & {"model_type", "_class_name"}:
        raise TrajOODError(f"{folder}: expected a config.json with a model_type, found none in it")
    return config


def _built(family: Any, source: str, options: dict[str, Any]) -> Autoencoder:
    try:
        return family.from_pretrained(source, **options)
    except TypeError as error:
        if "unexpected keyword" in str(error):
            raise TrajOODError(f"model {source!r} ({family.family}): {str(error).split(') ')[-1]}") from error
        raise
