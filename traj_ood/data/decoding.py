"""Decode image files, and Pillow images, to 8-bit greyscale or RGB. All images are read by this module."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from traj_ood.errors import TrajOODError, foreign_errors

# The limit above which Pillow warns (a 256 MiB RGB image); a constant, because any library may change Pillow's global.
MAX_PIXELS = 89_478_485
# The format is recognised from a file's bytes, not its name. Other formats are not opened: Pillow would pass an EPS
# file, which is a program, to Ghostscript.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
BIT_DEPTHS = (10, 12, 14, 16)
_DARK = 4096  # a 16-bit image with nearly all values below this may be one of 10 or 12 bits
_SATURATED = 0.01  # share of values that may be higher in such an image: dead sensor cells, burnt-in marks
_BITS, _PHOTOMETRIC, _SAMPLES, _MAXIMUM, _PLANES, _FORMAT = 258, 262, 277, 281, 284, 339  # TIFF tags
_WHITE_IS_ZERO, _SEPARATE, _SIGNED = 0, 2, 2  # values of the tags photometric, planes and format
_ORIENTATION = 274  # EXIF tag
_TILE = (322, 323)  # TIFF tags: tile width and height
MAX_SCANS = 100
"""Most scans in a JPEG. A progressive JPEG has about ten; each is decoded over the whole image, and a file of 30 MB
can contain a million."""
_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
_EOI, _SOS, _ALONE = 0xD9, 0xDA, (0x01, 0xD8)  # JPEG markers: end of image, start of scan, markers without a length
_FOREIGN = (
    (8, (b"avif", b"avis"), "AVIF, which this Pillow cannot decode: install pillow 11.3 or newer, or convert it"),
    (8, (b"heic", b"heix", b"hevc", b"heim", b"mif1", b"msf1"), "HEIC, which Pillow cannot decode: convert it"),
    (0, (b"II*\0", b"MM\0*"), "a TIFF of a kind that Pillow cannot decode: convert it to PNG"),
    (0, (b"version https://git-lfs",), "a Git LFS pointer in place of the file: run git lfs pull"),
    (0, (b"%PDF",), "a PDF: convert its pages"),
    (0, (b"%!PS",), "PostScript: convert it"),
)


@dataclass(frozen=True)
class Reading:
    """How image files are decoded.

    Attributes:
        exif: rotate photographs according to their EXIF orientation. Default false, as in OpenOOD, torchvision and
            timm: results stay comparable, and models were trained on images read in this way.
        bit_depth: number of used bits in each value of a 16-bit file: 10, 12, 14 or 16. Default: what the file says
            (TIFF's BitsPerSample and MaxSampleValue, PNG's sBIT), else 16. Without it, a 16-bit image with at most 1 %
            of its values at 4096 or above is refused: read as one of 12 bits, it would be 16 times as bright.

    Raises:
        TrajOODError: any other bit depth.
    """

    exif: bool = False
    bit_depth: int | None = None

    def __post_init__(self) -> None:
        if self.bit_depth is not None and self.bit_depth not in BIT_DEPTHS:
            raise TrajOODError(f"bit depth: expected one of {', '.join(map(str, BIT_DEPTHS))}, got {self.bit_depth!r}")

    def options(self) -> dict[str, Any]:
        """The settings that differ from the defaults, as JSON data."""
        told = {"exif": self.exif, "bit_depth": self.bit_depth}
        return {key: value for key, value in told.items() if value}


AS_STORED = Reading()


def open_image(path: Path, reading: Reading = AS_STORED) -> Image.Image:
    """Decode an image file to mode 'L' (greyscale) or 'RGB'; see :func:`decode`."""
    with _pillow_errors(str(path), lambda: path.open("rb")):
        _check_is_filled_file(path)
        with _picture(path) as image:
            return decode(image, str(path), reading)


def open_bytes(content: bytes, where: str, reading: Reading = AS_STORED) -> Image.Image:
    """Decode the content of an image file in memory, called ``where`` in messages; nothing is written to disk."""
    if not content:
        raise TrajOODError(f"{where}: expected an image, found nothing (0 bytes)")
    with _pillow_errors(where, lambda: io.BytesIO(content)), _picture(io.BytesIO(content)) as image:
        return decode(image, where, reading)


def size_of(content: bytes) -> tuple[int, int]:
    """Width and height of what decoding holds in memory, according to the header (see :func:`held_size`); (0, 0) if the
    header cannot be read, which decoding will report."""
    try:
        with _picture(io.BytesIO(content)) as image:
            return held_size(image)
    except Exception:  # of any class, see _decoding
        return 0, 0


def _picture(file: Path | BinaryIO) -> Image.Image:
    return Image.open(file, formats=_formats())


@contextmanager
def _pillow_errors(where: str, again: Callable[[], BinaryIO]) -> Iterator[None]:
    """Context manager that turns errors of Pillow into a ``TrajOODError``; ``again`` opens the file once more."""
    with _decoding(where):
        try:
            yield
        except UnidentifiedImageError as error:
            with again() as file:
                head = file.read(32)
            unknown = "no format that Pillow knows; replace the file"
            found = next((name for place, marks, name in _FOREIGN if head[place:].startswith(marks)), unknown)
            raise TrajOODError(f"{where}: expected an image, found {found}") from error
        except Image.DecompressionBombError as error:
            raise _too_large(where, "more than twice that") from error


def _decoding(where: str) -> AbstractContextManager[None]:
    # Pillow's decoders raise OSError, SyntaxError, struct.error, … on damaged bytes.
    return foreign_errors(f"{where}: the image cannot be decoded", "; replace the file or remove it")


def decode(image: Image.Image, where: str, reading: Reading = AS_STORED) -> Image.Image:
    """Convert any Pillow image, called ``where`` in messages, to mode 'L' or 'RGB', decoding it completely.

    As in OpenOOD, palette, CMYK and alpha images become RGB without alpha, colour profiles are not applied, and EXIF
    orientation is applied only on request (except that of TIFF, which Pillow always applies). Unlike in OpenOOD:

    * Truncated files are errors; otherwise a half-grey image would be scored.
    * 16-bit greyscale is scaled to 8 bits, where Pillow's ``convert`` clips it to white, and inverted if 0 is white.
    * Animations and files of several pages are refused, as it is unknown which frame is meant. The additional pictures
      that cameras embed in a JPEG are ignored.
    """
    check_picture(image, where)
    with _decoding(where):
        # Kept with the image, as decoding ends the access to its file, and the same image may come again.
        stored = vars(image).get("_stored") or _stored(image)
        vars(image)["_stored"] = stored
        image.load()  # opening reads only the header; truncation is found here
        plain = _grey_or_rgb(image, stored, where, reading)
        return _upright(plain, image) if reading.exif else plain


def check_picture(image: Image.Image, where: str) -> None:
    """Check the header of an image before it is decoded: pixels, at most ``MAX_PIXELS``, one frame."""
    width, height = held_size(image)
    if width * height == 0:
        raise TrajOODError(
            f"{where}: expected an image, got one of {image.width} x {image.height} pixels; leave it out"
        )
    if width * height > MAX_PIXELS:
        raise _too_large(where, f"{width} x {height} pixels")
    if image.format in ("JPEG", "MPO") and _has_too_many_scans(image):
        raise TrajOODError(f"{where}: expected a JPEG of at most {MAX_SCANS} scans, got more; save it again")
    if image.format != "MPO" and getattr(image, "is_animated", False):
        raise TrajOODError(
            f"{where}: expected a single image, got several frames or pages ({image.format}); save the one to use as a "
            "separate file"
        )


def held_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of what decoding holds in memory: at least one tile for a tiled TIFF, and a tile may be larger
    than the image."""
    tags = getattr(image, "tag_v2", None) or {}
    sides = [side if isinstance(side := tags.get(tag), int) else 0 for tag in _TILE]
    if image.width * image.height == 0 or not all(sides):
        return image.size
    return max(image.width, sides[0]), max(image.height, sides[1])


