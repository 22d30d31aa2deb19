"""Record which user code a detector needs, and name it in an error if it has not been imported.

The record is information only: no code is run because a detector's folder names it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from traj_ood.autoencoders import FAMILIES, Autoencoder
from traj_ood.errors import TrajOODError, warn
from traj_ood.io.extensions import load_plugins, origin_of
from traj_ood.scorers import SCORERS, Scorer

_FIELDS = ("module", "file", "sha256")


def origin(thing: Scorer | Autoencoder) -> dict[str, Any]:
    """``{"origin": {module, file, sha256}}`` for a scorer or model defined in user code, else an empty dict."""
    found = origin_of(type(thing))
    return {} if found is None else {"origin": found}


def check_origin(described: Mapping[str, Any], name: str, kind: str, where: str) -> None:
    """Check that the user-defined scorer or model family (``kind``) ``name``, described by the record in the file
    ``where``, is registered; warn if its file has changed."""
    stored = described.get("origin")
    if not isinstance(stored, Mapping):
        return
    module, file, digest = (str(stored.get(key, "")) for key in _FIELDS)
    registry: Mapping[str, type[Any]] = SCORERS if kind == "scorer" else FAMILIES
    if name not in registry:
        load_plugins("traj_ood.scorers" if kind == "scorer" else "traj_ood.models", name)
    known = registry.get(name)
    source, content = (f"{file} (SHA-256 {digest[:16]}…)", digest) if file else (f"module {module}", "")
    if known is None:
        raise TrajOODError(
            f"{where}: its {kind} {name!r} is defined in {source}, which is not imported: give --import "
            f"{file or module} with its path, or import it in Python before"
        )
    here = origin_of(known) or {}
    if content and here.get("sha256") != content:
        other = here.get("file", known.__module__)
        warn(
            f"{where}: its {kind} {name!r} is defined in {source}, and {other} here is not the same file: results on "
            "two test images are compared, others may differ",
            stacklevel=5,
        )
