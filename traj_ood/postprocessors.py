"""Deprecated alias of :mod:`traj_ood.scorers`; every access warns with a ``DeprecationWarning``."""

from __future__ import annotations

import warnings
from typing import Any

from traj_ood import scorers

_FORMER = {
    "POSTPROCESSORS": "SCORERS",
    "Postprocessor": "Scorer",
    "create_postprocessor": "create_scorer",
    "create_postprocessors": "create_scorers",
}


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    found = getattr(scorers, _FORMER.get(name, name))
    warnings.warn(f"traj_ood.postprocessors is now traj_ood.scorers: import {name} from there", DeprecationWarning, 2)
    return found
