"""YAML and JSON of strangers: refused in one line, in no time, whatever is in them; what people write is read."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from traj_ood.data import load_benchmark
from traj_ood.errors import TrajOODError
from traj_ood.evaluation.results import Result
from traj_ood.io.trees import MAX_DEPTH, MAX_YAML, read_json, read_yaml
from traj_ood.training.config import CONFIGS, TrainConfig

LAUGHS = "name: [&a [x,x,x,x,x,x,x,x,x]" + "".join(
    f", &{new} [{','.join(['*' + old] * 9)}]" for old, new in zip("abcdef", "bcdefg", strict=True)
)
BAD_YAML = {
    "laughs": (LAUGHS + "]", "line 1: malformed YAML .more than 5000 values, those repeated by aliases included"),
    "itself": ("a: &a [*a]", "the alias 'a' inside the value it refers to"),
    "flow": ("a: " + "[" * 900, "more than 50 lists and mappings inside each other"),
    "block": ("\n".join(" " * i + "a:" for i in range(300)), "line 51: .*more than 50 lists"),
    "text": ("a: " + "x" * 9000, "a value of 9000 characters, expected at most 4096"),
    "digits": ("a: 0x" + "f" * 4000, "a number of 4002 digits, expected at most 40"),
    "base 60": ("a: " + ":".join(["59"] * 999), "a number of 2996 digits"),
    "long": ("# x\n" * 20_000, f"expected at most {MAX_YAML} bytes, got 80001"),
    "twice": ("a: 1\nb: 2\na: 3", "line 3: .*the key 'a' is given twice"),
    "object": ("a: !!python/object/apply:os.system [x]", "could not determine a constructor"),
    "date": ("a: 2001-99-99", "malformed YAML"),
    "NUL": ("a: \0", "malformed YAML"),
}


@pytest.mark.parametrize("name", BAD_YAML)
def test_yaml_without_bounds_is_one_line_at_once(tmp_path: Path, name: str) -> None:
    text, words = BAD_YAML[name]
    (tmp_path / "b.yaml").write_text(text + "\n")
    for read in (load_benchmark, TrainConfig.load):
        began = time.perf_counter()
        with pytest.raises(TrajOODError, match=words) as error:
            read(str(tmp_path / "b.yaml"))
        assert time.perf_counter() - began < 20  # idle: at most 0.4 s
        assert str(error.value).startswith(f"{tmp_path / 'b.yaml'}")
        assert len(str(error.value)) < 2000


def test_a_device_without_end_is_no_file() -> None:
    if not Path("/dev/zero").exists():
        pytest.skip("needs /dev/zero")
    for read in (read_yaml, lambda path, what: read_json(path, what, "", limit=1000)):
        with pytest.raises(TrajOODError, match=r"/dev/zero: it: expected at most .* bytes"):
            read(Path("/dev/zero"), "it")


def test_yaml_that_people_write_is_read_as_pyyaml_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("\ufeffa: &base {x: 1, y: [1.5, true, null]}\nb: {<<: *base, y: ü}\nc: [*base, *base]\n", "utf-8")
    assert read_yaml(path, "it") == yaml.safe_load(path.read_text("utf-8-sig"))
    for bundled in CONFIGS.glob("*.yaml"):
        assert read_yaml(bundled, "it") == yaml.safe_load(bundled.read_text("utf-8"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[" * 10**6, "expected JSON, got"),
        (b'{"a":' * MAX_DEPTH + b"{}" + b"}" * MAX_DEPTH, "more than 50 lists and objects inside each other"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b'{"a": ' + b"9" * 10**6 + b"}", "expected JSON, got"),
        (b"\xff", "expected JSON, got"),
        (b"[]", "expected a JSON object, got list"),
        (b"{}", "expected a result of schema"),
    ],
)
def test_json_without_bounds_is_one_line(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "result.json").write_bytes(content)
    with pytest.raises(TrajOODError, match=words) as error:
        Result.load(tmp_path / "result.json")
    assert len(str(error.value)) < 2000


def test_json_is_read_as_json_reads_it(tmp_path: Path) -> None:
    tree: Any = {"a": [1, 2.5, None, {"b": "ü]["}]}
    for _ in range(MAX_DEPTH - 4):
        tree = {"a": tree}
    (tmp_path / "a.json").write_text(json.dumps(tree))
    assert read_json(tmp_path / "a.json", "it", "") == tree
