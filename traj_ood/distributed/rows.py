"""Rows on a cluster, each with a key: the Ray actor that makes them, and the folder of Parquet files that has them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from traj_ood.data.decoding import Reading
from traj_ood.detector import Detector
from traj_ood.errors import TrajOODError
from traj_ood.stream import Entry, judge_entries, parquet_columns

if TYPE_CHECKING:
    import pandas as pd

KEY = "key"
"""Column with a row's position in the input, by which rows are sorted."""


class ScoreActor:
    """Loads the detector once in a process, then turns batches of images into batches of rows.

    A batch has the column ``path`` and optionally ``key`` (int64), ``content`` (bytes of an image file; else ``path``
    is read) and ``error`` (why there is no image).
    """

    def __init__(self, folder: str, device: str, threads: int, reading: dict[str, Any] | None = None) -> None:
        torch.set_num_threads(threads)
        self._detector = Detector.load(Path(folder), device=device)
        if reading is not None:
            self._detector.reading = Reading(**reading)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        paths = [os.fsdecode(path) for path in batch["path"]]
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


def written_keys(folder: Path, *, remove_broken: bool = False) -> Any:
    """The keys of the rows in ``folder``, sorted, as (n,) int64. ``remove_broken`` deletes incomplete files of a killed
    writer, which are an error otherwise."""
    import pyarrow.parquet as pq

    keys = [np.empty(0, dtype=np.int64)]
    for path in sorted(folder.glob("*.parquet")):
        try:
            keys.append(pq.read_table(path, columns=[KEY])[KEY].to_numpy())
        except Exception as error:  # an incomplete file, or another kind of file
            if not remove_broken:
                raise TrajOODError(f"{path}: cannot be read as rows ({error}): continue with --resume") from error
            path.unlink()
    return np.unique(np.concatenate(keys))


def read_rows_of(folder: str | Path) -> pd.DataFrame:
    """Read all rows of a folder in the order of the input, without the duplicates of restarted workers."""
    import pandas as pd

    written_keys(Path(folder))
    files = sorted(Path(folder).glob("*.parquet"))
    if not files:
        raise TrajOODError(f"{folder}: expected rows of traj-ood score --engine ray, found none")
    rows = pd.concat([pd.read_parquet(path) for path in files], ignore_index=True)
    return rows.drop_duplicates(KEY).sort_values(KEY, ignore_index=True)
