"""Hashes of files: right ones, remembered as long as the file is the same, and never a reason to fail."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

from traj_ood.data import contents
from traj_ood.data.contents import ABSENT, FILE_NAME, hash_files


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of its own, in which files that are a moment old are settled."""
    monkeypatch.setenv("TRAJ_OOD_DATA", str(tmp_path / "cache"))
    monkeypatch.setattr(contents, "_FINE_CLOCK", -1)
    monkeypatch.setattr(contents, "_COARSE_CLOCK", -1)
    monkeypatch.setattr(contents, "_warned", set())
    monkeypatch.setattr(contents, "_own", {})
    monkeypatch.setattr(contents, "_distrusts", False)
    return tmp_path / "cache"


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    (tmp_path / "files").mkdir()
    paths = [tmp_path / "files" / f"{i:03d}.bin" for i in range(150)]
    for i, path in enumerate(paths):
        path.write_bytes(bytes([i]) * (i * 1000))
    return list(map(str, paths))


def truth(paths: list[str]) -> tuple[str, ...]:
    return tuple(hashlib.sha256(Path(p).read_bytes()).hexdigest() for p in paths)


class Opened:
    """Counts the files that are hashed."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.paths: list[str] = []
        patch.setattr(contents, "hash_file", self)

    def __call__(self, path: str) -> str:
        self.paths.append(path)
        return hashlib.sha256(Path(path).read_bytes()).hexdigest() if Path(path).is_file() else ABSENT


def test_a_file_that_changes_within_one_tick_while_it_is_read_is_read_again(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, read, tick = tmp_path / "a.bin", contents.hash_file, time.time_ns()
    path.write_bytes(b"old")

    def slow(name: str) -> str:
        digest = read(name)
        path.write_bytes(b"new")
        time.sleep(0.11)
        return digest

    monkeypatch.setattr(contents, "_FINE_CLOCK", 100_000_000)
    monkeypatch.setattr(contents, "stamp", lambda _: (3, tick, tick, 1))
    monkeypatch.setattr(contents, "hash_file", slow)
    hash_files([str(path)])
    monkeypatch.setattr(contents, "hash_file", read)
    assert hash_files([str(path)]) == truth([str(path)])


def test_files_are_read_once(cache: Path, files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Opened(monkeypatch)
    assert hash_files(files) == truth(files)
    assert sorted(opened.paths) == files
    opened.paths.clear()
    assert hash_files(files[::-1]) == truth(files)[::-1]
    assert opened.paths == []


def test_distrust_reads_every_file_once_more(cache: Path, files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    hash_files(files)
    opened = Opened(monkeypatch)
    for _ in range(2):
        contents.distrust()
        for some in (files[:3], files, files[1:]):
            assert hash_files(some) == truth(some)
        assert sorted(opened.paths) == files
        opened.paths.clear()


def test_a_replaced_file_is_noticed_whatever_its_times_say(cache: Path, files: list[str]) -> None:
    hash_files(files)
    old = os.stat(files[7])
    Path(files[7]).write_bytes(b"x" * old.st_size)
    os.utime(files[7], ns=(old.st_atime_ns, old.st_mtime_ns))  # as cp -p and rsync -t do
    new = os.stat(files[7])
    assert (new.st_size, new.st_mtime_ns) == (old.st_size, old.st_mtime_ns)
    assert hash_files(files) == truth(files)
    Path(files[3]).replace(files[4])  # another inode under the name
    assert hash_files(files)[4] == truth(files[4:5])[0]
    assert hash_files(files)[3] == ABSENT


def test_a_file_that_has_just_been_written_is_not_remembered(
    cache: Path, files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_FINE_CLOCK", "_COARSE_CLOCK"):
        monkeypatch.setattr(contents, name, 3600 * 10**9)
    opened = Opened(monkeypatch)
    assert hash_files(files[:2]) == hash_files(files[:2]) == truth(files[:2])
    assert len(opened.paths) == 4


def test_a_file_that_changes_while_it_is_read_is_not_remembered(
    cache: Path, files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def written_meanwhile(path: str) -> str:
        digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        Path(path).write_bytes(b"another")
        return digest

    monkeypatch.setattr(contents, "hash_file", written_meanwhile)
    hash_files(files[:1])
    monkeypatch.undo()
    monkeypatch.setenv("TRAJ_OOD_DATA", str(cache))
    assert hash_files(files[:1]) == truth(files[:1])


def test_what_is_no_file_is_absent(cache: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").touch()
    paths = [str(tmp_path / name) for name in ("pipe", "nothing", "", "empty")]
    assert hash_files([*paths, "a\0b"]) == (ABSENT, ABSENT, ABSENT, hashlib.sha256().hexdigest(), ABSENT)
    assert hash_files([]) == ()


@pytest.mark.parametrize("damage", ["rubbish", "short", "folder", "unwritable", "row"])
def test_a_store_that_is_of_no_use_costs_time_alone(
    cache: Path, files: list[str], damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hash_files(files)
    store = cache / FILE_NAME
    whole = store.read_bytes()
    if damage == "folder":
        store.unlink()
        store.mkdir()
    elif damage == "unwritable":
        (cache / "file").touch()
        monkeypatch.setenv("TRAJ_OOD_DATA", str(cache / "file"))
    elif damage == "row":  # the digest of a file, a bit of which has flipped on the disk
        place = whole.index(bytes.fromhex(truth(files[5:6])[0]))
        store.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    else:
        store.write_bytes(b"rubbish" * 900 if damage == "rubbish" else whole[:5000])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert hash_files(files) == truth(files)
        opened = Opened(monkeypatch)
        assert hash_files(files) == truth(files)
        assert opened.paths == []  # this process still remembers
    assert [str(w.message).count("$TRAJ_OOD_DATA") for w in caught] == ([] if damage == "row" else [1])


def test_processes_share_the_store(cache: Path, files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import sys; from traj_ood.data import contents; contents._FINE_CLOCK = contents._COARSE_CLOCK = -1; "
        "contents._PER_COMMIT = 7; print(*contents.hash_files(sys.argv[1:]))"
    )
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code, *files], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    answers = [process.communicate(timeout=300) for process in running]
    assert [tuple(out.split()) for out, _ in answers] == [truth(files)] * 2
    assert [err for _, err in answers] == ["", ""]
    opened = Opened(monkeypatch)
    assert hash_files(files) == truth(files)
    assert opened.paths == []
