"""Image sources: what comes out of a file, what is refused, and what the digest notices."""

from __future__ import annotations

import hashlib
import io
import os
import struct
import warnings
import zlib
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image, features

from traj_ood.data import ArrayImages, FileImages, decoding, read_folder, read_image_list
from traj_ood.data.decoding import AS_STORED, MAX_PIXELS, Reading, decode, open_image
from traj_ood.data.images import walk_images
from traj_ood.errors import TrajOODError


def save(path: Path, mode: str = "RGB", size: tuple[int, int] = (16, 12), seed: int = 0) -> Path:
    """A small image of random pixels at ``path``, in the format of its suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    channels = {"L": (), "RGB": (3,), "RGBA": (4,), "LA": (2,), "CMYK": (4,)}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], *channels), dtype=np.uint8)
    Image.frombytes(mode, size, pixels.tobytes()).save(path)
    return path


def one_line(error: pytest.ExceptionInfo[TrajOODError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_16_bit_greyscale_is_scaled_and_not_clipped(tmp_path: Path) -> None:
    values = np.array([[0, 128, 129, 257], [32768, 51400, 65407, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")

    image = open_image(tmp_path / "deep.png")

    assert image.mode == "L"
    np.testing.assert_array_equal(np.asarray(image), [[0, 0, 1, 1], [128, 200, 255, 255]])


def test_16_bit_pgm_and_tiff_are_scaled_too(tmp_path: Path) -> None:
    values = np.array([[0, 51400, 65535]], dtype=np.uint16)
    (tmp_path / "deep.pgm").write_bytes(b"P5 3 1 65535\n" + values.astype(">u2").tobytes())
    Image.fromarray(values).save(tmp_path / "deep.tif")

    for name in ("deep.pgm", "deep.tif"):
        np.testing.assert_array_equal(np.asarray(open_image(tmp_path / name)), [[0, 200, 255]])


@pytest.mark.parametrize("pixels", [np.full((2, 2), 70000, np.int32), np.full((2, 2), -1, np.int32)])
def test_integers_of_unknown_range_are_refused(tmp_path: Path, pixels: np.ndarray) -> None:
    Image.fromarray(pixels).save(tmp_path / "wide.tif")
    with pytest.raises(TrajOODError, match=r"wide\.tif: expected greyscale of 8 or 16 bits, got integers from"):
        open_image(tmp_path / "wide.tif")


def test_floating_point_images_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.ones((2, 2), np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(TrajOODError, match=r"float\.tif: expected an image of 8 or 16 bits per channel, got floating"):
        open_image(tmp_path / "float.tif")


@pytest.mark.parametrize(
    ("mode", "suffix", "expected"),
    [
        ("L", ".png", "L"),
        ("RGB", ".jpg", "RGB"),
        ("RGBA", ".png", "RGB"),
        ("LA", ".png", "RGB"),
        ("CMYK", ".jpg", "RGB"),
    ],
)
def test_only_l_and_rgb_come_out(tmp_path: Path, mode: str, suffix: str, expected: str) -> None:
    path = save(tmp_path / f"image{suffix}", mode)
    image = open_image(path)
    assert image.mode == expected
    np.testing.assert_array_equal(np.asarray(image), np.asarray(Image.open(path).convert(expected)))


def test_palette_with_transparency_keeps_its_colours_without_a_warning(tmp_path: Path) -> None:
    source = Image.new("P", (2, 1))
    source.putpalette([255, 0, 0, 0, 0, 255])
    source.putpixel((1, 0), 1)
    source.save(tmp_path / "palette.png", transparency=b"\x00\xff")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = open_image(tmp_path / "palette.png")

    assert image.mode == "RGB"
    assert [image.getpixel((x, 0)) for x in (0, 1)] == [(255, 0, 0), (0, 0, 255)]


def test_bilevel_images_become_grey(tmp_path: Path) -> None:
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "bits.png")
    image = open_image(tmp_path / "bits.png")
    assert (image.mode, image.getpixel((0, 0)), image.getpixel((1, 0))) == ("L", 255, 0)


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_a_truncated_image_is_named(tmp_path: Path, suffix: str) -> None:
    path = save(tmp_path / f"cut{suffix}", size=(64, 64))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(TrajOODError, match=r"the image cannot be decoded \(.*truncated.*\); replace the file") as error:
        open_image(path)
    assert str(path) in one_line(error)


def test_missing_empty_and_foreign_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("not an image")
    for name, words in (
        ("gone.jpg", "expected an image file, found nothing; restore it or take it out of the set"),
        ("empty.jpg", "expected an image, found an empty file (0 bytes); restore it or remove it"),
        ("text.jpg", "expected an image, found no format that Pillow knows; replace the file"),
    ):
        with pytest.raises(TrajOODError) as error:
            open_image(tmp_path / name)
        assert one_line(error) == f"{tmp_path / name}: {words}"


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [10_000, 60_000])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path: Path, side: int) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    assert side**2 > MAX_PIXELS
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    png = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )
    (tmp_path / "bomb.png").write_bytes(png)

    with pytest.raises(TrajOODError, match=rf"bomb\.png: expected an image of at most {MAX_PIXELS} pixels, got"):
        open_image(tmp_path / "bomb.png")


def test_an_image_list_is_of_paths_and_labels(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("a/1.jpg 3\n\n./a/2.jpg {'label': 1, 'x': 2}\r\nb.jpg\n   \n", encoding="utf-8")
    images = read_image_list(tmp_path / "list.txt", tmp_path / "root")
    assert images.paths == images.ids == ("a/1.jpg", "a/2.jpg", "b.jpg")
    assert images.labels == ("3", "{'label': 1, 'x': 2}", "")
    assert images.root == tmp_path / "root"


@pytest.mark.parametrize(
    ("line", "path", "label"),
    [
        ("my photos/a 1.JPG 3", "my photos/a 1.JPG", "3"),
        ("my photo.png", "my photo.png", ""),
        ("a.tif tabby cat", "a.tif", "tabby cat"),
        ("copy.jpg of b.jpg 2", "copy.jpg of b.jpg", "2"),
        ("scan 7", "scan", "7"),  # without a suffix
    ],
)
def test_names_with_spaces_may_be_in_an_image_list(tmp_path: Path, line: str, path: str, label: str) -> None:
    (tmp_path / "list.txt").write_text(line)
    images = read_image_list(tmp_path / "list.txt", tmp_path)
    assert (images.paths, images.labels) == ((path,), (label,))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.jpg 0\n../b.jpg 0\n", "line 2: '../b.jpg' leaves the image root through '..'"),
        ("a/../../b.jpg 0\n", "line 1: 'a/../../b.jpg' leaves the image root through '..'"),
        ("/etc/b.jpg 0\n", "line 1: expected a path relative to the image root, got '/etc/b.jpg'"),
        ("a.jpg 0\nb.jpg 0\n./a.jpg 1\n", "line 3: 'a.jpg' is already on line 1; list every image once"),
        ("\n \n", ": expected lines 'relative/path label', found none; fill the list"),
    ],
)
def test_bad_image_lists_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(TrajOODError) as error:
        read_image_list(tmp_path / "list.txt", tmp_path)
    assert message in one_line(error)
    assert one_line(error).startswith(f"image list {tmp_path / 'list.txt'}")


def test_a_missing_or_binary_image_list_is_named(tmp_path: Path) -> None:
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    for name, reason in (("gone.txt", "No such file or directory"), ("binary.txt", "not UTF-8 text")):
        with pytest.raises(TrajOODError) as error:
            read_image_list(tmp_path / name, tmp_path)
        assert one_line(error).startswith(f"image list {tmp_path / name}: cannot be read ({reason})")


def test_a_path_inside_the_root_may_use_dots(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("a/../b.jpg 0\n..c/d.jpg 1\n")
    assert read_image_list(tmp_path / "list.txt", tmp_path).paths == ("b.jpg", "..c/d.jpg")


def test_links_do_not_lead_out_of_a_lists_root_unless_allowed(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    for name in ("root/real/1.png", "outside/2.png"):
        save(tmp_path / name)
    (root / "same.png").symlink_to(root / "real" / "1.png")
    (root / "file.png").symlink_to(outside / "2.png")
    (root / "folder").symlink_to(outside)
    (tmp_path / "alias").symlink_to(root)  # the root itself may be a link
    (tmp_path / "list.txt").write_text("real/1.png 0\nsame.png 0\nfile.png 1\nfolder/2.png 1\ngone.png 1\n")
    for start in (root, tmp_path / "alias"):
        images = read_image_list(tmp_path / "list.txt", start)
        assert images.load(0).size == images.load(1).size == (16, 12)
        for index, name in ((2, "file.png"), (3, "folder/2.png")):
            for ask in (partial(images.load, index), partial(images.select([index]).load, 0)):
                with pytest.raises(
                    TrajOODError, match=rf"{name}: a link on the way leads out of {start}; .*--follow-l"
                ):
                    ask()
        with pytest.raises(TrajOODError, match=r"file\.png: a link"):
            images.check_links()
        images.select([0, 1, 4]).check_links()
        free = read_image_list(tmp_path / "list.txt", start, follow_links=True)
        free.check_links()
        assert [free.load(i).size for i in (2, 3)] == [(16, 12)] * 2
        assert free.digest() == images.digest()


def test_a_folder_is_read_recursively_and_sorted(tmp_path: Path) -> None:
    for name in ("b/2.PNG", "a/1.JPEG", "z.jpg", "a/10.jpg"):
        save(tmp_path / name)
    for name in ("notes.txt", "a/._1.jpg", ".hidden/3.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("no image")
    (tmp_path / "b" / "loop").symlink_to(tmp_path, target_is_directory=True)

    images = read_folder(tmp_path, prefix="set")

    assert images.paths == ("a/1.JPEG", "a/10.jpg", "b/2.PNG", "z.jpg")
    assert images.ids == ("set/a/1.JPEG", "set/a/10.jpg", "set/b/2.PNG", "set/z.jpg")
    assert images.missing() == []
    assert images.load(3).size == (16, 12)


@pytest.mark.parametrize("target", ["..", "../..", "/"])
def test_links_to_a_folder_above_are_refused_by_name(tmp_path: Path, target: str) -> None:
    inside = tmp_path / "data" / "id"
    for place in (inside / "a", inside.parent / "ood"):
        save(place / "1.png")
    (inside / "a" / "loop").symlink_to("..")  # the folder itself
    assert read_folder(inside).paths == ("a/1.png",)
    (inside / "loop").symlink_to(target)
    words = rf"id/loop: the link leads to a folder above {inside}, and to all images in there; remove it"
    with pytest.raises(TrajOODError, match=words):
        read_folder(inside)
    found = dict(walk_images(str(inside), Counter(), follow_links=False))
    assert found[str(inside / "loop")] == f"the link leads out of {inside}; allow that with --follow-links"
    assert len(found) == 2
    if target != "/":
        assert len(read_folder(tmp_path)) == 2  # in what is read, it leads to nothing new


def test_folders_that_cannot_be_listed_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a/1.png", "b/2.png"):
        save(tmp_path / name)
    scandir = os.scandir

    def refuse(path: str) -> Any:
        if str(path).endswith("b"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(TrajOODError, match=r"b: the folder cannot be listed \(Permission denied\); fix its perm"):
        read_folder(tmp_path)


def test_wide_integers_that_may_be_8_bits_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((2, 2), 200, np.int32)).save(tmp_path / "wide.tif")
    with pytest.raises(TrajOODError, match=r"wide\.tif: expected greyscale of 8 or 16 bits, got integers of 32 bits"):
        open_image(tmp_path / "wide.tif")
    Image.fromarray(np.full((2, 2), 65535, np.int32)).save(tmp_path / "deep.tif")
    assert open_image(tmp_path / "deep.tif").getpixel((0, 0)) == 255


def test_missing_and_empty_folders_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").touch()
    with pytest.raises(TrajOODError, match=r"gone: expected a folder of images, found nothing; correct the path"):
        read_folder(tmp_path / "gone")
    with pytest.raises(TrajOODError, match=r"empty: expected at least one image \(.*\.png.*\), found none"):
        read_folder(tmp_path / "empty")


def test_missing_lists_absent_and_empty_files(tmp_path: Path) -> None:
    save(tmp_path / "a.jpg")
    (tmp_path / "b.jpg").touch()
    images = FileImages(tmp_path, ("a.jpg", "b.jpg", "c.jpg"), ("a", "b", "c"))
    assert images.missing() == [str(tmp_path / "b.jpg"), str(tmp_path / "c.jpg")]
    assert images.select([0]).missing() == []


def test_file_digests_follow_bytes_or_the_list_and_not_the_machine(tmp_path: Path) -> None:
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        for name, data in (("a.jpg", b"one"), ("b.jpg", b"two"), ("c.jpg", b"three")):
            (tmp_path / folder / name).write_bytes(data)
    images = FileImages(tmp_path / "here", ("a.jpg", "b.jpg"), ("a.jpg", "b.jpg"), ("0", "1"))
    same = FileImages(tmp_path / "there", images.paths, images.ids, images.labels)
    assert (same.digest(), same.list_digest(), same.contents()) == (
        images.digest(),
        images.list_digest(),
        tuple(hashlib.sha256(data).hexdigest() for data in (b"one", b"two")),
    )
    relabelled = replace(images, labels=("0", "2"))
    renamed = replace(images, ids=("x", "y"))
    others = [replace(images, paths=("a.jpg", "c.jpg")), renamed, images.select([1, 0]), images.select([0])]
    assert len({images.digest(), *(other.digest() for other in others)}) == 5
    assert relabelled.digest() == images.digest()
    assert len({images.list_digest(), relabelled.list_digest(), *(o.list_digest() for o in others)}) == 6
    assert images.select([1, 0]).labels == ("1", "0")
    (tmp_path / "there" / "a.jpg").write_bytes(b"another")
    assert same.digest() != images.digest()
    assert same.list_digest() == images.list_digest()


def test_array_digest_follows_ids_and_bytes() -> None:
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    changed = array.copy()
    changed[1, 2, 3] ^= 1
    images = ArrayImages(("a", "b"), array)
    assert images.digest() == ArrayImages(("a", "b"), array.copy()).digest()
    different = [
        ArrayImages(("a", "c"), array),
        ArrayImages(("a", "b"), changed),
        ArrayImages(("a", "b"), array.reshape(2, 4, 3)),
    ]
    assert len({images.digest(), *(other.digest() for other in different)}) == 4


def test_arrays_load_as_grey_or_colour_and_stay_unchanged() -> None:
    grey = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    images = ArrayImages(("a", "b"), grey)
    loaded = images.select([1]).load(0)
    assert loaded.mode == "L"
    np.testing.assert_array_equal(np.asarray(loaded), grey[1])
    loaded.putpixel((0, 0), 99)
    assert grey[1, 0, 0] == 6
    assert ArrayImages(("a",), np.zeros((1, 2, 2, 3), np.uint8)).load(0).mode == "RGB"


@pytest.mark.parametrize(
    ("ids", "array", "message"),
    [
        (("a",), np.zeros((1, 2, 2)), "expected uint8 of shape (N, H, W) or (N, H, W, 3), got float64 (1, 2, 2)"),
        (("a",), np.zeros((1, 2, 2, 4), np.uint8), "got uint8 (1, 2, 2, 4); convert the array first"),
        (("a",), np.zeros((2, 2, 2), np.uint8), "expected 2 ids, one per image, got 1"),
        (("a", "a"), np.zeros((2, 2, 2), np.uint8), "expected unique ids, got 'a' twice"),
    ],
)
def test_bad_arrays_are_refused(ids: tuple[str, ...], array: np.ndarray, message: str) -> None:
    with pytest.raises(TrajOODError) as error:
        ArrayImages(ids, array)
    assert message in one_line(error)


# ---------------------------------------------------------------------------- what files say of values


GREY = np.random.default_rng(5).integers(0, 256, (12, 16), dtype=np.uint8)
COLOUR = np.random.default_rng(6).integers(0, 256, (12, 16, 3), dtype=np.uint8)
DEEP = GREY.astype(np.uint16) * 257


def write_png(path: Path, values: np.ndarray, kind: int, significant: bytes = b"") -> Path:
    """A 16-bit PNG by hand: Pillow writes no colour of that depth and no sBIT."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, kind, 0, 0, 0)
    sbit = chunk(b"sBIT", significant) if significant else b""
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + sbit + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )
    return path


