"""The records of an operator's page are rehearsed: the drill, and the service under load and under attack."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

for library in ("fastapi", "multipart", "httpx", "onnxscript", "onnxruntime"):
    pytest.importorskip(library, reason="needs traj_ood[serve,export] and httpx")

import drill  # noqa: E402 (behind what says that its libraries are there)
import serving  # noqa: E402


def rehearse(script: Any, out: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", [f"benchmarks/{script.__name__}.py", "--tiny", "--out", str(out)])
    script.main()
    return dict(json.loads(out.read_text()))


def test_the_share_of_ood_images_rises_to_a_half() -> None:
    shares = [drill.share_of_ood(minute) for minute in range(drill.MINUTES)]
    assert shares[:20] == [0.0] * 20
    assert shares[20:40] == pytest.approx([0.025 * k for k in range(1, 21)])
    assert shares[40:] == [0.5] * 20


@pytest.mark.slow
def test_the_drill_rehearses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = rehearse(drill, tmp_path / "drill.json", monkeypatch)
    assert record["alarm"]["minute"] > 20
    assert "the stream differs from the calibration" in record["alarm"]["operator sees"]
    assert len(record["minutes"]) == drill.MINUTES
    assert not any(minute["alarm"] for minute in record["minutes"][:20])
    other = record["another detector"]
    assert "damaged" in other["refused"]
    assert other["answered meanwhile by the one before"]
    assert other["new one taken"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory and CPU time are read from /proc")
def test_the_load_test_rehearses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = rehearse(serving, tmp_path / "serving.json", monkeypatch)
    for load in (record["service"], record["one client"]):
        assert load["lost"] == 0
        assert load["answers"]["200"] == load["images"]
        assert 0 < load["seconds"]["p50"] <= load["seconds"]["p99"]
    assert record["largest relative difference of a score"] < 1e-3
    assert math.isfinite(record["throughput beside the bare detector's"]["by CPU time"])
    attacked = record["hostile"]
    assert attacked["lives"]
    assert attacked["then"] == 200
    assert sum(n for told in attacked["answers"].values() for n in told.values()) == attacked["requests"]
    assert attacked["answers"]["honest"] == {"200": 1}
    assert set(attacked["answers"]["slow"]) == {"408"}
    assert set(attacked["answers"]["a head of 1 MiB"]) <= {"400", "431", "closed"}
