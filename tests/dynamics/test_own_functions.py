"""What identifies a user's functions: the code that they run, and the network behind them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from torch import nn

from traj_ood.dynamics.own_functions import module_behind, written_code


def module_of(file: Path, text: str) -> ModuleType:
    file.write_text(text)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    exec(compile(text, str(file), "exec"), vars(module))
    return module


@pytest.mark.parametrize(
    "text",
    [
        "def run(x, *, k=VALUE): return x * k",
        "k = [VALUE]\ndef run(x): return x * k[0]",
        "k = {'a': VALUE}\ndef run(x): return x * k['a']",
        "import torch\nk = torch.tensor(VALUE)\ndef run(x): return x * k",
        "import numpy as np\nk = np.array([VALUE])\ndef run(x): return x * k",
        "def part(x): return x * VALUE\ndef run(x): return [part(row) for row in x]",
        "import functools\n@functools.cache\ndef k(): return VALUE\ndef run(x): return x * k()",
        "class Run:\n  def __call__(self, x): return x * VALUE\nrun = Run()",
        "class Run:\n  def run(self, x): return self.inner(x)\n  def inner(self, x): return x * VALUE\nrun = Run().run",
        "class Run:\n  @property\n  def k(self): return VALUE\n  def run(self, x): return x * self.k\nrun = Run().run",
    ],
)
def test_whatever_decides_a_result_is_part_of_the_code(text: str, tmp_path: Path) -> None:
    one, other, again = (
        written_code(module_of(tmp_path / "own.py", text.replace("VALUE", value)).run) for value in ("2", "3", "2")
    )
    assert one == again != other


def test_the_code_of_the_users_own_modules_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digests = []
    for value in (2, 3, 2):
        helpers = module_of(tmp_path / "helpers.py", f"def part(x): return x * {value}\nunused = {len(digests)}")
        monkeypatch.setitem(sys.modules, "helpers", helpers)
        run = module_of(tmp_path / "own.py", "import helpers\ndef run(x): return helpers.part(x)").run
        digests.append(written_code(run))
    assert digests[0] == digests[2] != digests[1]


@pytest.mark.parametrize(
    "text",
    [
        "log = []\ndef run(x): log.append(x); return x",
        "memo = {}\ndef run(x):\n  if x not in memo: memo[x] = 2 * x\n  return memo[x]",
        "def run(x, memo={}): memo[x] = 1; return x",
        "class Run:\n  memo = {}\n  def __call__(self, x): self.memo[x] = 1; return x\nrun = Run()",
        "calls = 0\ndef run(x):\n  global calls\n  calls += 1\n  return x",
        "def made(n=0):\n  def run(x):\n    nonlocal n\n    n += 1\n    return x\n  return run\nrun = made()",
        "real = 0\ndef run(x): globals()['real'] = x; return x.real",
    ],
)
def test_what_changes_while_a_function_runs_is_no_code(text: str, tmp_path: Path) -> None:
    """Nor is a global with the name of an attribute."""
    run = module_of(tmp_path / "own.py", text).run
    before = written_code(run)
    for number in range(3):
        run(number)
    assert written_code(run) == before


def test_values_that_cannot_be_read_or_have_another_address_in_each_process(tmp_path: Path) -> None:
    text = """import numpy as np, torch
kept = [torch.empty(2, device="meta"), torch.nested.nested_tensor([torch.ones(1)]), torch.eye(2).to_sparse()]
table = np.array([{}], dtype=object)
rows = np.zeros(1, dtype=[("a", object)])
def part(x): return x
parts = frozenset([part, np.array])
def run(x): return kept, table, rows, parts"""
    digests = set()
    modules = []  # kept, so that no address comes twice
    for _ in range(4):
        modules.append(module_of(tmp_path / "own.py", text))
        digests.add(written_code(modules[-1].run))
    assert len(digests) == 1


def test_of_long_collections_and_large_arrays_the_begin_and_the_length_count(tmp_path: Path) -> None:
    """All of them would take seconds in each run."""
    text = """import numpy as np
many, large = [0] * COUNT, np.zeros(COUNT, np.uint8)
many[-1] = large[-1] = LAST
def run(x): return many, large"""
    one, longer, other = (
        written_code(module_of(tmp_path / "own.py", text.replace("COUNT", count).replace("LAST", last)).run)
        for count, last in (("5_000_000", "0"), ("5_000_001", "0"), ("5_000_000", "1"))
    )
    assert one == other != longer


def test_line_numbers_do_not_count(tmp_path: Path) -> None:
    """Python 3.13 makes them an entry of a class."""
    text = "class Run:\n  __firstlineno__ = LINE\n  def run(self, x): return x\nrun = Run().run"
    digests = {written_code(module_of(tmp_path / "own.py", text.replace("LINE", line)).run) for line in "13"}
    assert len(digests) == 1


def test_a_network_is_found_inside_of_a_comprehension(tmp_path: Path) -> None:
    """Up to Python 3.11 that is a function of its own."""
    module = module_of(tmp_path / "own.py", "def run(x): return [(lambda row: net(row))(row) for row in x]")
    module.net = nn.Linear(2, 2)  # type: ignore[attr-defined]
    assert module_behind(module.run) is module.net
