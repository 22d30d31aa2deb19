"""A rehearsal of OpenOOD's folder layout with tiny images."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from traj_ood.data import MissingDataError, load_benchmark, preflight
from traj_ood.data.openood import OPENOOD_BENCHMARKS
from traj_ood.errors import TrajOODError

Make = Callable[[Path, Iterable[str]], None]

# From OpenOOD's own table (evaluation_api/datasets.py, v1.5): list file -> image folder, in the order id, near, far.
V15 = {
    "cifar10": {
        "train": "cifar10/train_cifar10.txt",
        "val": "cifar10/val_cifar10.txt",
        "test": "cifar10/test_cifar10.txt",
        "cifar100": "cifar10/test_cifar100.txt",
        "tin": "cifar10/test_tin.txt",
        "mnist": "cifar10/test_mnist.txt",
        "svhn": "cifar10/test_svhn.txt",
        "texture": "cifar10/test_texture.txt",
        "places365": "cifar10/test_places365.txt",
    },
    "cifar100": {
        "train": "cifar100/train_cifar100.txt",
        "val": "cifar100/val_cifar100.txt",
        "test": "cifar100/test_cifar100.txt",
        "cifar10": "cifar100/test_cifar10.txt",
        "tin": "cifar100/test_tin.txt",
        "mnist": "cifar100/test_mnist.txt",
        "svhn": "cifar100/test_svhn.txt",
        "texture": "cifar100/test_texture.txt",
        "places365": "cifar100/test_places365.txt",
    },
    "imagenet": {
        "train": "imagenet/train_imagenet.txt",
        "val": "imagenet/val_imagenet.txt",
        "test": "imagenet/test_imagenet.txt",
        "ssb_hard": "imagenet/test_ssb_hard.txt",
        "ninco": "imagenet/test_ninco.txt",
        "inaturalist": "imagenet/test_inaturalist.txt",
        "textures": "imagenet/test_textures.txt",
        "openimage_o": "imagenet/test_openimage_o.txt",
    },
}
ROLES = {
    "train": "train",
    "val": "val",
    "test": "test",
    **dict.fromkeys(("cifar10", "cifar100", "tin", "ssb_hard", "ninco"), "near"),
}


def lay_out(root: Path, make_images: Make, split: str, list_file: str, folder: str) -> None:
    """Three images of one split and their list."""
    names = [f"{split}/x/{i}.jpg" for i in range(3)]
    make_images(root / folder, names)
    path = root / "benchmark_imglist" / list_file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{name} -1\n" for name in names))


@pytest.fixture
def imagenet(tmp_path: Path, make_images: Make) -> Path:
    for split, list_file in V15["imagenet"].items():
        folder = "images_classic" if split == "textures" else "images_largescale"
        lay_out(tmp_path, make_images, split, list_file, folder)
    return tmp_path


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_reads_the_v15_splits(tmp_path: Path, make_images: Make, name: str) -> None:
    for split, list_file in V15[name].items():
        lay_out(tmp_path, make_images, split, list_file, "images_classic")
    benchmark = load_benchmark(name, tmp_path)
    preflight(benchmark)
    assert {s.name: s.role for s in benchmark.splits()} == {s: ROLES.get(s, "far") for s in V15[name]}
    assert benchmark.train.images.ids == ("train/x/0.jpg", "train/x/1.jpg", "train/x/2.jpg")


def test_imagenet_reads_the_v15_splits(imagenet: Path) -> None:
    benchmark = load_benchmark("imagenet", imagenet)
    preflight(benchmark)
    assert [s.name for s in benchmark.splits()] == list(V15["imagenet"])
    assert {s.name: s.role for s in benchmark.splits()} == {s: ROLES.get(s, "far") for s in V15["imagenet"]}
    assert (benchmark.train_size, benchmark.test_size) == (2000, None)


def test_imagenet_paper_reads_sun_and_places_from_folders(imagenet: Path, make_images: Make) -> None:
    make_images(imagenet / "images_largescale", ["sun/images/s1.jpg", "sun/images/s2.jpg", "places/images/p1.jpg"])
    benchmark = load_benchmark("imagenet-paper", imagenet)
    preflight(benchmark)
    assert [(s.name, s.role, len(s.images)) for s in benchmark.splits()] == [
        ("train", "train", 3),
        ("test", "test", 3),
        ("sun", "far", 2),
        ("places", "far", 1),
        ("textures", "far", 3),
        ("inaturalist", "far", 3),
    ]
    assert benchmark.ood[0].images.ids == ("sun/images/s1.jpg", "sun/images/s2.jpg")
    assert (benchmark.train_size, benchmark.test_size) == (2000, 2000)
    assert "inferred" in benchmark.note
    assert benchmark.note.endswith("Read from folders, for want of a list: sun, places.")


def test_imagenet_paper_prefers_lists(imagenet: Path, make_images: Make) -> None:
    make_images(imagenet / "images_largescale", ["sun/1.jpg", "sun/2.jpg", "places/1.jpg"])
    (imagenet / "benchmark_imglist/imagenet/test_sun.txt").write_text("sun/2.jpg -1\n")
    assert load_benchmark("imagenet-paper", imagenet).ood[0].images.ids == ("sun/2.jpg",)


def test_all_missing_splits_are_named_at_once(imagenet: Path) -> None:
    with pytest.raises(MissingDataError) as error:
        load_benchmark("imagenet-paper", imagenet)
    lists, large = imagenet / "benchmark_imglist/imagenet", imagenet / "images_largescale"
    assert str(error.value) == (
        f"benchmark 'imagenet-paper': 2 of 6 splits are missing: expected sun in {lists}/test_sun.txt or {large}/sun, "
        f"places in {lists}/test_places.txt or {large}/places; to get the data, run in a clone of OpenOOD: python "
        "scripts/download/download.py --contents datasets --save_dir ROOT --dataset_mode benchmark --datasets "
        "imagenet-1k, then once more with --dataset_mode dataset --datasets sun places"
    )
    assert len(error.value.details) == 2


def test_v15_sets_are_never_read_without_their_list(imagenet: Path) -> None:
    (imagenet / "benchmark_imglist/imagenet/test_textures.txt").unlink()
    with pytest.raises(TrajOODError, match=r"1 of 8 splits are missing: expected textures in .*test_textures\.txt;"):
        load_benchmark("imagenet", imagenet)


def test_missing_images_are_left_to_the_preflight(imagenet: Path) -> None:
    (imagenet / "images_largescale/ninco/x/1.jpg").unlink()
    with pytest.raises(
        MissingDataError, match=r"1 image files are missing or empty in ninco \(1 of 3\); expected e\.g\."
    ):
        preflight(load_benchmark("imagenet", imagenet))


@pytest.mark.parametrize("name", OPENOOD_BENCHMARKS)
def test_a_missing_root_explains_the_layout(tmp_path: Path, name: str) -> None:
    with pytest.raises(TrajOODError) as error:
        load_benchmark(name, tmp_path / "nowhere")
    for part in (f"benchmark '{name}': expected OpenOOD's layout (benchmark_imglist/,", "nowhere", "download.py"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_the_root_defaults_to_the_variable_then_the_data_folder(
    imagenet: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    empty = tmp_path_factory.mktemp("empty")
    monkeypatch.chdir(empty)
    monkeypatch.setenv("TRAJ_OOD_DATA", str(imagenet))
    digests = load_benchmark("imagenet").digests()
    monkeypatch.setenv("TRAJ_OOD_DATA", str(empty))
    with pytest.raises(TrajOODError, match=r"found no .* and no data/benchmark_imglist/imagenet"):
        load_benchmark("imagenet")
    (empty / "data").symlink_to(imagenet)
    assert load_benchmark("imagenet").digests() == digests
