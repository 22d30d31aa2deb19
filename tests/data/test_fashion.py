"""The idx reader, the search for Fashion-MNIST, and the benchmark `fashion`."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from traj_ood.data import fashion_mnist, list_benchmarks, load_benchmark
from traj_ood.data.fashion import ID_CLASSES, far_sets, load_fashion
from traj_ood.data.fashion_mnist import FILES, find_fashion_mnist, obtain_fashion_mnist, read_fashion_mnist, read_idx
from traj_ood.errors import TrajOODError

FOUND = find_fashion_mnist()
needs_fashion_mnist = pytest.mark.skipif(FOUND is None, reason="Fashion-MNIST is not on this machine")


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_fake(folder: Path, train: int = 3000, test: int = 100, compress: bool = True) -> None:
    """Files of the right form: image i is filled with its label, labels go round 0 to 9."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, count in (("train", train), ("t10k", test)):
        labels = (np.arange(count) % 10).astype(np.uint8)
        images = np.broadcast_to(labels[:, None, None], (count, 28, 28))
        for name, array in ((f"{part}-images-idx3-ubyte", images), (f"{part}-labels-idx1-ubyte", labels)):
            data = idx(array)
            (folder / (f"{name}.gz" if compress else name)).write_bytes(gzip.compress(data, 1) if compress else data)


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no Debian folder; returns the cache."""
    monkeypatch.setenv("TRAJ_OOD_DATA", str(tmp_path / "cache"))
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", tmp_path / "debian")
    return tmp_path / "cache"


@pytest.mark.parametrize("name", ["a", "a.gz"])
def test_idx_files_are_read(tmp_path: Path, name: str) -> None:
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    data = idx(array)
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    np.testing.assert_array_equal(read_idx(tmp_path / name), array)


def test_digits_in_the_files_of_the_clothes_are_refused(tmp_path: Path) -> None:
    write_fake(tmp_path)
    digits = np.zeros((3000, 28, 28), dtype=np.uint8)
    digits[:, 8:20, 8:20] = 200
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(digits), 1))
    with pytest.raises(TrajOODError, match=r"expected Fashion-MNIST's clothes, got images of which 18% is not black"):
        load_fashion(tmp_path)
    assert len(read_fashion_mnist(tmp_path, "train", "mnist")[0]) == 3000


GOOD = idx(np.arange(6, dtype=np.uint8).reshape(2, 3))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a", b"\x00\x00\x0d\x01" + GOOD[4:], "magic 00 00 08 and the number of dimensions), got magic 00 00 0d 01;"),
        ("a", b"<html>", "got magic 3c 68 74 6d;"),
        ("a", b"", "got magic nothing;"),
        ("a", GOOD[:9], "expected a header of 12 bytes, got 9;"),
        ("a", GOOD[:-1], "expected 6 bytes of data for shape (2, 3), got 5;"),
        ("a", GOOD + b"\0", "expected 6 bytes of data for shape (2, 3), got 7;"),
        ("a.gz", gzip.compress(GOOD, mtime=0)[:-6], "cannot be read as an idx file (Compressed file ended"),
        ("a.gz", b"<html>", "cannot be read as an idx file (Not a gzipped file"),
    ],
)
def test_damaged_idx_files_are_named(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(TrajOODError) as error:
        read_idx(tmp_path / name)
    assert str(error.value).startswith(f"{tmp_path / name}: ")
    assert message in str(error.value)


def test_the_files_are_found_in_every_place(nowhere: Path, tmp_path: Path) -> None:
    assert find_fashion_mnist() is None
    for place in (nowhere / "FashionMNIST" / "raw", nowhere / "fashion-mnist", tmp_path / "debian"):
        write_fake(place, 10, 10, compress=place.name == "raw")
        assert find_fashion_mnist() == place  # each place goes before the ones made so far
    write_fake(tmp_path / "mine" / "FashionMNIST" / "raw", 10, 10)
    assert obtain_fashion_mnist(tmp_path / "mine") == tmp_path / "mine" / "FashionMNIST" / "raw"
    write_fake(tmp_path / "mine" / "fashion-mnist", 10, 10)  # where the refusal of digits says to put them
    assert obtain_fashion_mnist(tmp_path / "mine") == tmp_path / "mine" / "fashion-mnist"


def test_a_given_root_without_the_files_is_an_error_and_no_download(
    nowhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fashion_mnist, "_into_cache", lambda *_: pytest.fail("tried to download"))
    write_fake(tmp_path / "debian", 10, 10)
    with pytest.raises(
        TrajOODError, match=r"expected train-images-idx3-ubyte\[\.gz\], .* in .*mine or in FashionMNIST/"
    ):
        load_benchmark("fashion", tmp_path / "mine")


def test_downloads_are_tried_in_order_and_leave_nothing_half_done(
    nowhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def broken(temp: Path) -> Path | None:
        tried.append("torchvision")
        write_fake(temp, 10, 10)
        (temp / f"{FILES[0]}.gz").write_bytes(b"<html>proxy error</html>")
        return temp

    def fails(temp: Path) -> Path | None:
        tried.append("debian")
        raise ConnectionError("no network")

    monkeypatch.setattr(fashion_mnist, "_fetch_torchvision", broken)
    monkeypatch.setattr(fashion_mnist, "_fetch_debian", fails)
    with pytest.raises(TrajOODError) as error:
        obtain_fashion_mnist()
    assert tried == ["torchvision", "debian"]
    assert list(nowhere.iterdir()) == []
    assert "\n" not in str(error.value)
    for way in (str(nowhere / "fashion-mnist"), "as root", "dataset-fashion-mnist", "torchvision's download"):
        assert way in str(error.value)


def test_a_download_lands_in_the_cache_and_is_used_again(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(temp: Path) -> Path | None:
        write_fake(temp / "raw", 10, 10)
        return temp / "raw"

    (nowhere / "fashion-mnist").mkdir(parents=True)
    (nowhere / "fashion-mnist" / "half-a-download").touch()
    monkeypatch.setattr(fashion_mnist, "_fetch_torchvision", fetch)
    assert obtain_fashion_mnist() == nowhere / "fashion-mnist"
    assert sorted(p.name for p in nowhere.rglob("*.*")) == sorted(f"{name}.gz" for name in FILES)
    monkeypatch.setattr(fashion_mnist, "_into_cache", lambda *_: pytest.fail("tried to download again"))
    assert obtain_fashion_mnist() == nowhere / "fashion-mnist"


def test_fashion_splits_by_class(tmp_path: Path) -> None:
    """On files whose images say their class: who goes where does not depend on the real pictures."""
    write_fake(tmp_path)
    benchmark = load_benchmark("fashion", tmp_path)
    values = {
        s.name: {s.images.load(i).getpixel((0, 0)) for i in range(len(s.images))}
        for s in benchmark.splits()
        if s.role not in ("far", "diagnostic")
    }
    id_classes = set(ID_CLASSES)
    assert id_classes == {0, 1, 2, 3, 4, 6, 9}
    assert values == {
        **dict.fromkeys(("train", "val", "test"), id_classes),
        "sandal": {5},
        "sneaker": {7},
        "bag": {8},
    }
    assert benchmark.val is not None
    assert (len(benchmark.train.images), len(benchmark.val.images), len(benchmark.test.images)) == (100, 2000, 70)
    assert benchmark.ood[0].images.ids[0] == "fashion-mnist/t10k/00005"
    assert (benchmark.train_size, benchmark.test_size) == (2000, None)
    roles = {s.name: s.role for s in benchmark.ood}
    assert list(roles) == ["sandal", "sneaker", "bag", "digits", "faces", "textures", "photos", "noise"]
    assert [name for name, role in roles.items() if role == "diagnostic"] == ["textures", "photos", "noise"]


def test_too_little_or_mismatched_data_is_refused(tmp_path: Path) -> None:
    write_fake(tmp_path / "few", train=100)
    with pytest.raises(TrajOODError, match=r"few: expected over 2001 training images of the classes .*, got 70;"):
        load_benchmark("fashion", tmp_path / "few")
    write_fake(tmp_path / "mixed")
    (tmp_path / "mixed" / f"{FILES[3]}.gz").write_bytes(gzip.compress(idx(np.zeros(7, np.uint8))))
    with pytest.raises(
        TrajOODError, match=r"t10k images \(N, 28, 28\) and labels \(N,\), got \(100, 28, 28\) and \(7,\)"
    ):
        load_benchmark("fashion", tmp_path / "mixed")


def test_far_sets_and_diagnostics_are_what_they_claim() -> None:
    sets = {s.name: s for s in far_sets()}
    pixels = {name: np.stack([np.asarray(s.images.load(i)) for i in range(100)]) for name, s in sets.items()}
    assert {name: len(s.images) for name, s in sets.items()} == {
        "digits": 1797,
        "textures": 1000,
        "photos": 1000,
        "faces": 100,
        "noise": 1000,
    }
    assert all(p.shape == (100, 28, 28) and p.dtype == np.uint8 for p in pixels.values())
    assert pixels["digits"].max() == 255
    assert pixels["digits"][:, 0, 0].mean() < 10  # white on black
    assert 126 < pixels["noise"].mean() < 129
    assert abs(np.corrcoef(pixels["noise"][:, :, :-1].ravel(), pixels["noise"][:, :, 1:].ravel())[0, 1]) < 0.02
    assert min(image.std() for name in ("textures", "photos") for image in pixels[name]) >= 10
    # Faces are alike: their mean still shows one, unlike the mean of any other set of natural images here.
    assert pixels["faces"].mean(0).std() > 2 * pixels["textures"].mean(0).std()
    stems = {i.split("/")[1] for i in sets["photos"].images.ids}
    assert stems == {"astronaut", "coffee", "chelsea", "rocket", "hubble_deep_field", "retina", "ihc"}
    assert sets["textures"].images.ids[:4] == (
        "skimage/brick/0000",
        "skimage/grass/0000",
        "skimage/gravel/0000",
        "skimage/brick/0001",
    )


def test_far_sets_are_the_same_every_time() -> None:
    first, second = ([s.images.digest() for s in far_sets()] for _ in range(2))
    assert first == second


@needs_fashion_mnist
def test_the_real_fashion_benchmark_has_its_published_sizes() -> None:
    benchmark = load_benchmark("fashion", FOUND)
    assert {s.name: len(s.images) for s in benchmark.splits() if s.role not in ("far", "diagnostic")} == {
        "train": 40000,
        "val": 2000,
        "test": 7000,
        "sandal": 1000,
        "sneaker": 1000,
        "bag": 1000,
    }
    # The first two test images are an ankle boot (9) and a pullover (2); the ninth is a sandal, the tenth a sneaker.
    assert benchmark.test.images.ids[:2] == ("fashion-mnist/t10k/00000", "fashion-mnist/t10k/00001")
    assert [s.images.ids[0] for s in benchmark.ood[:2]] == ["fashion-mnist/t10k/00008", "fashion-mnist/t10k/00009"]


def test_the_registry_lists_every_benchmark_and_helps_with_typos() -> None:
    infos = list_benchmarks()
    assert [info.name for info in infos] == [
        "fashion",
        "imagenet-paper",
        "imagenet",
        "cifar10",
        "cifar100",
        "cifar10-local",
        "tiny-imagenet",
        "imagenet-sample",
    ]
    assert all(info.summary and info.needs for info in infos)
    with pytest.raises(TrajOODError, match=r"^unknown benchmark 'fasion': did you mean 'fashion'\? Known: "):
        load_benchmark("fasion")
