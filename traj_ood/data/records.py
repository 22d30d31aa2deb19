"""Read images from tar shards, Hugging Face data sets, Parquet files, remote addresses and videos.

Each kind is read with its library (webdataset, datasets, pyarrow, fsspec, PyAV) as a stream of :class:`Record`, with
one image in memory at a time. A broken record has an error instead of content, so that one in a million does not end a
run. An archive with signs of an attack (links, paths outside it, oversized members) is refused.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

from traj_ood.data.addresses import RemoteFiles, check_allowed, is_address, library
from traj_ood.data.decoding import MAX_PIXELS
from traj_ood.data.images import IMAGE_SUFFIXES
from traj_ood.errors import TrajOODError, foreign_errors

MAX_MEMBER = 2**28
"""Largest file in an archive in bytes: the largest image that is decoded (89 megapixels of RGB) has as many."""
MAX_MEMBERS = 10**8
"""Most files in an archive."""
MAX_HEAD = 2**16
"""Largest header extension of a tar member in bytes (long name, further attributes)."""
MAX_SAMPLE = MAX_MEMBER  # in bytes, over all members of the sample
_LABEL = 4096  # bytes read of a member that is no image
_PLAIN_TYPES = (*tarfile.REGULAR_TYPES, tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE)
TARS = (".tar", ".tar.gz", ".tgz", ".tar.zst", ".tar.xz", ".tar.bz2")
VIDEOS = (".mp4", ".mkv", ".mov", ".avi", ".webm", ".m4v", ".mpg", ".mpeg")
# A playlist is excluded: the parts that it names may be local files or addresses that are not allowed.
_VIDEO_OPTIONS = {"format_whitelist": "avi,matroska,mov,mpeg,mpegts,mpegvideo", "protocol_whitelist": ""}
HUB = "hf:"
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
_IMAGE_COLUMNS = ("image", "img", "picture", "image_bytes", "bytes", "content", "jpg", "png")
_LABEL_COLUMNS = ("label", "labels", "cls", "fine_label", "target")


@dataclass(frozen=True)
class Record:
    """One image of a source."""

    key: str  # unique, such as shard.tar/0001.jpg, data.parquet#17 or a.mp4#frame=120
    content: bytes | None = None  # of an image file; None if the record is broken
    error: str = ""  # the reason why it is broken
    label: str = ""  # of its class, if one is given


@dataclass(frozen=True)
class Opening:
    """How sources of records are opened."""

    stride: int = 1  # of the frames that are read of a video
    allow: tuple[str, ...] = ()  # prefixes of addresses that may be opened, see traj_ood.data.addresses


DEFAULT_OPENING = Opening()


def is_records(source: str) -> bool:
    """Whether ``source`` is one of these kinds, judged by its name."""
    lower = source.lower()
    plain = lower.endswith((*TARS, *VIDEOS, ".parquet")) or lower.startswith(HUB)
    return plain or is_address(source) or _is_parquet_folder(source)


def read_records(source: str, opening: Opening = DEFAULT_OPENING) -> Iterator[Record]:
    """Iterate over the images of a source, in its own order.

    Args:
        source: one of

            * webdataset shards ``shards-{000..009}.tar`` (also ``.tar.gz`` etc.), with labels in ``.cls``;
            * ``hf:NAME`` or ``hf:NAME@SPLIT``, a data set of the Hugging Face hub or a folder that ``datasets`` loads;
            * a ``.parquet`` file or a folder of them, with a column of image bytes or of Hugging Face images;
            * a video;
            * an fsspec address of an image, a folder of images, or a tar, Parquet or video file.
        opening: see :class:`Opening`.
    """
    lower = source.lower()
    if is_address(source):
        check_allowed(source, opening.allow)
        return (record for name in _shard_names(source) for record in _remote(name, opening))
    if lower.startswith(HUB):
        return _hub(source)
    if lower.endswith(TARS):
        return (record for path in _shards(source) for record in _tar(path, lambda p=path: open(p, "rb")))  # type: ignore[misc]
    if lower.endswith(VIDEOS):
        return _video(source, lambda: open(source, "rb"), opening.stride)
    return _parquet(source)


def files_of(source: str) -> list[str]:
    """The files that a source is read from, each a source of its own with the same records: shards, and the files of a
    Parquet folder; else the source itself."""
    if is_address(source) or source.lower().endswith(TARS):
        return _shard_names(source) if is_address(source) else _shards(source)
    if _is_parquet_folder(source):
        return [str(path) for path in sorted(Path(source).glob("*.parquet"))]
    return [source]


# ---------------------------------------------------------------------- tar shards


def _shard_names(source: str) -> list[str]:
    """The names in a pattern such as ``a-{08..11}.tar``; any other source is its own only name."""
    match = _BRACES.search(source)
    if match is None or not source.lower().endswith(TARS):
        return [source]
    first, last, width = int(match[1]), int(match[2]), len(match[1])
    if not 0 <= last - first < 10**6:
        raise TrajOODError(f"{source}: expected a rising range of at most a million shards, got {match[0]}")
    return [source[: match.start()] + f"{n:0{width}d}" + source[match.end() :] for n in range(first, last + 1)]


def _shards(source: str) -> list[str]:
    """The file names of a pattern such as ``a-{08..11}.tar``, all of which must exist."""
    names = _shard_names(source)
    gone = [name for name in names if not Path(name).is_file()]
    if gone:
        raise TrajOODError(f"{gone[0]}: expected a tar file, found nothing ({len(gone)} of {len(names)} shards)")
    return names


def _tar(name: str, opened: Callable[[], AbstractContextManager[BinaryIO]]) -> Iterator[Record]:
    group_by_keys = library("webdataset.tariterators", "webdataset").group_by_keys
    found = False
    with foreign_errors(f"{name}: cannot be read as a tar file", ": make it again"), opened() as file:
        for sample in group_by_keys(_members(name, file)):
            found = True
            yield _of_sample(name, sample)
    if not found:
        raise TrajOODError(f"{name}: expected samples, found none: give tar files as webdataset writes them")


class _Member(tarfile.TarInfo):
    """A tar member that refuses large header extensions and sparse files while its header is parsed: before it returns
    a member, tarfile reads long names and attributes of any size and endless lists of the holes in a sparse file."""

    def _proc_member(self, archive: tarfile.TarFile) -> Any:
        if self.type == tarfile.GNUTYPE_SPARSE:
            raise TrajOODError(f"{self.name[:200]!r}: a sparse file")
        if self.type not in _PLAIN_TYPES and self.size > MAX_HEAD:
            raise TrajOODError(f"{self.name[:200]!r}: a head of {self.size} bytes")
        return super()._proc_member(archive)  # type: ignore[misc]

    def _proc_gnusparse_10(self, following: tarfile.TarInfo, *_: Any) -> None:
        raise TrajOODError(f"{following.name[:200]!r}: a sparse file")


def _members(name: str, file: BinaryIO) -> Iterator[dict[str, Any]]:
    """The members of a tar file in the form that webdataset groups into samples.

    Each header is checked before its content is read; of a member that is no image, at most ``_LABEL`` bytes are read.
    """
    key_of = library("webdataset.tariterators", "webdataset").base_plus_ext
    key, size = "", 0
    try:
        with tarfile.open(fileobj=file, mode="r|*", tarinfo=_Member) as archive:
            for number, member in enumerate(archive):
                archive.members = []  # type: ignore[attr-defined]  # tarfile keeps them all
                if member.isdir():
                    continue
                _check_member(member, number)
                own, suffix = key_of(member.name)
                key, size = own, member.size + (size if own is not None and own == key else 0)
                if size > MAX_SAMPLE:
                    raise TrajOODError(f"{member.name[:200]!r}: {size} bytes of one sample")
                content = archive.extractfile(member)
                assert content is not None
                is_image = f".{(suffix or '').rpartition('.')[2].lower()}" in IMAGE_SUFFIXES
                yield {"fname": member.name, "data": content.read(-1 if is_image else _LABEL), "__url__": name}
    except TrajOODError as error:
        raise TrajOODError(f"{name}: member {error}: do not trust this archive") from error


def _check_member(member: tarfile.TarInfo, number: int) -> None:
    path = member.name
    kind = "a link" if member.islnk() or member.issym() else "" if member.isreg() else "a device"
    kind = kind or ("a sparse file" if member.sparse else "")
    outside = path.startswith(("/", "\\")) or ".." in path.replace("\\", "/").split("/") or "\0" in path
    if kind or outside or member.size > MAX_MEMBER or number >= MAX_MEMBERS:
        reason = kind or ("a path outside it" if outside else f"{member.size} bytes")
        raise TrajOODError(f"{path[:200]!r}: {reason}")


def _of_sample(name: str, sample: dict[str, Any]) -> Record:
    key = f"{name}/{sample['__key__']}"
    images = [s for s in sample if f".{s.rpartition('.')[2]}" in IMAGE_SUFFIXES]
    chosen = [s for s in images if "." not in s][:1] or images  # jpg rather than mask.png, which may come first
    if len(chosen) != 1:  # such as those of a.01.jpg and a.02.jpg, which have the same key
        found = f"{', '.join(images)} (a key ends at the first dot)" if images else "none"
        return Record(key, error=f"expected an image in the sample, found {found}")
    label = sample.get("cls", b"")
    return Record(f"{key}.{chosen[0]}", sample[chosen[0]], label=label.decode("utf-8", "replace").strip())


# ---------------------------------------------------------------------- tables


def _is_parquet_folder(source: str) -> bool:
    path = Path(source)
    return path.is_dir() and next(path.glob("*.parquet"), None) is not None


def _parquet(source: str) -> Iterator[Record]:
    for file in files_of(source):
        if not Path(file).is_file():
            raise TrajOODError(f"{file}: expected a Parquet file, found nothing: correct the path")
        yield from _parquet_rows(file, file)


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
    """A record from image bytes, or from ``{"bytes": …, "path": …}`` as written by Hugging Face."""
    content = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(content, bytes):
        return Record(key, error="expected the bytes of an image, found none")
    return Record(key, content, label="" if label is None else str(label))


def _hub(source: str) -> Iterator[Record]:
    datasets = library("datasets", "datasets")
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
    """The bytes of an image that ``datasets`` gives by path. Only paths in the data set's own folder or on the hub are
    read, as a table may contain any path of this machine."""
    path = value.get("path")
    if value.get("bytes") is not None or not isinstance(path, str):
        return value
    own = folder.exists() and Path(path).resolve().is_relative_to(folder.resolve())
    if not own and not path.rpartition("::")[2].startswith("hf://"):
        return value
    with import_module("datasets.utils.file_utils").xopen(path, "rb") as file:
        return file.read(MAX_MEMBER)


# ---------------------------------------------------------------------- addresses


def _remote(address: str, opening: Opening) -> Iterator[Record]:
    files = RemoteFiles(address, opening.allow)
    wanted = (*IMAGE_SUFFIXES, *TARS, *VIDEOS, ".parquet")
    names = [name for name in files.names if name.lower().endswith(wanted) or len(files.names) == 1]
    if not names:
        raise TrajOODError(f"{address}: expected images, found none in it")
    for name in names:
        lower = name.lower()
        if lower.endswith(TARS):
            yield from _tar(name, partial(files.open, name))
        elif lower.endswith(".parquet"):
            with files.open(name, seekable=True) as file:
                yield from _parquet_rows(name, file)
        elif lower.endswith(VIDEOS):
            yield from _video(name, partial(files.open, name, seekable=True), opening.stride)
        else:
            yield _fetched(files, name)


def _fetched(files: RemoteFiles, name: str) -> Record:
    try:
        content = files.read(name, MAX_MEMBER)
    except TrajOODError as error:
        return Record(name, error=str(error).removeprefix(f"{name}: "))
    if len(content) > MAX_MEMBER:
        return Record(name, error=f"expected at most {MAX_MEMBER} bytes, got more")
    return Record(name, content)


# ---------------------------------------------------------------------- videos


def _video(name: str, opened: Callable[[], AbstractContextManager[BinaryIO]], stride: int) -> Iterator[Record]:
    av = library("av", "av")
    if stride < 1:
        raise TrajOODError(f"stride: expected at least 1, got {stride}")
    try:
        file = opened()
    except OSError as error:
        raise TrajOODError(f"{name}: cannot be read ({error.strerror or error}): correct the path") from error
    count = 0  # of decoded frames
    with file as content:
        try:
            with av.open(content, options=_VIDEO_OPTIONS) as video:
                size = video.streams.video[0]
                if size.width * size.height > MAX_PIXELS:
                    told = f"expected frames of at most {MAX_PIXELS} pixels, got {size.width} x {size.height}"
                    yield Record(f"{name}#frame=0", error=told)
                    return
                for count, frame in enumerate(video.decode(video=0), start=1):
                    if (count - 1) % stride == 0:
                        picture = io.BytesIO()
                        frame.to_image().save(picture, "PPM")  # lossless
                        yield Record(f"{name}#frame={count - 1}", picture.getvalue())
        except (av.FFmpegError, IndexError) as error:  # frames decoded so far are kept
            yield Record(f"{name}#frame={count}", error=f"the video cannot be decoded any further ({error})")


def short(key: str, source: str) -> str:
    """A record's key without the folder of its source, the same on every machine."""
    folder = source.rstrip("/").rpartition("/")[0]
    return key.removeprefix(folder + "/") if folder else key
