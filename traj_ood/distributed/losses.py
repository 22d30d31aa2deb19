"""Losses that Ray does not recover from by itself: a node that is lost with the rows that it held."""

from __future__ import annotations

import time
from importlib import import_module
from typing import Any

_PATIENCE = 60.0
"""Seconds until Ray has noticed that a node is lost: about 15 where its address refuses connections, more where it is
silent."""


def is_loss(error: BaseException) -> bool:
    """Whether ``error``, or a cause of it, is the loss of a node, a worker or an object. A worker that fails to start,
    or whose code fails, is not a loss: it would fail again."""
    errors = import_module("ray.exceptions")
    kinds = (errors.RayActorError, errors.ObjectLostError, errors.NodeDiedError, errors.WorkerCrashedError)
    seen: list[BaseException] = []
    waiting: list[Any] = [error]
    while waiting:
        one = waiting.pop()
        if not isinstance(one, BaseException) or any(one is earlier for earlier in seen):
            continue
        if isinstance(one, kinds):
            return not getattr(one, "actor_init_failed", False)
        seen.append(one)
        waiting += [one.__cause__, getattr(one, "cause", None)]
    return False


def living(ray: Any) -> int:
    """The number of nodes that Ray believes to be alive."""
    return sum(bool(node["Alive"]) for node in ray.nodes())


def wait_until_noticed(ray: Any, nodes: int) -> None:
    """Wait until fewer than ``nodes`` nodes are alive, for at most a minute: tasks started before would be sent to the
    lost node."""
    deadline = time.monotonic() + _PATIENCE
    while living(ray) >= nodes and time.monotonic() < deadline:
        time.sleep(0.5)
