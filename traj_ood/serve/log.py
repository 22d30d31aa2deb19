"""Rows of all that was judged, for `traj-ood monitor`: names and numbers, no images."""

from __future__ import annotations

import errno
import io
import json
import os
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from traj_ood.detector import refuse_inside
from traj_ood.detector.decision import Decision
from traj_ood.io.files import folder_errors


class RowLog:
    """JSON lines in ``folder/<digest of the detector>/<day>.jsonl``: a stream for each detector.

    A line is written at once and whole, so that a monitor reads the file while it grows.

    Raises:
        TrajOODError: a folder that cannot be written, or lies in a detector.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        refuse_inside(folder)
        with folder_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def write(self, digest: str, names: Sequence[str], said: Sequence[Decision]) -> None:
        """One row for each image.

        Raises:
            TrajOODError: they cannot be written; none of them is in the file then.
        """
        now = datetime.now(timezone.utc)
        at = now.isoformat(timespec="milliseconds")
        lines = [json.dumps({"path": n, **one.as_dict(), "at": at}) + "\n" for n, one in zip(names, said, strict=True)]
        path = self._folder / digest / f"{now:%Y-%m-%d}.jsonl"
        with folder_errors(path.parent, path.name):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "ab", buffering=0) as file:
                append(file, "".join(lines).encode())


def append(file: io.FileIO, data: bytes) -> None:
    """All of ``data`` or nothing: behind half a line on a full disk the next one would be unreadable, too."""
    end = os.fstat(file.fileno()).st_size
    if file.write(data) != len(data):
        file.truncate(end)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