def _has_too_many_scans(image: Any) -> bool:
    content = _content(image)
    return content.count(bytes((0xFF, _SOS))) > MAX_SCANS and _scans(content) > MAX_SCANS


def _scans(content: bytes) -> int:
    """The number of scans in a JPEG, at most ``MAX_SCANS + 1``, without images appended after its end or embedded in
    its segments by cameras."""
    scans, place = 0, 0
    while scans <= MAX_SCANS and (match := _MARKER.search(content, place)) and content[match.end() - 1] != _EOI:
        marker, place = content[match.end() - 1], match.end()
        scans += marker == _SOS
        if marker not in _ALONE:
            place += max(2, int.from_bytes(content[place : place + 2], "big"))
    return scans


@dataclass(frozen=True)
class _Stored:
    """How pixel values are stored, according to the header of a file."""

    bits: int = 0  # per value; 0 if unknown
    used: int = 0  # how many of them are used, if the file says so, else 0
    white_is_zero: bool = False  # as X-ray scanners write
    planes: bool = False  # colour channels are stored one after the other
    signed: bool = False  # values of 8 or 16 bits may be negative


def _stored(image: Image.Image) -> _Stored:
    # Pillow has parsed the tags already; tifffile would be a second decoder for one of eight formats.
    tags = getattr(image, "tag_v2", None)
    if tags is not None:
        bits = max(tags.get(_BITS) or (1,))
        highest = max(tags.get(_MAXIMUM) or (0,))
        # MaxSampleValue gives the bit depth only if it is 2^depth - 1; it may also be the largest value of this image.
        used = highest.bit_length() if highest in [2**depth - 1 for depth in BIT_DEPTHS] else 0
        return _Stored(
            bits=bits,
            used=bits if 8 < bits < 16 else used,
            white_is_zero=tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO,
            planes=tags.get(_PLANES) == _SEPARATE and (tags.get(_SAMPLES) or 1) > 1,
            signed=bits <= 16 and _SIGNED in (tags.get(_FORMAT) or ()),
        )
    if image.format == "PNG":
        deep = any(";16" in str(tile[3]) for tile in getattr(image, "tile", ())) or image.mode.startswith("I")
        return _Stored(16, _significant_bits(image)) if deep else _Stored()
    return _Stored()


