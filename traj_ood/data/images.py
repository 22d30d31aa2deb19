"""Where images come from: arrays in memory or files on disk, each image with a stable id.

Every source hands out Pillow images of mode 'L' or 'RGB' and nothing else, so that no transform further up has to know
about palettes, alpha channels or 16-bit greyscale.
"""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from traj_ood.data.contents import hash_files
from traj_ood.data.decoding import Reading, open_image
from traj_ood.errors import TrajOODError, warn

if TYPE_CHECKING:
    from PIL import Image

IMAGE_SUFFIXES = (".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


class ImageSource(Protocol):
    """A finite, ordered, immutable set of images."""

    @property
    def ids(self) -> Sequence[str]:
        """One stable id per image, unique within the source and free of machine-specific paths."""

    @property
    def labels(self) -> Sequence[str]:
        """One class label per image, or empty where none is known."""

    def __len__(self) -> int: ...

    def load(self, index: int) -> Image.Image:
        """The fully decoded image, mode 'L' or 'RGB'.

        Raises:
            TrajOODError: the image is missing, empty, truncated or cannot be decoded; the message names it.
        """

    def contents(self, indices: Sequence[int] | None = None) -> tuple[str, ...]:
        """What is in each image (default: all), as a text that is the same for images of the same content alone."""

    def digest(self) -> str:
        """SHA-256 (hex) over the ids and the content of every image; the same on every machine."""

    def select(self, indices: Sequence[int]) -> ImageSource:
        """The images at ``indices``, in that order, with the ids they have here."""

    def missing(self) -> list[str]:
        """Paths that should be image files but are absent or empty; always ``[]`` for arrays."""


@dataclass(frozen=True, eq=False)
class ArrayImages:
    """Images held in memory.

    Attributes:
        ids: N unique ids.
        array: uint8, (N, H, W) greyscale or (N, H, W, 3) RGB.
        labels: N class labels, or empty.

    Raises:
        TrajOODError: another dtype or shape, or ids or labels that do not match.
    """

    ids: tuple[str, ...]
    array: np.ndarray
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", tuple(self.ids))
        object.__setattr__(self, "labels", tuple(self.labels))
        shape = self.array.shape
        if self.array.dtype != np.uint8 or not (len(shape) == 3 or (len(shape) == 4 and shape[3] == 3)):
            raise TrajOODError(
                f"array images: expected uint8 of shape (N, H, W) or (N, H, W, 3), got {self.array.dtype} {shape}; "
                "convert the array first"
            )
        _check_ids(self.ids, shape[0], "array images")
        _check_labels(self.labels, shape[0], "array images")

    def __len__(self) -> int:
        return len(self.ids)

    def load(self, index: int) -> Image.Image:
        """Image ``index`` as a copy, so that no caller can change the source."""
        from PIL import Image

        return Image.fromarray(np.ascontiguousarray(self.array[index]))

    def contents(self, indices: Sequence[int] | None = None) -> tuple[str, ...]:
        """SHA-256 of the shape and the pixels of each image."""
        rows = range(len(self)) if indices is None else indices
        shape = repr(self.array.shape[1:]).encode()
        return tuple(hashlib.sha256(shape + np.ascontiguousarray(self.array[i]).tobytes()).hexdigest() for i in rows)

    def digest(self) -> str:
        """SHA-256 over the ids, the shape and the pixel bytes; labels are left out, since no image depends on them."""
        sha = _digest_of(self.ids)
        sha.update(repr(self.array.shape).encode())
        sha.update(np.ascontiguousarray(self.array).data)
        return sha.hexdigest()

    def select(self, indices: Sequence[int]) -> ArrayImages:
        """The images at ``indices``, in that order."""
        return ArrayImages(
            tuple(self.ids[i] for i in indices),
            self.array[np.asarray(indices, dtype=np.intp)],
            tuple(self.labels[i] for i in indices) if self.labels else (),
        )

    def missing(self) -> list[str]:
        """Nothing can be missing from memory."""
        return []


@dataclass(frozen=True)
class FileImages:
    """Image files below one folder.

    Attributes:
        root: the folder that ``paths`` start from; it is left out of ids and digest, so both are the same on every
            machine.
        paths: N relative paths with forward slashes.
        ids: N unique ids.
        labels: N texts as the image list gives them, or empty when there is no list. Class-conditional scorers and the
            training of classifiers read them.
        follow_links: read also what links on the way lead to outside ``root``. Default true, for folders that somebody
            filled and named; false for image lists, which may come from anybody (see :func:`read_image_list`).
        exif, bit_depth: how files become pixels, see :class:`traj_ood.data.Reading`; part of the digest.

    Raises:
        TrajOODError: ids or labels do not match the paths, or an unknown bit depth.
    """

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
        for field in ("paths", "ids", "labels"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        _check_ids(self.ids, len(self.paths), f"image files below {self.root}")
        _check_labels(self.labels, len(self.paths), f"image files below {self.root}")

    def __len__(self) -> int:
        return len(self.paths)

    def load(self, index: int) -> Image.Image:
        """Read and fully decode file ``index``; see :func:`open_image` for the errors, and :meth:`check_links`."""
        self.check_links([index])
        return open_image(self.root / self.paths[index], Reading(self.exif, self.bit_depth))

    def reading(self) -> dict[str, Any]:
        """What decides the loaded images besides the bytes of the files, JSON-able; part of the digest."""
        return Reading(self.exif, self.bit_depth).options()

    def contents(self, indices: Sequence[int] | None = None) -> tuple[str, ...]:
        """SHA-256 of the bytes of each file, empty for one that cannot be read; see :func:`hash_files`."""
        part = self if indices is None else self.select(indices)
        return hash_files(list(part.resolved()))

    def digest(self) -> str:
        """SHA-256 over ids, bytes and :meth:`reading`. Neither root nor labels are in it: no image depends on them."""
        how = json.dumps([type(self).__name__, self.reading()], sort_keys=True)
        return _digest_of(self.ids, self.contents(), [how]).hexdigest()

    def list_digest(self) -> str:
        """SHA-256 over ids, relative paths, labels and :meth:`reading`: which files these are, whatever they hold."""
        how = [[str(self.reading())]] if self.reading() else []
        return _digest_of(self.ids, self.paths, self.labels, *how).hexdigest()

    def select(self, indices: Sequence[int]) -> FileImages:
        """The files at ``indices``, in that order."""
        return replace(
            self,
            paths=tuple(self.paths[i] for i in indices),
            ids=tuple(self.ids[i] for i in indices),
            labels=tuple(self.labels[i] for i in indices) if self.labels else (),
        )

    def check_links(self, indices: Sequence[int] | None = None) -> None:
        """Refuse files (default: any of all) that a link on the way puts outside ``root``, unless links are followed.

        Raises:
            TrajOODError: names the first of them.
        """
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
        """Full paths that are absent, empty or not a file, in list order."""
        return [full for full in (os.path.join(self.root, path) for path in self.paths) if not _is_filled_file(full)]

    def resolved(self) -> Iterator[str]:
        """Canonical absolute path of every file, links followed.

        Folders are resolved once each: a whole ``realpath`` per file takes minutes for a million of them.
        """
        folders: dict[str, str] = {}
        for path in self.paths:
            folder, name = posixpath.split(path)
            if folder not in folders:
                folders[folder] = os.path.realpath(os.path.join(self.root, folder))
            full = os.path.join(folders[folder], name)
            yield os.path.realpath(full) if os.path.islink(full) else full


def check_unchanged(images: ImageSource, indices: Sequence[int], contents: Sequence[str]) -> None:
    """Refuse what was made of the images ``indices`` when they are not what they were.

    Args:
        contents: of all images, when the work began.
    Raises:
        TrajOODError: says how many have changed, and names the first.
    """
    found = images.contents(indices)
    changed = [images.ids[i] for i, now in zip(indices, found, strict=True) if contents[i] != now]
    if changed:
        raise TrajOODError(
            f"{len(changed)} image(s) changed while they were being read, first {changed[0]!r}: start the same command "
            "again when nothing writes them any more"
        )


def read_image_list(list_path: str | Path, root: str | Path, *, follow_links: bool = False) -> FileImages:
    """Read an image list in OpenOOD's format: one ``relative/path label`` per line.

    The path ends at the first space; the label (a class number, −1, a dict literal, or nothing) is kept for the digest
    only. Blank lines are skipped. The ids are the normalised relative paths.

    Args:
        list_path: the text file, UTF-8.
        root: the folder the paths start from, and may not leave. It need not exist yet: preflight reports missing
            files all at once. It may itself be a link.
        follow_links: read also files that links below ``root`` put elsewhere. Default false: they are refused when
            they are looked for (by preflight, ``fit``) or loaded.

    Raises:
        TrajOODError: the list is missing, unreadable or empty, a path is absolute or leaves ``root`` through '..', or a
            path appears twice.
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
        written, _, label = line.strip().partition(" ")
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


def read_folder(folder: str | Path, *, prefix: str = "") -> FileImages:
    """All image files in and below ``folder``, sorted by relative path.

    Image files are known by their suffix, in any case; other files are left out, with a warning that counts them.
    Hidden files and folders are passed over (macOS leaves ``._name.jpg`` files that are no images); linked folders are
    followed, each real folder once.

    Args:
        folder: where to look.
        prefix: put before each relative path to form the id, e.g. ``sun`` gives ``sun/a/b.jpg``; default none.

    Raises:
        TrajOODError: the folder is missing or holds no image.
    """
    folder = Path(folder)
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing"
        raise TrajOODError(f"image folder {folder}: expected a folder of images, found {found}; correct the path")
    others: Counter[str] = Counter()
    paths = sorted(_walk(folder, others))
    if not paths:
        raise TrajOODError(
            f"image folder {folder}: expected at least one image ({' '.join(IMAGE_SUFFIXES)}), found none; "
            "fill the folder or correct the path"
        )
    if others:
        warn(left_out(folder, others), stacklevel=2)
    return FileImages(folder, tuple(paths), tuple(posixpath.join(prefix, path) for path in paths))


def labelled_by_folder(images: FileImages) -> FileImages:
    """The same, labelled by the first folder on the way to each image, as in an ImageFolder.

    Raises:
        TrajOODError: an image that lies in no such folder.
    """
    labels = tuple(path.split("/")[0] if "/" in path else "" for path in images.paths)
    if "" in labels:
        raise TrajOODError(
            f"{images.root}: expected a folder for each class, found {images.paths[labels.index('')]} beside them"
        )
    return replace(images, labels=labels)


def left_out(folder: str | Path, others: Counter[str]) -> str:
    """What to say of files by suffix that are no images, the most frequent first."""
    total, kinds = sum(others.values()), [f"{suffix or 'no suffix'} {n}" for suffix, n in others.most_common(5)]
    more = ", …" if len(others) > len(kinds) else ""
    return f"{folder}: left out {total} file(s) that are no images: {', '.join(kinds)}{more}"


def suffix_of(name: str) -> str:
    """The suffix by which files that are no images are counted, short and printable."""
    suffix = posixpath.splitext(name)[1].lower()
    return suffix if suffix.isprintable() and len(suffix) <= 12 else ".…"


def _walk(folder: Path, others: Counter[str]) -> Iterator[str]:
    """Relative posix paths of the image files below ``folder``, in a fixed order; ``others`` counts what is none."""
    seen: set[str] = set()
    for current, folders, files in os.walk(folder, followlinks=True, onerror=_refuse_folder):
        real = os.path.realpath(current)
        if real in seen:  # a link back to a folder already walked: without this a loop never ends
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            if name.startswith("."):
                continue
            if name.lower().endswith(IMAGE_SUFFIXES):
                yield Path(current, name).relative_to(folder).as_posix()
            else:
                others[suffix_of(name)] += 1


def _refuse_folder(error: OSError) -> None:
    raise TrajOODError(
        f"{error.filename}: the folder cannot be listed ({error.strerror}); fix its permissions"
    ) from error


def inside_root(written: str, where: str) -> str:
    """The normalised form of a relative path as an image list gives it; ``where`` it stands is for the error.

    Raises:
        TrajOODError: the path is absolute or leaves its root through '..'. Links are another matter:
            see ``check_links``.
    """
    path = posixpath.normpath(written)
    if path.startswith("/") or os.path.isabs(path):
        raise TrajOODError(f"{where}: expected a path relative to the image root, got {written!r}; make it relative")
    if path.split("/", 1)[0] == "..":
        raise TrajOODError(f"{where}: {written!r} leaves the image root through '..'; keep every path below the root")
    return path


def _is_filled_file(path: str) -> bool:
    try:
        return os.path.isfile(path) and os.stat(path).st_size > 0
    except OSError:  # removed between the two calls, or no permission to look
        return False


def _check_ids(ids: tuple[str, ...], count: int, what: str) -> None:
    if len(ids) != count:
        raise TrajOODError(f"{what}: expected {count} ids, one per image, got {len(ids)}; give one id per image")
    if len(set(ids)) != count:
        twice = next(image_id for image_id, times in Counter(ids).items() if times > 1)
        raise TrajOODError(f"{what}: expected unique ids, got {twice!r} twice; give every image its own id")


def _check_labels(labels: tuple[str, ...], count: int, what: str) -> None:
    if labels and len(labels) != count:
        raise TrajOODError(
            f"{what}: expected {count} labels, one per image, got {len(labels)}; give one label per image or none"
        )


def _digest_of(*columns: Sequence[str]) -> hashlib._Hash:
    """A SHA-256 over columns of text; lengths are hashed too, so no two different tables look alike."""
    sha = hashlib.sha256()
    for column in columns:
        sha.update(f"{len(column)}\n".encode())
        for text in column:
            data = text.encode("utf-8", "surrogateescape")
            sha.update(f"{len(data)}:".encode() + data)
    return sha
