"""Tensor files: what is written is what is read, the same bytes each time, and nothing that has changed since."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from traj_ood.errors import TrajOODError
from traj_ood.io.tensor_file import TensorFile, check_digest, open_tensors, write_tensors

HEADER = {"schema": "test/1", "ids": ["a", "b"], "notes": {"x": 1.5, "none": None}}


def tensors() -> dict[str, torch.Tensor]:
    shared = torch.arange(6.0, dtype=torch.float64).reshape(2, 3)
    return {
        "whole": shared,
        "row": shared[1],  # of the same memory
        "column": shared[:, ::2],
        "one of a column": shared[:1, 0],  # stride 3, and contiguous all the same
        "none": torch.empty(0, 3),
        "scalar": torch.tensor(7),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "nan": torch.tensor([torch.nan, torch.inf]),
        "weights": torch.nn.Parameter(torch.ones(2)),
        "flags": torch.tensor([True, False]),
    }


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.safetensors"
    write_tensors(path, tensors(), HEADER)
    file = load(path)
    assert file.header == HEADER
    plain = load_file(path)  # as any other program reads it
    assert file.tensors.keys() == plain.keys() == tensors().keys()
    for key, expected in tensors().items():
        for found in (file.tensors[key], plain[key]):
            torch.testing.assert_close(found, expected.detach(), rtol=0, atol=0, equal_nan=True)
    first = path.read_bytes()
    write_tensors(path, dict(reversed(tensors().items())), HEADER)
    assert path.read_bytes() == first


def load(path: Path) -> TensorFile:
    with open_tensors(path, "file", "write it again") as file:
        return file


def test_no_flipped_bit_is_read_as_something_else(tmp_path: Path) -> None:
    path, refused = tmp_path / "a.safetensors", list[str]()
    write_tensors(path, {"x": torch.arange(4.0)}, HEADER)
    whole = path.read_bytes()
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1
        path.write_bytes(changed)
        try:
            found = load(path)  # where the digest's own name is changed, or what transformers wants
        except TrajOODError as error:
            refused.append(str(error))
        else:
            assert found.tensors["x"].tolist() == [0, 1, 2, 3]
            assert HEADER.items() <= found.header.items()
    assert len(refused) > len(whole) - 40
    assert all(re.search(r"a\.safetensors: not a readable file \(.+\): write it again", text) for text in refused)
    path.write_bytes(whole[:-3])
    with pytest.raises(TrajOODError, match="cut off"):
        load(path)


def test_files_of_older_versions_and_of_others_are_taken_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.ones(2)}, path, metadata={"schema": "test/1", "ids": '["a"]'})
    assert load(path).header == {"schema": "test/1", "ids": ["a"]}
    save_file({"x": torch.ones(2)}, path)
    assert load(path).header == {}


def test_what_cannot_be_understood_counts_as_damage_and_own_errors_pass(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, {}, HEADER)
    with (
        pytest.raises(TrajOODError, match=r"not a readable file \('more'\): fix"),
        open_tensors(path, "file", "fix") as f,
    ):
        f.header["more"]
    with pytest.raises(TrajOODError, match=r"^of another schema$"), open_tensors(path, "file", "fix"):
        raise TrajOODError("of another schema")
    with pytest.raises(TrajOODError, match="nothing: not a readable file"):
        load(tmp_path / "nothing")


def test_json_beside_a_model_is_covered_but_for_what_libraries_add(tmp_path: Path) -> None:
    path, weights, config = tmp_path / "model.safetensors", {"x": torch.ones(2)}, {"width": 2, "sizes": (1, 2)}
    write_tensors(path, weights, beside=[config])
    check_digest(path, weights, {"sizes": [1, 2], "width": 2, "transformers_version": "9", "_name_or_path": "x"})
    for changed, beside in (({"x": torch.zeros(2)}, config), (weights, {**config, "width": 3})):
        with pytest.raises(
            TrajOODError, match=r"model\.safetensors: damaged or edited: it or the JSON files beside it"
        ):
            check_digest(path, changed, beside)
    save_file(weights, path)
    check_digest(path, weights, {"width": 3})  # whoever wrote it left no digest
