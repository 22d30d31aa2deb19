"""Scoring with Ray Data, which distributes the blocks, restarts actors and repeats lost tasks."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from traj_ood.data.records import DEFAULT_OPENING, Opening, files_of, read_records
from traj_ood.detector import FILE_NAME, SCHEMA, refuse_inside
from traj_ood.distributed.losses import is_loss, living, wait_until_noticed
from traj_ood.distributed.rows import KEY, ScoreActor, written_keys
from traj_ood.errors import TrajOODError, warn
from traj_ood.io.files import write_atomic
from traj_ood.io.sealed import open_sealed
from traj_ood.stream import Entry

_KEYS_PER_FILE = 2**32
"""Keys reserved for one file of records: those of the n-th file begin at n · 2³²."""
_BLOCK_ROWS = 4096  # rows in one block of the input, at most
_TASKS_PER_WORKER = 4  # at least, where there are enough images: a worker that is done early gets another task
_BATCH_BYTES = 2**26  # of decoded float32 images of the model's size
_MAX_BATCH = 256
_RETRIES = 3


@dataclass(frozen=True)
class Workers:
    """The actors of a run."""

    count: int | None = None  # by default one per GPU of the cluster, or one per CPU if there is no GPU
    threads: int = 1  # of each actor, and CPUs reserved for it
    batch: int | None = None  # images; by default 64 MiB of them in the model's size, at most 256, in whole chunks


def score(
    dataset: Any,
    detector: str | Path,
    *,
    workers: Workers | None = None,
    reading: Mapping[str, Any] | None = None,
) -> Any:
    """Score a Ray dataset of images, lazily.

    Args:
        dataset: has a column ``path``, text or bytes, of image files that all nodes can read, or of names if the column
            ``content`` has the bytes of an image file. Optional columns: ``error``, why there is no image, and ``key``,
            which is copied to the row.
        detector: the folder of a detector, which all nodes can read. Each actor loads and verifies it once.
        workers: see :class:`Workers`.
        reading: options of :class:`traj_ood.data.Reading`. Default: the detector's.
    Returns:
        A Ray dataset with the columns of ``traj-ood score``; an image that cannot be judged has a row with the reason.
        Batches of a dead actor are judged again by another. Order is not kept: sort by ``key``.
    Raises:
        TrajOODError: ray is missing, or ``detector`` is not a valid detector.
    """
    ray = _ray()
    wanted = workers or Workers()
    folder = Path(detector).expanduser().absolute()
    count, has_gpu = _places(ray, wanted)
    options = None if reading is None else dict(reading)
    with warnings.catch_warnings():
        # Without the last two Ray restarts a worker for ever that an image kills. It deprecates them, for version 2.64.
        warnings.filterwarnings("ignore", message=".*ray_remote_args")
        return dataset.map_batches(
            ScoreActor,
            fn_constructor_args=(str(folder), "cuda" if has_gpu else "cpu", wanted.threads, options),
            batch_size=wanted.batch or _batch(folder),
            batch_format="numpy",
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=count),
            num_cpus=wanted.threads,
            num_gpus=1 if has_gpu else 0,
            max_restarts=_RETRIES,
            max_task_retries=_RETRIES,
        )


def images_of(entries: Iterable[Entry], *, skip: Any = (), block: int = _BLOCK_ROWS) -> Any:
    """A Ray dataset of entries, such as those of :func:`traj_ood.stream.walk`, with their positions as ``key``, without
    those in ``skip``, which is sorted. One task scores ``block`` of them. Paths are bytes: Arrow's text is UTF-8."""
    rows = (
        {KEY: i, "path": os.fsencode(e.path), "error": e.error} for i, e in enumerate(entries) if not _among(i, skip)
    )
    return _dataset(rows, block)


def records_of(sources: Iterable[str], opening: Opening = DEFAULT_OPENING, *, skip: Any = ()) -> Any:
    """A Ray dataset of the images in sources of records (tar shards, Parquet, videos), without those whose keys are in
    ``skip``. Each file is read by one task, on any node."""
    files = [file for source in sources for file in files_of(source)]
    units = [{"source": file, "first": n * _KEYS_PER_FILE} for n, file in enumerate(files)]

    def read(unit: dict[str, Any]) -> Iterator[dict[str, Any]]:
        for number, record in enumerate(read_records(unit["source"], opening)):
            key = int(unit["first"]) + number
            if not _among(key, skip):
                path = os.fsencode(record.key)
                yield {KEY: key, "path": path, "content": record.content or b"", "error": record.error}

    return _dataset(units).repartition(max(1, len(units))).flat_map(read)


