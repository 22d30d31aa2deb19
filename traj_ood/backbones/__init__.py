"""Frozen backbones: the base class, one file per library, each of which registers itself on import, and the loader."""

from traj_ood.backbones.base import Backbone, CallableBackbone, Features
from traj_ood.backbones.openood_networks import OpenOODBackbone
from traj_ood.backbones.registry import LIBRARIES, is_backbone_spec, load_backbone, register_backbone
from traj_ood.backbones.timm_models import TimmBackbone
from traj_ood.backbones.torchvision_models import TorchvisionBackbone
from traj_ood.backbones.transformers_models import TransformersClassifier, TransformersEncoder

__all__ = [
    "LIBRARIES",
    "Backbone",
    "CallableBackbone",
    "Features",
    "OpenOODBackbone",
    "TimmBackbone",
    "TorchvisionBackbone",
    "TransformersClassifier",
    "TransformersEncoder",
    "is_backbone_spec",
    "load_backbone",
    "register_backbone",
]
