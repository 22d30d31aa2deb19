"""The part store: what was finished is found again, and nothing that is damaged, of other code or of somebody else."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from traj_ood.errors import TrajOODError
from traj_ood.io.parts import Part, PartStore


def store(folder: Path) -> PartStore:
    return PartStore(folder, "batch", "compute it again", "run.json", "discard it with --fresh")


PART = Part(("a", "b"), [{"id": "c", "error": "broken"}], {"score": torch.arange(4.0).reshape(2, 2)[:, 0]}, {"n": 1})


def test_a_part_is_found_again(tmp_path: Path) -> None:
    assert store(tmp_path).load("test-0") is None
    store(tmp_path / "new").save("group/test-0", PART)
    found = store(tmp_path / "new").get("group/test-0")
    assert (found.ids, found.failures, found.notes) == (PART.ids, PART.failures, PART.notes)
    assert found.tensors["score"].tolist() == [0, 2]
    with pytest.raises(
        TrajOODError, match=r"test-1\.safetensors: expected the batch that another process has finished"
    ):
        store(tmp_path).get("test-1")


def test_a_damaged_part_and_that_of_another_place_are_named(tmp_path: Path) -> None:
    store(tmp_path).save("a", PART)
    shutil.copy(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    with pytest.raises(
        TrajOODError, match=r"b\.safetensors: not a readable batch \(it contains the part a\): delete this file"
    ):
        store(tmp_path).load("b")
    path = tmp_path / "a.safetensors"
    whole = path.read_bytes()
    for place in (len(whole) - 3, whole.index(b"broken")):
        changed = bytearray(whole)
        changed[place] ^= 1
        path.write_bytes(changed)
        with pytest.raises(
            TrajOODError, match=r"\(its content has changed since it was written\): delete this file to c"
        ):
            store(tmp_path).load("a")


def test_parts_of_other_code_and_distrusted_ones_count_as_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store(tmp_path).save("a", PART)
    distrusting = store(tmp_path)
    distrusting.distrust()
    assert (distrusting.has("a"), distrusting.load("a")) == (False, None)
    distrusting.save("a", PART)
    assert distrusting.has("a")
    monkeypatch.setattr("traj_ood.io.parts.code_digest", lambda: "0" * 16)
    assert store(tmp_path).load("a") is None


def test_a_folder_says_whose_parts_it_holds(tmp_path: Path) -> None:
    assert store(tmp_path).open({"sizes": (1, 2), "code": "x"}) == {"sizes": [1, 2], "code": "x"}
    assert store(tmp_path).open({"sizes": [3], "code": "y"}) == {
        "sizes": [1, 2],
        "code": "x",
    }  # for the caller to judge
    store(tmp_path).claim({"sizes": [3], "code": "y"})
    assert store(tmp_path).open({"sizes": [], "code": ""})["code"] == "y"
    assert store(tmp_path).open({"sizes": []}, "group") == {"sizes": []}
    with pytest.raises(TrajOODError, match=r"run\.json: damaged or of another version: discard it with --fresh"):
        store(tmp_path).open({"sizes": [3]})
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(TrajOODError, match=r"run\.json: expected JSON, got .*; discard it with --fresh"):
        store(tmp_path).open({"sizes": [3]})


def test_parts_of_nobody_are_refused(tmp_path: Path) -> None:
    store(tmp_path).save("a", PART)
    with pytest.raises(TrajOODError, match=r"a\.safetensors: expected run\.json beside it, found nothing: discard it"):
        store(tmp_path).open({"sizes": [3]})
    store(tmp_path).remove()
    assert store(tmp_path).open({"sizes": [3]}) == {"sizes": [3]}