def difference(path: Path, expected: np.ndarray, reading: Reading = AS_STORED) -> int:
    """The largest, to ``expected``; the picture as a Pillow image in memory has to be the same as the file."""
    found = open_image(path, reading)
    image = Image.open(io.BytesIO(path.read_bytes()))
    for _ in range(2):  # the same image may be scored twice
        assert decode(image, "memory", reading).tobytes() == found.tobytes()
    return int(np.abs(np.asarray(found).astype(int) - expected).max())


@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
@pytest.mark.parametrize("bits", [1, 8, 16])
@pytest.mark.parametrize("options", [{}, {"compression": "zlib", "predictor": False}, {"tile": (16, 16)}])
def test_tiff_of_either_polarity_is_the_picture(tmp_path: Path, photometric: str, bits: int, options: Any) -> None:
    picture = {1: (GREY > 128) * 255, 8: GREY, 16: GREY}[bits]
    stored = {1: GREY > 128, 8: GREY, 16: DEEP}[bits]
    if photometric == "miniswhite":
        stored = ~stored
    tifffile.imwrite(tmp_path / "x.tif", stored, photometric=photometric, **options)
    assert difference(tmp_path / "x.tif", picture) == 0


@pytest.mark.parametrize("order", ["<", ">"])
def test_tiff_of_either_byte_order(tmp_path: Path, order: Any) -> None:
    tifffile.imwrite(tmp_path / "x.tif", DEEP, byteorder=order, photometric="minisblack")
    assert difference(tmp_path / "x.tif", GREY) == 0


