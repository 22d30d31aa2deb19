"""Score millions of images on a Ray cluster, with the rows of ``traj-ood score``."""

from traj_ood.distributed.engine import images_of, score, score_to
from traj_ood.distributed.rows import read_rows_of, written_keys

__all__ = ["images_of", "read_rows_of", "score", "score_to", "written_keys"]
