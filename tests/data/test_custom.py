"""A benchmark from a YAML file, and everything a YAML file can get wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from traj_ood.data import load_benchmark, preflight
from traj_ood.errors import TrajOODError

GOOD = """
name: pets
root: ./images
train: cats/train
val: cats/val
test: {list: lists/test.txt, root: ./images}
near: {dogs: dogs}
far: {textures: {list: lists/textures.txt}}
diagnostic: {crops: crops}
"""


@pytest.fixture
def pets(tmp_path: Path, make_images: Callable[[Path, Iterable[str]], None]) -> Path:
    names = [
        f"{s}/{i}.png" for s in ("cats/train", "cats/val", "cats/test", "dogs", "walls", "crops") for i in range(3)
    ]
    make_images(tmp_path / "images", names)
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "test.txt").write_text("cats/test/0.png 0\ncats/test/2.png 1\n")
    (tmp_path / "lists" / "textures.txt").write_text("walls/1.png\n")
    (tmp_path / "pets.yaml").write_text(GOOD)
    return tmp_path / "pets.yaml"


def refused(path: Path, text: str) -> str:
    path.write_text(text)
    with pytest.raises(TrajOODError) as error:
        load_benchmark(str(path))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_yaml_file_describes_a_benchmark(pets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark = load_benchmark(str(pets))
    preflight(benchmark)
    assert benchmark.name == "pets"
    assert [(s.name, s.role, tuple(s.images.ids)) for s in benchmark.splits()] == [
        ("train", "train", ("train/0.png", "train/1.png", "train/2.png")),
        ("val", "val", ("val/0.png", "val/1.png", "val/2.png")),
        ("test", "test", ("test/cats/test/0.png", "test/cats/test/2.png")),
        ("dogs", "near", ("dogs/0.png", "dogs/1.png", "dogs/2.png")),
        ("textures", "far", ("textures/walls/1.png",)),
        ("crops", "diagnostic", ("crops/0.png", "crops/1.png", "crops/2.png")),
    ]
    # Relative paths start from the YAML file, not from where the command is run.
    monkeypatch.chdir(pets.parent)
    assert load_benchmark("pets.yaml").digests() == benchmark.digests()


def test_name_and_root_have_defaults_and_root_can_be_given(pets: Path, tmp_path: Path) -> None:
    text = "train: cats/train\ntest: cats/test\nfar: {dogs: dogs}\n"
    (tmp_path / "images" / "mine.yml").write_text(text)
    assert load_benchmark(str(tmp_path / "images" / "mine.yml")).name == "mine"
    pets.write_text("root: elsewhere\n" + text)
    assert len(load_benchmark(str(pets), tmp_path / "images").train.images) == 3


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "train:",
            "trian:",
            ": unknown key 'trian': did you mean 'train'? Known: control, diagnostic, far, name, ne",
        ),
        (
            "root: ./images}",
            "rot: ./images}",
            ": test: image list: unknown key 'rot': did you mean 'root'? Known: list, r",
        ),
        ("list: lists/test.txt, ", "", ": test: expected the key 'list' with an image list; add it"),
        ("train: cats/train", "", ": expected the key 'train' with a folder or an image list; add it"),
        ("train: cats/train", "train: [cats]", ": train: expected a folder or {list: FILE, root: FOLDER}, got list"),
        ("{dogs: dogs}", "dogs", ": near: expected OOD sets by name, e.g. {dogs: path/to/dogs}, got str 'dogs'"),
        ("{dogs: dogs}", "{2024: dogs}", ": near: set name: expected text, got int 2024; write it in quotes"),
        ("{dogs: dogs}", "{a b: dogs}", ": near: a b: split name 'a b': expected letters"),
        ("{dogs: dogs}", "{dogs: }", ": near: dogs: expected a folder or {list: FILE, root: FOLDER}, got nothing"),
        ("name: pets", "name: pets\ncontrol: 1", ": control: expected true or false, got int 1"),
        ("name: pets", "name: 3", ": name: expected text, got int 3; write it in quotes"),
        ("val: cats/val", "train: cats/val", " line 5: malformed YAML (the key 'train' is given twice)"),
        ("near: {dogs: dogs}", "near: {dogs: dogs", " line 8: malformed YAML (expected ',' or '}', but got"),
    ],
)
def test_bad_files_are_refused_with_the_place(pets: Path, old: str, new: str, message: str) -> None:
    assert old in GOOD
    assert refused(pets, GOOD.replace(old, new, 1)).startswith(f"{pets}{message}")


def test_missing_and_empty_splits_are_named(pets: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    (images / "void").mkdir()
    assert refused(pets, GOOD.replace("cats/val", "cats/vla")) == (
        f"{pets}: val: image folder {images}/cats/vla: expected a folder of images, found nothing; correct the path"
    )
    assert refused(pets, GOOD.replace("dogs: dogs", "dogs: void")).startswith(
        f"{pets}: near: dogs: image folder {images}/void: expected at least one image ("
    )
    (tmp_path / "lists" / "textures.txt").write_text("")
    assert refused(pets, GOOD).startswith(f"{pets}: far: textures: image list {tmp_path}/lists/textures.txt: expected")


def test_leaks_and_too_few_samples_are_refused(pets: Path, tmp_path: Path) -> None:
    message = refused(pets, GOOD.replace("val: cats/val", "val: cats/train"))
    assert message.startswith("benchmark 'pets': splits 'train' and 'val' share the image 'train/0.png'")
    assert "splits 'train' and 'dogs' share" in refused(pets, GOOD.replace("dogs: dogs", "dogs: cats/train"))
    (tmp_path / "lists" / "one.txt").write_text("cats/train/0.png 0\n")
    assert "fewer than 2 ID samples" in refused(pets, GOOD.replace("cats/train", "{list: lists/one.txt}"))


@pytest.mark.parametrize(("text", "got"), [("", "nothing"), ("- a\n", "list ['a']"), ("pets", "str 'pets'")])
def test_files_without_keys_are_refused(pets: Path, text: str, got: str) -> None:
    message = refused(pets, text)
    assert message == (
        f"{pets}: expected the keys name, root, train, val, test, near, far, diagnostic, control, got {got}; name at "
        "least train and test"
    )


def test_a_missing_file_and_unsafe_yaml_are_refused(pets: Path, tmp_path: Path) -> None:
    with pytest.raises(TrajOODError, match=r"gone\.yaml: expected the benchmark file, got No such file"):
        load_benchmark(str(tmp_path / "gone.yaml"))
    assert "line 1: malformed YAML" in refused(pets, "!!python/object/apply:os.getcwd []\n")
    pets.write_bytes(b"name: \xff\n")
    with pytest.raises(TrajOODError, match=r"pets\.yaml: expected a YAML file in UTF-8"):
        load_benchmark(str(pets))
