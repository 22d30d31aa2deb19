"""Read the folders of runs: each result with its scores, curves and pictures, if they were kept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from traj_ood.data import OOD_ROLES
from traj_ood.errors import TrajOODError, foreign_errors
from traj_ood.evaluation.gallery import FILE_NAME as GALLERY_NAME
from traj_ood.evaluation.gallery import Pictures
from traj_ood.evaluation.results import FILE_NAME, Result, near_first, refuse_copies, result_files

_ROUNDING = 1e-9  # of an AUROC, of which a single pair of images is more


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

        Raises ``TrajOODError`` if there are none, a file is damaged, or two are one run.
        """
        folder = Path(folder)
        paths = result_files(folder)
        runs = [cls.load(path.parent, path.parent.relative_to(folder)) for path in paths]
        refuse_copies({path.parent: run.result for path, run in zip(paths, runs, strict=True)})
        return runs

    @classmethod
    def load(cls, folder: Path, place: Path) -> Run:
        """Read the run in ``folder``, to be shown as ``place``. Raises ``TrajOODError`` if a file is damaged, or the
        scores are not those of the result."""
        gallery = folder / GALLERY_NAME
        result = Result.load(folder / FILE_NAME)
        return cls(
            place=place.as_posix() if place.parts else result.name,
            result=result,
            scores=read_scores(folder, result),
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


def read_scores(folder: Path, result: Result) -> pd.DataFrame | None:
    """The scores of the run in ``folder``, None if they were not kept. Raises ``TrajOODError`` if they are damaged, or
    not those of the ``result`` beside them."""
    path = folder / "scores.parquet"
    scores = _table(path, {"split", "role", "id", *result.scorers})
    if scores is not None:
        _check_scores(scores[[*result.scorers]], path)
        _check_agreement(scores, result, path)
    return scores


def _check_scores(scores: pd.DataFrame, path: Path) -> None:
    """Raise ``TrajOODError`` for scores that no run writes: none, or values that are not finite."""
    values = scores.apply(pd.to_numeric, errors="coerce").to_numpy(dtype=np.float64)
    bad = int((~np.isfinite(values)).any(axis=1).sum())
    if bad or not len(values):
        what = f"{bad} of {len(values)} rows with scores that are not" if len(values) else "no row"
        raise TrajOODError(f"{path}: expected finite scores of every image, got {what}; run it again with --fresh")


def _check_agreement(scores: pd.DataFrame, result: Result, path: Path) -> None:
    """Raise ``TrajOODError`` unless the scores have the sets, and give the AUROCs, of the result."""
    then = "one of the two files is of another run or was edited; copy both again, or run it again with --fresh"
    grouped: dict[Any, Any] = scores.groupby(["split", "role"]).indices
    rows = {(str(split), str(role)): own for (split, role), own in grouped.items()}
    tests = [own for (_, role), own in rows.items() if role == "test"]
    sets = {place: own for place, own in rows.items() if place[1] in OOD_ROLES}
    counts = {place: len(own) for place, own in sets.items()}
    for label, scorer in result.scorers.items():
        recorded = {(name, score.role): score.count for name, score in scorer.sets.items()}
        if counts != recorded or len(tests) != 1:
            apart = sorted({name for (name, _), _ in counts.items() ^ recorded.items()}) or ["test"]
            raise TrajOODError(f"{path}: its images of {', '.join(apart)} are not those of {FILE_NAME}: {then}")
        values = scores[label].to_numpy(dtype=np.float64)
        id_scores = np.sort(values[tests[0]])
        for (name, _), own in sets.items():
            ranks = [np.searchsorted(id_scores, values[own], side) for side in ("left", "right")]  # ties count half
            found, written = float(np.mean(ranks)) / len(id_scores), scorer.sets[name].metrics.auroc
            if abs(found - written) > _ROUNDING:
                raise TrajOODError(
                    f"{path}: its scores of {label} give an AUROC of {found:.6f} on {name}, but {FILE_NAME} has "
                    f"{written:.6f}: {then}"
                )


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