@pytest.mark.parametrize(
    "options", [{}, {"tile": (16, 16)}, {"planarconfig": "separate"}, {"compression": "zlib"}, {"rowsperstrip": 3}]
)
def test_tiff_colours_are_those_that_tifffile_reads(tmp_path: Path, options: dict[str, Any]) -> None:
    planes = "planarconfig" in options
    tifffile.imwrite(tmp_path / "x.tif", COLOUR.transpose(2, 0, 1) if planes else COLOUR, photometric="rgb", **options)
    theirs = tifffile.imread(tmp_path / "x.tif")
    assert difference(tmp_path / "x.tif", theirs.transpose(1, 2, 0) if planes else theirs) == 0


def test_16_bit_colours(tmp_path: Path) -> None:
    deep = np.random.default_rng(7).integers(0, 65536, (12, 16, 3)).astype(np.uint16)
    tifffile.imwrite(tmp_path / "x.tif", deep, photometric="rgb")
    for path in (tmp_path / "x.tif", write_png(tmp_path / "x.png", deep, 2)):
        assert difference(path, deep / 257) <= 1
    write_png(tmp_path / "alpha.png", np.dstack([deep, deep[..., :1]]), 6)
    assert difference(tmp_path / "alpha.png", deep / 257) <= 1
    tifffile.imwrite(tmp_path / "x.tif", deep.transpose(2, 0, 1), photometric="rgb", planarconfig="separate")
    with pytest.raises(TrajOODError, match=r"x\.tif: expected 16-bit colours pixel by pixel, got planes"):
        open_image(tmp_path / "x.tif")


