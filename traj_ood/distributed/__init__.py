"""Millions of images over a Ray cluster: the rows that one process writes, from actors that each hold the detector."""

from traj_ood.distributed.engine import images_of, score, score_to
from traj_ood.distributed.output import read_rows_of, written_keys

__all__ = ["images_of", "read_rows_of", "score", "score_to", "written_keys"]
