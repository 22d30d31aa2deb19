"""Digests of the images of a run at its beginning, by which later changes are found."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from traj_ood.data import ImageSource, Split
from traj_ood.data.images import check_unchanged
from traj_ood.errors import TrajOODError
from traj_ood.io.files import write_atomic

FILE_NAME = "images.parquet"
_DIGITS = 16  # of each SHA-256; enough to find the images that changed, as result.json has full digests of all
_SHOWN_IDS = 3
LEARNT = "learnt by the surrogate"
"""In place of a split's name, which has no spaces: the training images that a surrogate has learnt from."""


class Snapshot:
    """Content digests of all images of some splits with distinct names, and of those that a surrogate has ``learnt``
    from, computed on construction: ``contents`` by split, see :meth:`traj_ood.data.ImageSource.contents`."""

    def __init__(self, splits: Sequence[Split], learnt: ImageSource | None = None) -> None:
        self._images = {split.name: split.images for split in splits} | ({LEARNT: learnt} if learnt is not None else {})
        self.contents = {name: images.contents() for name, images in self._images.items()}

    def check(self, split: Split, indices: Sequence[int]) -> None:
        """Raise ``TrajOODError``, which names the split and the first image, if images have changed since."""
        try:
            check_unchanged(split.images, indices, self.contents[split.name])
        except TrajOODError as error:
            raise TrajOODError(f"split {split.name!r}: {error}") from error

    def save(self, folder: Path) -> None:
        """Write ``images.parquet``: split, id and the first 16 digits of the content digest of each image."""
        table = pd.concat(map(self._table, self._images))
        write_atomic(folder / FILE_NAME, lambda f: table.to_parquet(f, index=False, compression="zstd"))

    def changed(self, folder: Path) -> dict[str, list[int]] | None:
        """Indices of the images, by split, whose contents differ from those recorded in ``folder``.

        None if this is unknown, because other images were listed or nothing was recorded.
        """
        with contextlib.suppress(Exception):  # absent in older runs; if damaged, the error just names no images
            before = pd.read_parquet(folder / FILE_NAME)
            both = LEARNT in self._images and LEARNT in set(before["split"])  # older runs lack it
            names, before = [n for n in self._images if both or n != LEARNT], before[both | (before["split"] != LEARNT)]
            now = pd.concat(map(self._table, names))
            if before[["split", "id"]].values.tolist() == now[["split", "id"]].values.tolist():
                other = before["content"].to_numpy() != now["content"].to_numpy()
                return {name: np.flatnonzero(other[now["split"] == name]).tolist() for name in names}
        return None

    def words(self, changed: dict[str, list[int]]) -> str:
        """Text on how many images of each split have changed, with the first few ids."""
        named = {self._images[name].ids[i] for name, rows in changed.items() if name != LEARNT for i in rows}
        if named.issuperset(self._images[LEARNT].ids[i] for i in changed.get(LEARNT, ())):
            changed = {name: rows for name, rows in changed.items() if name != LEARNT}
        return "; ".join(
            f"{len(rows)} of {len(self._images[name])} images "
            + ("that the surrogate has learnt from" if name == LEARNT else f"of split {name!r}")
            + " have changed: "
            + ", ".join(repr(self._images[name].ids[i]) for i in rows[:_SHOWN_IDS])
            + (", …" if len(rows) > _SHOWN_IDS else "")
            for name, rows in changed.items()
            if rows
        )

    def _table(self, name: str) -> pd.DataFrame:
        contents = [content[:_DIGITS] for content in self.contents[name]]
        return pd.DataFrame({"split": name, "id": list(self._images[name].ids), "content": contents})
