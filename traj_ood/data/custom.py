"""User-defined benchmarks: a YAML file that names an image folder or an image list for each split.

    name: pets                 # default: the name of the YAML file
    root: ./images             # where folders start; default: the folder of the YAML file
    train: cats/train          # a folder, read with its subfolders, or {list: train.txt, root: ./images}
                               # {folder: cats/train, classes: true}: its subfolders are the class labels
    val: cats/val              # optional
    test: cats/test
    near: {dogs: dogs}         # OOD sets by name; near, far or both
    far: {textures: {list: lists/textures.txt}}
    diagnostic: {noise: noise}   # optional: OOD sets with figures of their own, left out of means over sets
    control: true              # optional: tables also say what the image files alone give away, see `bench --control`

Folders, and the paths inside image lists, are relative to ``root``. The keys ``root`` and ``list``, and a list's own
``root``, are relative to the folder of the YAML file.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from traj_ood.data.addresses import is_address
from traj_ood.data.benchmark import OOD_ROLES, Benchmark, Role, Split
from traj_ood.data.encoded import EncodedImages, read_encoded
from traj_ood.data.images import FileImages, labelled_by_folder, read_folder, read_image_list
from traj_ood.data.records import DEFAULT_OPENING, HUB, Opening, is_records
from traj_ood.errors import TrajOODError, unknown_name
from traj_ood.io.trees import read_yaml

KEYS = ("name", "root", "train", "val", "test", *OOD_ROLES, "control")
LIST_KEYS = ("list", "root")
FOLDER_KEYS = ("folder", "classes")


def load_custom(yaml_path: str | Path, root: str | Path | None = None, opening: Opening = DEFAULT_OPENING) -> Benchmark:
    """Load the benchmark that a YAML file describes; the module's docstring shows the format.

    Image ids are ``split/relative path``, so that equal file names in two folders are distinct. ``root`` replaces the
    top-level ``root`` of the file.
    """
    yaml_path = Path(yaml_path)
    config = read_yaml(yaml_path, "the benchmark file")
    if not isinstance(config, dict):
        raise TrajOODError(
            f"{yaml_path}: expected the keys {', '.join(KEYS)}, got {_kind(config)}; name at least train and test"
        )
    _check_keys(config, KEYS, str(yaml_path))
    here = yaml_path.parent
    base = Path(root) if root is not None else _place(here, config.get("root", "."), f"{yaml_path}: root")
    for key in ("train", "test"):
        if config.get(key) is None:
            raise TrajOODError(f"{yaml_path}: expected the key {key!r} with a folder or an image list; add it")

    def split(name: str, role: Role, spec: object, where: str) -> Split:
        try:
            images = _images(spec, here, base, opening)
            return Split(name, role, replace(images, ids=tuple(f"{name}/{i}" for i in images.ids)))
        except TrajOODError as error:
            raise TrajOODError(f"{yaml_path}: {where}: {error}") from error

    return Benchmark(
        name=_text(config.get("name", yaml_path.stem), f"{yaml_path}: name"),
        train=split("train", "train", config["train"], "train"),
        val=split("val", "val", config["val"], "val") if config.get("val") is not None else None,
        test=split("test", "test", config["test"], "test"),
        ood=tuple(
            split(name, role, spec, f"{role}: {name}")
            for role in OOD_ROLES
            for name, spec in _named_sets(config.get(role), f"{yaml_path}: {role}")
        ),
        note=f"Described by {yaml_path.name}.",
        how_to_get=f"put the files there or correct {yaml_path}",
        control=_flag(config.get("control", False), f"{yaml_path}: control"),
    )


def _images(spec: object, here: Path, base: Path, opening: Opening) -> FileImages | EncodedImages:
    """The images of one split: a folder below ``base``, an image list, or a source of records."""
    if isinstance(spec, str) and spec.strip():
        place = spec if is_address(spec) or spec.startswith(HUB) else str(_place(base, spec, "folder"))
        return read_encoded(place, opening=opening) if is_records(place) else read_folder(place)
    if not isinstance(spec, dict):
        raise TrajOODError(f"expected a folder or {{list: FILE, root: FOLDER}}, got {_kind(spec)}; give one")
    if "folder" in spec:
        _check_keys(spec, FOLDER_KEYS, "image folder")
        labelled = _flag(spec.get("classes", False), "classes")
        images = read_folder(_place(base, spec["folder"], "folder"))
        return labelled_by_folder(images) if labelled else images
    _check_keys(spec, LIST_KEYS, "image list")
    if "list" not in spec:
        raise TrajOODError("expected the key 'list' with an image list; add it, or give a folder as plain text")
    root = _place(here, spec["root"], "root") if "root" in spec else base
    return read_image_list(_place(here, spec["list"], "list"), root)


def _named_sets(sets: object, where: str) -> Iterable[tuple[str, object]]:
    if sets is None:
        return []
    if not isinstance(sets, dict):
        raise TrajOODError(
            f"{where}: expected OOD sets by name, e.g. {{dogs: path/to/dogs}}, got {_kind(sets)}; name them"
        )
    return [(_text(name, f"{where}: set name"), spec) for name, spec in sets.items()]


def _check_keys(mapping: dict[Any, Any], known: tuple[str, ...], where: str) -> None:
    for key in mapping:
        if key not in known:
            raise TrajOODError(f"{where}: {unknown_name('key', str(key), known)}")


def _text(value: object, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise TrajOODError(f"{where}: expected text, got {_kind(value)}; write it in quotes")
    return value


def _flag(value: object, where: str) -> bool:
    if not isinstance(value, bool):
        raise TrajOODError(f"{where}: expected true or false, got {_kind(value)}")
    return value


def _place(start: Path, value: object, where: str) -> Path:
    """A path in the YAML file, relative to ``start`` unless absolute; ``~`` is the home folder."""
    return start / Path(_text(value, where)).expanduser()


def _kind(value: object) -> str:
    return "nothing" if value is None or value == "" else f"{type(value).__name__} {value!r}"
