"""The contents of a folder of results: each run's record and, where they are kept, its scores, curves and pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from traj_ood.errors import TrajOODError, foreign_errors
from traj_ood.evaluation.gallery import FILE_NAME as GALLERY_NAME
from traj_ood.evaluation.gallery import Pictures
from traj_ood.evaluation.results import FILE_NAME, Result, near_first


@dataclass(frozen=True)
class Run:
    """One run as it was recorded; ``place`` is its folder below the results, ``None`` stands for files not kept."""

    place: str
    result: Result
    scores: pd.DataFrame | None
    curves: pd.DataFrame | None
    pictures: Pictures | None

    @classmethod
    def load_all(cls, folder: str | Path) -> list[Run]:
        """Every run in ``folder`` or below, sorted by path.

        Raises ``TrajOODError`` when there is none, or a file of one is damaged.
        """
        folder = Path(folder)
        Result.load_all(folder)  # its errors name the folder and what to do
        return [cls.load(path.parent, path.parent.relative_to(folder)) for path in sorted(folder.rglob(FILE_NAME))]

    @classmethod
    def load(cls, folder: Path, place: Path) -> Run:
        """The run in ``folder``, shown under the name ``place``. Raises ``TrajOODError`` when a file is damaged."""
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
        """The role of each OOD set, near ones first, then by name."""
        scorers = self.result.scorers.values()
        return near_first({name: score.role for scorer in scorers for name, score in scorer.sets.items()})

    def scores_of(self, label: str) -> tuple[NDArray[np.float64], dict[str, NDArray[np.float64]]]:
        """ID scores and those of each of the scorer's sets in the order of :meth:`sets`. Raises ``TrajOODError`` where
        they were not kept."""
        if self.scores is None:
            raise TrajOODError(f"{self.place}: expected scores.parquet of a finished run; run it again")
        values = self.scores[label].to_numpy(dtype=np.float64)
        split, role = (self.scores[key].to_numpy() for key in ("split", "role"))
        own = self.result.scorers[label].sets
        return values[role == "test"], {name: values[split == name] for name in self.sets() if name in own}


def _check_scores(scores: pd.DataFrame, path: Path) -> None:
    """Raises ``TrajOODError`` for scores that no run leaves: not finite, or none at all."""
    values = scores.apply(pd.to_numeric, errors="coerce").to_numpy(dtype=np.float64)
    bad = int((~np.isfinite(values)).any(axis=1).sum())
    if bad or not len(values):
        what = f"{bad} of {len(values)} rows with scores that are not" if len(values) else "no row"
        raise TrajOODError(f"{path}: expected finite scores of every image, got {what}; run it again")


def _table(path: Path, columns: set[str]) -> pd.DataFrame | None:
    if not path.is_file():
        return None
    with foreign_errors(f"{path}: expected a Parquet table, got a damaged file", "; run it again"):
        table = pd.read_parquet(path)
    missing = sorted(columns - set(table.columns))
    if missing:
        raise TrajOODError(f"{path}: expected the columns of its run, got none of {', '.join(missing)}; run it again")
    return table
