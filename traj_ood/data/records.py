"""Images that are no files of their own: tar shards, Hugging Face data sets, Parquet, remote addresses, videos.

Each kind is read by its own library (webdataset, datasets, pyarrow, fsspec, PyAV) as a stream of :class:`Record`, one
image in memory at a time. A record that is broken has an error in place of a content, because one of a million must not
end a run; an archive that nobody honest would make (links, names that leave it, members beyond all sizes) is refused.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

from traj_ood.data.images import IMAGE_SUFFIXES
from traj_ood.errors import TrajOODError, foreign_errors

MAX_MEMBER = 2**28
"""Bytes of one file in an archive: no image that we decode is larger as a file (89 megapixels of RGB are as many)."""
MAX_MEMBERS = 10**8
TARS = (".tar", ".tar.gz", ".tgz", ".tar.zst", ".tar.xz", ".tar.bz2")
VIDEOS = (".mp4", ".mkv", ".mov", ".avi", ".webm", ".m4v", ".mpg", ".mpeg")
HUB = "hf:"
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
_ADDRESS = re.compile(r"^[a-z][a-z0-9+.-]*(::[a-z0-9+.:/-]*)?://", re.IGNORECASE)
_IMAGE_COLUMNS = ("image", "img", "picture", "image_bytes", "bytes", "content", "jpg", "png")
_LABEL_COLUMNS = ("label", "labels", "cls", "fine_label", "target")


@dataclass(frozen=True)
class Record:
    """One image of a source.

    Attributes:
        key: unique in its source, and names it: ``shard.tar/0001.jpg``, ``data.parquet#17``, ``a.mp4#frame=120``.
        content: the bytes of an image file; None where there is an error.
        error: why there are none; empty otherwise.
        label: of its class; empty where none is given.
    """

    key: str
    content: bytes | None = None
    error: str = ""
    label: str = ""


@dataclass(frozen=True)
class Opening:
    """How sources of records are opened.

    Attributes:
        stride: of a video's frames: every ``stride``-th. Default 1.
        allow: beginnings of addresses that may be opened. Default none: an address in a list or a form may be
            anybody's, and a request from this machine reaches what the machine reaches.
    """

    stride: int = 1
    allow: tuple[str, ...] = ()


AS_USUAL = Opening()


def is_records(source: str) -> bool:
    """Whether ``source`` is one of these kinds, by its name alone."""
    lower = source.lower()
    plain = lower.endswith((*TARS, *VIDEOS, ".parquet")) or lower.startswith(HUB)
    return plain or is_address(source) or _is_parquet_folder(source)


def is_address(source: str) -> bool:
    """Whether ``source`` is a URL for fsspec, such as ``s3://bucket/folder``."""
    return bool(_ADDRESS.match(source))


def read_records(source: str, opening: Opening = AS_USUAL) -> Iterator[Record]:
    """The images of a source, in its own order, as they are read.

    Args:
        source: ``shards-{000..009}.tar`` (also ``.tar.gz`` and its like), one sample a key as webdataset has them, the
            label in ``.cls``; ``hf:NAME`` or ``hf:NAME@SPLIT`` of the Hugging Face hub or a folder that ``datasets``
            loads; a ``.parquet`` file or a folder of them, with a column of image bytes or of Hugging Face images; a
            video; an address of fsspec: an image, a folder of images, a tar or Parquet file.
        opening: see :class:`Opening`.
    Raises:
        TrajOODError: a library is missing, nothing of that name, no images in it, a hostile archive, or an address that
            is not allowed.
    """
    lower = source.lower()
    if is_address(source):
        _check_allowed(source, opening.allow)
        return _remote(source, opening.stride)
    if lower.startswith(HUB):
        return _hub(source)
    if lower.endswith(TARS):
        return (record for path in _shards(source) for record in _tar(path, lambda p=path: open(p, "rb")))  # type: ignore[misc]
    if lower.endswith(VIDEOS):
        return _video(source, lambda: open(source, "rb"), opening.stride)
    return _parquet(source)


# ---------------------------------------------------------------------- tar shards


def _shards(source: str) -> list[str]:
    """``a-{08..11}.tar`` as the names it stands for.

    Raises:
        TrajOODError: one of them is not there.
    """
    match = _BRACES.search(source)
    if match is None:
        names = [source]
    else:
        first, last, width = int(match[1]), int(match[2]), len(match[1])
        if not 0 <= last - first < 10**6:
            raise TrajOODError(f"{source}: expected a rising range of at most a million shards, got {match[0]}")
        names = [source[: match.start()] + f"{n:0{width}d}" + source[match.end() :] for n in range(first, last + 1)]
    gone = [name for name in names if not Path(name).is_file()]
    if gone:
        raise TrajOODError(f"{gone[0]}: expected a tar file, found nothing ({len(gone)} of {len(names)} shards)")
    return names


