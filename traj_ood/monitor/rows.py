"""Read rows of `traj-ood score` or of a service: CSV, JSON lines, Parquet, and folders of such files."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from traj_ood.detector.conformal import Calibration
from traj_ood.errors import TrajOODError, foreign_errors, warn
from traj_ood.io.files import files_below
from traj_ood.monitor.martingale import Floats

if TYPE_CHECKING:
    import pandas as pd

SUFFIXES = (".csv", ".jsonl", ".parquet")
_COLUMNS = ("score", "p_value", "key")


@dataclass(frozen=True)
class Rows:
    """The rows of a stream of images."""

    scores: Floats  # (T,) in order, including infinite ones
    p_values: Floats  # (T,), NaN if missing
    invalid: int  # number of rows without a score

    def check(self, calibration: Calibration) -> None:
        """Check that the rows come from a detector with this calibration: that each p-value belongs to its score."""
        given = ~np.isnan(self.p_values)
        expected = calibration.p_values(torch.from_numpy(self.scores[given])).numpy()
        wrong = np.flatnonzero(~np.isclose(self.p_values[given], expected, rtol=1e-9, atol=0))
        if len(wrong):
            raise TrajOODError(
                "rows: expected p-values of this detector's calibration, got others "
                f"({len(wrong)} of {int(given.sum())}, first {self.p_values[given][wrong[0]]:g} for "
                f"{expected[wrong[0]]:g}): give the detector that wrote the rows, and only rows that it wrote"
            )


def read_rows(sources: Iterable[str | Path]) -> Rows:
    """Read all rows of files and folders, in the given order.

    The files of a folder are read in the order of their names. Rows of a cluster have keys: each is read once, in the
    order of the keys. Unfinished output is ignored: an incomplete last line of a text file, and files below a folder
    whose names do not end in ``.csv``, ``.jsonl`` or ``.parquet``.

    Raises:
        TrajOODError: a file or folder that does not exist, a folder without any such file, or a file without scores.
    """
    whole = np.concatenate([np.empty((0, 2)), *(_source(Path(source)) for source in sources)])
    scored = ~np.isnan(whole[:, 0])
    return Rows(whole[scored, 0], whole[scored, 1], int((~scored).sum()))


def _source(source: Path) -> np.ndarray:
    """Scores and p-values of one file or folder, (rows, 2); rows with the same key count once."""
    whole = np.concatenate([np.empty((0, 3)), *(_scores(path) for path in _files(source))])
    if not np.isnan(whole[:, 2]).any():
        whole = whole[np.unique(whole[:, 2], return_index=True)[1]]
    return whole[:, :2]


def _files(source: Path) -> list[Path]:
    if source.is_dir():
        files = sorted(files_below(source))
        found = [path for path in files if path.suffix in SUFFIXES and path.is_file()]
        if not found and not any(path.suffix == ".part" for path in files):
            raise TrajOODError(
                f"{source}: expected files with rows ({', '.join(SUFFIXES)}), found none in it: give a folder into "
                "which traj-ood score or serve writes"
            )
        return found
    if not source.is_file():
        raise TrajOODError(f"{source}: expected rows, found nothing: give files or folders that traj-ood score wrote")
    return [source]


def _scores(path: Path) -> np.ndarray:
    """(rows, 3) float64: score, p-value and key, NaN if missing."""
    with foreign_errors(f"{path}: cannot be read as rows", ": give CSV, JSON lines or Parquet of traj-ood"):
        table = _table(path)
    if table is None:
        return np.empty((0, 3))
    if "score" not in table:
        found = ", ".join(map(str, table.columns)) or "none of ours"
        raise TrajOODError(f"{path}: expected a column score, got {found}: give rows of traj-ood")
    nothing: Any = [None] * len(table)
    with foreign_errors(f"{path}: expected numbers in the columns score and p_value", ": give rows of traj-ood"):
        columns = [np.asarray(table.get(name, nothing), dtype=np.float64) for name in _COLUMNS]
    return np.stack(columns, axis=1)


def _table(path: Path) -> pd.DataFrame | None:
    import pandas as pd

    suffix = Path(path.name.removesuffix(".part")).suffix
    if suffix == ".parquet":
        import pyarrow.parquet as pq

        present = [name for name in _COLUMNS if name in pq.read_schema(path).names]
        return pd.read_parquet(path, columns=present)
    if suffix not in SUFFIXES:
        raise TrajOODError(f"{path}: expected a name that ends in {', '.join(SUFFIXES)}: rename it")
    text = path.read_bytes()
    whole = text.rfind(b"\n") + 1
    if whole < len(text):
        warn(f"{path}: its last line has no end and is left out, as if it were still being written")
    text = text[:whole]
    if not text:
        return None
    if suffix == ".csv":  # as text: pandas rounds the last digit of many numbers, and scores may equal calibration's
        return pd.read_csv(io.BytesIO(text), dtype=str, usecols=lambda n: n in _COLUMNS, encoding_errors="replace")
    # Not by pandas, which also rounds, and refuses the surrogates in names that are not UTF-8.
    return pd.DataFrame(list(_json_rows(text.decode(errors="replace"))))


def _json_rows(text: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"line {number}: expected an object, got {line[:40]}")
            yield {name: row[name] for name in _COLUMNS if name in row}
