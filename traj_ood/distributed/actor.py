"""The Ray actor that scores images on a cluster, one per process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from traj_ood.data.decoding import Reading
from traj_ood.detector import Detector
from traj_ood.stream import Entry, judge_entries, parquet_columns

KEY = "key"
"""Column with a row's position in the input, by which rows are sorted."""


class ScoreActor:
    """Loads the detector once, then turns batches of images into batches of rows.

    A batch has the column ``path`` and optionally ``key`` (int64), ``content`` (bytes of an image file; else ``path``
    is read) and ``error`` (why there is no image).
    """

    def __init__(self, folder: str, device: str, threads: int, reading: dict[str, Any] | None = None) -> None:
        torch.set_num_threads(threads)
        self._detector = Detector.load(Path(folder), device=device)
        if reading is not None:
            self._detector.reading = Reading(**reading)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        paths = [str(path) for path in batch["path"]]
        nothing: list[Any] = [None] * len(paths)
        contents, errors = (batch.get(name, nothing) for name in ("content", "error"))
        entries = [
            Entry(path, str(error) if error else "", content if isinstance(content, bytes) else None)
            for path, content, error in zip(paths, contents, errors, strict=True)
        ]
        rows = parquet_columns(judge_entries(self._detector, entries))
        if KEY in batch:
            rows[KEY] = np.asarray(batch[KEY], dtype=np.int64)
        return rows
