"""Tells a user who passed something else than a model how to make one of it."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from traj_ood.autoencoders.base import Autoencoder
from traj_ood.backbones import Backbone
from traj_ood.errors import TrajOODError


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