def _significant_bits(image: Any) -> int:
    """The significant bits in the sBIT chunk of a PNG, which Pillow ignores; 0 without such a chunk."""
    content, place = _content(image), 8
    while (kind := content[place + 4 : place + 8]) not in (b"", b"IDAT", b"IEND"):
        size = int.from_bytes(content[place : place + 4], "big")
        if kind == b"sBIT":
            return max(content[place + 8 : place + 8 + min(size, 4)], default=0)
        place += size + 12
    return 0


def _content(image: Any) -> bytes:
    """The bytes of an image's file; empty if it is not at hand."""
    file = getattr(image, "fp", None)
    if file is None or file.closed:  # decoded already
        name = getattr(image, "filename", "")
        return Path(name).read_bytes() if name and Path(name).is_file() else b""
    place = file.tell()
    try:
        file.seek(0)
        return file.read()
    finally:
        file.seek(place)


def _grey_or_rgb(image: Image.Image, stored: _Stored, where: str, reading: Reading) -> Image.Image:
    """Convert a loaded image of any mode to 'L' or 'RGB'."""
    mode = image.mode
    if mode == "F":
        raise TrajOODError(
            f"{where}: expected an image of 8 or 16 bits per channel, got floating point of unknown range; save it as "
            "8 or 16 bit"
        )
    if stored.signed:
        raise TrajOODError(f"{where}: expected values from 0, got signed ones of unknown range; save it as 8 or 16 bit")
    if mode == "LAB":
        raise TrajOODError(f"{where}: expected grey or RGB, got LAB colours; save it as RGB")
    if mode.startswith("I"):
        return Image.fromarray(_grey_of(np.asarray(image), stored, where, reading))
    if stored.bits > 8:
        _check_deep_colour(image, stored, where, reading)
    if mode in ("L", "RGB"):
        return image.copy()
    if mode == "1":
        return image.convert("L")
    if mode in ("La", "RGBa"):  # colours multiplied by alpha
        image = image.convert("LA" if mode == "La" else "RGBA")
    if mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # same colours; going to RGB directly makes Pillow warn
    return image.convert("RGB")


