"""What a long computation has finished: one file per part, so that an interruption loses one part at most."""

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
    """One batch: the ids that were read, the failures ({id, error}), tensors with one row per id, and plain notes."""

    ids: tuple[str, ...] = ()
    failures: list[dict[str, str]] = field(default_factory=list)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)


class PartStore:
    """``folder/<key>.safetensors``: parts by key, each whole or absent.

    A part that other code of this package has computed counts as absent. A folder of parts may say in a JSON file whose
    they are, see :meth:`claim`.

    Args:
        folder: made with the first part.
        what: a part is, for errors: ``batch of a run``.
        redo: what deleting a damaged part makes happen, for errors: ``compute it again``.
        index: name of the JSON file. discard: how to be rid of a folder with another or a damaged one, for errors.
        code: the digest of the code that decides what is in the parts. Default: all of it, with what a user imported.
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
        self._code = code or (lambda: code_digest())
        self._what, self._fix, self._index, self._discard = what, f"delete this file to {redo}", index, discard
        self._believed: set[str] | None = None

    def distrust(self) -> None:
        """From now on believe only the parts that this object writes."""
        self._believed = set()

    # ------------------------------------------------------------------ whose parts they are

    def index(self, group: str = "") -> Path:
        """The JSON file of the parts whose keys begin with ``group/``; by default, of those without a group."""
        return self.folder / group / self._index

    def open(self, identity: Mapping[str, Any], group: str = "") -> dict[str, Any]:
        """The identity of the computation that the parts belong to: ``identity``, where nobody has claimed them yet.

        Raises:
            TrajOODError: the folder cannot be written, its identity is damaged or has other keys, or there are parts
                without one.
        """
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
        """Say whose parts these are, whatever was said before.

        Args:
            identity: plain data for JSON; what is none is written as text.
        Raises:
            TrajOODError: the folder cannot be written.
        """
        write_json(self.index(group), identity, sort_keys=True, default=str)

    # ------------------------------------------------------------------ parts

    def has(self, key: str) -> bool:
        """Whether a part has been written."""
        return self._path(key).is_file() and (self._believed is None or key in self._believed)

    def save(self, key: str, part: Part) -> None:
        """Write a part.

        Raises:
            TrajOODError: the folder cannot be written.
        """
        header = {"part": key, "code": self._code(), "ids": part.ids, "failures": part.failures, "notes": part.notes}
        write_tensors(self._path(key), part.tensors, header)
        if self._believed is not None:
            self._believed.add(key)

    def load(self, key: str) -> Part | None:
        """A part, or None where it has not been computed.

        Raises:
            TrajOODError: its file is damaged, or that of another part.
        """
        if not self.has(key):
            return None
        with open_tensors(self._path(key), self._what, self._fix) as file:
            header = file.header
            if header.get("code") != self._code():
                return None
            if header["part"] != key:
                raise ValueError(f"it is that of {header['part']}")
            return Part(tuple(header["ids"]), header["failures"], file.tensors, header["notes"])

    def get(self, key: str) -> Part:
        """A part that is known to be finished.

        Raises:
            TrajOODError: its file is absent or damaged.
        """
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
