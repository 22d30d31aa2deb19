"""Score endless streams of images: one row per path, in order and in bounded memory."""

from traj_ood.stream.parquet import parquet_columns
from traj_ood.stream.paths import Entry, read_list, read_paths, walk
from traj_ood.stream.rows import COLUMNS, Row, Tally, judge_entries, score_rows
from traj_ood.stream.run import write_scores
from traj_ood.stream.tables import FORMATS, Table, open_table

__all__ = [
    "COLUMNS",
    "FORMATS",
    "Entry",
    "Row",
    "Table",
    "Tally",
    "judge_entries",
    "open_table",
    "parquet_columns",
    "read_list",
    "read_paths",
    "score_rows",
    "walk",
    "write_scores",
]
