"""What runs on the cluster: one object per process, with the detector in it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from traj_ood.data.decoding import Reading
from traj_ood.detector import Detector
from traj_ood.stream import COLUMNS, Entry, Row, judge_entries

KEY = "key"
"""Column of the row's place in the input, by which rows are put in order."""


class ScoreActor:
    """Loads the detector once, then turns batches of images into batches of rows.

    A batch has the columns ``path``, and where there are any ``key`` (int64), ``content`` (bytes of an image file; else
    ``path`` is read) and ``error`` (why there is no image).
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
        rows = columns_of(judge_entries(self._detector, entries))
        if KEY in batch:
            rows[KEY] = np.asarray(batch[KEY], dtype=np.int64)
        return rows


def columns_of(rows: list[Row]) -> dict[str, Any]:
    """Rows as columns with the types of a Parquet file, whichever of them are None."""
    import pyarrow as pa

    table = [asdict(row) for row in rows]
    kinds = {"score": pa.float64(), "p_value": pa.float64(), "steps": pa.int64()}
    return {name: pa.array([_text(row[name]) for row in table], type=kinds.get(name, pa.string())) for name in COLUMNS}


def _text(value: Any) -> Any:
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value
