"""The detector in use by the service, and its replacement while the service runs."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from traj_ood.detector import FILE_NAME, Detector
from traj_ood.detector.decision import Decision, decide_all
from traj_ood.errors import TrajOODError
from traj_ood.io.files import folder_errors


@dataclass(frozen=True, eq=False)
class Serving:
    """A detector in use; a request keeps the same one from start to end."""

    detector: Detector
    digest: str  # first 16 hex digits of the SHA-256 of its record; "memory" if it was not loaded from a folder
    judge: Callable[[Sequence[Tensor]], list[Decision]]  # of prepared images; another object for every detector


class Held:
    """The detector in use. A folder is loaded only if its seal is intact, and checked for changes by :meth:`reload`.

    ``now`` is replaced as a whole, because other threads read it during a reload. ``failure`` says why the folder's
    current content is not in use.
    """

    def __init__(self, source: Detector | str | Path, device: str = "auto") -> None:
        self._folder = None if isinstance(source, Detector) else Path(source).expanduser()
        self._device, self.failure = device, ""
        self._seen = self._stamp()
        self.now = _serving(source, "memory") if isinstance(source, Detector) else _serving(*self._load())

    def reload(self) -> bool:
        """Load the folder's detector if it has changed; returns whether another detector is in use now.

        A detector that is damaged, incomplete, unsealed or of a newer schema is not used: the current one stays in use,
        ``failure`` says why, and the next change of any file in the folder starts another attempt.
        """
        stamp = self._stamp()
        if self._folder is None or stamp == self._seen:
            return False
        self._seen = stamp
        try:
            self.now = _serving(*self._load())
        except TrajOODError as error:
            self.failure = str(error)
            return False
        self.failure = ""
        return True

    def _load(self) -> tuple[Detector, str]:
        """Load the detector from a private copy of its folder. Tensors are memory-mapped: writing into the original
        files would otherwise change the model in use, and truncating them would crash the process."""
        assert self._folder is not None
        with tempfile.TemporaryDirectory(prefix="traj_ood-serve-") as place:
            copy = Path(place) / "detector"
            if self._folder.is_dir():
                with folder_errors(copy, "a copy of the detector"):
                    shutil.copytree(self._folder, copy, symlinks=True)
            record = copy / FILE_NAME
            digest = hashlib.sha256(record.read_bytes() if record.is_file() else b"").hexdigest()[:16]
            try:
                return Detector.load(copy, device=self._device), digest
            except TrajOODError as error:
                raise TrajOODError(str(error).replace(str(copy), str(self._folder))) from error

    def _stamp(self) -> tuple[tuple[str, int, int, int], ...]:
        """Path, modification time, inode and size of every file in the folder: the last file that a copy writes may be
        another one than the record."""
        found = []
        try:
            for path in sorted(self._folder.rglob("*")) if self._folder else ():
                status = path.lstat()
                found.append((str(path), status.st_mtime_ns, status.st_ino, status.st_size))
        except OSError:  # the folder is being replaced
            return ()
        return tuple(found)


def _serving(detector: Detector, digest: str) -> Serving:
    with torch.no_grad():
        detector.score(torch.zeros(1, *detector.autoencoder.input_shape))  # warm-up, before the first request
    return Serving(detector, digest, partial(decide_all, detector.judge))
