"""Digests of the images of a run at its beginning, by which later changes are found."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from traj_ood.data import Split
from traj_ood.data.images import check_unchanged
from traj_ood.errors import TrajOODError
from traj_ood.io.files import write_atomic

FILE_NAME = "images.parquet"
_DIGITS = 16  # of each SHA-256; enough to find the images that changed, as result.json has full digests of all
_SHOWN_IDS = 3


class Snapshot:
    """Content digests of all images of some splits with distinct names, computed on construction: ``contents`` by
    split, see :meth:`traj_ood.data.ImageSource.contents`."""

    def __init__(self, splits: Sequence[Split]) -> None:
        self._splits = splits
        self.contents = {split.name: split.images.contents() for split in splits}

    def check(self, split: Split, indices: Sequence[int]) -> None:
        """Raise ``TrajOODError``, which names the split and the first image, if images have changed since."""
        try:
            check_unchanged(split.images, indices, self.contents[split.name])
        except TrajOODError as error:
            raise TrajOODError(f"split {split.name!r}: {error}") from error

    def save(self, folder: Path) -> None:
        """Write ``images.parquet``: split, id and the first 16 digits of the content digest of each image."""
        table = pd.concat([self._table(split) for split in self._splits])
        write_atomic(folder / FILE_NAME, lambda f: table.to_parquet(f, index=False, compression="zstd"))

    def changed(self, folder: Path) -> dict[str, list[int]] | None:
        """Indices of the images, by split, whose contents differ from those recorded in ``folder``.

        None if this is unknown, because other images were listed or nothing was recorded.
        """
        with contextlib.suppress(Exception):  # absent in older runs; if damaged, the error just names no images
            before, now = pd.read_parquet(folder / FILE_NAME), pd.concat(map(self._table, self._splits))
            if before[["split", "id"]].values.tolist() == now[["split", "id"]].values.tolist():
                other = (before["content"].to_numpy() != now["content"].to_numpy()).tolist()
                found, first = {}, 0
                for split in self._splits:
                    found[split.name] = [i for i in range(len(split.images)) if other[first + i]]
                    first += len(split.images)
                return found
        return None

    def words(self, changed: dict[str, list[int]]) -> str:
        """Text on how many images of each split have changed, with the first few ids."""
        return "; ".join(
            f"{len(changed[split.name])} of {len(split.images)} images of split {split.name!r} have changed: "
            + ", ".join(repr(split.images.ids[i]) for i in changed[split.name][:_SHOWN_IDS])
            + (", …" if len(changed[split.name]) > _SHOWN_IDS else "")
            for split in self._splits
            if changed[split.name]
        )

    def _table(self, split: Split) -> pd.DataFrame:
        contents = [content[:_DIGITS] for content in self.contents[split.name]]
        return pd.DataFrame({"split": split.name, "id": list(split.images.ids), "content": contents})