@pytest.mark.parametrize("bits", [10, 12])
def test_10_and_12_bits_in_16_are_never_dark_in_silence(tmp_path: Path, bits: int) -> None:
    values = DEEP >> (16 - bits)
    Image.fromarray(values).save(tmp_path / "x.png")
    Image.fromarray(values).save(tmp_path / "x.tif")
    for name in ("x.png", "x.tif"):
        with pytest.raises(
            TrajOODError, match=rf"{name}: hardly any 16-bit value is 4096 or more .*: --bit-depth 10, 12"
        ):
            open_image(tmp_path / name)
        assert difference(tmp_path / name, GREY, Reading(bit_depth=bits)) <= 1
        assert difference(tmp_path / name, values / 257, Reading(bit_depth=16)) <= 1
    marked = values.copy()
    marked[3, 4] = 65535  # a dead sensor cell
    Image.fromarray(marked).save(tmp_path / "marked.tif")
    with pytest.raises(
        TrajOODError, match=r"marked\.tif: hardly any 16-bit value is 4096 or more \(the highest is 65535\)"
    ):
        open_image(tmp_path / "marked.tif")
    write_png(tmp_path / "colour.png", COLOUR.astype(np.uint16) * 257 >> (16 - bits), 2)
    with pytest.raises(TrajOODError, match=r"colour\.png: hardly any 16-bit colour is 4096 or more"):
        open_image(tmp_path / "colour.png")
    with pytest.raises(TrajOODError, match=r"can be scaled in grey images only, got 16-bit colours"):
        open_image(tmp_path / "colour.png", Reading(bit_depth=bits))
    image = Image.open(tmp_path / "colour.png")
    for _ in range(2):
        with pytest.raises(TrajOODError, match=r"memory: hardly any 16-bit colour is 4096 or more"):
            decode(image, "memory")


