"""The files behind a user's file, which identify its code in caches, runs and detectors."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import traj_ood
from traj_ood.io.own_files import is_library, with_helpers


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        path = folder / f"{name.replace('__in__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_all_files_that_a_file_imports_are_found(tmp_path: Path) -> None:
    write(
        tmp_path,
        mine="import torch, json\nfrom prep import prep\n\ndef late():\n    import pack.deep\n",
        prep="from scale import FACTOR\nimport mine\n",
        scale="FACTOR = 2\n",
        pack__in____init__="from .beside import x\n",
        pack__in__deep="from . import other\n",
        pack__in__beside="x = 1\n",
        pack__in__other="",
        stranger="",
    )
    found = [path.relative_to(tmp_path).as_posix() for path in with_helpers(tmp_path / "mine.py")]
    packed = ["pack/__init__.py", "pack/beside.py", "pack/deep.py", "pack/other.py"]
    assert found == ["mine.py", *packed, "prep.py", "scale.py"]


def test_libraries_stand_alone() -> None:
    for module in (torch, os, pytest, traj_ood):
        file = Path(str(module.__file__))
        assert is_library(file)
        assert with_helpers(file) == [file]


PROGRAM = """
import sys
from traj_ood.io.extensions import import_extension, origin_of
from traj_ood.io.provenance import code_digest
made = import_extension("mine.py")
cls = next(module for name, module in sys.modules.items() if name.startswith("mine_")).Mine
print(made.digest, origin_of(cls)["sha256"], code_digest())
"""


def digests_in(folder: Path) -> list[str]:
    """Digests of the extension ``mine.py``, of a class in it, and of all code, in a process of their own."""
    run = subprocess.run([sys.executable, "-c", PROGRAM], cwd=folder, capture_output=True, text=True, check=True)
    return run.stdout.split()


@pytest.mark.parametrize("imports", ["from prep import prep", "def late():\n    from prep import prep"])
def test_a_changed_helper_changes_the_digests(tmp_path: Path, imports: str) -> None:
    found = []
    for number, factor in enumerate((1, 1, 2)):
        folder = tmp_path / str(number)
        mine = f"{imports}\n\nclass Mine:\n    pass\n"
        write(folder, mine=mine, prep=f"def prep(x):\n    return {factor} * x\n")
        found.append(digests_in(folder))
    first, same, other = found
    assert first == same
    assert all(one != two for one, two in zip(first, other, strict=True))


def test_a_file_without_helpers_keeps_its_digest(tmp_path: Path) -> None:
    """So that detectors and runs of earlier versions are known."""
    write(tmp_path, mine="import torch\n\nclass Mine:\n    pass\n")
    expected = hashlib.sha256((tmp_path / "mine.py").read_bytes() + b"\0").hexdigest()
    assert digests_in(tmp_path)[:2] == [expected, expected]
