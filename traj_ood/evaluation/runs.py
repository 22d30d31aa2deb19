"""Read the folders of runs: each result with its scores, curves and pictures, if they were kept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from traj_ood.errors import TrajOODError, foreign_errors
from traj_ood.evaluation.gallery import FILE_NAME as GALLERY_NAME
from traj_ood.evaluation.gallery import Pictures
from traj_ood.evaluation.results import FILE_NAME, Result, near_first, result_files


@dataclass(frozen=True)
class Run:
    """One recorded run; ``place`` is its folder relative to the results, and files that were not kept are None."""

    place: str
    result: Result
    scores: pd.DataFrame | None
    curves: pd.DataFrame | None
    pictures: Pictures | None

    @classmethod
    def load_all(cls, folder: str | Path) -> list[Run]:
        """Read every run in and below ``folder``, sorted by path.

        Raises ``TrajOODError`` if there are none, or a file is damaged.
        """
        folder = Path(folder)
        return [cls.load(path.parent, path.parent.relative_to(folder)) for path in result_files(folder)]

    @classmethod
    def load(cls, folder: Path, place: Path) -> Run:
        """Read the run in ``folder``, to be shown as ``place``. Raises ``TrajOODError`` if a file is damaged."""
        gallery = folder / GALLERY_NAME
        result = Result.load(folder / FILE_NAME)
        scores = _table(folder / "scores.parquet", {"split", "role", "id", *result.scorers})
        if scores is not None:
            _check_scores(scores[[*result.scorers]], folder / "scores.parquet")
        return cls(
            place=place.as_posix() if place.parts else result.name,
            result=result,
            scores=scores,
            curves=_table(folder / "curves.parquet", {"split", "role", "step", "quantity", "q25", "q50", "q75"}),
            pictures=Pictures.load(gallery) if gallery.is_file() else None,
        )

    def sets(self) -> dict[str, str]:
        """The role of each OOD set, near sets first, then by name."""
        scorers = self.result.scorers.values()
        return near_first({name: score.role for scorer in scorers for name, score in scorer.sets.items()})

    def scores_of(self, label: str) -> tuple[NDArray[np.float64], dict[str, NDArray[np.float64]]]:
        """The scores of ID images, and of each OOD set in the order of :meth:`sets`. Raises ``TrajOODError`` if they
        were not kept."""
        if self.scores is None:
            raise TrajOODError(f"{self.place}: expected scores.parquet of a finished run; run it again with --fresh")
        values = self.scores[label].to_numpy(dtype=np.float64)
        split, role = (self.scores[key].to_numpy() for key in ("split", "role"))
        own = self.result.scorers[label].sets
        return values[role == "test"], {name: values[split == name] for name in self.sets() if name in own}


def _check_scores(scores: pd.DataFrame, path: Path) -> None:
    """Raise ``TrajOODError`` for scores that no run writes: none, or values that are not finite."""
    values = scores.apply(pd.to_numeric, errors="coerce").to_numpy(dtype=np.float64)
    bad = int((~np.isfinite(values)).any(axis=1).sum())
    if bad or not len(values):
        what = f"{bad} of {len(values)} rows with scores that are not" if len(values) else "no row"
        raise TrajOODError(f"{path}: expected finite scores of every image, got {what}; run it again with --fresh")


def _table(path: Path, columns: set[str]) -> pd.DataFrame | None:
    if not path.is_file():
        return None
    with foreign_errors(f"{path}: expected a Parquet table, got a damaged file", "; run it again with --fresh"):
        table = pd.read_parquet(path)
    missing = sorted(columns - set(table.columns))
    if missing:
        raise TrajOODError(
            f"{path}: expected the columns of its run, got none of {', '.join(missing)}; run it again with --fresh"
        )
    return table