def test_a_bit_depth_that_the_file_states_is_used(tmp_path: Path) -> None:
    values = DEEP >> 4
    write_png(tmp_path / "x.png", values, 0, b"\x0c")
    tifffile.imwrite(tmp_path / "x.tif", values, photometric="minisblack", extratags=[(281, 3, 1, 4095, True)])
    white = 4095 - values
    tifffile.imwrite(tmp_path / "w.tif", white, photometric="miniswhite", extratags=[(281, 3, 1, 4095, True)])
    for name in ("x.png", "x.tif", "w.tif"):
        assert difference(tmp_path / name, GREY) <= 1
    write_png(tmp_path / "scaled.png", values << 4, 0, b"\x0c")  # as PNG's own rule has it
    assert difference(tmp_path / "scaled.png", GREY) <= 1


def test_12_bits_packed_into_bytes(tmp_path: Path) -> None:
    values = (DEEP >> 4).astype(int)
    pairs = values.reshape(-1, 2)
    packed = np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], axis=1)
    data = packed.astype(np.uint8).tobytes()
    height, width = values.shape
    tags = [
        (256, width),
        (257, height),
        (258, 12),
        (259, 1),
        (262, 1),
        (273, 8),
        (277, 1),
        (278, height),
        (279, len(data)),
    ]
    table = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    header = b"II*\0" + struct.pack("<I", 8 + len(data))
    (tmp_path / "x.tif").write_bytes(header + data + struct.pack("<H", len(tags)) + table + struct.pack("<I", 0))
    assert difference(tmp_path / "x.tif", GREY) <= 1


