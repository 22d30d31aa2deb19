"""Store of finished parts of a long computation, one file per part: an interruption loses at most one part."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from traj_ood.errors import TrajOODError
from traj_ood.io.provenance import code_digest
from traj_ood.io.tensor_file import open_tensors, write_tensors
from traj_ood.io.trees import read_json, write_json


@dataclass(frozen=True)
class Part:
    """The result for one batch."""

    ids: tuple[str, ...] = ()  # of the images that were read
    failures: list[dict[str, str]] = field(default_factory=list)  # {id, error} of those that could not be
    tensors: Mapping[str, Tensor] = field(default_factory=dict)  # by name, each with one row per id
    notes: Mapping[str, Any] = field(default_factory=dict)  # further JSON values


class PartStore:
    """Parts by key, stored in ``folder/<key>.safetensors``; each is complete or absent.

    A part that another version of the code has computed counts as absent.

    Args:
        folder: where the parts are stored.
        what: what a part is called in messages, such as ``unit of work``.
        redo: completes the advice on a damaged part, "delete this file to …", such as ``compute it again``.
        index: name of the JSON file that records which computation the parts belong to, see :meth:`claim`.
        discard: advice on a folder whose JSON file is damaged or belongs to another computation.
        code: returns the digest of the code that decides the parts. Default: that of the whole package and the user's
            imports.
    """

    def __init__(
        self,
        folder: Path,
        what: str,
        redo: str,
        index: str = "",
        discard: str = "",
        code: Callable[[], str] | None = None,
    ) -> None:
        self.folder = folder
        self._code = code or code_digest
        self._what, self._fix, self._index, self._discard = what, f"delete this file to {redo}", index, discard
        self._believed: set[str] | None = None

    def distrust(self) -> None:
        """Ignore all parts that were stored before; only those that this object saves from now on count."""
        self._believed = set()

    # ------------------------------------------------------------------ identity of the computation

    def index(self, group: str = "") -> Path:
        """Path of the JSON file for the parts whose keys begin with ``group/``; by default, for those without group."""
        return self.folder / group / self._index

    def open(self, identity: Mapping[str, Any], group: str = "") -> dict[str, Any]:
        """The recorded identity of the computation that the parts belong to, which has the keys of ``identity``; a new
        folder is given ``identity``."""
        path = self.index(group)
        if not path.is_file():
            strangers = sorted(path.parent.glob("*.safetensors"))
            if strangers and not path.is_file():  # another process may have written it meanwhile
                raise TrajOODError(f"{strangers[0]}: expected {path.name} beside it, found nothing: {self._discard}")
            self.claim(identity, group)
        stored = read_json(path, "what its parts belong to", self._discard)
        if stored.keys() != identity.keys():
            raise TrajOODError(f"{path}: damaged or of another version: {self._discard}")
        return stored

    def claim(self, identity: Mapping[str, Any], group: str = "") -> None:
        """Record ``identity`` (JSON data; other objects are written as text) as the computation that the parts belong
        to, replacing any earlier record."""
        write_json(self.index(group), identity, sort_keys=True, default=str)

    # ------------------------------------------------------------------ parts

    def has(self, key: str) -> bool:
        """Whether a part has been saved."""
        return self._path(key).is_file() and (self._believed is None or key in self._believed)

    def save(self, key: str, part: Part) -> None:
        """Save a part."""
        header = {"part": key, "code": self._code(), "ids": part.ids, "failures": part.failures, "notes": part.notes}
        write_tensors(self._path(key), part.tensors, header)
        if self._believed is not None:
            self._believed.add(key)

    def load(self, key: str) -> Part | None:
        """The part of this key, or None if it has not been computed by this code."""
        if not self.has(key):
            return None
        with open_tensors(self._path(key), self._what, self._fix) as file:
            header = file.header
            if header.get("code") != self._code():
                return None
            if header["part"] != key:
                raise ValueError(f"it contains the part {header['part']}")
            return Part(tuple(header["ids"]), header["failures"], file.tensors, header["notes"])

    def get(self, key: str) -> Part:
        """The part of this key, which another process has finished."""
        part = self.load(key)
        if part is None:
            raise TrajOODError(
                f"{self._path(key)}: expected the {self._what} that another process has finished, found no file: check "
                "that all processes share this folder, and start the same command again"
            )
        return part

    def remove(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"
