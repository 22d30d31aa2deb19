"""Log of all decisions for `traj-ood monitor`: names and numbers, no images."""

from __future__ import annotations

import errno
import io
import json
import os
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from traj_ood.detector.decision import Decision
from traj_ood.io.files import folder_errors
from traj_ood.io.sealed import refuse_inside


class RowLog:
    """JSON lines in ``folder/<digest of the detector>/<day>.jsonl``, a separate stream for each detector.

    Lines are written immediately and completely, so that a monitor can read the file while it grows.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        refuse_inside(folder)
        with folder_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def write(self, digest: str, names: Sequence[str], decisions: Sequence[Decision]) -> None:
        """Append one row per image, or none if the rows cannot be written."""
        now = datetime.now(timezone.utc)
        at = now.isoformat(timespec="milliseconds")
        pairs = zip(names, decisions, strict=True)
        lines = [json.dumps({"path": name, **made.as_dict(), "at": at}) + "\n" for name, made in pairs]
        path = self._folder / digest / f"{now:%Y-%m-%d}.jsonl"
        with folder_errors(path.parent, path.name):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "ab", buffering=0) as file:
                append(file, "".join(lines).encode())


def append(file: io.FileIO, data: bytes) -> None:
    """Append all of ``data`` or nothing: half a line on a full disk would make the next line unreadable too."""
    end = os.fstat(file.fileno()).st_size
    if file.write(data) != len(data):
        file.truncate(end)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
