"""Find a benchmark's data, and check that all of its files exist before anything is computed."""

from __future__ import annotations

import os
from pathlib import Path

from traj_ood.data.benchmark import Benchmark
from traj_ood.data.images import FileImages
from traj_ood.errors import TrajOODError, UnreadableImageError
from traj_ood.io.files import CACHE_VARIABLE

SHOWN = 3  # paths in the one-line message; `details` has all of them


class MissingDataError(TrajOODError):
    """Data files are missing: ``details`` has every missing path with its split, of which the message shows only the
    first few."""

    def __init__(self, message: str, details: tuple[str, ...]) -> None:
        super().__init__(message)
        self.details = details


def data_folders(root: str | Path | None) -> list[Path]:
    """Folders where a benchmark's data may be: ``root`` if given, else ``$TRAJ_OOD_DATA``, then ``./data``."""
    if root is not None:
        return [Path(root)]
    variable = os.environ.get(CACHE_VARIABLE)
    return [*([Path(variable)] if variable else []), Path("data")]


def find_root(name: str, root: str | Path | None, part: str | Path, expected: str, how: str) -> Path:
    """The first of :func:`data_folders` that contains ``part``; else an error with what is ``expected`` there and
    ``how`` to get it."""
    folders = data_folders(root)
    for folder in folders:
        if (folder / part).is_dir():
            return folder
    looked = tuple(str(folder / part) for folder in folders)
    raise MissingDataError(
        f"benchmark {name!r}: expected {expected}, found no {' and no '.join(looked)}; give the folder that contains "
        f"it as root or in ${CACHE_VARIABLE}; {how}",
        looked,
    )


def preflight(benchmark: Benchmark) -> None:
    """Check that every file of every split exists and is not empty, that no link leads out of the root of an image
    list, and that the first image of each split decodes.

    Decoding all images would cost as much as the run itself; damaged ones are reported when they are read.
    """
    missing = [(split, found) for split in benchmark.splits() if (found := split.images.missing())]
    if missing:
        counts = ", ".join(f"{split.name} ({len(found)} of {len(split.images)})" for split, found in missing)
        paths = [path for _, found in missing for path in found]
        raise MissingDataError(
            f"benchmark {benchmark.name!r}: {len(paths)} image files are missing or empty in {counts}; "
            f"expected e.g. {', '.join(paths[:SHOWN])}; "
            f"{benchmark.how_to_get or 'put the files there or correct the folders and lists'}",
            tuple(f"{split.name}: {path}" for split, found in missing for path in found),
        )
    for split in benchmark.splits():
        try:
            if isinstance(split.images, FileImages):
                split.images.check_links()
            split.images.load(0)
        except TrajOODError as error:
            raise UnreadableImageError(f"benchmark {benchmark.name!r}, split {split.name!r}: {error}") from error
