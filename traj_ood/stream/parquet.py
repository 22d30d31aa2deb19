"""Rows as Parquet, whose files cannot be read before their end: they are made of whole tables of JSON lines.

Parquet's text is UTF-8. For a name that is not, the column ``path`` shows its other bytes as ``\\udcXX``, and
``path_bytes``, null in all other rows, contains the original bytes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from traj_ood.errors import TrajOODError
from traj_ood.io.files import write_atomic
from traj_ood.stream.rows import COLUMNS, Row

_ROW_GROUP = 8192  # rows in one row group
_BYTES = "path_bytes"


def write_parquet(path: Path, rows: Iterable[Row]) -> None:
    """Write rows to a Parquet file, atomically, in row groups of 8,192."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([*_types().items(), (_BYTES, pa.binary())])
    rest = iter(rows)

    def write(file: BinaryIO) -> None:
        with pq.ParquetWriter(file, schema, compression="zstd") as writer:
            while group := list(islice(rest, _ROW_GROUP)):
                writer.write_table(_table(group, schema))

    write_atomic(path, write)


def read_parquet(path: Path) -> Iterator[Row]:
    """Iterate over the rows of a file of :func:`write_parquet`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for cells in batch.to_pylist():
                    written = cells.pop(_BYTES)
                    del cells["reason"]  # it follows from the others
                    yield Row(**cells | ({} if written is None else {"path": os.fsdecode(written)}))
    except (pa.ArrowException, LookupError, TypeError) as error:
        raise TrajOODError(
            f"{path}: expected a Parquet table of `traj-ood score`, got: {error}; choose another --out, or start again "
            "with --overwrite"
        ) from error


def parquet_columns(rows: Sequence[Row]) -> dict[str, Any]:
    """Rows as pyarrow arrays by column, with the same types whichever values are None.

    Bytes that are not UTF-8 are shown as ``\\udcXX``.
    """
    import pyarrow as pa

    def value(row: Row, name: str) -> Any:
        found = getattr(row, name)
        return found.encode("utf-8", "backslashreplace").decode() if isinstance(found, str) else found

    return {name: pa.array([value(row, name) for row in rows], type=kind) for name, kind in _types().items()}


def _table(rows: Sequence[Row], schema: Any) -> Any:
    import pyarrow as pa

    columns = parquet_columns(rows)
    shown = columns["path"].to_pylist()
    columns[_BYTES] = [
        None if text == row.path else os.fsencode(row.path) for row, text in zip(rows, shown, strict=True)
    ]
    return pa.table(columns, schema=schema)


def _types() -> dict[str, Any]:
    import pyarrow as pa

    kinds = {"score": pa.float64(), "p_value": pa.float64(), "steps": pa.int64()}
    return {name: kinds.get(name, pa.string()) for name in COLUMNS}
