"""Look at every file of a benchmark before anything is computed."""

from __future__ import annotations

from traj_ood.data.benchmark import Benchmark
from traj_ood.data.images import FileImages
from traj_ood.errors import TrajOODError

SHOWN = 3  # paths in the one-line message; `details` holds them all


class MissingDataError(TrajOODError):
    """Data files are not where they should be.

    Attributes:
        details: every missing path with its split, one text each, for a caller with room for more than one line.
    """

    def __init__(self, message: str, details: tuple[str, ...]) -> None:
        super().__init__(message)
        self.details = details


def preflight(benchmark: Benchmark) -> None:
    """Check that every file of every split is there and filled, and that each split's first image decodes.

    Decoding all of them would cost as much as the run itself; damaged files further on are named when they are read.

    Raises:
        MissingDataError: files are missing or empty; the message says how many in which splits, the first few paths
            and how to get them.
        TrajOODError: a first image cannot be decoded, or a link leads out of the root of an image list.
    """
    counts: list[str] = []
    details: list[str] = []
    shown: list[str] = []
    for split in benchmark.splits():
        missing = split.images.missing()
        if missing:
            counts.append(f"{split.name} ({len(missing)} of {len(split.images)})")
            details += [f"{split.name}: {path}" for path in missing]
            shown += missing[:SHOWN]
    if details:
        raise MissingDataError(
            f"benchmark {benchmark.name!r}: {len(details)} image files are missing or empty in {', '.join(counts)}; "
            f"expected e.g. {', '.join(shown[:SHOWN])}; "
            f"{benchmark.how_to_get or 'put the files there or correct the folders and lists'}",
            tuple(details),
        )
    for split in benchmark.splits():
        try:
            if isinstance(split.images, FileImages):
                split.images.check_links()
            split.images.load(0)
        except TrajOODError as error:
            raise TrajOODError(f"benchmark {benchmark.name!r}, split {split.name!r}: {error}") from error
