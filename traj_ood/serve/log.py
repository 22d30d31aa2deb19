"""Rows of all that was judged, for `traj-ood monitor`: names and numbers, no images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from traj_ood.detector.decision import Decision
from traj_ood.io.files import folder_errors


class RowLog:
    """JSON lines in ``folder/<digest of the detector>/<day>.jsonl``: a stream for each detector.

    A line is written at once and whole, so that a monitor reads the file while it grows.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with folder_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def write(self, digest: str, names: Sequence[str], said: Sequence[Decision]) -> None:
        now = datetime.now(timezone.utc)
        at = now.isoformat(timespec="milliseconds")
        lines = [json.dumps({"path": n, **one.as_dict(), "at": at}) + "\n" for n, one in zip(names, said, strict=True)]
        path = self._folder / digest / f"{now:%Y-%m-%d}.jsonl"
        with folder_errors(path.parent, path.name):
            path.parent.mkdir(exist_ok=True)
            with open(path, "ab", buffering=0) as file:
                file.write("".join(lines).encode())
