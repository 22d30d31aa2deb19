"""benchmarks/gpu.py, rehearsed on the CPU: every part answers, and one that fails does not end the others."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gpu
import pytest


def record_of(monkeypatch: pytest.MonkeyPatch, path: Path, *words: str) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", ["benchmarks/gpu.py", "--device", "cpu", "--tiny", "--out", str(path), *words])
    gpu.main()
    return json.loads(path.read_text())  # type: ignore[no-any-return]


def test_a_part_that_fails_is_named_and_the_others_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(card: gpu.Card) -> dict[str, Any]:
        raise RuntimeError("no such card")

    monkeypatch.setitem(gpu.PARTS, "steps", broken)
    record = record_of(monkeypatch, tmp_path / "gpu.json", "--only", "steps", "indices")
    assert record["steps"] == "failed: RuntimeError: no such card"
    assert record["indices"]["torch"]["mean_distance"] > 0


@pytest.mark.slow
def test_the_whole_rehearsal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = record_of(monkeypatch, tmp_path / "gpu.json")
    assert not [part for part in gpu.PARTS if isinstance(record[part], str)]
    assert all(apart["largest"] == 0 for apart in record["parity"].values())  # here the device is the CPU
