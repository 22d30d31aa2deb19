"""Text on its way out: nothing that a terminal obeys, bounded messages, cells that no spreadsheet runs."""

from __future__ import annotations

import csv
import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from traj_ood.errors import TrajOODError, unknown_name
from traj_ood.text import MAX_MESSAGE, brief, one_line, printable, quote_formula, unquote_formula

STRANGE = st.text(st.sampled_from("'=+-@\t\r\nab,\" \x1b\u202e\udcff＝") | st.characters(), max_size=12)


@settings(max_examples=200, deadline=None)
@given(STRANGE)
def test_cells_go_there_and_back(text: str) -> None:
    cell = quote_formula(text)
    assert unquote_formula(cell) == text
    assert not cell or cell[0] not in "=+-@\t\r\n＝＋－＠"
    assert cell in (text, "'" + text)


@settings(max_examples=200, deadline=None)
@given(STRANGE)
def test_nothing_is_left_for_a_terminal(text: str) -> None:
    shown = printable(text)
    assert all(c.isprintable() or c.isspace() for c in shown)
    assert not set(shown) & set("\x1b\u202e\udcff\r\n\x07\x9b")
    assert printable(shown) == shown
    assert one_line(one_line(text)) == one_line(text)


def test_letters_of_all_scripts_stay() -> None:
    assert printable("Gänse/雁 3\u00a0×.png") == "Gänse/雁 3\u00a0×.png"
    assert printable("a\x1b[2J\u2066b\udcff\x85") == r"a\x1b[2J\u2066b\udcff\x85"


@pytest.mark.parametrize("filler", ["x", "雁", "\x1b", "\udcff", "😀", "\n"])
@pytest.mark.parametrize("count", [100, 2000, 5_000_000])
def test_a_message_keeps_its_beginning_and_its_end(filler: str, count: int) -> None:
    line = one_line("model.yaml: expected a name, got '" + filler * count + "': correct the line")
    for encoding in ("utf-8", "ascii"):
        assert len(line.encode(encoding, "backslashreplace")) <= MAX_MESSAGE
    assert line.startswith("model.yaml: expected a name, got '")
    assert line.endswith("': correct the line")
    assert "\n" not in line
    assert one_line(line) == line


def test_every_error_is_one_short_line() -> None:
    error = TrajOODError("expected\n  a name, got \x1b[31m" + "y" * 10_000 + ": do that")
    assert str(error).startswith(r"expected a name, got \x1b[31myyy")
    assert len(str(error)) <= MAX_MESSAGE
    assert len(str(unknown_name("scorer", "k" * 5000, [f"name{i}" for i in range(3000)]))) <= MAX_MESSAGE


def test_a_spreadsheet_reader_sees_text() -> None:
    table = io.StringIO()
    csv.writer(table).writerow([quote_formula('=HYPERLINK("http://x")'), -1.5, quote_formula("\r=1")])
    table.seek(0)
    assert next(csv.reader(table)) == ['\'=HYPERLINK("http://x")', "-1.5", "'\r=1"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "OSError"),
        (" \n ", "OSError"),
        ("gone.", "gone"),
        ("gone.\nand more", "gone"),
        ("Error(s):\n\tMissing key: a.\n\tMore", "Error(s): Missing key: a"),
        ("x" * 300, "x" * 200),
    ],
)
def test_errors_of_libraries_are_told_in_brief(text: str, expected: str) -> None:
    assert brief(OSError(text)) == expected
