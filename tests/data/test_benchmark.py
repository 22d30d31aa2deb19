"""Benchmarks: what may be put together, and what a subsample keeps."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from traj_ood.data import ArrayImages, Benchmark, MissingDataError, Role, Split, preflight, read_folder
from traj_ood.data.benchmark import sample_indices
from traj_ood.errors import TrajOODError


def split(name: str, role: Role, count: int) -> Split:
    ids = tuple(f"{name}/{i}" for i in range(count))
    return Split(name, role, ArrayImages(ids, np.zeros((count, 2, 2), np.uint8)))


def benchmark(**changes: object) -> Benchmark:
    parts: dict[str, object] = {
        "name": "toy",
        "train": split("train", "train", 50),
        "val": split("val", "val", 20),
        "test": split("test", "test", 40),
        "ood": (split("b", "far", 40), split("a", "near", 8)),
    }
    return Benchmark(**{**parts, **changes})  # type: ignore[arg-type]


def ids(part: Split | None) -> tuple[str, ...]:
    assert part is not None
    return tuple(part.images.ids)


def test_near_sets_come_before_far_sets_and_diagnostics_last() -> None:
    assert [s.name for s in benchmark().splits()] == ["train", "val", "test", "a", "b"]
    assert [s.name for s in benchmark(val=None).splits()] == ["train", "test", "a", "b"]
    ood = (split("c", "diagnostic", 3), split("b", "far", 40), split("a", "near", 8))
    assert [s.name for s in benchmark(val=None, ood=ood).ood] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"train": split("train", "train", 1)},
            "benchmark 'toy': fewer than 2 ID samples: the train split holds 1; give at least 2 training",
        ),
        ({"ood": ()}, "benchmark 'toy': expected at least one near or far OOD set, got none; add one"),
        ({"ood": (split("c", "diagnostic", 2),)}, "expected at least one near or far OOD set, got none; add one"),
        ({"ood": (split("test", "far", 2),)}, "benchmark 'toy': two splits are named 'test'; rename one"),
        ({"test": split("t", "near", 2)}, "split 't': expected the role test, got 'near'"),
        ({"ood": (split("v", "val", 2),)}, "split 'v': expected the role near or far or diagnostic"),
        ({"name": "../x"}, "benchmark name '../x': expected letters, digits, '_', '-' and '.', starting with"),
    ],
)
def test_bad_benchmarks_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(TrajOODError, match=re.escape(message)):
        benchmark(**changes)


def test_empty_and_misnamed_splits_are_refused() -> None:
    with pytest.raises(TrajOODError, match=r"split 'dogs': expected at least one image, it is empty"):
        split("dogs", "far", 0)
    with pytest.raises(TrajOODError, match=r"split name 'a/b': expected letters"):
        split("a/b", "far", 2)
    with pytest.raises(TrajOODError, match=r"split 'a': expected a role of .*, got 'csid'"):
        split("a", "csid", 2)  # type: ignore[arg-type]


def test_a_shared_id_is_named() -> None:
    images = benchmark().train.images
    leaking = Split("test", "test", images.select([7]))
    with pytest.raises(TrajOODError, match=r"splits 'train' and 'test' share the image 'train/7'; give every image"):
        benchmark(test=leaking)


def test_equal_ids_in_unrelated_ood_sources_are_no_leak() -> None:
    names = tuple(f"train/{i}" for i in range(3))
    far = Split("far", "far", ArrayImages(names, np.zeros((3, 2, 2), np.uint8)))
    assert len(benchmark(ood=(far,)).splits()) == 4


@pytest.mark.parametrize("role", ["test", "far"])
def test_one_file_in_two_splits_is_found_through_links_and_other_ids(
    tmp_path: Path, make_images: Callable[..., None], role: Role
) -> None:
    make_images(tmp_path / "a", ["1.png", "2.png"])
    make_images(tmp_path / "b", ["3.png"])
    (tmp_path / "b" / "4.png").symlink_to(tmp_path / "a" / "2.png")
    train = Split("train", "train", read_folder(tmp_path / "a", prefix="x"))
    other = Split("other", role, read_folder(tmp_path / "b", prefix="y"))
    changes = {"test": other} if role == "test" else {"ood": (other,)}
    with pytest.raises(TrajOODError, match=r"splits 'train' and 'other' share the image 'x/2\.png'"):
        benchmark(train=train, **changes)


def test_subsample_sizes_order_and_seeds() -> None:
    full = benchmark()
    one, again, other = (full.subsample(train=10, per_set=15, seed=seed) for seed in (1, 1, 2))

    assert [len(s.images) for s in one.splits()] == [10, 15, 15, 8, 15]
    assert one.digests() == again.digests()
    assert ids(one.train) != ids(other.train)
    for a, b in zip(one.splits()[1:], other.splits()[1:], strict=True):
        assert ids(a) == ids(b)
    for part, whole in zip(one.splits(), full.splits(), strict=True):
        positions = [ids(whole).index(i) for i in ids(part)]
        assert positions == sorted(set(positions))
    assert [i.split("/")[1] for i in ids(one.test)] != [i.split("/")[1] for i in ids(one.ood[1])]


def test_a_larger_subsample_contains_the_smaller_one() -> None:
    small, large = (benchmark().subsample(train=n, per_set=n, seed=3) for n in (5, 20))
    for a, b in zip(small.splits(), large.splits(), strict=True):
        assert set(ids(a)) <= set(ids(b))


def test_subsample_of_nothing_is_the_whole_and_of_too_much_an_error() -> None:
    full = benchmark()
    assert full.subsample(train=None, per_set=None, seed=0).digests() == full.digests()
    assert full.subsample(train=50, per_set=1000, seed=0).digests() == full.digests()
    for train in (51, 1):
        with pytest.raises(TrajOODError, match=rf"'toy': expected between 2 and 50 training images .*, got {train};"):
            full.subsample(train=train, per_set=None, seed=0)
    with pytest.raises(TrajOODError, match=r"expected at least 1 image per set, got 0"):
        full.subsample(train=None, per_set=0, seed=0)
    with pytest.raises(TrajOODError, match=r"expected a seed of 0 or more, got -1"):
        full.subsample(train=5, per_set=None, seed=-1)


def test_sampling_never_changes() -> None:
    """Recorded results depend on these draws; they were written down once and must come out for ever."""
    assert sample_indices(1000, 5, 0, "test") == [51, 138, 197, 950, 951]


def test_sampling_is_uniform() -> None:
    hits = np.zeros(20)
    for seed in range(2000):
        hits[sample_indices(20, 5, seed, "train")] += 1
    assert np.all(np.abs(hits - 500) < 5 * np.sqrt(2000 * 0.25 * 0.75))


def test_digests_name_role_count_and_content() -> None:
    digests = benchmark().digests()
    assert list(digests) == ["train", "val", "test", "a", "b"]
    assert digests["a"]["role"] == "near"
    assert digests["a"]["count"] == 8
    assert re.fullmatch("[0-9a-f]{64}", str(digests["a"]["sha256"]))


def on_disk(folder: Path) -> Benchmark:
    images = {name: read_folder(folder / name, prefix=name) for name in ("train", "test", "dogs")}
    return Benchmark(
        name="toy",
        train=Split("train", "train", images["train"]),
        val=None,
        test=Split("test", "test", images["test"]),
        ood=(Split("dogs", "far", images["dogs"]),),
        how_to_get="ask the owner of the dogs",
    )


def test_preflight_counts_missing_files_and_says_where(tmp_path: Path, make_images: Callable[..., None]) -> None:
    make_images(tmp_path, [f"{s}/{i}.png" for s in ("train", "test", "dogs") for i in range(4)])
    toy = on_disk(tmp_path)
    preflight(toy)

    (tmp_path / "dogs" / "2.png").unlink()
    (tmp_path / "train" / "0.png").write_bytes(b"")
    (tmp_path / "train" / "3.png").unlink()
    with pytest.raises(MissingDataError) as error:
        preflight(toy)
    gone = [str(tmp_path / name) for name in ("train/0.png", "train/3.png", "dogs/2.png")]
    assert str(error.value) == (
        "benchmark 'toy': 3 image files are missing or empty in train (2 of 4), dogs (1 of 4); "
        f"expected e.g. {', '.join(gone)}; ask the owner of the dogs"
    )
    assert error.value.details == (f"train: {gone[0]}", f"train: {gone[1]}", f"dogs: {gone[2]}")


def test_preflight_decodes_the_first_image_of_each_split(tmp_path: Path, make_images: Callable[..., None]) -> None:
    make_images(tmp_path, [f"{s}/{i}.png" for s in ("train", "test", "dogs") for i in range(2)])
    (tmp_path / "test" / "0.png").write_bytes(b"no image")
    with pytest.raises(TrajOODError, match=r"benchmark 'toy', split 'test': .*0\.png: expected an image, found no"):
        preflight(on_disk(tmp_path))