def score_to(
    out: str | Path,
    sources: Iterable[str] | Iterable[Entry],
    detector: str | Path,
    *,
    resume: bool = False,
    workers: Workers | None = None,
    opening: Opening = DEFAULT_OPENING,
    reading: Mapping[str, Any] | None = None,
) -> int:
    """Write one row per image into Parquet files in the folder ``out``, and return their number; read them with
    :func:`read_rows_of`.

    Args:
        out: the folder.
        sources: entries, or names of sources of records, which are read on the cluster; not both.
        detector, workers, reading: see :func:`score`.
        resume: leave out images that have a row; all other arguments but ``workers`` must be the same as before.
            Default false: a folder with rows is refused. A lost node or worker costs the rows that are not written yet,
            with a warning: they are scored again. If the cluster fails for another reason, the rows so far are kept for
            this option.
        opening: how sources of records are opened.
    """
    ray = _ray()
    folder = Path(out).expanduser().absolute()
    refuse_inside(folder)
    folder.mkdir(parents=True, exist_ok=True)
    found = [path.name for path in folder.iterdir()]
    others = sorted(name for name in found if not name.endswith((".parquet", ".crc")) and name != _ABOUT)
    if others or (found and not resume):
        raise TrajOODError(
            f"{folder}: expected an empty folder{' or rows of an earlier run' if resume else ''}, found "
            f"{(others or sorted(found))[0]!r}: choose another --out{'' if resume else ', or continue with --resume'}"
        )
    given: list[str | Entry] = [*sources]
    names = [s.path if isinstance(s, Entry) else str(s) for s in given]
    check_same_run(folder, Path(detector).expanduser(), names, opening.stride, reading)
    scoring = Scoring(folder, given, Path(detector).expanduser(), workers or Workers(), opening, reading)
    write_rows(scoring, ray)
    # Broken files are those of a killed writer; its rows are written again elsewhere.
    written = len(written_keys(folder, remove_broken=True))
    if written < scoring.expected:
        raise TrajOODError(f"{folder}: expected {scoring.expected} rows, found {written}: continue with --resume")
    return written


