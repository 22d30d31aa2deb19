"""benchmarks/speed.py: what is a loss, and that a piece that fails, or is not there, is named."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import performance_table
import pytest
import speed


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["benchmarks/speed.py", *words])
    with pytest.raises(SystemExit) as end:
        speed.main()
    return int(end.value.code or 0)


@pytest.fixture
def pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two pieces that write the ratios they are called with, and one whose script is not there."""
    script = "import json, sys\nif sys.argv[1] == 'fail': sys.exit('no such luck')\n"
    script += "open(sys.argv[-1], 'w').write(json.dumps({'ratios': json.loads(sys.argv[1])}))\n"
    (tmp_path / "piece.py").write_text(script)
    monkeypatch.setattr(speed, "HERE", tmp_path)
    found = {
        "one": speed.Piece("piece.py", ('{"a": 1.1, "b": 2.0}',), ('{"a": 9.0}',), speed.flat),
        "broken": speed.Piece("piece.py", ("fail",), ("fail",), speed.flat),
        "absent": speed.Piece("absent.py", (), (), speed.flat),
    }
    monkeypatch.setattr(speed, "PIECES", found)
    return tmp_path


def test_what_is_a_loss() -> None:
    recorded = {"same": 1.0, "better": 1.0, "within": 1.0, "worse": 1.0, "nan": 1.0, "gone": 1.0}
    today = {"same": 1.0, "better": 0.2, "within": 1.149, "worse": 1.151, "nan": math.nan, "new": 7.0}
    lines, losses = speed.compare(today, recorded)
    assert losses == ["worse", "nan"]
    assert [line.split()[0] for line in lines] == list(today)
    assert lines[3].endswith("recorded    1.000  LOSS")
    assert lines[5].endswith("not recorded")
    assert speed.compare({}, recorded) == ([], [])


def test_a_loss_ends_with_exit_code_1_and_its_name(
    pieces: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    against, out = pieces / "recorded.json", pieces / "today.json"
    assert run(monkeypatch, "--only", "one", "--against", str(against), "--record") == 0
    assert json.loads(against.read_text())["ratios"] == {"a": 1.1, "b": 2.0}
    assert json.loads((pieces / "piece.json").read_text())["ratios"] == {"a": 1.1, "b": 2.0}
    assert run(monkeypatch, "--only", "one", "--against", str(against)) == 0
    against.write_text('{"ratios": {"a": 1.0, "b": 1.0, "c": 5.0}}')
    assert run(monkeypatch, "--only", "one", "--against", str(against), "--out", str(out)) == 1
    assert "More than 15% dearer than recorded: b\n" in capsys.readouterr().err
    assert json.loads(out.read_text())["ratios"] == {"a": 1.1, "b": 2.0}
    assert run(monkeypatch, "--only", "one", "--against", str(against), "--tiny") == 0  # compares nothing
    assert run(monkeypatch, "--only", "one", "--against", str(against), "--tiny", "--record") == 2
    assert json.loads(against.read_text())["ratios"]["c"] == 5.0


def test_a_piece_that_fails_is_named_and_the_others_run(
    pieces: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--against", str(pieces / "none.json")) == 1
    said = capsys.readouterr()
    assert "exit code 1: no such luck" in said.err
    assert "absent: absent.py is not there" in said.err
    assert "a     1.100  not recorded" in said.out


def test_records_become_ratios_of_costs() -> None:
    record = {
        "knn": {"traj_ood": {"times_of_ours": 1.0}, "openood": {"times_of_ours": 4.0}, "pytorch_ood": "absent"},
        "versions": {"traj_ood": "0.1.0"},
        "command": "python",
    }
    assert speed.of_static_scorers(record) == {"knn over openood": 0.25}
    assert speed.of_all_scorers({"all_over_dearest": 1.1}) == {"all scorers over the dearest alone": 1.1}


@pytest.mark.slow
@pytest.mark.parametrize("piece", [name for name in speed.PIECES if (speed.HERE / speed.PIECES[name].script).is_file()])
def test_every_piece_rehearses(piece: str) -> None:
    chosen = speed.PIECES[piece]
    record = speed.measure(chosen, tiny=True)
    assert chosen.ratios(record)
    own = [row for row in performance_table.ROWS if row.record == Path(chosen.script).stem and "batches" not in piece]
    for row in own:
        if "OpenOOD" not in row.what:  # which need not be there
            assert row.read(record), row.what
