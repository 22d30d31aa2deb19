"""benchmarks/scaling.py: slopes of known growth, what is called faster than linear, and the rehearsal."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import scaling


def test_slopes_are_exponents() -> None:
    sizes = (10, 100, 1000)
    assert scaling.slopes(sizes, [3 * n**2 for n in sizes]) == pytest.approx((2, 2))
    assert scaling.slopes(sizes, [n + 1000.0 for n in sizes])[1] < 0.5
    assert scaling.slopes(sizes, [5.0, 5.0, 50.0]) == pytest.approx((0.5, 1))


def test_what_grows_faster_than_linear_is_named() -> None:
    assert scaling.faster_than_linear("images", "score", (1.0, 1.1)) == ""
    said = scaling.faster_than_linear("attractors", "build", (1.3, 1.6))
    assert said == "attractors, build: cost grows with exponent 1.60 at the end (1.30 over all)"
    assert scaling.faster_than_linear("processes", "bench", (0.0, 0.1)) == ""
    assert "exponent 0.40" in scaling.faster_than_linear("processes", "bench", (0.2, 0.4))


def test_the_rehearsal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "scaling.json"
    monkeypatch.setattr(sys, "argv", ["benchmarks/scaling.py", "--tiny", "--out", str(out)])
    scaling.main()
    record = json.loads(out.read_text())
    assert record["axes"].keys() == {"images", "attractors", "latent"}
    assert all(len(c["cpu_seconds"]) == len(c["sizes"]) for axis in record["axes"].values() for c in axis.values())
    assert out.with_suffix(".png").stat().st_size > 10_000
    last = capsys.readouterr().out.splitlines()[-1]
    assert record["faster_than_linear"][-1:] in ([], [last])