def _check_deep_colour(image: Image.Image, stored: _Stored, where: str, reading: Reading) -> None:
    """Check that a 16-bit colour image uses all bits: Pillow returns the upper 8 of them."""
    if stored.planes:
        raise TrajOODError(f"{where}: expected 16-bit colours pixel by pixel, got planes; save it as 8 bit or as PNG")
    if reading.bit_depth not in (None, 16):
        raise TrajOODError(
            f"{where}: a bit depth of {reading.bit_depth} can be scaled in grey images only, got 16-bit colours; save "
            "it as 8 bit"
        )
    values = np.asarray(image)
    colours = values[..., :-1] if image.mode in ("LA", "RGBA") else values
    if reading.bit_depth is None and _is_dark(colours, _DARK // 256):
        raise TrajOODError(
            f"{where}: hardly any 16-bit colour is {_DARK} or more, as in images of 10 or 12 bits; save it as 8 bit, "
            "or, if it really is that dark, give --bit-depth 16 (in Python: bit_depth=16)"
        )


def _grey_of(pixels: np.ndarray, stored: _Stored, where: str, reading: Reading) -> np.ndarray:
    """Scale greyscale (H, W) of any integer dtype to uint8, rounded: 65535 / 255 = 257."""
    low, high = int(pixels.min()), int(pixels.max())
    if pixels.dtype.itemsize > 2 and (0 < high < 256 or stored.white_is_zero) and low >= 0:
        raise TrajOODError(
            f"{where}: expected greyscale of 8 or 16 bits, got integers of 32 bits from {low} to {high}, which could "
            "be either; save it as 8 or 16 bit"
        )
    if low < 0 or high > 65535:
        raise TrajOODError(
            f"{where}: expected greyscale of 8 or 16 bits, got integers from {low} to {high}; save it as 8 or 16 bit"
        )
    top = 2 ** _depth(pixels, stored, high, where, reading) - 1
    if high > top:
        raise TrajOODError(
            f"{where}: expected values up to {top} at a bit depth of {top.bit_length()}, got {high}; give its actual "
            "bit depth"
        )
    values = pixels.astype(np.int64)
    values = top - values if stored.white_is_zero else values
    return ((values * 510 + top) // (2 * top)).astype(np.uint8)


def _depth(pixels: np.ndarray, stored: _Stored, high: int, where: str, reading: Reading) -> int:
    """The number of bits that the values use: according to the file, else to ``reading``, else 16."""
    if stored.bits in range(9, 16):
        return stored.bits
    if reading.bit_depth is not None:
        return reading.bit_depth
    # By the PNG standard values are scaled to 16 bits and sBIT is the original depth; some writers do not scale them.
    scaled = stored.used and not bool((pixels.astype(np.int64) % 2 ** (16 - stored.used)).any())
    if 8 < stored.used < 16 and high < 2**stored.used and not scaled:
        return stored.used
    if _is_dark(pixels, _DARK):
        raise TrajOODError(
            f"{where}: hardly any 16-bit value is {_DARK} or more (the highest is {high}), as in images of 10 or 12 "
            "bits; give the number of used bits: --bit-depth 10, 12, 14 or 16 (in Python: bit_depth=)"
        )
    return 16


def _is_dark(values: np.ndarray, limit: int) -> bool:
    """Whether nearly all values are below ``limit`` and not all of them 0."""
    return bool(values.any() and np.count_nonzero(values >= limit) <= _SATURATED * values.size)


def _upright(plain: Image.Image, image: Image.Image) -> Image.Image:
    """``plain`` rotated by the EXIF orientation of ``image``; Pillow has applied and removed that of TIFF."""
    orientation = image.getexif().get(_ORIENTATION, 1)
    if orientation == 1:
        return plain
    plain.getexif()[_ORIENTATION] = orientation
    turned = ImageOps.exif_transpose(plain)
    turned.info.pop("exif", None)
    return turned


def _too_large(where: str, size: str) -> TrajOODError:
    return TrajOODError(
        f"{where}: expected an image of at most {MAX_PIXELS} pixels, got {size}; scale it down or remove it "
        "(decoding it could exhaust the memory)"
    )


@cache
def _formats() -> tuple[str, ...]:
    """Those of ``FORMATS`` that this build of Pillow supports; naming any other would be a KeyError.

    Only their plugins are imported, as importing all takes a fifth of a second.
    """
    for name in FORMATS:
        with suppress(ImportError):  # a format that this build does not support
            import_module(f"PIL.{'WebP' if name == 'WEBP' else name.capitalize()}ImagePlugin")
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _check_is_filled_file(path: Path) -> None:
    if not path.exists():
        raise TrajOODError(f"{path}: expected an image file, found nothing; restore it or take it out of the set")
    if not path.is_file():  # reading from a pipe or a device could never end
        found = "a folder" if path.is_dir() else "a pipe or device"
        raise TrajOODError(f"{path}: expected an image file, found {found}; give regular files")
    if path.stat().st_size == 0:
        raise TrajOODError(f"{path}: expected an image, found an empty file (0 bytes); restore it or remove it")
