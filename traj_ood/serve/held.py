"""The detector that is being served, and the one that takes its place."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from traj_ood.detector import FILE_NAME, Detector
from traj_ood.detector.decision import Decision, decide_all
from traj_ood.errors import TrajOODError
from traj_ood.io.files import folder_errors


class Held:
    """A detector in use. A folder is loaded only when its seal holds, and looked at again by :meth:`reload`.

    Attributes:
        detector: in use now.
        digest: first 16 hex digits of the SHA-256 of its record; ``memory`` for one that came from no folder.
        judge: decisions of prepared images (C, H, W); another object for every detector.
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
        if isinstance(source, Detector):
            self._take(source, "memory")
        else:
            self._take(*self._load())

    def reload(self) -> bool:
        """Whether the folder has changed and another detector is in use now. One that is damaged, newer than this
        program or without its seal is not taken: the one in use stays, and ``failure`` says why."""
        stamp = self._stamp()
        if self._folder is None or stamp == self._seen:
            return False
        self._seen = stamp
        try:
            self._take(*self._load())
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

    def _take(self, detector: Detector, digest: str) -> None:
        with torch.no_grad():
            detector.score(torch.zeros(1, *detector.autoencoder.input_shape))  # what is made at first use is made now
        self.detector, self.digest = detector, digest
        self.judge: Callable[[Sequence[Tensor]], list[Decision]] = partial(decide_all, detector.judge)

    def _stamp(self) -> tuple[int, ...]:
        """What changes when the folder is replaced."""
        try:
            status = (self._folder / FILE_NAME).stat() if self._folder else None
        except OSError:
            return ()
        return (status.st_mtime_ns, status.st_ino, status.st_size) if status else ()
