"""Files of a model on this machine: a local folder as it is, or a copy from the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from traj_ood.errors import TrajOODError, foreign_errors
from traj_ood.io.trees import MAX_CONFIG, read_json

DOWNLOAD = "download it where there is a network and pass the folder"
"""What to do about a model that cannot be fetched here."""


def local_copy(source: str, files: Sequence[str]) -> Path:
    """The folder that holds ``files`` of ``source``.

    Args:
        source: a local folder, or ``owner/name`` on the hub, where a third part names a folder of the repository
            (``stabilityai/stable-diffusion-xl-base-1.0/vae``). Copies are kept in the hub's own cache.
        files: names or patterns; of a hub repository nothing else is fetched. Pickled weights should not be among them.
    Raises:
        TrajOODError: no such folder, no network, no such repository.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    parts = source.split("/")
    if source.startswith((".", "/", "~")) or len(parts) not in (2, 3) or not all(parts):
        raise TrajOODError(
            f"model {source!r}: no such folder; expected one, or owner/name or owner/name/folder of the hub"
        )
    from huggingface_hub import snapshot_download

    inner = parts[2] if len(parts) == 3 else ""
    patterns = [f"{inner}/{file}" if inner else file for file in files]
    with foreign_errors(f"model {source!r}: neither a local folder nor to be had from the hub", f"; {DOWNLOAD}"):
        copy = snapshot_download("/".join(parts[:2]), allow_patterns=patterns)
    if not (Path(copy) / inner).is_dir():
        raise TrajOODError(f"model {source!r}: the repository {'/'.join(parts[:2])} has no folder {inner!r}")
    return Path(copy) / inner


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a model.

    Raises:
        TrajOODError: missing, not JSON, or no object.
    """
    return read_json(folder / "config.json", "the config of a model", "correct the folder", limit=MAX_CONFIG)