def _tar(name: str, opened: Callable[[], AbstractContextManager[BinaryIO]]) -> Iterator[Record]:
    group_by_keys = _library("webdataset.tariterators", "webdataset").group_by_keys
    found = False
    with opened() as file, foreign_errors(f"{name}: cannot be read as a tar file", ": make it again"):
        for sample in group_by_keys(_members(name, file)):
            found = True
            yield _of_sample(name, sample)
    if not found:
        raise TrajOODError(f"{name}: expected samples, found none: give tar files as webdataset writes them")


def _members(name: str, file: BinaryIO) -> Iterator[dict[str, Any]]:
    """What webdataset groups into samples, after a look at each member's head.

    Raises:
        TrajOODError: links, devices, names that leave the archive, or members beyond all sizes.
    """
    with tarfile.open(fileobj=file, mode="r|*") as archive:
        for number, member in enumerate(archive):
            path = member.name
            if member.isdir():
                continue
            kind = "a link" if member.islnk() or member.issym() else "a device" if not member.isreg() else ""
            outside = path.startswith(("/", "\\")) or ".." in path.replace("\\", "/").split("/") or "\0" in path
            if kind or outside or member.size > MAX_MEMBER or member.sparse or number >= MAX_MEMBERS:
                reason = kind or ("a name that leads out of it" if outside else f"{member.size} bytes")
                raise TrajOODError(f"{name}: member {path[:200]!r}: {reason}: do not trust this archive")
            content = archive.extractfile(member)
            assert content is not None
            yield {"fname": path, "data": content.read(), "__url__": name}


def _of_sample(name: str, sample: dict[str, Any]) -> Record:
    key = f"{name}/{sample['__key__']}"
    suffix = next((s for s in sample if f".{s.rpartition('.')[2]}" in IMAGE_SUFFIXES), None)
    if suffix is None:
        return Record(key, error="expected an image in the sample, found none")
    label = sample.get("cls", b"")
    return Record(f"{key}.{suffix}", sample[suffix], label=label.decode("utf-8", "replace").strip())


# ---------------------------------------------------------------------- tables


def _is_parquet_folder(source: str) -> bool:
    path = Path(source)
    return path.is_dir() and next(path.glob("*.parquet"), None) is not None


def _parquet(source: str) -> Iterator[Record]:
    path = Path(source)
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    for file in files:
        if not file.is_file():
            raise TrajOODError(f"{file}: expected a Parquet file, found nothing: correct the path")
        yield from _parquet_rows(str(file), str(file))


def _parquet_rows(name: str, file: Any) -> Iterator[Record]:
    import pyarrow.parquet as pq

    with foreign_errors(f"{name}: cannot be read as Parquet"):
        table = pq.ParquetFile(file)
        image, label = _columns(name, table.schema_arrow.names)
        number = 0
        for batch in table.iter_batches(batch_size=64, columns=[image, *([label] if label else [])]):
            for row in batch.to_pylist():
                yield _of_row(f"{name}#{number}", row[image], row[label] if label else "")
                number += 1


def _columns(name: str, columns: Sequence[str]) -> tuple[str, str | None]:
    image = next((column for column in _IMAGE_COLUMNS if column in columns), None)
    if image is None:
        raise TrajOODError(
            f"{name}: expected a column of images ({', '.join(_IMAGE_COLUMNS)}), got {', '.join(columns)[:200]}: "
            "rename it"
        )
    return image, next((column for column in _LABEL_COLUMNS if column in columns), None)


def _of_row(key: str, value: Any, label: Any) -> Record:
    """Of image bytes, or of ``{"bytes": …, "path": …}`` as Hugging Face writes them."""
    content = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(content, bytes):
        return Record(key, error="expected the bytes of an image, found none")
    return Record(key, content, label="" if label is None else str(label))


def _hub(source: str) -> Iterator[Record]:
    datasets = _library("datasets", "datasets")
    name, _, split = source.removeprefix(HUB).partition("@")
    with foreign_errors(f"{source}: cannot be loaded", ": give hf:NAME@SPLIT of the hub, or a folder"):
        local = Path(name).expanduser()
        data = datasets.load_dataset(str(local) if local.exists() else name, split=split or "train", streaming=True)
        image, label = _columns(source, list(data.features or ()))
        data = data.select_columns([image, *([label] if label else [])])
        for number, row in enumerate(data.cast_column(image, datasets.Image(decode=False))):
            value = _opened(row[image], local) if isinstance(row[image], dict) else row[image]
            yield _of_row(f"{source}#{number}", value, row[label] if label else "")


