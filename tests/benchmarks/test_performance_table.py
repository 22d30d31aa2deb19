"""docs/performance.md is what benchmarks/performance_table.py makes of the records."""

from __future__ import annotations

import json
from pathlib import Path

import performance_table

from traj_ood.evaluation.text_tables import put_between_markers


def test_the_page_holds_the_table_of_its_records(tmp_path: Path) -> None:
    page = performance_table.PAGE.read_text(encoding="utf-8")
    (tmp_path / "page.md").write_text(page, encoding="utf-8")
    put_between_markers(tmp_path / "page.md", "table", performance_table.table())
    told = "python benchmarks/performance_table.py makes it anew"
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == page, told


def test_rows_are_read_from_their_records(tmp_path: Path) -> None:
    (tmp_path / "streaming.json").write_text('{"share_of_rows_used": 0.9512, "ratios": {}}')
    compiled = {"compiled_over_plain": 0.921, "compile_seconds": 11.2, "rows_to_earn_it_back": None}
    (tmp_path / "engine.json").write_text(json.dumps({"compiled": compiled}))
    (tmp_path / "static_scorers.json").write_text(
        '{"knn": {"openood": "absent", "pytorch_ood": {"times_of_ours": 4.0}}}'
    )
    (tmp_path / "scaling.json").write_text('{"faster_than_linear": []}')
    lines = performance_table.table(tmp_path).splitlines()
    assert len(lines) == 2 + len(performance_table.ROWS)
    measured = {cells[1].strip(): cells[3].strip() for cells in (line.split("|") for line in lines[2:])}
    assert measured["rows of f that belong to a running sample, `bench fashion --quick`"] == "95.1 %"
    assert measured["CPU time of that bench over that of its matrix products alone"] == "not recorded"
    assert measured["the bundled model's f through `torch.compile` over f"] == "0.92 ×"
    assert measured["seconds to compile it, and rows of f after which they are earned back"] == "11 s, never"
    assert measured["KNN, k = 50, over OpenOOD's: 50,000 × 768, 10,000 queries in one call"] == "not recorded"
    assert measured["the same over pytorch-ood's"] == "0.25 ×"
    assert measured["what grows faster than linear"] == "nothing"
    assert measured["every scorer over the dearest alone"] == "not recorded"
