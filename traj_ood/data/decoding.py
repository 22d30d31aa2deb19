"""From an image file, or an image in memory, to 8 bits of grey or RGB: the same pixels wherever they are asked for."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from traj_ood.errors import TrajOODError

if TYPE_CHECKING:
    from PIL import Image

# Pillow's own warning limit (a 256 MiB RGB image). Ours stands apart from Pillow's global, which any library may lift.
MAX_PIXELS = 89_478_485
# Files are known by their bytes, whatever their name says. Formats beyond these stay closed: Pillow would hand an EPS
# file to Ghostscript, which runs the program that such a file is.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
BIT_DEPTHS = (10, 12, 14, 16)
_DARK = 4096  # a 16-bit image with hardly a value as high as this may be one of 10 or 12 bits
_SATURATED = 0.01  # share of its values that may be higher all the same: dead sensor cells, marks that were written in
_BITS, _PHOTOMETRIC, _SAMPLES, _MAXIMUM, _PLANES, _FORMAT = 258, 262, 277, 281, 284, 339  # tags of TIFF
_WHITE_IS_ZERO, _SEPARATE, _SIGNED = 0, 2, 2  # values of the third, of the fifth and of the last
_ORIENTATION = 274  # tag of EXIF
_TILE = (322, 323)  # tags of TIFF: width and height
MAX_SCANS = 100
"""Of one JPEG. A progressive one has ten or so; each is decoded over the whole image, and a file of 30 MB could have
a million."""
_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
_EOI, _SOS, _ALONE = 0xD9, 0xDA, (0x01, 0xD8)  # markers of JPEG: the end, a scan, and those without a length
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
    """What decides the pixels of a file besides its bytes.

    Attributes:
        exif: turn photographs upright, as the EXIF orientation says. Default false, as OpenOOD, torchvision and timm
            read them: results stay comparable, and models were trained on images read so.
        bit_depth: 10, 12, 14 or 16, the bits that are used of each value in 16-bit files. Default: as the file says
            (TIFF's BitsPerSample and MaxSampleValue, PNG's sBIT), else 16; a 16-bit image with hardly a value (at most
            1 %) of 4096 or more is refused then, since as one of 12 bits it would be 16 times as bright.

    Raises:
        TrajOODError: another bit depth.
    """

    exif: bool = False
    bit_depth: int | None = None

    def __post_init__(self) -> None:
        if self.bit_depth is not None and self.bit_depth not in BIT_DEPTHS:
            raise TrajOODError(f"bit depth: expected one of {', '.join(map(str, BIT_DEPTHS))}, got {self.bit_depth!r}")

    def options(self) -> dict[str, Any]:
        """Those that are not the defaults, JSON-able."""
        told = {"exif": self.exif, "bit_depth": self.bit_depth}
        return {key: value for key, value in told.items() if value}


AS_STORED = Reading()


def open_image(path: Path, reading: Reading = AS_STORED) -> Image.Image:
    """Decode one image file completely, as mode 'L' (greyscale) or 'RGB'; see :func:`decode`.

    Raises:
        TrajOODError: missing, empty, no regular file, or as :func:`decode`; the message names the path.
    """
    with _told(str(path), lambda: path.open("rb")):
        _check_is_filled_file(path)
        with _picture(path) as image:
            return decode(image, str(path), reading)


def open_bytes(content: bytes, where: str, reading: Reading = AS_STORED) -> Image.Image:
    """As :func:`open_image`, of a file's content in memory; nothing is written anywhere.

    Args:
        where: for errors.
    Raises:
        TrajOODError: empty, or as :func:`decode`.
    """
    if not content:
        raise TrajOODError(f"{where}: expected an image, found nothing (0 bytes)")
    with _told(where, lambda: io.BytesIO(content)), _picture(io.BytesIO(content)) as image:
        return decode(image, where, reading)


def size_of(content: bytes) -> tuple[int, int]:
    """Width and height of what decoding an image file holds, by its header, see :func:`held_size`; (0, 0) where that
    cannot be read, which decoding tells."""
    try:
        with _picture(io.BytesIO(content)) as image:
            return held_size(image)
    except Exception:  # Pillow's plugins raise OSError, SyntaxError, struct.error, … on damaged bytes
        return 0, 0


def _picture(file: Path | BinaryIO) -> Image.Image:
    from PIL import Image

    return Image.open(file, formats=_formats())


@contextmanager
def _told(where: str, again: Callable[[], BinaryIO]) -> Iterator[None]:
    """What Pillow raises, as the one error that names ``where``; ``again`` opens the file anew."""
    from PIL import Image, UnidentifiedImageError

    try:
        yield
    except UnidentifiedImageError as error:
        with again() as file:
            known = _foreign_format(file.read(32))
        raise TrajOODError(
            f"{where}: expected an image, found {known or 'no format that Pillow knows; replace the file'}"
        ) from error
    except Image.DecompressionBombError as error:
        raise _too_large(where, "more than twice that") from error
    except TrajOODError:
        raise
    except Exception as error:
        raise _undecodable(where, error) from error


def decode(image: Image.Image, where: str, reading: Reading = AS_STORED) -> Image.Image:
    """Any Pillow image as one of mode 'L' or 'RGB', decoded to its end.

    Like OpenOOD, palette, CMYK and alpha images become RGB with alpha dropped, colour profiles are not applied, and
    EXIF orientation is not, unless asked for (Pillow itself always applies that of TIFF). Unlike OpenOOD, truncated
    files are errors (a grey half would be scored as if it were the image), 16-bit greyscale is scaled to 8 bits
    (Pillow's ``convert`` clips it to white) and inverted where 0 is white, and animations and files of several pages
    are refused: which of their frames is meant, nobody has said. The extra pictures that cameras hide in a JPEG are
    passed over.

    Args:
        image: opened, perhaps not yet decoded; it is not changed.
        where: for errors.
    Raises:
        TrajOODError: truncated, undecodable, several frames, too large, values of unknown range, or dark as images of
            10 or 12 bits in 16-bit files are.
    """
    check_picture(image, where)
    try:
        stored = _stored(image)
        image.load()  # decodes to the end: opening only reads the header, and truncation shows here
        plain = _grey_or_rgb(image, stored, where, reading)
        return _upright(plain, image) if reading.exif else plain
    except TrajOODError:
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, … on damaged bytes
        raise _undecodable(where, error) from error


def check_picture(image: Image.Image, where: str) -> None:
    """Refuse an image that is opened, but not decoded yet, for what its header says; ``where`` is for the error.

    Raises:
        TrajOODError: no pixels, more than ``MAX_PIXELS``, or several frames.
    """
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
            f"{where}: expected a single image, got several frames or pages ({image.format}); save the one that "
            "is meant as a file of its own"
        )


def held_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of what decoding holds in memory: of a TIFF in tiles at least one of them, which may be larger
    than the image that it is a part of."""
    tags = getattr(image, "tag_v2", None) or {}
    sides = [side if isinstance(side := tags.get(tag), int) else 0 for tag in _TILE]
    if image.width * image.height == 0 or not all(sides):
        return image.size
    return max(image.width, sides[0]), max(image.height, sides[1])


def _has_too_many_scans(image: Any) -> bool:
    file = getattr(image, "fp", None)
    if file is None or file.closed:  # decoded already
        return False
    place = file.tell()
    try:
        file.seek(0)
        content = file.read()
    finally:
        file.seek(place)
    return content.count(bytes((0xFF, _SOS))) > MAX_SCANS and _scans(content) > MAX_SCANS


def _scans(content: bytes) -> int:
    """Of a JPEG; what cameras append behind its end and embed in its segments does not count."""
    scans, place = 0, 0
    while scans <= MAX_SCANS and (match := _MARKER.search(content, place)) and content[match.end() - 1] != _EOI:
        marker, place = content[match.end() - 1], match.end()
        scans += marker == _SOS
        if marker not in _ALONE:
            place += max(2, int.from_bytes(content[place : place + 2], "big"))
    return scans


@dataclass(frozen=True)
class _Stored:
    """What the header of a file says of its values.

    Attributes:
        bits: of each value; 0 where it is not known.
        used: how many of them are used, where the file says so, else 0.
        white_is_zero: as X-ray scanners write.
        planes: colours are stored one after the other.
        signed: values of 8 or 16 bits may be negative.
    """

    bits: int = 0
    used: int = 0
    white_is_zero: bool = False
    planes: bool = False
    signed: bool = False


def _stored(image: Image.Image) -> _Stored:
    # Pillow has parsed the tags already; tifffile would be a second decoder for one of eight formats.
    tags = getattr(image, "tag_v2", None)
    if tags is not None:
        bits = max(tags.get(_BITS) or (1,))
        highest = max(tags.get(_MAXIMUM) or (0,))
        # Written, too, as the highest value of this image; only as that of a bit depth it says anything.
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
    """What the sBIT chunk of a PNG says, which Pillow passes over; 0 without one."""
    file = getattr(image, "fp", None)
    if file is None:  # decoded already
        name = getattr(image, "filename", "")
        if not name or not Path(name).is_file():
            return 0
        with open(name, "rb") as again:
            return _sbit(again)
    place = file.tell()
    try:
        return _sbit(file)
    finally:
        file.seek(place)


def _sbit(file: BinaryIO) -> int:
    file.seek(8)
    while len(head := file.read(8)) == 8 and head[4:] not in (b"IDAT", b"IEND"):
        size = int.from_bytes(head[:4], "big")
        if head[4:] == b"sBIT":
            return max(file.read(min(size, 4)), default=0)
        file.seek(size + 4, 1)
    return 0


def _grey_or_rgb(image: Image.Image, stored: _Stored, where: str, reading: Reading) -> Image.Image:
    """A loaded image of any mode as a plain 'L' or 'RGB' image."""
    from PIL import Image

    mode = image.mode
    if mode == "F":
        raise TrajOODError(
            f"{where}: expected an image of 8 or 16 bits per channel, got floating point; its range is unknown, so "
            "save it as 8 or 16 bit"
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
    """Pillow hands out the upper 8 of 16 bits, which are all there is of an image that uses them all."""
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
            "or, if it is as dark as that, say --bit-depth 16 (in Python: bit_depth=16)"
        )


def _grey_of(pixels: np.ndarray, stored: _Stored, where: str, reading: Reading) -> np.ndarray:
    """Greyscale (H, W) of any integer dtype to uint8, rounded: 65535 / 255 = 257."""
    low, high = int(pixels.min()), int(pixels.max())
    if pixels.dtype.itemsize > 2 and (0 < high < 256 or stored.white_is_zero) and low >= 0:
        raise TrajOODError(
            f"{where}: expected greyscale of 8 or 16 bits, got integers of 32 bits from {low} to {high}, which may be "
            "meant as either; save it as 8 or 16 bit"
        )
    if low < 0 or high > 65535:
        raise TrajOODError(
            f"{where}: expected greyscale of 8 or 16 bits, got integers from {low} to {high}; save it as 8 or 16 bit"
        )
    top = 2 ** _depth(pixels, stored, high, where, reading) - 1
    if high > top:
        raise TrajOODError(
            f"{where}: expected values up to {top} at a bit depth of {top.bit_length()}, got {high}; give the bit "
            "depth that it has"
        )
    values = pixels.astype(np.int64)
    values = top - values if stored.white_is_zero else values
    return ((values * 510 + top) // (2 * top)).astype(np.uint8)


def _depth(pixels: np.ndarray, stored: _Stored, high: int, where: str, reading: Reading) -> int:
    """How many bits of 16 the values use: as the file says, else as asked for."""
    if stored.bits in range(9, 16):
        return stored.bits
    if reading.bit_depth is not None:
        return reading.bit_depth
    # PNG's own rule is to scale values up to 16 bits and to note how many counted; some only note them.
    scaled = stored.used and not bool((pixels.astype(np.int64) % 2 ** (16 - stored.used)).any())
    if 8 < stored.used < 16 and high < 2**stored.used and not scaled:
        return stored.used
    if _is_dark(pixels, _DARK):
        raise TrajOODError(
            f"{where}: hardly any 16-bit value is {_DARK} or more (the highest is {high}), as in images of 10 or 12 "
            "bits; say how many bits are used: --bit-depth 10, 12, 14 or 16 (in Python: bit_depth=)"
        )
    return 16


def _is_dark(values: np.ndarray, limit: int) -> bool:
    """Whether nearly all values are below ``limit``, and not all 0."""
    return bool(values.any() and np.count_nonzero(values >= limit) <= _SATURATED * values.size)


def _upright(plain: Image.Image, image: Image.Image) -> Image.Image:
    """``plain`` turned as the EXIF orientation of ``image`` says; of TIFF Pillow has done so, and taken it away."""
    from PIL import ImageOps

    orientation = image.getexif().get(_ORIENTATION, 1)
    if orientation == 1:
        return plain
    plain.getexif()[_ORIENTATION] = orientation
    turned = ImageOps.exif_transpose(plain)
    turned.info.pop("exif", None)
    return turned


def _foreign_format(head: bytes) -> str:
    """What a file is that Pillow does not open, by its first bytes; empty where that is not known."""
    return next((name for place, marks, name in _FOREIGN if head[place:].startswith(marks)), "")


def _undecodable(where: str, error: Exception) -> TrajOODError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return TrajOODError(f"{where}: the image cannot be decoded ({reason}); replace the file or remove it")


def _too_large(where: str, size: str) -> TrajOODError:
    return TrajOODError(
        f"{where}: expected an image of at most {MAX_PIXELS} pixels, got {size}; scale it down or remove it "
        "(decoding it could exhaust the memory)"
    )


@cache
def _formats() -> tuple[str, ...]:
    """Those of ``FORMATS`` that this Pillow was built with; naming any other would be a KeyError.

    Their plugins alone are imported: all of Pillow's take a fifth of a second.
    """
    from PIL import Image

    for name in FORMATS:
        with suppress(ImportError):  # of a format that this Pillow has not got
            import_module(f"PIL.{'WebP' if name == 'WEBP' else name.capitalize()}ImagePlugin")
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _check_is_filled_file(path: Path) -> None:
    if not path.exists():
        raise TrajOODError(f"{path}: expected an image file, found nothing; restore it or take it out of the set")
    if not path.is_file():  # reading from a pipe or a device could go on for ever
        found = "a folder" if path.is_dir() else "a pipe or device"
        raise TrajOODError(f"{path}: expected an image file, found {found}; give regular files")
    if path.stat().st_size == 0:
        raise TrajOODError(f"{path}: expected an image, found an empty file (0 bytes); restore it or remove it")
