"""Locates the files of a model: a local folder, or a local copy of a Hugging Face hub repository."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from traj_ood.errors import TrajOODError, foreign_errors
from traj_ood.io.pretrained import is_local
from traj_ood.io.trees import MAX_CONFIG, field_of, read_json

DOWNLOAD = "download it on a machine with a network and pass the folder"
"""The remedy for a model that cannot be downloaded."""
PROCESSOR = "preprocessor_config.json"
OPTIONS = "traj_ood.json"
"""The file of a saved model with the options that its library's own files do not have."""


def local_copy(source: str, files: Sequence[str]) -> Path:
    """The local folder with the files of ``source``: a local folder, or ``owner/name`` on the hub, of which a copy is
    made in the hub's own cache.

    A third part is a folder of the repository (``stabilityai/stable-diffusion-xl-base-1.0/vae``). ``files`` are names
    or patterns of the files to download; pickled weights should not be among them.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    parts = source.split("/")
    if is_local(source) or len(parts) not in (2, 3) or not all(parts):
        raise TrajOODError(
            f"model {source!r}: no such folder; expected a folder, or owner/name or owner/name/folder on the hub"
        )
    from huggingface_hub import snapshot_download

    inner = parts[2] if len(parts) == 3 else ""
    patterns = [f"{inner}/{file}" if inner else file for file in files]
    with foreign_errors(f"model {source!r}: neither a local folder nor available from the hub", f"; {DOWNLOAD}"):
        copy = snapshot_download("/".join(parts[:2]), allow_patterns=patterns)
    if not (Path(copy) / inner).is_dir():
        raise TrajOODError(f"model {source!r}: the repository {'/'.join(parts[:2])} has no folder {inner!r}")
    return Path(copy) / inner


def name_of(source: str | Path) -> str:
    """The default name of a model: that of its folder, also for ``.`` and ``..``, or its name on the hub."""
    folder = Path(source).expanduser()
    return Path(os.path.abspath(folder)).name if folder.is_dir() else str(source)


def stored_options(folder: Path, kinds: Mapping[str, type]) -> dict[str, Any]:
    """The options in :data:`OPTIONS` of a folder, with their types; none if it has no such file."""
    path = folder / OPTIONS
    tree = read_json(path, "options of a model", "correct or delete it", limit=MAX_CONFIG) if path.is_file() else {}
    return {key: field_of(tree, key, kind, str(path)) for key, kind in kinds.items() if key in tree}


def read_config(folder: Path, file: str = "config.json", what: str = "the config of a model") -> dict[str, Any]:
    """Read a JSON file of a model's folder, called ``what`` in messages."""
    return read_json(folder / file, what, "correct the folder", limit=MAX_CONFIG)