def test_a_wrong_bit_depth_is_refused(tmp_path: Path) -> None:
    Image.fromarray(DEEP).save(tmp_path / "x.png")
    with pytest.raises(TrajOODError, match=r"x\.png: expected values up to 4095 at a bit depth of 12, got \d+"):
        open_image(tmp_path / "x.png", Reading(bit_depth=12))
    with pytest.raises(TrajOODError, match="bit depth: expected one of 10, 12, 14, 16, got 9"):
        FileImages(tmp_path, ("x.png",), ("x",), bit_depth=9)


@pytest.mark.parametrize("dtype", [np.int8, np.int16])
def test_signed_values_are_refused(tmp_path: Path, dtype: Any) -> None:
    tifffile.imwrite(tmp_path / "x.tif", (GREY // 2).astype(dtype), photometric="minisblack")
    with pytest.raises(TrajOODError, match=r"x\.tif: expected values from 0, got signed ones"):
        open_image(tmp_path / "x.tif")


@pytest.mark.parametrize("mode", ["LA", "La", "PA", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "P", "1", "I;16"])
def test_images_of_every_mode_in_memory(mode: str) -> None:
    opaque = Image.fromarray(COLOUR)
    image = {
        "La": lambda: opaque.convert("LA").convert("La"),
        "PA": lambda: opaque.convert("P").convert("PA"),
        "RGBa": lambda: opaque.convert("RGBA").convert("RGBa"),
        "I;16": lambda: Image.fromarray(DEEP),
    }.get(mode, lambda: opaque.convert(mode))()
    assert image.mode == mode
    found = decode(image, "memory")
    target = "L" if mode in ("1", "I;16") else "RGB"
    expected = {
        "I;16": lambda: Image.fromarray(GREY),
        "La": lambda: opaque.convert("L").convert("RGB"),
        "RGBa": lambda: opaque,
    }.get(mode, lambda: image.convert(target))()
    assert found.mode == target
    assert np.abs(np.asarray(found).astype(int) - np.asarray(expected)).max() <= 1


def test_hidden_colours_under_alpha_show(tmp_path: Path) -> None:
    Image.new("RGBA", (2, 2), (200, 10, 30, 0)).save(tmp_path / "x.png")
    assert open_image(tmp_path / "x.png").getpixel((0, 0)) == (200, 10, 30)


def test_cmyk_of_adobe_is_not_negative(tmp_path: Path) -> None:
    Image.fromarray(np.full((16, 16, 3), (220, 30, 40), np.uint8)).convert("CMYK").save(tmp_path / "x.jpg", quality=95)
    assert np.abs(np.array(open_image(tmp_path / "x.jpg").getpixel((8, 8))) - (220, 30, 40)).max() <= 6


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_avif(tmp_path: Path) -> None:
    Image.new("RGB", (16, 16), (200, 100, 50)).save(tmp_path / "x.avif", quality=95)
    assert read_folder(tmp_path).paths == ("x.avif",)
    assert np.abs(np.array(open_image(tmp_path / "x.avif").getpixel((8, 8))) - (200, 100, 50)).max() <= 4


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"\0\0\0\x1cftypheic\0\0", "found HEIC, which Pillow cannot decode: convert it"),
        (b"%PDF-1.7 ", "found a PDF: convert its pages"),
        (b"version https://git-lfs.github.com/spec/v1", "found a Git LFS pointer in place of the file"),
    ],
)
def test_formats_that_are_not_read_are_named(tmp_path: Path, content: bytes, text: str) -> None:
    (tmp_path / "x.jpg").write_bytes(content)
    with pytest.raises(TrajOODError, match=text):
        open_image(tmp_path / "x.jpg")