@dataclass(frozen=True)
class Scoring:
    """One call of :func:`score_to`: entries or sources of records, their detector, and the folder of their rows."""

    folder: Path
    given: Sequence[str | Entry]
    detector: Path
    workers: Workers
    opening: Opening
    reading: Mapping[str, Any] | None

    @property
    def of_records(self) -> bool:
        return bool(self.given) and isinstance(self.given[0], str)

    @property
    def expected(self) -> int:
        """The number of rows; 0 for sources of records, which are not counted before they are read."""
        return 0 if self.of_records else len(self.given)

    def write(self, done: Any) -> None:
        """Score everything whose key is not in ``done``."""
        if self.of_records:
            dataset = records_of([str(source) for source in self.given], self.opening, skip=done)
        else:
            entries = [entry for entry in self.given if isinstance(entry, Entry)]
            dataset = images_of(entries, skip=done, block=self._block(len(entries) - len(done)))
        rows = score(dataset, self.detector, workers=self.workers, reading=self.reading)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The maximum number of concurrent tasks")  # for few images
            # Writers ask for no CPU: workers have them all, and rows would wait for the end, to be lost with a node.
            rows.write_parquet(str(self.folder), ray_remote_args={"num_cpus": 0}, concurrency=max(1, living(_ray())))

    def _block(self, count: int) -> int:
        """Images in one task, in whole batches: several tasks for each worker where there are few images."""
        batch = self.workers.batch or _batch(self.detector)
        share = -(-count // (_TASKS_PER_WORKER * _places(_ray(), self.workers)[0]))
        return min(_BLOCK_ROWS, -(-share // batch) * batch)


def write_rows(scoring: Scoring, ray: Any) -> None:
    """Score everything that has no row. After a loss that Ray does not recover from, such as that of a node with its
    rows, start again with what still has no row; the fourth failure in a row without a new row is an error."""
    done, failures = written_keys(scoring.folder, remove_broken=True), 0
    while len(done) < scoring.expected or scoring.of_records:
        nodes = living(ray)
        try:
            scoring.write(done)
            return
        except TrajOODError:
            raise
        except Exception as error:  # ray has many error classes
            before, done = len(done), written_keys(scoring.folder, remove_broken=True)
            failures = 0 if len(done) > before else failures + 1
            text = (str(error).strip().splitlines() or [type(error).__name__])[-1][:300]
            if failures > _RETRIES or not is_loss(error):
                kept = f"rows so far are in {scoring.folder}"
                raise TrajOODError(f"ray: {text}: {kept}: continue with --resume") from error
            warn(f"ray: lost a node or a worker: scoring goes on without it after {len(done):,} rows ({text[:120]})")
            wait_until_noticed(ray, nodes)


_ABOUT = "_run.json"


def check_same_run(
    folder: Path, detector: Path, names: Sequence[str], stride: int = 1, reading: Mapping[str, Any] | None = None
) -> None:
    """Record the digests of the detector and of the sources' names, and how these are read, beside the rows, and refuse
    to continue with others: the keys of rows are positions among the images of the sources."""
    sources = hashlib.sha256("\n".join(names).encode("utf-8", "surrogateescape")).hexdigest()
    now = {
        "detector": open_sealed(detector, FILE_NAME, SCHEMA)["digest"],
        "sources": sources,
        "stride": stride,
        "reading": None if reading is None else dict(reading),
    }
    about = folder / _ABOUT
    if not about.exists():
        write_atomic(about, (json.dumps({"schema": "traj_ood.rows/2", **now}) + "\n").encode())
        return
    before = {"stride": 1, "reading": None, **json.loads(about.read_text())}  # earlier versions recorded neither
    known = {"sources": "list of images", "reading": "reading of images (--exif, --bit-depth)"}
    for name in now:
        if before.get(name) != now[name]:
            what = known.get(name, name)
            raise TrajOODError(f"{folder}: expected rows of this {what}, found another's: choose another --out")


def _places(ray: Any, wanted: Workers) -> tuple[int, bool]:
    """The number of workers, and whether each has a GPU."""
    there = ray.cluster_resources()
    has_gpu = there.get("GPU", 0) >= 1
    places = int(there["GPU"]) if has_gpu else int(there.get("CPU", 1)) // wanted.threads
    return wanted.count or max(1, places), has_gpu


def _batch(folder: Path) -> int:
    """The default number of images per batch, from the detector's record, without loading the model."""
    model = open_sealed(folder, FILE_NAME, SCHEMA)["model"]
    channels, height, width = model["input_shape"]
    chunk = max(1, int(model.get("chunk", 1)))
    return max(1, min(_MAX_BATCH, _BATCH_BYTES // (4 * channels * height * width)) // chunk) * chunk


def _dataset(rows: Iterable[dict[str, Any]], block: int = _BLOCK_ROWS) -> Any:
    """Rows as a Ray dataset of blocks, without a Python object per row."""
    import pyarrow as pa

    waiting, tables = iter(rows), []
    while part := list(islice(waiting, block)):
        tables.append(pa.Table.from_pylist(part))
    if not tables:
        raise TrajOODError("nothing to score: expected images without a row, found none")
    return _ray().data.from_arrow(tables)


def _among(key: int, keys: Any) -> bool:
    """Whether ``key`` is in the sorted array ``keys``."""
    place = int(np.searchsorted(keys, key))
    return place < len(keys) and int(keys[place]) == key


def _is_warning(record: logging.LogRecord) -> bool:
    return record.levelno == logging.WARNING


def _ray() -> Any:
    try:
        ray = import_module("ray")
        import_module("ray.data")
    except ImportError as error:
        raise TrajOODError(f"scoring over a cluster needs ray ({error}): pip install 'traj_ood[ray]'") from error
    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level="ERROR")  # joins the cluster at RAY_ADDRESS, else starts one
    ray.data.DataContext.get_current().enable_progress_bars = False
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):  # the console: errors are raised, and the rest is progress
            handler.addFilter(_is_warning)
    return ray
