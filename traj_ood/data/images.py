"""Where images come from: arrays in memory or files on disk, each image with a stable id.

Every source hands out Pillow images of mode 'L' or 'RGB' and nothing else, so that no transform further up has to know
about palettes, alpha channels or 16-bit greyscale.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from traj_ood.errors import TrajOODError

if TYPE_CHECKING:
    from PIL import Image

IMAGE_SUFFIXES = (".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
# Pillow's own warning limit (a 256 MiB RGB image). Ours stands apart from Pillow's global, which any library may lift.
MAX_PIXELS = 89_478_485
# Files are known by their bytes, whatever their name says. Formats beyond those of the suffixes stay closed: Pillow
# would hand an EPS file to Ghostscript, which runs the program that such a file is.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")


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

    def digest(self) -> str:
        """SHA-256 (hex) over the ids and what identifies the content: pixel bytes, or relative paths and labels."""

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

    Raises:
        TrajOODError: ids or labels do not match the paths.
    """

    root: Path
    paths: tuple[str, ...]
    ids: tuple[str, ...]
    labels: tuple[str, ...] = ()
    follow_links: bool = True

    def __post_init__(self) -> None:
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
        return open_image(self.root / self.paths[index])

    def digest(self) -> str:
        """SHA-256 over ids, relative paths and labels: the list, not the bytes of possibly a million files."""
        return _digest_of(self.ids, self.paths, self.labels).hexdigest()

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


def open_image(path: Path) -> Image.Image:
    """Decode one image file completely, as mode 'L' (greyscale) or 'RGB'.

    Like OpenOOD, palette, CMYK and alpha images become RGB with alpha dropped, and EXIF orientation is not applied.
    Unlike OpenOOD, truncated files are errors (a grey half would be scored as if it were the image), 16-bit greyscale
    is scaled to 8 bits (Pillow's ``convert`` clips it to white), and animations and files of several pages are refused:
    which of their frames is meant, nobody has said. The extra pictures that cameras hide in a JPEG are passed over.

    Raises:
        TrajOODError: missing, empty, no regular file, truncated, undecodable, several frames or too large; the message
            names the path.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        _check_is_filled_file(path)
        with Image.open(path, formats=_formats()) as image:
            check_picture(image, str(path))
            image.load()  # decodes to the end: Image.open only reads the header, and truncation shows here
            return _grey_or_rgb(image, path)
    except TrajOODError:
        raise
    except UnidentifiedImageError as error:
        raise TrajOODError(f"{path}: expected an image, found no format that Pillow knows; replace the file") from error
    except Image.DecompressionBombError as error:
        raise _too_large(str(path), "more than twice that") from error
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, … on damaged bytes
        reason = " ".join(str(error).split()) or type(error).__name__
        raise TrajOODError(f"{path}: the image cannot be decoded ({reason}); replace the file or remove it") from error


def check_picture(image: Image.Image, where: str) -> None:
    """Refuse an image that is opened, but not decoded yet, for what its header says; ``where`` is for the error.

    Raises:
        TrajOODError: no pixels, more than ``MAX_PIXELS``, or several frames.
    """
    pixels = image.width * image.height
    if pixels == 0:
        raise TrajOODError(
            f"{where}: expected an image, got one of {image.width} x {image.height} pixels; leave it out"
        )
    if pixels > MAX_PIXELS:
        raise _too_large(where, f"{image.width} x {image.height} pixels")
    if image.format != "MPO" and getattr(image, "is_animated", False):
        raise TrajOODError(
            f"{where}: expected a single image, got several frames or pages ({image.format}); save the one that "
            "is meant as a file of its own"
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

    Image files are known by their suffix, in any case. Hidden files and folders are passed over (macOS leaves
    ``._name.jpg`` files that are no images); linked folders are followed, each real folder once.

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
    paths = sorted(_walk(folder))
    if not paths:
        raise TrajOODError(
            f"image folder {folder}: expected at least one image ({' '.join(IMAGE_SUFFIXES)}), found none; "
            "fill the folder or correct the path"
        )
    return FileImages(folder, tuple(paths), tuple(posixpath.join(prefix, path) for path in paths))


def _walk(folder: Path) -> Iterator[str]:
    """Relative posix paths of the image files below ``folder``, in a fixed order."""
    seen: set[str] = set()
    for current, folders, files in os.walk(folder, followlinks=True, onerror=_refuse_folder):
        real = os.path.realpath(current)
        if real in seen:  # a link back to a folder already walked: without this a loop never ends
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            if not name.startswith(".") and name.lower().endswith(IMAGE_SUFFIXES):
                yield Path(current, name).relative_to(folder).as_posix()


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


def _grey_or_rgb(image: Image.Image, path: Path) -> Image.Image:
    """A loaded image of any mode as a plain 'L' or 'RGB' image."""
    from PIL import Image

    mode = image.mode
    if mode in ("L", "RGB"):
        return image.copy()
    if mode == "1":
        return image.convert("L")
    if mode == "F":
        raise TrajOODError(
            f"{path}: expected an image of 8 or 16 bits per channel, got floating point; its range is unknown, so save "
            "it as 8 or 16 bit"
        )
    if mode.startswith("I"):
        return Image.fromarray(_to_8_bits(np.asarray(image), path))
    if mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # same colours; going to RGB directly makes Pillow warn
    return image.convert("RGB")


def _to_8_bits(pixels: np.ndarray, path: Path) -> np.ndarray:
    """16-bit greyscale (H, W) of any integer dtype to uint8, rounded: 65535 / 255 = 257."""
    low, high = int(pixels.min()), int(pixels.max())
    if pixels.dtype.itemsize > 2 and 0 < high < 256 and low >= 0:
        raise TrajOODError(
            f"{path}: expected greyscale of 8 or 16 bits, got integers of 32 bits from {low} to {high}, which may be "
            "meant as either; save it as 8 or 16 bit"
        )
    if low < 0 or high > 65535:
        raise TrajOODError(
            f"{path}: expected greyscale of 8 or 16 bits, got integers from {low} to {high}; save it as 8 or 16 bit"
        )
    return ((pixels.astype(np.int64) + 128) // 257).astype(np.uint8)


def _too_large(where: str, size: str) -> TrajOODError:
    return TrajOODError(
        f"{where}: expected an image of at most {MAX_PIXELS} pixels, got {size}; scale it down or remove it "
        "(decoding it could exhaust the memory)"
    )


@cache
def _formats() -> tuple[str, ...]:
    """Those of ``FORMATS`` that this Pillow was built with; naming any other would be a KeyError."""
    from PIL import Image

    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _check_is_filled_file(path: Path) -> None:
    if not path.exists():
        raise TrajOODError(f"{path}: expected an image file, found nothing; restore it or take it out of the set")
    if not path.is_file():  # reading from a pipe or a device could go on for ever
        found = "a folder" if path.is_dir() else "a pipe or device"
        raise TrajOODError(f"{path}: expected an image file, found {found}; give regular files")
    if path.stat().st_size == 0:
        raise TrajOODError(f"{path}: expected an image, found an empty file (0 bytes); restore it or remove it")


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
