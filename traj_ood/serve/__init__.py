"""Serve a detector over HTTP, with limits on every resource, batching across clients, metrics and reloading."""

from traj_ood.serve.app import create_app
from traj_ood.serve.held import Held
from traj_ood.serve.limits import Budget, Limits, RefusedError

__all__ = ["Budget", "Held", "Limits", "RefusedError", "create_app"]
