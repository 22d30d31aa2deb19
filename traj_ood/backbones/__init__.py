"""Frozen backbones by name: one file per library, and the loader."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from traj_ood.backbones.base import Backbone, CallableBackbone, Features
from traj_ood.errors import TrajOODError, unknown_name

__all__ = ["LIBRARIES", "Backbone", "CallableBackbone", "Features", "is_backbone_spec", "load_backbone"]

# Library → module of this folder with ``load(rest of the spec, **options)``. Imported on demand: each is heavy.
LIBRARIES = {
    "timm": "timm_models",
    "torchvision": "torchvision_models",
    "transformers": "transformers_models",
    "openood": "openood_networks",
}


def is_backbone_spec(model: str) -> bool:
    """Whether ``model`` names a backbone, such as ``timm:resnet18``, rather than an autoencoder."""
    return ":" in model and model.split(":", 1)[0] in LIBRARIES


def load_backbone(spec: str, **options: Any) -> Backbone:
    """A frozen backbone by library and name, in eval mode on the CPU.

    Args:
        spec: ``timm:<name>[:<weights file>]`` or ``timm:<folder>``; ``torchvision:<name>[:<weights file>]``;
            ``transformers:<hub name or folder>``; ``openood:<network>:<checkpoint>``.
        options: of the library's loader, such as ``size=224``; see its module.
    Raises:
        TrajOODError: unknown library, name or option (with near ones); weights that are missing, damaged or of another
            architecture; no network for a download.
    """
    library, _, rest = spec.partition(":")
    if library not in LIBRARIES:
        raise unknown_name("backbone library", library, LIBRARIES)
    if not rest:
        raise TrajOODError(f"backbone {spec!r}: expected a name after {library}:, such as timm:resnet18")
    load = import_module(f"traj_ood.backbones.{LIBRARIES[library]}").load
    try:
        return load(rest, **options)
    except TypeError as error:
        if "unexpected keyword" in str(error):
            raise TrajOODError(f"backbone {spec!r}: {str(error).split(') ')[-1]}") from error
        raise
