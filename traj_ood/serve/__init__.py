"""A detector behind HTTP: bounded in everything, batched across clients, watched, and reloaded while it runs."""

from traj_ood.serve.app import create_app
from traj_ood.serve.held import Held
from traj_ood.serve.limits import Budget, Limits, RefusedError

__all__ = ["Budget", "Held", "Limits", "RefusedError", "create_app"]
