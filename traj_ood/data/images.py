"""Image sources: arrays in memory or files on disk, each image with a stable id.

Every source returns Pillow images of mode 'L' or 'RGB' only, so that no transform has to handle palettes, alpha
channels or 16-bit greyscale.
"""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
from PIL import Image

from traj_ood.data.contents import hash_files
from traj_ood.data.decoding import Reading, open_image
from traj_ood.errors import TrajOODError, warn

if TYPE_CHECKING:
    from typing_extensions import Self

HIDDEN = "hidden"
"""The key of hidden image files among the counts of what is left out of a folder, which no suffix is."""
IMAGE_SUFFIXES = (".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


class ImageSource(Protocol):
    """A finite, ordered, immutable set of images."""

    @property
    @abstractmethod
    def ids(self) -> Sequence[str]:
        """One id per image, unique within the source and the same on every machine."""

    @property
    @abstractmethod
    def labels(self) -> Sequence[str]:
        """One class label per image, or empty if they are unknown."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def load(self, index: int) -> Image.Image:
        """Image ``index``, fully decoded, of mode 'L' or 'RGB'.

        Raises:
            TrajOODError: the image is missing, empty, truncated or cannot be decoded; the message names it.
        """

    @abstractmethod
    def contents(self, indices: Sequence[int] | None = None) -> tuple[str, ...]:
        """A content digest of each image (default: all): equal texts if and only if the contents are equal."""

    @abstractmethod
    def digest(self) -> str:
        """SHA-256 (hex) over the ids and the content of every image; the same on every machine."""

    @abstractmethod
    def select(self, indices: Sequence[int]) -> ImageSource:
        """The images at ``indices``, in that order, with the same ids."""

    @abstractmethod
    def missing(self) -> list[str]:
        """Paths of image files that are absent or empty; always ``[]`` for arrays."""


class Listed:
    """Base of image sources that are dataclasses: each field in ``columns`` has one entry per image, or none."""

    columns: ClassVar[tuple[str, ...]] = ("ids", "labels")
    ids: tuple[str, ...]
    labels: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, indices: Sequence[int]) -> Self:
        """The images at ``indices``, in that order."""
        whole = {name: getattr(self, name) for name in self.columns}
        parts = {name: tuple(column[i] for i in indices) for name, column in whole.items() if column}
        return replace(self, **parts)  # type: ignore[type-var]

    def _check(self, count: int, what: str) -> None:
        """Make tuples of the columns, and check that there are ``count`` unique ids and as many labels or none."""
        for column in self.columns:
            object.__setattr__(self, column, tuple(getattr(self, column)))
        if len(self.ids) != count:
            raise TrajOODError(
                f"{what}: expected {count} ids, one per image, got {len(self.ids)}; give one id per image"
            )
        if len(set(self.ids)) != count:
            twice = next(image_id for image_id, times in Counter(self.ids).items() if times > 1)
            raise TrajOODError(f"{what}: expected unique ids, got {twice!r} twice; give every image its own id")
        if self.labels and len(self.labels) != count:
            raise TrajOODError(
                f"{what}: expected {count} labels, one per image, got {len(self.labels)}; give one label per image or "
                "none"
            )


@dataclass(frozen=True, eq=False)
class ArrayImages(Listed):
    """Images held in memory.

    Attributes:
        ids: N unique ids.
        array: uint8, (N, H, W) greyscale or (N, H, W, 3) RGB.
        labels: N class labels, or empty.

    Raises:
        TrajOODError: the dtype or shape is another, or ids or labels do not match the images.
    """

    ids: tuple[str, ...]
    array: np.ndarray
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        shape = self.array.shape
        if self.array.dtype != np.uint8 or not (len(shape) == 3 or (len(shape) == 4 and shape[3] == 3)):
            raise TrajOODError(
                f"array images: expected uint8 of shape (N, H, W) or (N, H, W, 3), got {self.array.dtype} {shape}; "
                "convert the array first"
            )
        self._check(shape[0], "array images")

    def load(self, index: int) -> Image.Image:
        return Image.fromarray(np.ascontiguousarray(self.array[index]))

    def contents(self, indices: Sequence[int] | None = None) -> tuple[str, ...]:
        """SHA-256 of the shape and the pixels of each image."""
        rows = range(len(self)) if indices is None else indices
        shape = repr(self.array.shape[1:]).encode()
        return tuple(hashlib.sha256(shape + np.ascontiguousarray(self.array[i]).tobytes()).hexdigest() for i in rows)

    def digest(self) -> str:
        """SHA-256 over the ids, the shape and the pixels. Labels are left out, as they do not affect images."""
        sha = _digest_of(self.ids)
        sha.update(repr(self.array.shape).encode())
        sha.update(np.ascontiguousarray(self.array).data)
        return sha.hexdigest()

    def select(self, indices: Sequence[int]) -> ArrayImages:
        labels = tuple(self.labels[i] for i in indices) if self.labels else ()
        return ArrayImages(tuple(self.ids[i] for i in indices), self.array[np.asarray(indices, dtype=np.intp)], labels)

    def missing(self) -> list[str]:
        return []


@dataclass(frozen=True)
class FileImages(Listed):
    """Image files below one folder.

    Attributes:
        root: the folder to which ``paths`` are relative. It is not part of ids and digest, which are therefore the same
            on every machine.
        paths: N relative paths with forward slashes.
        ids: N unique ids.
        labels: N class labels, or empty; for class-conditional scorers and the training of classifiers.
        follow_links: whether to read files that links put outside ``root``. Default true, for folders; false for image
            lists, which may come from an untrusted source (see :func:`read_image_list`).
        exif, bit_depth: how files are decoded, see :class:`traj_ood.data.Reading`; part of the digest.

    Raises:
        TrajOODError: ids or labels do not match the paths, or the bit depth is invalid.
    """

    columns = ("paths", "ids", "labels")

    root: Path
    paths: tuple[str, ...]
    ids: tuple[str, ...]
    labels: tuple[str, ...] = ()
    follow_links: bool = True
    exif: bool = False
    bit_depth: int | None = None

    def __post_init__(self) -> None:
        Reading(self.exif, self.bit_depth)
        object.__setattr__(self, "root", Path(self.root))
        self._check(len(self.paths), f"image files below {self.root}")

    def load(self, index: int) -> Image.Image:
        """Read and decode file ``index``; raises as :func:`open_image` and :meth:`check_links`."""
        self.check_links([index])
        return open_image(self.root / self.paths[index], Reading(self.exif, self.bit_depth))

    def reading(self) -> dict[str, Any]:
        """The decoding settings that differ from the defaults, as JSON data; part of the digest."""
        return Reading(self.exif, self.bit_depth).options()

    def contents(self, indices: Sequence[int] | None = None) -> tuple[str, ...]:
        """SHA-256 of each file, an empty text for one that cannot be read; see :func:`hash_files`."""
        part = self if indices is None else self.select(indices)
        return hash_files(list(part.resolved()))

    def digest(self) -> str:
        """SHA-256 over ids, file contents and :meth:`reading`, without root and labels, which do not affect images."""
        how = json.dumps([type(self).__name__, self.reading()], sort_keys=True)
        return _digest_of(self.ids, self.contents(), [how]).hexdigest()

    def list_digest(self) -> str:
        """SHA-256 over ids, relative paths, labels and :meth:`reading`, without the contents of the files."""
        how = [[str(self.reading())]] if self.reading() else []
        return _digest_of(self.ids, self.paths, self.labels, *how).hexdigest()

    def check_links(self, indices: Sequence[int] | None = None) -> None:
        """Unless ``follow_links``, refuse files (default: all) that links put outside ``root``."""
        if self.follow_links:
            return
        part = self if indices is None else self.select(indices)
        root = os.path.realpath(self.root)
        for path, real in zip(part.paths, part.resolved(), strict=True):
            if os.path.commonpath([real, root]) != root:
                raise TrajOODError(
                    f"{os.path.join(self.root, path)}: a link on the way leads out of {self.root}; put the file there, "
                    "or allow such links with --follow-links (in Python: follow_links=True)"
                )

    def missing(self) -> list[str]:
        """Full paths that are absent, empty or not a file, in order."""
        return [full for full in (os.path.join(self.root, path) for path in self.paths) if not _is_filled_file(full)]

    def resolved(self) -> Iterator[str]:
        """Canonical absolute path of every file, links followed.

        Each folder is resolved once, as ``realpath`` of a million full paths takes minutes.
        """
        folders: dict[str, str] = {}
        for path in self.paths:
            folder, name = posixpath.split(path)
            if folder not in folders:
                folders[folder] = os.path.realpath(os.path.join(self.root, folder))
            full = os.path.join(folders[folder], name)
            yield os.path.realpath(full) if os.path.islink(full) else full


def check_unchanged(images: ImageSource, indices: Sequence[int], contents: Sequence[str]) -> None:
    """Refuse to go on if the images at ``indices`` have changed since ``contents``, the digests of all images, were
    taken."""
    found = images.contents(indices)
    changed = [images.ids[i] for i, now in zip(indices, found, strict=True) if contents[i] != now]
    if changed:
        raise TrajOODError(
            f"{len(changed)} image(s) changed while they were being read, first {changed[0]!r}: start the same command "
            "again once nothing writes them any more"
        )


def read_image_list(list_path: str | Path, root: str | Path, *, follow_links: bool = False) -> FileImages:
    """Read an image list in OpenOOD's format, a UTF-8 text of one ``relative/path label`` per line.

    The path ends at the first space, or, if it contains spaces, with the last word that has an image's suffix; the rest
    is the label (a class number, −1, a dict literal, or nothing). Blank lines are skipped. The ids are the normalised
    relative paths, of which each may appear once.

    Args:
        list_path: the text file.
        root: the folder to which paths are relative, and which they may not leave. It may be a link, and need not exist
            yet: preflight reports all missing files together.
        follow_links: whether to read files that links below ``root`` put elsewhere. Default false: preflight, ``fit``
            and :meth:`FileImages.load` refuse them.
    """
    list_path = Path(list_path)
    try:
        lines = list_path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        message = f"image list {list_path}: cannot be read ({reason}); give a text file of image paths"
        raise TrajOODError(message) from error
    first_line: dict[str, int] = {}
    labels = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        written, label = path_and_label(line.strip())
        path = inside_root(written, f"image list {list_path} line {number}")
        if path in first_line:
            raise TrajOODError(
                f"image list {list_path} line {number}: {path!r} is already on line {first_line[path]}; "
                "list every image once"
            )
        first_line[path] = number
        labels.append(label.strip())
    if not first_line:
        raise TrajOODError(f"image list {list_path}: expected lines 'relative/path label', found none; fill the list")
    paths = tuple(first_line)
    return FileImages(Path(root), paths, paths, tuple(labels), follow_links)


def path_and_label(line: str) -> tuple[str, str]:
    """The path and the label in a line of an image list, see :func:`read_image_list`."""
    words = line.split(" ")
    ends = [end for end, word in enumerate(words, start=1) if word.lower().endswith(IMAGE_SUFFIXES)]
    end = ends[-1] if ends else 1
    return " ".join(words[:end]), " ".join(words[end:])


def read_folder(folder: str | Path, *, prefix: str = "") -> FileImages:
    """All image files in and below ``folder``, sorted by relative path, which ``prefix`` precedes in the ids (``sun``
    gives ``sun/a/b.jpg``).

    Image files are recognised by suffix, in upper or lower case. Other files are left out, and so are hidden image
    files, with a warning that counts them. Other hidden files and folders are ignored. Links to folders are followed,
    each real folder once; a link to a folder above ``folder``, which would add the images beside it, is refused.
    """
    folder = Path(folder)
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing"
        raise TrajOODError(f"image folder {folder}: expected a folder of images, found {found}; correct the path")
    others: Counter[str] = Counter()
    paths: list[str] = []
    for path, error in walk_images(str(folder), others, follow_links=True):
        if error:
            raise TrajOODError(f"{path}: {error}")
        paths.append(Path(path).relative_to(folder).as_posix())
    paths.sort()
    if not paths:
        found = f"{others[HIDDEN]} hidden one(s) alone" if others[HIDDEN] else "none"
        raise TrajOODError(
            f"image folder {folder}: expected at least one image ({' '.join(IMAGE_SUFFIXES)}), found {found}; "
            "fill the folder or correct the path"
        )
    if others:
        warn(left_out(folder, others), stacklevel=2)
    return FileImages(folder, tuple(paths), tuple(posixpath.join(prefix, path) for path in paths))


def labelled_by_folder(images: FileImages) -> FileImages:
    """A copy with each image labelled by its first subfolder, as in torchvision's ImageFolder."""
    labels = tuple(path.split("/")[0] if "/" in path else "" for path in images.paths)
    if "" in labels:
        raise TrajOODError(
            f"{images.root}: expected a folder for each class, found {images.paths[labels.index('')]} beside them"
        )
    return replace(images, labels=labels)


def left_out(folder: str | Path, others: Counter[str]) -> str:
    """The warning about files that are no images, with counts by suffix, the most frequent first, and hidden ones."""
    plain = Counter({suffix: n for suffix, n in others.items() if suffix != HIDDEN})
    kinds = [f"{suffix or 'no suffix'} {n}" for suffix, n in plain.most_common(5)]
    more = ", …" if len(plain) > len(kinds) else ""
    parts = [f"{plain.total()} file(s) that are no images: {', '.join(kinds)}{more}"] if plain else []
    parts += [f"{others[HIDDEN]} hidden image file(s), whose names begin with a dot"] if others[HIDDEN] else []
    return f"{folder}: left out {'; and '.join(parts)}"


def suffix_of(name: str) -> str:
    """The suffix of a file name, or ``.…`` if it is long or not printable."""
    suffix = posixpath.splitext(name)[1].lower()
    return suffix if suffix.isprintable() and len(suffix) <= 12 else ".…"


def walk_images(folder: str, others: Counter[str], *, follow_links: bool) -> Iterator[tuple[str, str]]:
    """Iterate over the image files in and below ``folder``, recognised by suffix, in the sort order of their relative
    paths: each path, and why it must not be read, else an empty text.

    Hidden files and folders are ignored; each real folder is entered once, so that loops of links end. Links that lead
    out of ``folder``, unless ``follow_links``, or to a folder above it, and folders that cannot be listed have an
    error. ``others`` counts the suffixes of files that are no images, and under ``HIDDEN`` hidden image files. One
    folder's names are in memory at a time.
    """
    root = os.path.realpath(folder)
    seen, above = {_identity(root)}, {_identity(str(parent)) for parent in Path(root).parents} - {None}
    waiting = [_listing(folder, others)]  # a stack of half-walked folders, not recursion: trees may be deep
    while waiting:
        item = next(waiting[-1], None)
        if item is None:
            waiting.pop()
        elif isinstance(item, tuple):
            yield item
        elif not follow_links and item.is_symlink() and leaves(item.path, root):
            if _is_folder(item) or item.name.lower().endswith(IMAGE_SUFFIXES):
                yield item.path, f"the link leads out of {folder}; allow that with --follow-links"
        elif _is_folder(item):
            identity = _identity(item.path)
            if identity in above:
                yield item.path, f"the link leads to a folder above {folder}, and to all images in there; remove it"
            elif identity is None or identity not in seen:
                seen.add(identity)
                waiting.append(_listing(item.path, others))
        elif item.name.lower().endswith(IMAGE_SUFFIXES):
            yield item.path, ""
        else:
            others[suffix_of(item.name)] += 1


def _listing(folder: str, others: Counter[str]) -> Iterator[os.DirEntry[str] | tuple[str, str]]:
    """The content of a folder without hidden names, in the sort order of the full relative paths below it. Hidden image
    files are counted in ``others``."""
    try:
        with os.scandir(folder) as found:
            every = list(found)
    except OSError as error:
        yield folder, f"the folder cannot be listed ({error.strerror}); fix its permissions"
        return
    if hidden := sum(map(_is_hidden_image, every)):
        others[HIDDEN] += hidden
    items = [item for item in every if not item.name.startswith(".")]
    yield from sorted(items, key=lambda item: item.name + "/" if _is_folder(item) else item.name)


def _is_hidden_image(item: os.DirEntry[str]) -> bool:
    # macOS writes a ``._name.jpg`` for each name.jpg on foreign disks, which is no image.
    named = item.name.startswith(".") and not item.name.startswith("._")
    return named and suffix_of(item.name) in IMAGE_SUFFIXES and not _is_folder(item)


def _is_folder(item: os.DirEntry[str]) -> bool:
    try:
        return item.is_dir()
    except OSError:  # a circular link
        return False


def _identity(folder: str) -> tuple[int, int] | None:
    """Device and inode of a folder; None if it no longer exists, which listing it will report."""
    try:
        status = os.stat(folder)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def leaves(path: str, real_root: str) -> bool:
    """Whether ``path``, with all links resolved, is outside ``real_root``."""
    real = os.path.realpath(path)
    return os.path.commonpath([real, real_root]) != real_root


def inside_root(written: str, where: str) -> str:
    """Normalise a path from an image list, which must stay below its root; for links see ``check_links``."""
    path = posixpath.normpath(written)
    if path.startswith("/") or os.path.isabs(path):
        raise TrajOODError(f"{where}: expected a path relative to the image root, got {written!r}; make it relative")
    if path.split("/", 1)[0] == "..":
        raise TrajOODError(f"{where}: {written!r} leaves the image root through '..'; keep every path below the root")
    return path


def _is_filled_file(path: str) -> bool:
    try:
        return os.path.isfile(path) and os.stat(path).st_size > 0
    except OSError:  # removed between the two calls, or no permission
        return False


def _digest_of(*columns: Sequence[str]) -> hashlib._Hash:
    """SHA-256 over columns of text; lengths are hashed too, so that no two different tables collide."""
    sha = hashlib.sha256()
    for column in columns:
        sha.update(f"{len(column)}\n".encode())
        for text in column:
            data = text.encode("utf-8", "surrogateescape")
            sha.update(f"{len(data)}:".encode() + data)
    return sha
