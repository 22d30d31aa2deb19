"""Autoencoders: the base class, one file per family, each of which registers itself on import, and the loader."""

from traj_ood.autoencoders.base import (
    VIEWS,
    Autoencoder,
    CallableAutoencoder,
    Encoding,
    FeatureView,
    ModelInfo,
    View,
)
from traj_ood.autoencoders.conv import ConvAutoencoder, ConvNetwork
from traj_ood.autoencoders.diffusers_vae import DiffusersVAE
from traj_ood.autoencoders.pairs import PairAutoencoder
from traj_ood.autoencoders.registry import FAMILIES, MODELS, check_autoencoder, load_autoencoder, register_autoencoder
from traj_ood.autoencoders.surrogate import SurrogateAutoencoder, SurrogateNetwork
from traj_ood.autoencoders.vit_mae import ViTMAE

__all__ = [
    "FAMILIES",
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
    "check_autoencoder",
    "load_autoencoder",
    "register_autoencoder",
]
