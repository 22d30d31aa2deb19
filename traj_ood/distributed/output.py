"""Read the folder of Parquet files into which a cluster writes rows, each with a key."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from traj_ood.distributed.actor import KEY
from traj_ood.errors import TrajOODError

if TYPE_CHECKING:
    import pandas as pd


def written_keys(folder: Path, *, remove_broken: bool = False) -> Any:
    """The keys of the rows in ``folder``, sorted, as (n,) int64. ``remove_broken`` deletes incomplete files of a killed
    writer, which are an error otherwise."""
    import numpy as np
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
