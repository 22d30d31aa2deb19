"""Scoring over Ray Data: the plan of a run. Ray moves the blocks, restarts what dies and repeats what was lost."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

from traj_ood.data.records import AS_USUAL, Opening, files_of, is_records, read_records
from traj_ood.detector import FILE_NAME, SCHEMA, refuse_inside
from traj_ood.distributed.actor import KEY, ScoreActor
from traj_ood.distributed.output import written_keys
from traj_ood.errors import TrajOODError
from traj_ood.io.files import write_atomic
from traj_ood.io.sealed import open_sealed
from traj_ood.stream import Entry

_RECORDS = 2**32
"""Keys of one file of records: those of the n-th begin at n · 2³²."""
_TABLE = 4096  # names in one block of the input
_BATCH_BYTES = 2**26  # of decoded images, at float32 in the model's own size
_MAX_BATCH = 256
_RETRIES = 3


@dataclass(frozen=True)
class Workers:
    """The actors of a run.

    Attributes:
        count: of them. Default None: one a GPU, or one a CPU where there is no GPU, of the whole cluster.
        threads: that each computes with, and CPUs that it takes. Default 1.
        batch: images at a time. Default None: 64 MiB of images in the model's size, at most 256, whole chunks.
    """

    count: int | None = None
    threads: int = 1
    batch: int | None = None


def score(
    dataset: Any,
    detector: str | Path,
    *,
    workers: Workers | None = None,
    reading: Mapping[str, Any] | None = None,
) -> Any:
    """Rows of a Ray dataset of images, lazily, as a Ray dataset.

    Args:
        dataset: with a column ``path``, each an image file that all nodes can read, or a name where the column
            ``content`` holds the bytes of an image file; other columns are ``error``, why there is no image, and
            ``key``, which comes out with the row.
        detector: a folder that all nodes can read. Each actor loads it once and proves its seal.
        workers: see :class:`Workers`.
        reading: options of :class:`traj_ood.data.Reading`. Default: the detector's own.
    Returns:
        A dataset with the columns of ``traj-ood score``; an image that cannot be judged is a row that says why. Batches
        of an actor that died are judged again by another. Order is not kept: sort by ``key``.
    Raises:
        TrajOODError: ray is missing, or no detector there.
    """
    ray = _ray()
    wanted = workers or Workers()
    folder = Path(detector).expanduser().absolute()
    there = ray.cluster_resources()
    has_gpu = there.get("GPU", 0) >= 1
    places = int(there["GPU"]) if has_gpu else int(there.get("CPU", 1)) // wanted.threads
    count = wanted.count or max(1, places)
    options = None if reading is None else dict(reading)
    return dataset.map_batches(
        ScoreActor,
        fn_constructor_args=(str(folder), "cuda" if has_gpu else "cpu", wanted.threads, options),
        batch_size=wanted.batch or _batch(folder),
        batch_format="numpy",
        concurrency=(1, count) if count > 1 else 1,
        num_cpus=wanted.threads,
        num_gpus=1 if has_gpu else 0,
        max_restarts=_RETRIES,
        max_task_retries=_RETRIES,
    )


def images_of(entries: Iterable[Entry], *, skip: Any = ()) -> Any:
    """A Ray dataset of entries, such as :func:`traj_ood.stream.walk` gives, with their places as ``key``.

    Args:
        skip: sorted keys to leave out.
    """
    return _dataset({KEY: i, "path": e.path, "error": e.error} for i, e in enumerate(entries) if not _among(i, skip))


def records_of(sources: Iterable[str], opening: Opening = AS_USUAL, *, skip: Any = ()) -> Any:
    """A Ray dataset of the images in sources of records (tar shards, Parquet, videos): each file is read by one task,
    on any node, which leaves out those whose keys are in ``skip``."""
    files = [file for source in sources for file in files_of(source)]
    units = [{"source": file, "first": n * _RECORDS} for n, file in enumerate(files)]

    def read(unit: dict[str, Any]) -> Iterator[dict[str, Any]]:
        for number, record in enumerate(read_records(unit["source"], opening)):
            key = int(unit["first"]) + number
            if not _among(key, skip):
                yield {KEY: key, "path": record.key, "content": record.content or b"", "error": record.error}

    return _dataset(units).repartition(max(1, len(units))).flat_map(read)


def score_to(
    out: str | Path,
    sources: Iterable[str] | Iterable[Entry],
    detector: str | Path,
    *,
    resume: bool = False,
    workers: Workers | None = None,
    opening: Opening = AS_USUAL,
    reading: Mapping[str, Any] | None = None,
) -> int:
    """Write a row for every image into Parquet files in the folder ``out``; see :func:`read_rows_of`.

    Args:
        sources: entries, or names of sources of records, which are read on the cluster; not both.
        resume: leave out images whose rows are there: the same ``sources`` have to be given as before. Default false:
            a folder with rows in it is refused.
    Returns:
        Number of rows in the folder.
    Raises:
        TrajOODError: as :func:`score`; a folder that holds rows or other files, or lies in a detector; or a failure of
            the cluster, after which the rows so far stay for ``resume``.
    """
    _ray()
    folder = Path(out).expanduser().absolute()
    refuse_inside(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = [path.name for path in folder.iterdir()]
    strange = sorted(name for name in names if not name.endswith((".parquet", ".crc")) and name != _ABOUT)
    if strange or (names and not resume):
        raise TrajOODError(
            f"{folder}: expected an empty folder{' or rows of an earlier run' if resume else ''}, found "
            f"{(strange or sorted(names))[0]!r}: choose another --out{'' if resume else ', or continue with --resume'}"
        )
    given, expected = list(sources), 0
    check_same_run(folder, Path(detector).expanduser(), [s.path if isinstance(s, Entry) else str(s) for s in given])
    done = written_keys(folder, remove_broken=True)
    if given and isinstance(given[0], str):
        dataset = records_of([str(source) for source in given], opening, skip=done)
    else:
        entries = [entry for entry in given if isinstance(entry, Entry)]
        expected = len(entries)
        if len(done) == expected:
            return expected
        dataset = images_of(entries, skip=done)
    try:
        score(dataset, detector, workers=workers, reading=reading).write_parquet(str(folder))
    except TrajOODError:
        raise
    except Exception as error:  # of the cluster: ray has many classes
        text = str(error).strip().splitlines() or [type(error).__name__]
        raise TrajOODError(f"ray: {text[-1][:300]}: rows so far are in {folder}: continue with --resume") from error
    found = len(written_keys(folder, remove_broken=True))  # a killed writer's; what it had begun is written elsewhere
    if found < expected:
        raise TrajOODError(f"{folder}: expected {expected} rows, found {found}: continue with --resume")
    return found


def split_sources(sources: Iterable[str]) -> tuple[list[str], list[str]]:
    """Those that are sources of records, and the others."""
    given = list(sources)
    return [s for s in given if is_records(s)], [s for s in given if not is_records(s)]


_ABOUT = "_run.json"


def check_same_run(folder: Path, detector: Path, names: Sequence[str]) -> None:
    """Keep the digests of the detector and of the sources' names beside the rows, and refuse to continue with others:
    keys are places among the sources.

    Raises:
        TrajOODError: says which of them has changed.
    """
    sources = hashlib.sha256("\n".join(names).encode("utf-8", "surrogateescape")).hexdigest()
    now = {"detector": open_sealed(detector, FILE_NAME, SCHEMA)["digest"], "sources": sources}
    about = folder / _ABOUT
    if not about.exists():
        write_atomic(about, (json.dumps({"schema": "traj_ood.rows/2", **now}) + "\n").encode())
        return
    before = json.loads(about.read_text())
    for name, what in (("detector", "detector"), ("sources", "list of images")):
        if before.get(name) != now[name]:
            raise TrajOODError(f"{folder}: expected rows of this {what}, found another's: choose another --out")


def _batch(folder: Path) -> int:
    """By memory: of what the record says, so that nothing is loaded here."""
    model = open_sealed(folder, FILE_NAME, SCHEMA)["model"]
    channels, height, width = model["input_shape"]
    chunk = max(1, int(model.get("chunk", 1)))
    return max(1, min(_MAX_BATCH, _BATCH_BYTES // (4 * channels * height * width)) // chunk) * chunk


def _dataset(rows: Iterable[dict[str, Any]]) -> Any:
    """Rows as a Ray dataset of blocks of some thousand, never a Python object for each."""
    import pyarrow as pa

    waiting, tables = iter(rows), []
    while part := list(islice(waiting, _TABLE)):
        tables.append(pa.Table.from_pylist(part))
    if not tables:
        raise TrajOODError("nothing to score: expected images, found none that have no row yet")
    return _ray().data.from_arrow(tables)


def _among(key: int, keys: Any) -> bool:
    """Whether a key is in a sorted array."""
    import numpy as np

    place = int(np.searchsorted(keys, key))
    return place < len(keys) and int(keys[place]) == key


def _ray() -> Any:
    try:
        ray = import_module("ray")
        import_module("ray.data")
    except ImportError as error:
        raise TrajOODError(f"scoring over a cluster needs ray ({error}): pip install 'traj_ood[ray]'") from error
    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level="ERROR")  # joins the cluster that RAY_ADDRESS names, else its own
    ray.data.DataContext.get_current().enable_progress_bars = False
    return ray
