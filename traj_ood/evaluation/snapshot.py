"""The contents of every image of a run when it began, to tell later which of them have changed."""

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
_DIGITS = 16  # of a SHA-256, to find out which image has changed; that one has, the digests in result.json say
_SHOWN_IDS = 3


class Snapshot:
    """The contents of all images of some splits at the time it is made.

    Args:
        splits: of distinct names.

    Attributes:
        contents: by split, see :meth:`traj_ood.data.ImageSource.contents`.
    """

    def __init__(self, splits: Sequence[Split]) -> None:
        self._splits = splits
        self.contents = {split.name: split.images.contents() for split in splits}

    def check(self, split: Split, indices: Sequence[int]) -> None:
        """Refuse images that have changed since.

        Raises:
            TrajOODError: names the split and the first of them.
        """
        try:
            check_unchanged(split.images, indices, self.contents[split.name])
        except TrajOODError as error:
            raise TrajOODError(f"split {split.name!r}: {error}") from error

    def save(self, folder: Path) -> None:
        """Write ``images.parquet``: split, id and the first 16 digits of what each image holds."""
        table = pd.concat([self._table(split) for split in self._splits])
        write_atomic(folder / FILE_NAME, lambda f: table.to_parquet(f, index=False, compression="zstd"))

    def changed(self, folder: Path) -> dict[str, list[int]] | None:
        """Places of the images whose contents differ from those in the run in ``folder``, by split; None where that is
        unknown, since other images were listed then, or nothing was recorded."""
        with contextlib.suppress(Exception):  # absent in older runs; a damaged one costs a name, not the refusal
            before, now = pd.read_parquet(folder / FILE_NAME), pd.concat(map(self._table, self._splits))
            if before[["split", "id"]].values.tolist() == now[["split", "id"]].values.tolist():
                other = (before["content"].to_numpy() != now["content"].to_numpy()).tolist()
                counts = [len(split.images) for split in self._splits]
                starts = [sum(counts[:k]) for k in range(len(counts))]
                places = zip(self._splits, starts, counts, strict=True)
                return {s.name: [i for i in range(n) if other[first + i]] for s, first, n in places}
        return None

    def words(self, changed: dict[str, list[int]]) -> str:
        """A sentence part: how many images of which split have changed, and the first of them."""
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
