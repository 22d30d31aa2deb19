"""The registry of backbone libraries, and loading by a spec ``library:source``."""

from __future__ import annotations

from typing import Any

from traj_ood.backbones.base import Backbone
from traj_ood.dynamics.device import standard_settings
from traj_ood.errors import TrajOODError
from traj_ood.io.families import Families

LIBRARIES: Families[Backbone] = Families(
    Backbone, "backbone library", "backbone", "library", ("load", "pack", "unpack")
)
register_backbone = LIBRARIES.register


def is_backbone_spec(model: str) -> bool:
    """Whether ``model`` names a backbone, such as ``timm:resnet18``, rather than an autoencoder."""
    return ":" in model and LIBRARIES.knows(model.split(":", 1)[0])


@standard_settings()
def load_backbone(spec: str, **options: Any) -> Backbone:
    """Load a frozen backbone by library and name, in evaluation mode on the CPU.

    Args:
        spec: ``timm:<name>[:<weights file>]`` or ``timm:<folder>``; ``torchvision:<name>[:<weights file>]``;
            ``transformers:<hub name or folder>``; ``openood:<network>:<checkpoint>``; or ``library:source`` of a
            library that you registered, see :func:`register_backbone`.
        options: of the library's ``load``, such as ``input_size=224``.
    Raises:
        TrajOODError: unknown library, name or option (the message lists similar ones); weights that are missing,
            damaged or of another architecture; no network for a download.
    """
    if not isinstance(spec, str):
        raise TrajOODError(
            f"load_backbone: expected text such as timm:resnet50, got {type(spec).__name__}: wrap a network of your "
            "own in a traj_ood.CallableBackbone"
        )
    return LIBRARIES.load(spec, options)
