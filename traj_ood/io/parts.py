"""The unfinished half of a run: one file per scored batch, so that an interruption loses one batch at most."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from traj_ood.errors import TrajOODError
from traj_ood.io.files import write_atomic
from traj_ood.io.weights import digest_of

_DIGEST = "sha256"


@dataclass(frozen=True)
class Part:
    """One batch: the ids that were read, the failures ({id, error}), tensors with one row per id, and plain notes."""

    ids: tuple[str, ...]
    failures: list[dict[str, str]]
    tensors: dict[str, Tensor]
    notes: dict[str, Any]


class PartFolder:
    """``folder/<split>-<first index>.safetensors`` and ``folder/run.json``, which says whose parts these are."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def is_open(self) -> bool:
        return (self._folder / "run.json").is_file()

    def open(self, identity: dict[str, Any]) -> dict[str, Any]:
        """Claim the folder for a run, or return the identity of the unfinished run it belongs to.

        Raises:
            TrajOODError: the folder cannot be written, or its run.json is damaged.
        """
        path = self._folder / "run.json"
        if path.is_file():
            try:
                stored = json.loads(path.read_text())
            except (ValueError, RecursionError):
                stored = None
            if not isinstance(stored, dict) or stored.keys() != identity.keys():
                raise TrajOODError(f"{path}: damaged or of another version: discard the unfinished run with --fresh")
            return stored
        self.claim(identity)
        return json.loads(json.dumps(identity))

    def claim(self, identity: dict[str, Any]) -> None:
        """Say whose parts these are, whatever was said before.

        Raises:
            TrajOODError: the folder cannot be written.
        """
        write_atomic(self._folder / "run.json", json.dumps(identity, indent=2, sort_keys=True).encode())

    def has(self, split: str, start: int) -> bool:
        """Whether that batch has been computed."""
        return self._path(split, start).is_file()

    def save(self, split: str, start: int, part: Part) -> None:
        header = {k: json.dumps(getattr(part, k)) for k in ("ids", "failures", "notes")}
        tensors = {k: v.contiguous().clone() for k, v in part.tensors.items()}  # safetensors refuses shared memory
        header[_DIGEST] = digest_of(tensors, header)
        write_atomic(self._path(split, start), save(tensors, metadata=header))

    def load(self, split: str, start: int) -> Part | None:
        """The part, or None when that batch has not been computed.

        Raises:
            TrajOODError: the file is damaged.
        """
        path = self._path(split, start)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata()
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
            expected = header.pop(_DIGEST, None)  # parts of older versions have none
            if expected is not None and expected != digest_of(tensors, header):
                raise ValueError("its content has changed since it was written")
            ids = tuple(json.loads(header["ids"]))
            return Part(ids, json.loads(header["failures"]), tensors, json.loads(header["notes"]))
        except Exception as error:
            raise TrajOODError(f"{path}: damaged ({error}): delete this file to compute its batch again") from error

    def get(self, split: str, start: int) -> Part:
        """The part of a batch that is known to be finished.

        Raises:
            TrajOODError: the file is absent or damaged.
        """
        part = self.load(split, start)
        if part is None:
            raise TrajOODError(
                f"{self._path(split, start)}: expected the batch that another process has finished, found no file: "
                "check that all processes share this folder, and start the same command again"
            )
        return part

    def remove(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self, split: str, start: int) -> Path:
        return self._folder / f"{split}-{start:08d}.safetensors"