def _opened(value: dict[str, Any], folder: Path) -> Any:
    """The bytes of an image that ``datasets`` names by its path, where that is in the data set's own folder or on the
    hub: a table may name any path of this machine."""
    path = value.get("path")
    if value.get("bytes") is not None or not isinstance(path, str):
        return value
    own = folder.exists() and Path(path).resolve().is_relative_to(folder.resolve())
    if not own and not path.rpartition("::")[2].startswith("hf://"):
        return value
    with import_module("datasets.utils.file_utils").xopen(path, "rb") as file:
        return file.read(MAX_MEMBER)


# ---------------------------------------------------------------------- addresses


def _check_allowed(address: str, allow: Sequence[str]) -> None:
    if ".." in address.split("/") or not any(allowed and _within(address, allowed) for allowed in allow):
        told = ", ".join(allow) or "none"
        raise TrajOODError(f"{address[:200]}: not an address that is allowed ({told}): name its beginning with --allow")


def _within(address: str, allowed: str) -> bool:
    """``s3://bucket/a`` holds ``s3://bucket/a`` and ``s3://bucket/a/b``, not ``s3://bucket/ab``."""
    return address == allowed or address.startswith(allowed if allowed.endswith("/") else allowed + "/")


def _remote(address: str, stride: int) -> Iterator[Record]:
    core = _library("fsspec.core", "fsspec")
    with foreign_errors(f"{address}: cannot be opened", ": correct the address, or install what fsspec asks for"):
        system, path = core.url_to_fs(address)
        names = sorted(system.find(path)) if system.isdir(path) else [path]
    prefix = address[: _ADDRESS.match(address).end()]  # type: ignore[union-attr]
    wanted = (*IMAGE_SUFFIXES, *TARS, *VIDEOS, ".parquet")
    names = [name for name in names if name.lower().endswith(wanted) or len(names) == 1]
    if not names:
        raise TrajOODError(f"{address}: expected images, found none in it")
    for name in names:
        key = name if _ADDRESS.match(name) else prefix + name.lstrip("/")
        lower = name.lower()
        if lower.endswith(TARS):
            yield from _tar(key, lambda n=name: system.open(n, "rb"))  # type: ignore[misc]
        elif lower.endswith(".parquet"):
            with system.open(name, "rb") as file:
                yield from _parquet_rows(key, file)
        elif lower.endswith(VIDEOS):
            yield from _video(key, lambda n=name: system.open(n, "rb"), stride)  # type: ignore[misc]
        else:
            yield _fetched(system, name, key)


def _fetched(system: Any, name: str, key: str) -> Record:
    try:
        with system.open(name, "rb") as file:
            content = file.read(MAX_MEMBER + 1)
    except Exception as error:  # each file system has errors of its own
        return Record(key, error=f"cannot be fetched ({type(error).__name__}: {str(error)[:200]})")
    if len(content) > MAX_MEMBER:
        return Record(key, error=f"expected at most {MAX_MEMBER} bytes, got more")
    return Record(key, content)


# ---------------------------------------------------------------------- videos


def _video(name: str, opened: Callable[[], AbstractContextManager[BinaryIO]], stride: int) -> Iterator[Record]:
    av = _library("av", "av")
    if stride < 1:
        raise TrajOODError(f"stride: expected at least 1, got {stride}")
    try:
        file = opened()
    except OSError as error:
        raise TrajOODError(f"{name}: cannot be read ({error.strerror or error}): correct the path") from error
    number = 0
    with file as content:
        try:
            with av.open(content) as video:
                for number, frame in enumerate(video.decode(video=0)):
                    if number % stride == 0:
                        picture = io.BytesIO()
                        frame.to_image().save(picture, "PPM")  # as it is: no second loss
                        yield Record(f"{name}#frame={number}", picture.getvalue())
        except (av.FFmpegError, IndexError) as error:  # what was decoded before it stands
            yield Record(f"{name}#frame={number}", error=f"the video cannot be decoded any further ({error})")


def _library(module: str, package: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise TrajOODError(f"this source needs {package}: pip install 'traj_ood[sources]'") from error


def short(key: str, source: str) -> str:
    """A record's key without where its source lies, the same on every machine."""
    folder = source.rstrip("/").rpartition("/")[0]
    return key.removeprefix(folder + "/") if folder else key
