"""The detector that is being served, and the one that takes its place."""

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
    """A detector with what a request needs of it: a request keeps one from its beginning to its end.

    Attributes:
        detector: a detector.
        digest: first 16 hex digits of the SHA-256 of its record; ``memory`` for one that came from no folder.
        judge: decisions of prepared images (C, H, W); another object for every detector.
    """

    detector: Detector
    digest: str
    judge: Callable[[Sequence[Tensor]], list[Decision]]


class Held:
    """A detector in use. A folder is loaded only when its seal holds, and looked at again by :meth:`reload`.

    Attributes:
        now: the detector in use; replaced as a whole, since threads read it while another one reloads.
        failure: why the folder as it is now was not taken; empty while it is in use.
    """

    def __init__(self, source: Detector | str | Path, device: str = "auto") -> None:
        """``source``: a detector, or its folder.

        Raises:
            TrajOODError: as :meth:`traj_ood.Detector.load`.
        """
        self._folder = None if isinstance(source, Detector) else Path(source).expanduser()
        self._device, self.failure = device, ""
        self._seen = self._stamp()
        self.now = _serving(source, "memory") if isinstance(source, Detector) else _serving(*self._load())

    def reload(self) -> bool:
        """Whether the folder has changed and another detector is in use now. One that is damaged, half written, newer
        than this program or without its seal is not taken: the one in use stays, ``failure`` says why, and the next
        change of any file is another try."""
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
        """From a private copy: tensors are mapped from their files, and whoever writes into the folder, in place of
        replacing it, would otherwise write into the model, or end the process where a file gets shorter."""
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
        """What changes when any file of the folder does: a copy that is under way ends with another file than the
        record, and is to be taken then."""
        found = []
        try:
            for path in sorted(self._folder.rglob("*")) if self._folder else ():
                status = path.lstat()
                found.append((str(path), status.st_mtime_ns, status.st_ino, status.st_size))
        except OSError:  # it is being replaced
            return ()
        return tuple(found)


def _serving(detector: Detector, digest: str) -> Serving:
    with torch.no_grad():
        detector.score(torch.zeros(1, *detector.autoencoder.input_shape))  # what is made at first use is made now
    return Serving(detector, digest, partial(decide_all, detector.judge))