def test_without_avif_in_pillow_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "_formats", lambda: ("PNG",))
    (tmp_path / "x.avif").write_bytes(b"\0\0\0\x1cftypavif\0\0")
    with pytest.raises(TrajOODError, match="found AVIF, which this Pillow cannot decode: install pillow"):
        open_image(tmp_path / "x.avif")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
def test_photographs_are_turned_upright_when_asked(tmp_path: Path, orientation: int, suffix: str) -> None:
    """The picture has a bright corner at the top left; the file shows it as a camera held that way stores it."""
    upright = np.full((24, 32, 3), 20, np.uint8)
    upright[:8, :8] = 230
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: np.rot90(upright.transpose(1, 0, 2), 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[274] = orientation
    path = tmp_path / f"x{suffix}"
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif)
    assert difference(path, upright, Reading(exif=True)) <= 16  # JPEG and WebP lose some
    assert difference(path, upright if suffix == ".tif" else stored) <= 16


def test_how_files_are_read_is_part_of_the_digest(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    images = read_folder(tmp_path)
    read = [replace(images, exif=True), replace(images, bit_depth=12), replace(images, bit_depth=16)]
    assert len({source.digest() for source in [images, *read]}) == 4
    assert read[1].select([0]).bit_depth == 12


def test_files_that_are_no_images_are_counted(tmp_path: Path) -> None:
    for name in ("a.png", "b/c.png"):
        save(tmp_path / name)
    for name in ("notes.txt", "b/more.TXT", "b/photo.heic", "README", ".hidden"):
        (tmp_path / name).write_text("no image")
    with pytest.warns(UserWarning, match=r"left out 4 file\(s\) that are no images: \.txt 2, .*\.heic 1") as caught:
        assert len(read_folder(tmp_path)) == 2
    assert len(caught) == 1


def test_hidden_images_are_mentioned_and_other_hidden_files_are_not(tmp_path: Path) -> None:
    for name in ("a.png", "b/.c.JPG", "b/.d.png", ".git/e.png"):
        save(tmp_path / name)
    (tmp_path / "b" / ".folder.png").mkdir()
    for name in (".DS_Store", "._a.png", "b/.notes.txt", ".png"):
        (tmp_path / name).write_text("no image")
    hidden = r"left out 2 hidden image file\(s\), whose names begin with a dot$"
    with pytest.warns(UserWarning, match=rf": {hidden}"):
        assert read_folder(tmp_path).paths == ("a.png",)
    (tmp_path / "notes.txt").touch()
    with pytest.warns(UserWarning, match=r"left out 1 file\(s\) that are no images: \.txt 1; and 2 hidden image file"):
        read_folder(tmp_path)
    with pytest.raises(TrajOODError, match=r"expected at least one image \(.*\), found 2 hidden one\(s\) alone; fill"):
        read_folder(tmp_path / "b")
    for name in ("b/.c.JPG", "b/.d.png", "notes.txt"):
        (tmp_path / name).unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_folder(tmp_path)
