"""Consoles of other encodings, closed and full outputs, names that a terminal would obey, no home, no cache."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tqdm import tqdm

from traj_ood.cli import main
from traj_ood.cli.console import abandon, note, prepare, say
from traj_ood.data.fashion_mnist import find_fashion_mnist, obtain_fashion_mnist
from traj_ood.errors import TrajOODError
from traj_ood.io.files import cache_folder, write_atomic
from traj_ood.report.page import breakable

REPOSITORY = Path(__file__).parents[2]


class Console:
    """Standard output and error of this process as those of a console of one encoding."""

    def __init__(self, encoding: str) -> None:
        self.out, self.err = io.BytesIO(), io.BytesIO()
        self.streams = [io.TextIOWrapper(b, encoding, errors="strict") for b in (self.out, self.err)]


@pytest.fixture
def console(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Put a console of this encoding in place."""

    def put(encoding: str) -> Console:
        made = Console(encoding)
        monkeypatch.setattr(sys, "stdout", made.streams[0])
        monkeypatch.setattr(sys, "stderr", made.streams[1])
        return made

    with warnings.catch_warnings():  # prepare() decides how warnings are shown
        yield put


def ended(*arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        main.main([str(a) for a in arguments], prog_name="traj-ood")
    return int(end.value.code or 0)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "cp437", "utf-8"])
def test_every_console_has_a_spelling(console: Any, encoding: str) -> None:
    made = console(encoding)
    prepare()
    say("AUROC ↑ 97.2 ± 0.3 · 雁\udcff\x1b[2J\u202e\nnext")
    note("seen 雁")
    for _ in tqdm(range(2), desc="雁 ±", file=sys.stderr, mininterval=0):
        pass
    shown, told = made.out.getvalue().decode(encoding), made.err.getvalue().decode(encoding)
    assert "97.2 ± 0.3" in shown or "97.2 +/- 0.3" in shown
    assert shown.endswith("\\udcff\\x1b[2J\\u202e\nnext\n")  # nothing that a terminal obeys
    assert ("雁" in shown) == ("雁" in told) == (encoding == "utf-8")
    assert "\\u96c1" in told or encoding == "utf-8"


def test_the_leaderboard_prints_on_an_ascii_console(console: Any) -> None:
    made = console("ascii")
    assert ended("leaderboard", REPOSITORY / "results") == 0
    assert "+/-" in made.out.getvalue().decode("ascii")


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["list", "models"], ["bench", "--help"]])
@pytest.mark.parametrize("kind", ["closed", "full"])
def test_lost_output_is_one_line_and_no_success(
    console: Any, monkeypatch: pytest.MonkeyPatch, kind: str, arguments: list[str]
) -> None:
    made = console("utf-8")
    if kind == "full" and not Path("/dev/full").exists():
        pytest.skip("needs /dev/full, a device that is always full")
    with open("/dev/full" if kind == "full" else os.devnull, "w") as device:
        monkeypatch.setattr(sys, "stdout", device if kind == "full" else None)
        assert ended(*arguments) == 2
    told = made.err.getvalue().decode()
    reason = "No space left on device" if kind == "full" else "it is closed"
    assert told.startswith(f"traj-ood: error: standard output cannot be written ({reason})")
    assert told.count("\n") == 1


@pytest.mark.parametrize("kind", ["closed", "full"])
def test_what_goes_to_standard_error_may_be_lost(console: Any, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    made = console("utf-8")
    with open("/dev/full", "w") if Path("/dev/full").exists() else open(os.devnull, "w") as device:
        monkeypatch.setattr(sys, "stderr", device if kind == "full" else None)
        assert ended("list", "models") == 0
        assert ended("list", "nothing") == 2
        for _ in tqdm(range(2), file=sys.stderr, mininterval=0):
            pass
        warnings.warn("x" * 10_000, stacklevel=1)
        abandon(device)
    assert made.out.getvalue().startswith(b"models:\n")


def test_a_process_without_standard_streams_writes_into_no_file(tmp_path: Path) -> None:
    """The first file to be opened takes the number of a closed stream."""
    code = "import os; from traj_ood.cli.console import prepare; prepare(); os._exit(os.open('/', os.O_RDONLY))"
    done = subprocess.run(
        ["sh", "-c", f'"{sys.executable}" -c "{code}" <&- >&- 2>&-'], check=False, timeout=300, cwd=REPOSITORY
    )
    assert done.returncode >= 3


def test_warnings_are_lines_without_controls_and_below_two_kilobytes(console: Any) -> None:
    made = console("utf-8")
    prepare()
    warnings.warn("named \x1b]0;x\x07 " + "y" * 10_000 + "\n: do this", stacklevel=1)
    (line,) = made.err.getvalue().decode().splitlines()
    assert line.startswith("traj-ood: warning: named \\x1b]0;x\\x07 y")
    assert line.endswith("y : do this")
    assert len(line) < 2000
    assert ended("bench", "\x1b[2J" + "z" * 5000, "--device", "cpu") == 2
    told = made.err.getvalue().decode()
    assert "\x1b" not in told
    assert max(map(len, told.splitlines())) < 2000
    assert ended("list", "\x1b" + "z" * 5000) == 2
    assert max(map(len, made.err.getvalue().decode().splitlines())) < 2000


def test_the_report_shows_what_a_name_would_do_to_a_reader() -> None:
    assert str(breakable("a/\x1b[2J<b>\u202e")) == r"a/<wbr>\x1b[2J&lt;b&gt;\u202e"


def test_a_cache_that_cannot_be_written_is_named_with_its_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRAJ_OOD_DATA", str(tmp_path / "file"))
    monkeypatch.setattr("traj_ood.data.fashion_mnist.DEBIAN_FOLDER", tmp_path / "none")
    words = r"file.*: expected a folder that can be written.*set TRAJ_OOD_DATA to another folder for the cache"
    with pytest.raises(TrajOODError, match=words):
        write_atomic(cache_folder() / "features" / "x", b"")
    with pytest.raises(TrajOODError, match=words):
        obtain_fashion_mnist()
    with pytest.raises(TrajOODError, match="choose another folder"):
        write_atomic(REPOSITORY / "README.md" / "x", b"")


def test_no_home_folder_matters_only_where_the_cache_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("TRAJ_OOD_DATA", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(TrajOODError, match="expected a home folder for the cache, found none: set TRAJ_OOD_DATA"):
        cache_folder()
    monkeypatch.setattr("traj_ood.data.fashion_mnist.DEBIAN_FOLDER", tmp_path)
    for name in ("train-images", "train-labels", "t10k-images", "t10k-labels"):
        (tmp_path / f"{name}-idx{3 if 'images' in name else 1}-ubyte").touch()
    assert find_fashion_mnist() == tmp_path


@pytest.mark.parametrize(("own", "shown"), [(None, 10.0), ("2", 2.0)])
def test_progress_bars_write_few_lines_into_files(own: str | None, shown: float) -> None:
    """tqdm's ten states a second are lines of a log file, which no later state overwrites."""
    code = "from traj_ood.cli.console import prepare; prepare(); import tqdm; print(tqdm.tqdm(total=3).mininterval)"
    environment = {key: value for key, value in os.environ.items() if key != "TQDM_MININTERVAL"}
    environment |= {} if own is None else {"TQDM_MININTERVAL": own}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=REPOSITORY)
    assert float(done.stdout) == shown, done.stderr
