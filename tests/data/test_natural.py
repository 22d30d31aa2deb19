"""The natural suites: what they read, the step that all their images pass, and the control on the spectrum."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from traj_ood.data.benchmark import reading_of
from traj_ood.data.decoding import Reading
from traj_ood.data.equal_files import EqualImages, equalise
from traj_ood.data.images import ArrayImages
from traj_ood.data.natural import class_folders
from traj_ood.data.preflight import MissingDataError, preflight
from traj_ood.data.registry import load_benchmark
from traj_ood.data.spectrum import image_statistics
from traj_ood.errors import TrajOODError

Make = Callable[[Path, Iterable[str]], None]


def write_idx(folder: Path, count: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((count, 28, 28), dtype=np.uint8)
    pixels[:, 8:20, 8:20] = np.random.default_rng(0).integers(1, 256, (count, 12, 12))  # a fifth, as of digits
    sizes = [np.array(s, dtype=">i4").tobytes() for s in ((count, 28, 28), (count,))]
    (folder / "t10k-images-idx3-ubyte").write_bytes(b"\x00\x00\x08\x03" + sizes[0] + pixels.tobytes())
    (folder / "t10k-labels-idx1-ubyte").write_bytes(b"\x00\x00\x08\x01" + sizes[1] + bytes(count))


@pytest.fixture
def root(tmp_path: Path, make_images: Make) -> Path:
    make_images(tmp_path / "tiny_imagenet/train", [f"n0000000{c}/{i}.JPEG" for c in (1, 2) for i in range(4)])
    make_images(tmp_path / "tiny_imagenet/val", [f"n0000000{c}/v{i}.JPEG" for c in (1, 2) for i in range(6)])
    make_images(tmp_path / "imagenet_sample", [f"n0000{i:04d}_thing.JPEG" for i in range(9)])
    make_images(tmp_path / "scenes", [f"forest/{i}.jpg" for i in range(3)])
    make_images(tmp_path / "dtd10", ["dotted/1.jpg"])
    make_images(tmp_path / "chest_xray", ["1.jpg", "2.jpg"])
    write_idx(tmp_path / "mnist", 5)
    return tmp_path


def test_tiny_imagenet_has_labels_and_one_size(root: Path) -> None:
    found = load_benchmark("tiny-imagenet", root)
    preflight(found)
    assert [(s.name, s.role, len(s.images)) for s in found.splits()] == [
        ("train", "train", 8),
        ("val", "val", 4),
        ("test", "test", 8),
        ("scenes", "near", 3),
        ("dtd10", "far", 1),
        ("chest_xray", "far", 2),
        ("mnist", "far", 5),
    ]
    assert found.train.images.labels == ("n00000001",) * 4 + ("n00000002",) * 4
    assert {split.images.load(0).size for split in found.splits()} == {(64, 64)}
    assert {split.images.load(0).mode for split in found.splits()} == {"RGB"}
    assert found.train_size == 2000


def test_empty_and_absent_files_are_no_copies_of_each_other(root: Path) -> None:
    for name in ("tiny_imagenet/train/n00000001/0.JPEG", "scenes/forest/0.jpg"):
        (root / name).write_bytes(b"")
    for name in ("tiny_imagenet/train/n00000001/1.JPEG", "scenes/forest/1.jpg"):
        (root / name).unlink()
        (root / name).symlink_to(root / "gone.jpg")
    (pair,) = (p for p in load_benchmark("tiny-imagenet", root).copies() if (p.first, p.second) == ("train", "scenes"))
    assert pair.example == ("scenes/forest/2.jpg", "tiny_imagenet/train/n00000001/2.JPEG")
    assert pair.count == 1


def test_photographs_are_turned_upright_on_request_also_below_the_common_step(root: Path) -> None:
    path, pixels = root / "scenes/forest/0.jpg", np.zeros((64, 64, 3), dtype=np.uint8)
    pixels[:32] = 255  # white above, as stored
    exif = Image.Exif()
    exif[274] = 3  # turned by 180 degrees
    Image.fromarray(pixels).save(path, exif=exif)
    stored, turned = (load_benchmark("tiny-imagenet", root, reading=Reading(exif=on)) for on in (False, True))
    tops = [np.asarray(found.ood[0].images.load(0))[:30].mean() for found in (stored, turned)]
    assert tops == pytest.approx([255, 0], abs=3)
    assert [reading_of(found.ood[0].images) for found in (stored, turned)] == [Reading(), Reading(exif=True)]
    assert reading_of(turned.ood[-1].images) is None  # arrays of digits
    for key in ("sha256", "contents"):
        assert stored.train.digests()[key] != turned.train.digests()[key]


def test_the_imagenet_sample_is_halved_and_has_no_labels(root: Path) -> None:
    found = load_benchmark("imagenet-sample", root)
    assert (len(found.train.images), found.val, len(found.test.images)) == (4, None, 5)
    assert not found.train.images.labels
    assert found.test.images.load(0).size == (256, 256)
    (root / "imagenet_sample" / "cat.jpg").write_bytes((root / "scenes/forest/0.jpg").read_bytes())
    with pytest.raises(TrajOODError, match=r"cat\.jpg: expected a name of the form WNID_NAME\.JPEG"):
        load_benchmark("imagenet-sample", root)


def test_sets_that_are_missing_are_named_or_left_out_by_a_name_that_says_so(root: Path) -> None:
    (root / "scenes").rename(root / "elsewhere")
    with pytest.raises(MissingDataError, match=r"1 of 4 OOD sets are missing: expected .*scenes; unpack Tiny-ImageNet"):
        load_benchmark("tiny-imagenet", root)
    partial = load_benchmark("tiny-imagenet", root, allow_missing=True)
    assert partial.name == "tiny-imagenet-partial"
    assert [s.name for s in partial.ood] == ["dtd10", "chest_xray", "mnist"]
    assert partial.note.endswith("Left out, for want of data: scenes.")
    assert load_benchmark("imagenet-sample", root, allow_missing=True).name == "imagenet-sample-partial"
    with pytest.raises(MissingDataError, match=r"expected the folder tiny_imagenet/, found no .*nowhere"):
        load_benchmark("tiny-imagenet", root / "nowhere", allow_missing=True)


def test_class_folders_are_labels(root: Path) -> None:
    assert class_folders(root, "tiny_imagenet/val").labels[5:7] == ("n00000001", "n00000002")
    with pytest.raises(TrajOODError, match=r"expected a folder for each class, found 1\.jpg beside them"):
        class_folders(root, "chest_xray")


# ---------------------------------------------------------------------------------------------- the step


def photograph(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """Pink noise: power falls with the square of the frequency, as in photographs."""
    draws = np.random.default_rng(seed)
    height, width = size[1], size[0]
    frequency = np.hypot(np.fft.fftfreq(height)[:, None] * height, np.fft.fftfreq(width) * width)
    frequency[0, 0] = np.inf
    field = np.fft.ifft2(np.fft.fft2(draws.standard_normal((height, width))) / frequency).real
    scaled = (255 * (field - field.min()) / np.ptp(field)).astype(np.uint8)
    return Image.fromarray(scaled).convert("RGB")


def test_the_step_is_a_centre_square_a_resize_and_a_jpeg() -> None:
    image = photograph((100, 60))
    buffer = io.BytesIO()
    box = (20, 0, 80, 60)  # a crop first would end the filter at its border
    image.resize((32, 32), Image.Resampling.BICUBIC, box=box).save(buffer, "JPEG", quality=90)
    expected = np.asarray(Image.open(buffer).convert("RGB"))
    np.testing.assert_array_equal(np.asarray(equalise(image, 32)), expected)


def test_equal_images_keep_ids_and_labels_and_say_what_they_are() -> None:
    array = np.random.default_rng(0).integers(0, 256, (4, 40, 50), dtype=np.uint8)
    source = ArrayImages(("a", "b", "c", "d"), array, ("0", "1", "0", "1"))
    equal = EqualImages(source, 16)
    part = equal.select([2, 0])
    assert (part.ids, part.labels, len(part), part.missing()) == (("c", "a"), ("0", "0"), 2, [])
    np.testing.assert_array_equal(np.asarray(part.load(0)), np.asarray(equal.load(2)))
    assert part.contents() == (equal.contents()[2], equal.contents()[0])
    assert equal.digest() == hashlib.sha256(f"{source.digest()} 16 90".encode()).hexdigest()
    with pytest.raises(TrajOODError, match="equal images: expected a side of at least 8"):
        EqualImages(source, 4)


# ---------------------------------------------------------------------------------------------- the control


def test_the_slope_of_noise_and_of_pink_noise() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (128, 128), dtype=np.uint8))
    assert image_statistics(noise)[0] == pytest.approx(0, abs=0.15)
    assert image_statistics(photograph((128, 128)))[0] == pytest.approx(-2, abs=0.3)


def test_enlarging_and_blocks_leave_a_trace() -> None:
    image = photograph((128, 128))
    enlarged = image.resize((32, 32)).resize((128, 128), Image.Resampling.BICUBIC)
    assert image_statistics(enlarged)[1] < image_statistics(image)[1] - 2
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=5)
    assert image_statistics(Image.open(buffer))[2] > image_statistics(image)[2] + 0.3
    assert image_statistics(image.resize((64, 96)))[3] == pytest.approx(np.log(64))


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (8, 8), (9, 40)])
def test_any_image_has_statistics(size: tuple[int, int]) -> None:
    for image in (Image.new("L", size), Image.new("RGB", size, "red")):
        assert np.isfinite(image_statistics(image)).all()


# ---------------------------------------------------------------------------------------------- OpenOOD's layout


def layout() -> Any:
    path = Path(__file__).parents[2] / "benchmarks" / "openood_layout.py"
    spec = importlib.util.spec_from_file_location("openood_layout", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_folders_become_openoods_layout_and_what_is_missing_is_said(root: Path, make_images: Make) -> None:
    make_images(root / "cifar10/train", [f"{c}/{i}.jpg" for c in ("cat", "dog") for i in range(3)])
    make_images(root / "cifar10/test", [f"{c}/{i}.jpg" for c in ("cat", "dog") for i in range(2)])
    written = layout().lay_out(root, root / "openood")
    assert written == {"train": 6, "test": 2, "val": 2, "tin": 12, "mnist": 5, "texture": 1, "scenes": 3}
    with pytest.raises(MissingDataError, match="3 of 9 splits are missing: expected cifar100 in"):
        load_benchmark("cifar10", root / "openood")
    found = load_benchmark("cifar10", root / "openood", allow_missing=True)
    preflight(found)
    assert found.name == "cifar10-partial"
    assert found.note.endswith("Left out, for want of data: cifar100, svhn, places365.")
    assert [(s.name, s.role) for s in found.ood] == [
        ("tin", "near"),
        ("mnist", "far"),
        ("texture", "far"),
        ("scenes", "far"),
    ]
    assert set(found.train.images.labels) == {"0", "1"}
    assert {split.images.load(0).size for split in found.splits()} == {(32, 32)}


def test_a_whole_benchmark_keeps_its_name(root: Path) -> None:
    assert load_benchmark("tiny-imagenet", root, allow_missing=True).name == "tiny-imagenet"


def test_a_benchmark_of_ones_own_has_labels_from_folders(root: Path) -> None:
    text = "train: {folder: tiny_imagenet/train, classes: true}\ntest: tiny_imagenet/val\nfar: {scenes: scenes}\n"
    (root / "own.yaml").write_text(text)
    found = load_benchmark(str(root / "own.yaml"))
    assert set(found.train.images.labels) == {"n00000001", "n00000002"}
    assert found.train.images.ids[0] == "train/n00000001/0.JPEG"
    assert not found.test.images.labels
    (root / "own.yaml").write_text(text.replace("tiny_imagenet/train", "chest_xray"))
    with pytest.raises(TrajOODError, match=r"own\.yaml: train: .*expected a folder for each class"):
        load_benchmark(str(root / "own.yaml"))
    (root / "own.yaml").write_text(text.replace("true", "1"))
    with pytest.raises(TrajOODError, match="classes: expected true or false, got int 1"):
        load_benchmark(str(root / "own.yaml"))
