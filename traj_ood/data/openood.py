"""The published benchmarks in OpenOOD's folder layout: image lists under ``benchmark_imglist/`` and images under
``images_classic/`` and ``images_largescale/`` of one root.

The splits of ``imagenet``, ``cifar10`` and ``cifar100`` are OpenOOD v1.5's (ID train, val, test, near, far; without
its covariate-shifted sets). ``imagenet-paper`` is the older protocol of the paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from traj_ood.data.benchmark import Benchmark, Role, Split
from traj_ood.data.images import FileImages, read_folder, read_image_list
from traj_ood.data.preflight import MissingDataError, find_root

CLASSIC = "images_classic"
LARGE = "images_largescale"


@dataclass(frozen=True)
class _Source:
    """Where one split is stored."""

    name: str
    role: Role
    list_file: str  # below benchmark_imglist/
    images: str  # the folder to which paths in the list are relative
    folder: str | None = None  # below it, read if there is no list; None if only the list defines the split


def _imagenet(name: str, role: Role, images: str = LARGE, folder: str | None = None) -> _Source:
    stem = f"{name}_imagenet" if role == name else f"test_{name}"
    return _Source(name, role, f"imagenet/{stem}.txt", images, folder)


def _cifar(name: str, other: str) -> tuple[_Source, ...]:
    """CIFAR-10 and CIFAR-100 have the same splits, each with the other as a near set."""
    ids: tuple[Role, ...] = ("train", "val", "test")
    sets: dict[Role, tuple[str, ...]] = {"near": (other, "tin"), "far": ("mnist", "svhn", "texture", "places365")}
    return (
        *(_Source(role, role, f"{name}/{role}_{name}.txt", CLASSIC) for role in ids),
        *(_Source(ood, role, f"{name}/test_{ood}.txt", CLASSIC) for role, oods in sets.items() for ood in oods),
    )


# v1.5's sets are defined by their lists (Textures omits 480 images). Only the older protocol, which lacks some lists,
# reads folders instead.
_SOURCES: dict[str, tuple[_Source, ...]] = {
    "imagenet-paper": (
        _imagenet("train", "train"),
        _imagenet("test", "test"),
        _imagenet("sun", "far", LARGE, "sun"),
        _imagenet("places", "far", LARGE, "places"),
        _imagenet("textures", "far", CLASSIC, "texture"),
        _imagenet("inaturalist", "far", LARGE, "inaturalist"),
    ),
    "imagenet": (
        _imagenet("train", "train"),
        _imagenet("val", "val"),
        _imagenet("test", "test"),
        _imagenet("ssb_hard", "near"),
        _imagenet("ninco", "near"),
        _imagenet("inaturalist", "far"),
        _imagenet("textures", "far", CLASSIC),
        _imagenet("openimage_o", "far"),
    ),
    "cifar10": _cifar("cifar10", "cifar100"),
    "cifar100": _cifar("cifar100", "cifar10"),
}
_V15_NOTE = (
    "OpenOOD v1.5's splits without its covariate-shifted sets; whole test sets as there, 2,000 training images for "
    "attractors as in the paper."
)
_PAPER_NOTE = (
    "The paper's protocol: 2,000 ImageNet training images (stated) and 2,000 images per test set (inferred: all "
    "its published FPRs are multiples of 0.05 %). Which images were drawn is not stated, nor whether Texture "
    "means all 5,640 images or OpenOOD v1.5's 5,160; the v1.5 list is used where it is found."
)
_SCRIPT = "python scripts/download/download.py --contents datasets --save_dir ROOT"
_DOWNLOADS = {
    "imagenet-paper": "--dataset_mode benchmark --datasets imagenet-1k, then once more with "
    "--dataset_mode dataset --datasets sun places",
    "imagenet": "--dataset_mode benchmark --datasets imagenet-1k",
    "cifar10": "--dataset_mode benchmark --datasets cifar-10",
    "cifar100": "--dataset_mode benchmark --datasets cifar-100",
}
_CIFAR_FAR = "MNIST, SVHN, Texture, Places365 (far)"
OPENOOD_BENCHMARKS = {
    "imagenet-paper": "ImageNet vs SUN, Places, Texture, iNaturalist, 2,000 images each, as in the paper",
    "imagenet": "OpenOOD v1.5: ImageNet vs SSB-hard, NINCO (near) and iNaturalist, Textures, OpenImage-O (far)",
    "cifar10": f"OpenOOD v1.5: CIFAR-10 vs CIFAR-100, Tiny ImageNet (near) and {_CIFAR_FAR}",
    "cifar100": f"OpenOOD v1.5: CIFAR-100 vs CIFAR-10, Tiny ImageNet (near) and {_CIFAR_FAR}",
}
"""What is compared, by name."""
# Sets that replace a missing one if ``allow_missing``; they keep their own name.
_REPLACEMENTS = {
    ("cifar10", "places365"): _Source("scenes", "far", "cifar10/test_scenes.txt", CLASSIC),
    ("cifar100", "places365"): _Source("scenes", "far", "cifar100/test_scenes.txt", CLASSIC),
}


def load_openood(name: str, root: str | Path | None = None, allow_missing: bool = False) -> Benchmark:
    """Load one of ``OPENOOD_BENCHMARKS`` from the folder that contains ``benchmark_imglist/``; default
    ``$TRAJ_OOD_DATA``, then ``./data``.

    OOD sets of ``imagenet-paper`` without an image list (v1.5 has none for SUN and Places) are read from their folders;
    the benchmark's note then says so.

    ``allow_missing`` omits OOD sets without a list or without any image. The benchmark's name then ends in
    ``-partial``, so that its results are not taken for the full benchmark's, and its note names the sets.
    """
    how = f"to get the data, run in a clone of OpenOOD: {_SCRIPT} {_DOWNLOADS[name]}"
    sources = _SOURCES[name]
    lists = Path("benchmark_imglist", Path(sources[0].list_file).parent)
    base = find_root(name, root, lists, f"OpenOOD's layout (benchmark_imglist/, {LARGE}/, {CLASSIC}/)", how)
    left_out: tuple[str, ...] = ()
    if allow_missing:
        sources, left_out = _available(name, base, sources)
    absent = [place for source in sources if (place := _absent(base, source)) is not None]
    if absent:
        raise MissingDataError(
            f"benchmark {name!r}: {len(absent)} of {len(sources)} splits are missing: expected "
            f"{', '.join(absent)}; {how}",
            tuple(absent),
        )
    folders = [source.name for source in sources if not _list_path(base, source).is_file()]
    splits = {source.name: Split(source.name, source.role, _read(base, source)) for source in sources}
    return Benchmark(
        name=f"{name}-partial" if left_out else name,
        train=splits["train"],
        val=splits.get("val"),
        test=splits["test"],
        ood=tuple(split for split in splits.values() if split.role in ("near", "far")),
        train_size=2000,
        test_size=2000 if name == "imagenet-paper" else None,
        note=(_PAPER_NOTE if name == "imagenet-paper" else _V15_NOTE)
        + (f" Read from folders, for want of a list: {', '.join(folders)}." if folders else "")
        + (f" Left out, for want of data: {', '.join(left_out)}." if left_out else ""),
        how_to_get=how,
        control=name.startswith("cifar"),  # on ImageNet it would read hundreds of thousands of large files once more
    )


def _available(name: str, base: Path, sources: tuple[_Source, ...]) -> tuple[tuple[_Source, ...], tuple[str, ...]]:
    """The ID splits and the available OOD sets or their replacements; then the names of the omitted sets. If no OOD set
    is available, all are returned, for the error that names them."""
    kept, left_out = [], []
    for source in sources:
        if source.role not in ("near", "far") or _has_images(base, source):
            kept.append(source)
            continue
        left_out.append(source.name)
        other = _REPLACEMENTS.get((name, source.name))
        if other is not None and _has_images(base, other):
            kept.append(other)
    if not any(source.role in ("near", "far") for source in kept):
        return sources, ()
    return tuple(kept), tuple(left_out)


def _has_images(base: Path, source: _Source) -> bool:
    if _absent(base, source) is not None:
        return False
    images = _read(base, source)
    return any((images.root / path).is_file() for path in images.paths)


def _list_path(base: Path, source: _Source) -> Path:
    return base / "benchmark_imglist" / source.list_file


def _absent(base: Path, source: _Source) -> str | None:
    """Where the missing split was expected; None if it is there."""
    if _list_path(base, source).is_file():
        return None
    if source.folder is None:
        return f"{source.name} in {_list_path(base, source)}"
    folder = base / source.images / source.folder
    return None if folder.is_dir() else f"{source.name} in {_list_path(base, source)} or {folder}"


def _read(base: Path, source: _Source) -> FileImages:
    if source.folder is None or _list_path(base, source).is_file():
        return read_image_list(_list_path(base, source), base / source.images)
    # With the prefix, ids are those that OpenOOD's lists would give these images.
    return read_folder(base / source.images / source.folder, prefix=source.folder)
