"""Streams of images: what is walked, read and refused, in order and bounded memory; files are whole or absent."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
import resource
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from PIL import Image
from torch import Tensor

from traj_ood.autoencoders import CallableAutoencoder
from traj_ood.data import read_folder, read_image_list
from traj_ood.data.decoding import AS_STORED, open_image
from traj_ood.detector import Detector, Judgement
from traj_ood.dynamics.trajectory import Status
from traj_ood.errors import TrajOODError
from traj_ood.stream import (
    COLUMNS,
    Entry,
    Row,
    Tally,
    open_table,
    read_list,
    read_paths,
    score_rows,
    walk,
    write_scores,
)
from traj_ood.text import unquote_formula

pytestmark = pytest.mark.filterwarnings("ignore:detector with .* unhealthy attractors")
STRANGE = [
    "a,b.png",
    'quo"te.png',
    "new\nline.png",
    "re\rturn.png",
    "both\r\n.png",
    " space .png",
    "ü€.png",
    "\udcff\udc80.png",
]


def _model() -> CallableAutoencoder:
    """z = tanh(x W), D(z) = 0.9 z Wᵀ: quick, and its f contracts."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.linalg.qr(torch.randn(64, 6, generator=draw)).Q
    return CallableAutoencoder(
        lambda x: torch.tanh(x.flatten(1) @ weight),
        lambda z: (0.9 * z @ weight.T).reshape(-1, 1, 8, 8),
        (1, 8, 8),
        chunk=6,
    )


def _images(count: int, seed: int) -> Tensor:
    """Of one brightness each, with some noise, as ``tiny.write_images`` makes them."""
    draw = torch.Generator().manual_seed(seed)
    return torch.rand(count, 1, 1, 1, generator=draw) * 0.7 + torch.rand(count, 1, 8, 8, generator=draw) * 0.3


def make(scorer: str = "field", calibration: int | None = 2) -> Detector:
    """A detector that calls about half of the images OOD; ``calibration`` is a seed, None leaves it out."""
    detector = Detector.fit(_model(), _images(40, 1), scorer, max_steps=6)
    return detector if calibration is None else detector.calibrate(_images(20, calibration), tpr=0.5)


@pytest.fixture(scope="module")
def judge() -> Detector:
    return make()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """23 images; number 5 is empty and number 11 is cut off."""
    tiny.write_images(tmp_path / "images", 23, seed=0)
    (tmp_path / "images" / "005.png").write_bytes(b"")
    whole = (tmp_path / "images" / "011.png").read_bytes()
    (tmp_path / "images" / "011.png").write_bytes(whole[:60])
    return tmp_path / "images"


def rows_of(judge: Any, entries: Any, **options: Any) -> list[Row]:
    return list(chain.from_iterable(score_rows(judge, entries, **options)))


def write(judge: Any, entries: Any, path: Path, **options: Any) -> Any:
    keys = {"resume", "overwrite"} & options.keys()
    with open_table(path, **{k: options[k] for k in keys}) as table:
        return write_scores(judge, entries, table, batch_size=4, resume=options.get("resume", False))


def paths(entries: Any) -> list[str]:
    return [entry.path for entry in entries]


# ---------------------------------------------------------------------------------------------- where images come from


def test_a_walk_is_in_the_order_of_read_folder_and_passes_hidden_files(tmp_path: Path) -> None:
    names = [
        "b/2.png",
        "b/10.png",
        "b.png",
        "b-c/1.JPG",
        "a/x/y.gif",
        "a.txt",
        ".hidden.png",
        ".git/1.png",
        "a/._1.png",
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    found = paths(walk(str(tmp_path)))
    assert found == [str(tmp_path / path) for path in read_folder(tmp_path).paths]
    assert found == [str(tmp_path / n) for n in ("a/x/y.gif", "b-c/1.JPG", "b.png", "b/10.png", "b/2.png")]


def test_a_walk_is_lazy(tmp_path: Path) -> None:
    for name in ("a/1.png", "b/2.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    walking = walk(str(tmp_path))
    assert next(walking).path.endswith("a/1.png")
    (tmp_path / "b" / "3.png").touch()  # not looked at yet
    assert [Path(p).name for p in paths(walking)] == ["2.png", "3.png"]


def test_links_out_of_a_folder_are_refused_unless_allowed(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    for place in (inside / "real", outside):
        place.mkdir(parents=True)
        (place / "1.png").touch()
    (inside / "a-file.png").symlink_to(outside / "1.png")
    (inside / "b-folder").symlink_to(outside)
    (inside / "c-text.txt").symlink_to(outside / "1.png")
    (inside / "d-same.png").symlink_to(inside / "real" / "1.png")
    (inside / "e-loop").symlink_to(inside)
    (inside / "f-gone.png").symlink_to(inside / "nothing.png")

    found = {Path(e.path).relative_to(inside).as_posix(): e.error for e in walk(str(inside))}
    assert list(found) == ["a-file.png", "b-folder", "d-same.png", "f-gone.png", "real/1.png"]
    for name in ("a-file.png", "b-folder"):
        assert found.pop(name) == f"the link leads out of {inside}; allow that with --follow-links"
    assert set(found.values()) == {""}

    allowed = [Path(e.path).relative_to(inside).as_posix() for e in walk(str(inside), follow_links=True) if not e.error]
    assert allowed == ["a-file.png", "b-folder/1.png", "d-same.png", "f-gone.png", "real/1.png"]
    (tmp_path / "link").symlink_to(inside)  # what the user names may be a link itself
    assert len(list(walk(str(tmp_path / "link")))) == 5


def test_a_folder_without_images_or_rights_is_an_entry_with_an_error(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    (entry,) = walk(str(tmp_path))
    assert entry.path == str(tmp_path)
    assert entry.error.startswith("expected a folder with images (.avif ")
    (gone,) = (e for e in walk(str(tmp_path / "gone")) if "listed" in e.error)
    assert gone == Entry(
        str(tmp_path / "gone"), "the folder cannot be listed (No such file or directory); fix its permissions"
    )


def test_a_deep_tree_is_no_recursion(tmp_path: Path) -> None:
    place = tmp_path
    for _ in range(400):  # names this short stay below the system's longest path
        place = place / "d"
    place.mkdir(parents=True)
    (place / "1.png").touch()
    depth = sys.getrecursionlimit()
    sys.setrecursionlimit(300)
    try:
        found = paths(walk(str(tmp_path)))
    finally:
        sys.setrecursionlimit(depth)
    assert found == [str(place / "1.png")]


def test_paths_from_standard_input() -> None:
    lines = b"a b.png\n\nc.png\r\n\xff.png\nlast.png"
    assert paths(read_paths(io.BytesIO(lines))) == ["a b.png", "c.png", "\udcff.png", "last.png"]
    assert paths(read_paths(io.BytesIO(b"a\nb\r\0\0c"), null=True)) == ["a\nb\r", "c"]
    assert paths(read_paths(io.BytesIO(b""))) == []
    with pytest.raises(TrajOODError, match=r"standard input: expected lines of text, got a NUL byte; .* need --null"):
        list(read_paths(io.BytesIO(b"a\0b\0")))
    with pytest.raises(
        TrajOODError, match=r"expected paths separated by NUL bytes, got .* bytes without one; check --null"
    ):
        list(read_paths(io.BytesIO(b"a\n" * 2**20), null=True))


def test_paths_are_handed_out_before_the_stream_ends() -> None:
    reader, writer = os.pipe()
    with open(reader, "rb", buffering=0) as stream:
        os.write(writer, b"a\nb\nc")
        entries = read_paths(stream)
        assert [next(entries).path, next(entries).path] == ["a", "b"]
        os.close(writer)
        assert paths(entries) == ["c"]


def test_a_pipe_that_does_not_block_is_read_to_its_end() -> None:
    """As standard input is that it shares with Node.js or a shell: nothing to read is not the end."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    with open(reader, "rb", buffering=0) as stream:
        os.write(writer, b"a\nb")
        entries = read_paths(stream)
        assert next(entries).path == "a"
        later = threading.Timer(0.2, lambda: (os.write(writer, b"c\nd"), os.close(writer)))
        later.start()
        assert paths(entries) == ["bc", "d"]
        later.join()


def test_a_list_may_not_leave_its_root(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "1.png").touch()
    (tmp_path / "secret.png").touch()
    (tmp_path / "root" / "link.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "root" / "up").symlink_to(tmp_path)
    lines = [
        "1.png 3",
        "",
        "./x/../1.png {'a': 1}",
        "../secret.png 0",
        f"{tmp_path}/secret.png",
        "link.png",
        "up/secret.png",
    ]
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbf" + "\n".join(lines).encode())
    entries = list(read_list(tmp_path / "list.txt", tmp_path / "root"))
    good = str(tmp_path / "root" / "1.png")
    assert entries[:2] == [Entry(good), Entry(good)]
    (tmp_path / "null.txt").write_bytes(b"1.png\0")
    with pytest.raises(TrajOODError, match=r"null\.txt: expected lines of text, got a NUL byte; give a text file, one"):
        list(read_list(tmp_path / "null.txt", tmp_path / "root"))
    assert [e.error for e in entries[2:]] == [
        f"line 4 of {tmp_path / 'list.txt'}: '../secret.png' leaves the image root through '..'; keep every path below "
        "the root",
        f"line 5 of {tmp_path / 'list.txt'}: expected a path relative to the image root, got '{tmp_path}/secret.png'; "
        "make it relative",
        *(
            f"line {n} of {tmp_path / 'list.txt'}: a link on the way leads out of {tmp_path / 'root'}; allow that with "
            "--follow-links"
            for n in (6, 7)
        ),
    ]
    free = list(read_list(tmp_path / "list.txt", tmp_path / "root", follow_links=True))
    assert [bool(e.error) for e in free] == [False, False, True, True, False, False]


def test_a_list_is_read_by_the_rules_of_read_image_list(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("a/1.jpg 3\n\n./a/2.jpg {'label': 1}\r\nb.jpg\nred  dog.PNG 3\r\n   \n")
    whole = read_image_list(tmp_path / "list.txt", tmp_path)
    assert paths(read_list(tmp_path / "list.txt", tmp_path)) == [str(tmp_path / p) for p in whole.paths]
    with pytest.raises(TrajOODError, match=r"gone\.txt: cannot be read \(No such file"):
        list(read_list(tmp_path / "gone.txt", tmp_path))


# ---------------------------------------------------------------------------------------------- which images are read


def frames(count: int) -> list[Image.Image]:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    return [Image.fromarray(p) for p in pixels]


@pytest.mark.parametrize("name", ["moving.gif", "moving.png", "moving.webp", "pages.tif"])
def test_several_frames_are_refused_by_name_and_one_is_not(tmp_path: Path, name: str) -> None:
    first, *others = frames(3)
    first.save(tmp_path / name, save_all=True, append_images=others)
    with pytest.raises(
        TrajOODError, match=r"expected a single image, got several frames or pages \((GIF|PNG|WEBP|TIFF)\)"
    ) as error:
        open_image(tmp_path / name)
    assert str(error.value).startswith(f"{tmp_path / name}: ")
    first.save(tmp_path / name, save_all=True)
    assert open_image(tmp_path / name).size == (8, 8)


def test_a_photograph_with_a_hidden_second_picture_is_the_photograph(tmp_path: Path) -> None:
    first, second = frames(2)
    first.save(tmp_path / "phone.jpg", "MPO", save_all=True, append_images=[second])
    first.save(tmp_path / "plain.jpg")
    with Image.open(tmp_path / "phone.jpg") as image:
        assert image.format == "MPO"
        expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(np.asarray(open_image(tmp_path / "phone.jpg")), expected)


def test_exif_orientation_is_not_applied(tmp_path: Path) -> None:
    """Documented, and the same for fitting and scoring: benchmarks read their images so."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("L", (8, 4)).save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg").size == (8, 4)


def test_files_that_are_programs_pipes_or_folders_are_not_opened(tmp_path: Path) -> None:
    (tmp_path / "program.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n")
    os.mkfifo(tmp_path / "pipe.png")  # opening it would wait for ever
    (tmp_path / "folder.png").mkdir()
    for name, words in {
        "program.png": "found PostScript: convert it",
        "pipe.png": "expected an image file, found a pipe or device; give regular files",
        "folder.png": "expected an image file, found a folder; give regular files",
    }.items():
        with pytest.raises(TrajOODError, match=words):
            open_image(tmp_path / name)
    with pytest.raises(TrajOODError, match="cannot be decoded"):
        open_image(tmp_path / ("x" * 300 + ".png"))  # longer than a name can be


# ---------------------------------------------------------------------------------------------- rows


def test_rows_come_in_order_and_bad_images_have_theirs(judge: Detector, folder: Path) -> None:
    rows = rows_of(judge, walk(str(folder)), batch_size=4, workers=3)
    assert paths(rows) == [str(folder / f"{i:03d}.png") for i in range(23)]
    failed = {i for i, row in enumerate(rows) if row.status == "error"}
    assert failed == {5, 11}
    assert rows[5].error == "expected an image, found an empty file (0 bytes); restore it or remove it"
    assert "cannot be decoded" in rows[11].error
    assert (rows[5].score, rows[5].p_value, rows[5].decision, rows[5].steps) == (None, None, None, None)
    good = [row for i, row in enumerate(rows) if i not in failed]
    expected = judge.judge(torch.stack([judge.autoencoder.transform(open_image(Path(row.path))) for row in good]))
    assert [row.score for row in good] == pytest.approx(expected.scores.tolist(), rel=1e-9)
    assert {row.decision for row in good} <= {"id", "ood"}
    assert all((row.score > judge.calibration.threshold) == (row.decision == "ood") for row in good)
    assert {row.status for row in good} == {"ok"}
    assert {row.error for row in good} == {None}
    assert len({row.score for row in good}) == 21  # images that are told apart
    assert len({row.decision for row in good}) == 2


@pytest.mark.parametrize("scorer", ["field", "trajectory", "mahalanobis"])
def test_rows_do_not_depend_on_batch_size_or_workers(folder: Path, scorer: str) -> None:
    judge = make(scorer)
    one, *others = (rows_of(judge, walk(str(folder)), batch_size=b, workers=w) for b, w in ((1, 1), (7, 3), (64, 2)))
    for rows in others:
        assert [row.score for row in rows] == [row.score and pytest.approx(row.score, rel=1e-9) for row in one]
        assert [replace(row, score=None) for row in rows] == [replace(row, score=None) for row in one]


def test_an_image_that_a_batch_is_refused_for_is_found(judge: Detector, folder: Path) -> None:
    plain = rows_of(judge, walk(str(folder)))
    middle = 1.000001 * float(np.median([row.score for row in plain if row.score is not None]))  # no score but nearby

    def strict_judge(images: Tensor, **options: Any) -> Any:
        judgement = judge.judge(images, **options)
        if bool((judgement.scores > middle).any()):
            raise TrajOODError("too odd:  \n take another")
        return judgement

    picky = SimpleNamespace(autoencoder=judge.autoencoder, reading=judge.reading, judge=strict_judge)
    strict = rows_of(picky, walk(str(folder)), batch_size=8)
    odd = [i for i, row in enumerate(strict) if row.error == "too odd: take another"]
    assert odd == [i for i, row in enumerate(plain) if row.score is not None and row.score > middle]
    assert len(odd) == 10
    for i in set(range(23)) - set(odd):
        assert strict[i].score == (plain[i].score and pytest.approx(plain[i].score, rel=1e-9))
        assert replace(strict[i], score=None) == replace(plain[i], score=None)


@pytest.mark.parametrize("status", [None, torch.tensor([Status.NON_FINITE, Status.CONVERGED])])
def test_scores_beyond_all_numbers_stay_above_every_threshold(
    judge: Detector, folder: Path, tmp_path: Path, status: Tensor | None
) -> None:
    steps = None if status is None else torch.tensor([0, 5])
    said = Judgement(
        torch.tensor([math.inf, 1.5]), torch.tensor([0.05, 0.5]), torch.tensor([True, False]), steps, status
    )
    known = SimpleNamespace(
        p_values=lambda scores: said.p_values[scores.isfinite().long()],  # type: ignore[index]
        decide=lambda scores: said.decisions[scores.isfinite().long()],  # type: ignore[index]
    )
    beyond = SimpleNamespace(
        autoencoder=judge.autoencoder, reading=judge.reading, judge=lambda images, **options: said, calibration=known
    )
    entries = [Entry(str(folder / "001.png")), Entry(str(folder / "002.png"))]
    for suffix in ("csv", "jsonl", "parquet"):
        tally, _ = write(beyond, entries, tmp_path / f"out.{suffix}")
        assert tally == Tally(count=2, failed=0, ood=1)
    for table in (
        pd.read_csv(tmp_path / "out.csv"),
        pd.read_parquet(tmp_path / "out.parquet"),
        pd.DataFrame(map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())),
    ):
        assert table["score"].astype(float).tolist() == [math.inf, 1.5]
        assert table["decision"].tolist() == ["ood", "id"]
        assert table["status"].tolist() == ["non_finite", "ok" if status is None else "converged"]
    for suffix in ("csv", "jsonl"):
        assert write(beyond, entries, tmp_path / f"out.{suffix}", resume=True)[1].count == 2
    lines = (tmp_path / "out.jsonl").read_text()
    assert json.loads(lines.splitlines()[0], parse_constant=lambda name: pytest.fail(name))["score"] == "Infinity"
    (tmp_path / "out.jsonl").write_text(lines.replace('"Infinity"', "1e999"))  # which parsers disagree on
    with pytest.raises(TrajOODError, match=r"row 1 is damaged \(the score 1e999 of an earlier version, now written as"):
        write(beyond, entries, tmp_path / "out.jsonl", resume=True)


def test_too_little_memory_is_told(judge: Detector, folder: Path) -> None:
    def fail(images: Tensor, **options: Any) -> Any:
        raise MemoryError

    def fail_in_torch(images: Tensor, **options: Any) -> Any:
        return torch.empty(2**60)

    parts = {"autoencoder": judge.autoencoder, "scorers": judge.scorers, "reading": judge.reading}
    for greed in (fail, fail_in_torch):
        greedy = SimpleNamespace(**parts, judge=greed)
        with pytest.raises(TrajOODError, match=r"out of memory while judging 1 images: give a smaller --batch-size"):
            rows_of(greedy, [Entry(str(folder / "001.png"))])

    def break_down(images: Tensor, **options: Any) -> Any:
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):  # which is nobody's input
        rows_of(SimpleNamespace(**parts, judge=break_down), [Entry(str(folder / "001.png"))])


def test_rows_without_calibration_or_iteration_leave_columns_empty(folder: Path) -> None:
    entries = [Entry(str(folder / "001.png"))]
    (plain,) = rows_of(make(calibration=None), entries)
    assert (plain.p_value, plain.decision) == (None, None)
    assert plain.steps == 1
    (static,) = rows_of(make("mahalanobis"), entries)
    assert (static.steps, static.status) == (None, "ok")


def test_a_transform_that_fails_is_a_row(judge: Detector, folder: Path) -> None:
    def transform(image: Image.Image) -> Tensor:
        raise ZeroDivisionError("odd\nimage")

    odd = SimpleNamespace(autoencoder=SimpleNamespace(transform=transform), reading=judge.reading, judge=judge.judge)
    (row,) = rows_of(odd, [Entry(str(folder / "001.png"))], batch_size=2)
    assert row.error == "the model's transform failed on 8 x 8 pixels: ZeroDivisionError('odd\\nimage')"


def test_reading_ahead_is_bounded_and_ends_with_its_reader(judge: Detector, folder: Path) -> None:
    taken = 0

    def entries() -> Iterator[Entry]:
        nonlocal taken
        while True:
            taken += 1
            yield Entry(str(folder / "001.png"))

    threads = threading.active_count()
    with closing(score_rows(judge, entries(), batch_size=4, workers=2)) as batches:
        for _ in range(3):
            next(batches)
            time.sleep(0.05)
            bound = taken
        assert bound <= 3 * 4 + (4 + 2) + 2
    deadline = time.monotonic() + tiny.PATIENCE
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.02)
    assert threading.active_count() <= threads


def test_a_slow_input_gets_its_rows_before_its_end(judge: Detector, folder: Path) -> None:
    more = threading.Event()

    def entries() -> Iterator[Entry]:
        yield Entry(str(folder / "001.png"))
        assert more.wait(tiny.PATIENCE)
        yield Entry(str(folder / "002.png"))

    batches = score_rows(judge, entries(), batch_size=50, linger=0.05)
    assert len(next(batches)) == 1
    more.set()
    assert len(next(batches)) == 1
    assert list(batches) == []


def test_an_input_that_breaks_ends_the_run_after_its_rows(judge: Detector, folder: Path) -> None:
    def entries() -> Iterator[Entry]:
        yield Entry(str(folder / "001.png"))
        raise TrajOODError("the list is gone")

    batches = score_rows(judge, entries(), batch_size=5)
    assert len(next(batches)) == 1
    with pytest.raises(TrajOODError, match="the list is gone"):
        next(batches)
    for options, words in (({"batch_size": 0}, "batch size"), ({"workers": 0}, "workers")):
        with pytest.raises(TrajOODError, match=f"{words}: expected at least 1, got 0"):
            rows_of(judge, [], **options)


# ---------------------------------------------------------------------------------------------- formats


def test_strange_names_round_trip_in_every_format(judge: Detector, tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    tiny.write_images(tmp_path, 1, seed=0)
    for name in STRANGE:
        (tmp_path / "s" / name).write_bytes((tmp_path / "000.png").read_bytes())
    expected = sorted(str(tmp_path / "s" / name) for name in STRANGE)
    for suffix in ("csv", "jsonl", "parquet"):
        tally, _ = write(judge, walk(str(tmp_path / "s")), tmp_path / f"out.{suffix}")
        assert (tally.count, tally.failed) == (len(STRANGE), 0)
    with open(tmp_path / "out.csv", encoding="utf-8", errors="surrogateescape", newline="") as file:
        assert [row["path"] for row in csv.DictReader(file)] == expected
    lines = (tmp_path / "out.jsonl").read_text(encoding="ascii").splitlines()
    assert [json.loads(line)["path"] for line in lines] == expected
    table = pd.read_parquet(tmp_path / "out.parquet")
    names = [
        os.fsdecode(b) if isinstance(b, bytes) else p for p, b in zip(table["path"], table["path_bytes"], strict=True)
    ]
    assert names == expected
    assert table["path_bytes"].notna().sum() == 1


@pytest.mark.parametrize("quoted", [True, False])
def test_texts_that_a_spreadsheet_would_run_are_quoted_and_resumed(
    judge: Detector, tmp_path: Path, quoted: bool
) -> None:
    names = ["=1+1.png", "'=1.png", "-2.png", "@x.png", "+.png", "\t.png", "'a.png", "a=.png", "＝1.png"]
    rows = [Row(name, -1.5, 0.25, "ood", 3, "converged") for name in names] + [Row("gone.png", error="= no file")]
    entries, out = [Entry(row.path) for row in rows], tmp_path / "out.csv"
    with open_table(out, quote_formulas=quoted) as table:
        table.write(rows)
    with open(tmp_path / "out.csv.part", encoding="utf-8", newline="") as file:
        cells = list(csv.DictReader(file))
    assert [cell["path"] for cell in cells[:-1]] == (
        ["'=1+1.png", "''=1.png", "'-2.png", "'@x.png", "'+.png", "'\t.png", "'a.png", "a=.png", "'＝1.png"]
        if quoted
        else names
    )
    assert [unquote_formula(cell["path"]) if quoted else cell["path"] for cell in cells[:-1]] == names
    assert {cell["score"] for cell in cells} == {"-1.5", ""}  # a number stays one
    known = SimpleNamespace(p_values=lambda scores: torch.tensor([0.25]), decide=lambda scores: torch.tensor([True]))
    detector: Any = SimpleNamespace(calibration=known, reading=AS_STORED)
    with open_table(out, resume=True, quote_formulas=quoted) as table:
        assert table.match(iter(entries), detector).sample == tuple(zip(entries, rows, strict=True))
    words = r"row 1 is of \"'=1\+1.png\"" if quoted else r"row 1 is damaged \(.* not quoted: add --no-quote-formulas\)"
    with open_table(out, resume=True, quote_formulas=not quoted) as table, pytest.raises(TrajOODError, match=words):
        table.match(iter(entries), detector)


def test_parquet_csv_and_json_lines_say_the_same(judge: Detector, folder: Path, tmp_path: Path) -> None:
    for suffix in ("csv", "jsonl", "parquet"):
        write(judge, walk(str(folder)), tmp_path / f"out.{suffix}")
    comma = pd.read_csv(tmp_path / "out.csv", float_precision="round_trip")
    parquet = pd.read_parquet(tmp_path / "out.parquet").drop(columns="path_bytes")
    lines = pd.read_json(tmp_path / "out.jsonl", lines=True, precise_float=True)
    assert tuple(comma.columns) == tuple(parquet.columns) == tuple(lines.columns) == COLUMNS
    pd.testing.assert_frame_equal(parquet, comma, check_dtype=False, check_exact=True)
    pd.testing.assert_frame_equal(lines, comma, check_dtype=False, check_exact=True)
    assert comma["error"].notna().sum() == 2
    assert comma["score"].dtype == parquet["score"].dtype == np.float64


def test_parquet_has_row_groups_of_bounded_size(
    judge: Detector, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow.parquet as pq

    monkeypatch.setattr("traj_ood.stream.parquet._ROW_GROUP", 10)
    write(judge, walk(str(folder)), tmp_path / "out.parquet")
    file = pq.ParquetFile(tmp_path / "out.parquet")
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [10, 10, 3]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images", "out.parquet"]


def test_no_images_make_a_table_without_rows(judge: Detector, tmp_path: Path) -> None:
    for suffix in ("csv", "jsonl", "parquet"):
        assert write(judge, [], tmp_path / f"out.{suffix}") == (Tally(), Tally())
    assert (tmp_path / "out.csv").read_text() == ",".join(COLUMNS) + "\n"
    assert (tmp_path / "out.jsonl").read_bytes() == b""
    assert len(pd.read_parquet(tmp_path / "out.parquet")) == 0


# ---------------------------------------------------------------------------------------------- whole or absent


def test_a_file_has_its_name_when_it_is_whole(judge: Detector, folder: Path, tmp_path: Path) -> None:
    out, part = tmp_path / "new" / "out.csv", tmp_path / "new" / "out.csv.part"
    with open_table(out) as table:
        table.write([Row("a", 1.0, status="ok")])
        assert (
            part.read_bytes() == (",".join(COLUMNS) + "\na,1.0,,,,ok,,,uncalibrated\n").encode()
        )  # a reader sees it at once
        assert not out.exists()
    assert part.exists()
    with pytest.raises(
        TrajOODError, match=r"out\.csv\.part: left by a run that did not finish; .* --resume, .* --overwrite"
    ):
        open_table(out)
    write(judge, walk(str(folder)), out, overwrite=True)
    assert not part.exists()
    before = out.read_bytes()
    with pytest.raises(TrajOODError, match=r"out\.csv: exists already; choose another --out, or .* --overwrite"):
        open_table(out)
    assert (out.read_bytes(), part.exists()) == (before, False)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_an_old_file_stays_until_the_new_one_is_whole(tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"out.{suffix}"
    out.write_bytes(b"old")
    with open_table(out, overwrite=True) as table:
        table.write([Row("a", 1.0)])
        assert out.read_bytes() == b"old"
    assert out.read_bytes() == b"old"
    with open_table(out, overwrite=True) as table:
        table.finish()
    assert out.read_bytes() != b"old"
    assert [p.name for p in tmp_path.iterdir()] == [out.name]


def test_a_run_that_fails_before_its_first_row_leaves_nothing(tmp_path: Path) -> None:
    for suffix in ("csv", "parquet"):
        with pytest.raises(ZeroDivisionError), open_table(tmp_path / f"out.{suffix}"):
            raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_written_by_one_process_at_a_time(tmp_path: Path) -> None:
    with open_table(tmp_path / "out.csv") as table:
        table.write([Row("a", 1.0)])
        for options in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(TrajOODError, match=r"out\.csv\.part: another process is writing it; wait for it"):
                open_table(tmp_path / "out.csv", **options)
        table.finish()
    assert (tmp_path / "out.csv").read_bytes().endswith(b"a,1.0,,,,error,,,uncalibrated\n")


def test_impossible_tables_are_refused(tmp_path: Path) -> None:
    for options, words in (
        ({"path": tmp_path / "out.txt"}, r"out\.txt: expected a name that ends in one of \.csv, \.jsonl, \.parquet"),
        ({"path": tmp_path / "out.csv", "format": "cvs"}, "unknown format 'cvs': did you mean 'csv'"),
        ({"path": tmp_path / "out.csv", "resume": True, "overwrite": True}, "give one of them"),
        ({"path": None, "format": "parquet"}, "Parquet: expected a file to write, got standard output"),
        ({"path": None, "resume": True}, "--resume: expected a file to write, got standard output"),
        ({"path": tmp_path, "format": "csv"}, "expected a file to write, found a folder or device"),
        ({"path": Path("/dev/full"), "format": "csv"}, "expected a file to write, found a folder or device"),
    ):
        with pytest.raises(TrajOODError, match=words):
            open_table(**options)  # type: ignore[arg-type]
    with open_table(tmp_path / "rows.txt", "jsonl") as table:
        table.finish()
    assert list(tmp_path.iterdir()) == [tmp_path / "rows.txt"]


# ---------------------------------------------------------------------------------------------- resuming


def assert_same_rows(found: bytes, expected: bytes, suffix: str) -> None:
    """Every cell, scores to what another split into batches may move."""
    tables = []
    for content in (found, expected):
        lines = content.decode("utf-8", "surrogateescape").splitlines()
        tables.append(list(csv.DictReader(lines)) if suffix == "csv" else [json.loads(line) for line in lines])
    assert len(tables[0]) == len(tables[1])
    for row, other in zip(*tables, strict=True):
        scores = [float(r.pop("score") or "nan") for r in (row, other)]
        assert row == other
        assert scores[0] == pytest.approx(scores[1], rel=1e-9, abs=0, nan_ok=True)


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_resuming_after_any_byte_gives_the_same_file(judge: Detector, tmp_path: Path, suffix: str) -> None:
    (tmp_path / "s").mkdir()
    tiny.write_images(tmp_path, 1, seed=0)
    for name in [*STRANGE, "ok1.png", "ok2.png"]:
        (tmp_path / "s" / name).write_bytes((tmp_path / "000.png").read_bytes())
    (tmp_path / "s" / "ok1.png").write_bytes(b"")
    out, part = tmp_path / f"out.{suffix}", tmp_path / f"out.{suffix}.part"
    write(judge, walk(str(tmp_path / "s")), out)
    whole = out.read_bytes()
    out.unlink()
    for cut in chain(range(0, len(whole), 67), [len(whole)]):
        part.write_bytes(whole[:cut])
        tally, earlier = write(judge, walk(str(tmp_path / "s")), out, resume=True)
        assert_same_rows(out.read_bytes(), whole, suffix)
        assert not part.exists()
        assert (tally.count, tally.failed) == (10, 1)
        assert earlier.count <= 10
        out.unlink()
    assert earlier == tally


def test_resuming_a_finished_file_checks_it_and_writes_nothing(judge: Detector, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    write(judge, walk(str(folder)), out, resume=True)  # nothing there yet: a first run
    whole = out.read_bytes()
    stamp = out.stat().st_mtime_ns
    tally, earlier = write(judge, walk(str(folder)), out, resume=True)
    assert (tally.count, tally.failed) == (23, 2)
    assert tally == earlier
    assert tally.ood == whole.count(b",ood,")
    assert out.stat().st_mtime_ns == stamp
    for entries, words in (
        (
            chain(walk(str(folder)), [Entry("more.png")]),
            "finished with 23 rows, but this input goes on with 'more.png'",
        ),
        ([Entry(str(folder / "000.png"))], r"row 2 is of '.*001\.png', where this input has its end"),
    ):
        with pytest.raises(TrajOODError, match=words):
            write(judge, entries, out, resume=True)
    out.write_bytes(whole[:-1])
    with pytest.raises(TrajOODError, match="finished with 22 rows, but it ends in a broken row"):
        write(judge, list(walk(str(folder)))[:22], out, resume=True)


def test_rows_of_another_input_detector_or_image_are_not_continued(
    judge: Detector, folder: Path, tmp_path: Path
) -> None:
    out, part = tmp_path / "out.csv", tmp_path / "out.csv.part"
    write(judge, walk(str(folder)), out)
    lines = out.read_bytes().split(b"\n")
    out.unlink()
    part.write_bytes(b"\n".join(lines[:9]) + b"\nbroken off")
    left = part.read_bytes()

    def refused(words: str, entries: Sequence[Entry] | None = None, detector: Any = judge) -> None:
        with pytest.raises(TrajOODError, match=words) as error:
            write(detector, walk(str(folder)) if entries is None else entries, out, resume=True)
        assert "\n" not in str(error.value)
        assert not out.exists()

    refused(
        r"row 1 is of '.*000\.png', where this input has 'other\.png'; resume with the same input", [Entry("other.png")]
    )
    assert part.read_bytes() == left
    refused(
        r"row 1: expected the p-value and decision that belong to its score, found others; resume with the calibration",
        detector=make(calibration=3),
    )
    refused("row 1: expected the p-value and decision", detector=make(calibration=None))
    refused(r"row 1: expected the p-value|expected this detector.s result on", detector=make("mahalanobis"))
    image = (folder / "003.png").read_bytes()
    (folder / "003.png").write_bytes((folder / "004.png").read_bytes())
    refused(r"row 4: '.*003\.png' has changed since it was judged, or was .*; start again with --overwrite")
    (folder / "003.png").write_bytes(image)
    write(judge, walk(str(folder)), out, resume=True)
    assert out.read_bytes().split(b"\n") == lines


class Rounding:
    """A detector whose scores are off by a factor, as those of a GPU may be by rounding when batches differ."""

    def __init__(self, detector: Detector, factor: float) -> None:
        self.autoencoder, self.calibration = detector.autoencoder, detector.calibration
        self.reading, self._detector, self._factor = detector.reading, detector, factor

    def judge(self, images: Tensor, **options: Any) -> Any:
        said = self._detector.judge(images, **options)
        known = self.calibration
        assert known is not None
        scores = said.scores * self._factor
        return replace(said, scores=scores, p_values=known.p_values(scores), decisions=known.decide(scores))


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_rows_that_differ_by_rounding_are_continued(judge: Detector, folder: Path, tmp_path: Path, suffix: str) -> None:
    out, part = tmp_path / f"out.{suffix}", tmp_path / f"out.{suffix}.part"
    write(judge, walk(str(folder)), out)
    whole = out.read_bytes()
    out.rename(part)
    write(Rounding(judge, 1 + 1e-9), walk(str(folder)), out, resume=True)
    assert out.read_bytes() == whole
    out.rename(part)
    with pytest.raises(TrajOODError, match=r"expected this detector.s result on '.*000\.png'"):
        write(Rounding(judge, 1 + 1e-5), walk(str(folder)), out, resume=True)
    assert part.read_bytes() == whole


def test_rows_of_another_calibration_are_found_wherever_they_differ(judge: Detector, tmp_path: Path) -> None:
    """The first 64 images look stranger than all others: any calibration says the same of them."""
    tiny.write_images(tmp_path / "t", 10, seed=1)
    (tmp_path / "s").mkdir()
    other, draw, number = make(calibration=3), np.random.default_rng(0), 0
    while number < 70:
        image = Image.fromarray((255 * draw.integers(0, 2, (8, 8))).astype(np.uint8))
        if all(float(one.p_value([image])) == 1 / 21 for one in (judge, other)):
            image.save(tmp_path / "s" / f"{number:03d}.png")
            number += 1
    out = tmp_path / "out.csv"
    entries = [*walk(str(tmp_path / "s")), *walk(str(tmp_path / "t"))]
    write(judge, entries, out)
    whole = out.read_bytes()
    out.rename(tmp_path / "out.csv.part")
    with pytest.raises(TrajOODError, match=r"out\.csv\.part: row 7\d: expected the p-value and decision that"):
        write(other, entries, out, resume=True)
    assert (tmp_path / "out.csv.part").read_bytes() == whole


@pytest.mark.parametrize("broken", [0, 70])
def test_rows_of_another_detector_are_found_behind_errors_and_behind_a_start_that_agrees(
    folder: Path, tmp_path: Path, broken: int
) -> None:
    """Two detectors that say the same of dark images; one calls every other image stranger than it is."""
    judge = make(calibration=None)
    (tmp_path / "s").mkdir()
    pictures = [(folder / "000.png").read_bytes() if i < 75 else (folder / "001.png").read_bytes() for i in range(150)]
    for i, content in enumerate(pictures):
        (tmp_path / "s" / f"{i:03d}.png").write_bytes(b"" if i < broken else content)

    def elsewhere(images: Any, **options: Any) -> Judgement:
        said, known = judge.judge(images, **options), judge.autoencoder.transform(open_image(folder / "000.png"))
        same = (images.images == known).flatten(1).all(dim=1)
        return replace(said, scores=torch.where(same, said.scores, said.scores + 1))

    other = SimpleNamespace(autoencoder=judge.autoencoder, judge=elsewhere, calibration=None, reading=judge.reading)
    out = tmp_path / "out.csv"
    write(judge, walk(str(tmp_path / "s")), out)
    out.rename(tmp_path / "out.csv.part")
    with pytest.raises(TrajOODError, match=r"expected this detector.s result on"):
        write(other, walk(str(tmp_path / "s")), out, resume=True)
    assert write(judge, walk(str(tmp_path / "s")), out, resume=True)[1] == Tally(150, broken, 0)


def test_the_unfinished_file_is_no_link_and_no_pipe(judge: Detector, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "out.csv.part").symlink_to(tmp_path / "victim")
    with pytest.raises(TrajOODError, match=r"expected a folder that can be written \(for out\.csv\.part\)"):
        write(judge, walk(str(folder)), tmp_path / "out.csv", overwrite=True)
    assert (tmp_path / "victim").read_text() == "mine"
    os.mkfifo(tmp_path / "pipe.csv.part")
    with pytest.raises(TrajOODError, match=r"pipe\.csv\.part: expected an unfinished file or nothing"):
        write(judge, walk(str(folder)), tmp_path / "pipe.csv", overwrite=True)


def test_damaged_rows_are_refused(judge: Detector, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    header = (",".join(COLUMNS) + "\n").encode()
    first = str(folder / "000.png").encode()
    for data, words in (
        (b"\0" * 300, "expected a table that starts with"),
        (b"my notes", "expected a table that starts with"),
        (header.replace(b"score", b"value"), "expected a table that starts with"),
        (header + first + b",1.0\n", r"row 1 is damaged \(2 columns\); start again with --overwrite"),
        (header + b'"' + first + b'"x,,,,,,,,\n', "row 1 is damaged"),
        (header + first + b",1.00,,,1,ok,,,uncalibrated\n", r"row 1 is damaged \(not as it was written\)"),
        (header + first + b",,,,1,ok,,,ok\n", "row 1 is damaged"),
        (header + first + b",1.0,0.5,ood,1,ok,,,ok\n", r"row 1 is damaged \(not as it was written\)"),
        (header + first + b",nan,,,1,ok,,,ok\n", "row 1 is damaged"),
        (header + first + b",one,,,1,ok,,,ok\n", "row 1 is damaged"),
        (header + b'"' + b"x\n" * 2**20, r"row 1 is damaged \(a row without an end\)"),
    ):
        out.with_name("out.csv.part").write_bytes(data)
        with pytest.raises(TrajOODError, match=words):
            write(judge, walk(str(folder)), out, resume=True)
    odd = json.dumps({**dict.fromkeys(COLUMNS), "path": str(folder / "000.png"), "score": "1", "status": "ok"})
    for data in (b"{}", b"[]", b"nonsense", b"\xff", b"1" * 2**21, b"[" * 10**5, odd.encode()):
        (tmp_path / "out.jsonl.part").write_bytes(data + b"\n")
        begins = data.startswith(b"{")
        words = "row 1 is damaged" if begins else "expected a table that starts with b'{'"
        with pytest.raises(TrajOODError, match=rf"out\.jsonl\.part: {words}"):
            write(judge, walk(str(folder)), tmp_path / "out.jsonl", resume=True)
    (tmp_path / "out.jsonl.part").write_bytes(b"PK")  # another program's, without an end of line
    with pytest.raises(TrajOODError, match="expected a table that starts with"):
        write(judge, walk(str(folder)), tmp_path / "out.jsonl", resume=True)


# ---------------------------------------------------------------------------------------------- a disk that is full


@contextmanager
def small_disk(size: int) -> Iterator[None]:
    """Files of this process stop growing at ``size`` bytes, as on a full disk.

    Only inside the block: pytest's own report may be a longer file by the time the test ends.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_keeps_earlier_rows(judge: Detector, folder: Path, tmp_path: Path) -> None:
    out, part = tmp_path / "out.csv", tmp_path / "out.csv.part"
    write(judge, walk(str(folder)), out)
    whole = out.read_bytes()
    out.unlink()
    with small_disk(len(whole) // 2), pytest.raises(TrajOODError) as error:
        write(judge, walk(str(folder)), out)
    assert str(error.value) == (
        f"{tmp_path}: expected a folder that can be written (for out.csv), got: File too large; rows before that are "
        "kept in out.csv.part: continue with --resume"
    )
    assert whole.startswith(part.read_bytes())
    assert part.stat().st_size == len(whole) // 2  # its last row is broken off
    assert not out.exists()
    write(judge, walk(str(folder)), out, resume=True)
    assert_same_rows(out.read_bytes(), whole, "csv")


def test_a_full_disk_leaves_no_half_parquet_and_all_rows(tmp_path: Path, capfd: Any) -> None:
    draws = np.random.default_rng(0)
    rows = [Row(f"{draws.random()}.png", float(draws.random()), status="ok") for _ in range(9000)]
    out, part = tmp_path / "out.parquet", tmp_path / "out.parquet.part"
    out.write_bytes(b"old")
    with open_table(out, overwrite=True) as table:
        table.write(rows)
        with small_disk(20_000), pytest.raises(TrajOODError, match=r"for out\.parquet\), got: .*; free space"):
            table.finish()
    assert sorted(tmp_path.iterdir()) == [out, part]
    assert out.read_bytes() == b"old"
    assert len(part.read_bytes().splitlines()) == 9000
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("finished", [False, True])
def test_parquet_is_resumed_from_its_lines(judge: Detector, folder: Path, tmp_path: Path, finished: bool) -> None:
    out, part = tmp_path / "out.parquet", tmp_path / "out.parquet.part"
    entries = list(walk(str(folder)))
    write(judge, entries, out)
    whole = pd.read_parquet(out)
    if not finished:
        with open_table(tmp_path / "lines.jsonl") as table:
            table.write(rows_of(judge, entries)[:7])
        (tmp_path / "lines.jsonl.part").rename(part)
        out.unlink()
    total, earlier = write(judge, entries, out, resume=True)
    assert (total.count, earlier.count) == (len(whole), len(whole) if finished else 7)
    pd.testing.assert_frame_equal(pd.read_parquet(out), whole, rtol=1e-9, atol=0)
    assert not part.exists()
    with pytest.raises(TrajOODError, match=r"out\.parquet: row 1 is of .*000.*, where this input has .*001"):
        write(judge, entries[1:], out, resume=True)


def test_another_parquet_table_is_not_resumed(judge: Detector, tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    for content in (pd.DataFrame({"a": [1]}), None):
        out.write_bytes(b"PAR1") if content is None else content.to_parquet(out)
        with pytest.raises(TrajOODError, match=r"out\.parquet: expected a Parquet table of `traj-ood score`, got: "):
            write(judge, [], out, resume=True)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(TrajOODError, match=r"expected a folder that can be written \(for out\.csv.*got: "):
        open_table(tmp_path / "file" / "out.csv")


# ---------------------------------------------------------------------------------------------- memory


def test_no_more_images_are_held_than_promised(judge: Detector, folder: Path, tmp_path: Path) -> None:
    held = most = 0
    lock = threading.Lock()

    def count(change: int) -> None:
        nonlocal held, most
        with lock:
            held += change
            most = max(most, held)

    def transform(image: Image.Image) -> Tensor:
        prepared = judge.autoencoder.transform(image)
        count(1)
        weakref.finalize(prepared, count, -1)
        return prepared

    watched = SimpleNamespace(
        autoencoder=SimpleNamespace(transform=transform), reading=judge.reading, judge=judge.judge
    )
    entries = (Entry(str(folder / "001.png")) for _ in range(600))
    with open_table(tmp_path / "out.csv") as table:
        tally, _ = write_scores(watched, entries, table, batch_size=16, workers=3)
    assert tally.count == 600
    assert 16 <= most <= 2 * 16 + 3 + 1


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
@pytest.mark.parametrize("finished", [False, True])
def test_a_file_that_changed_far_behind_the_first_rows_is_noticed(
    judge: Detector, tmp_path: Path, suffix: str, finished: bool
) -> None:
    """Among the first 64 rows, which are judged again, the score would tell; behind them only the bytes do."""
    tiny.write_images(tmp_path / "many", 70, seed=3)
    out, part, late = tmp_path / f"out.{suffix}", tmp_path / f"out.{suffix}.part", tmp_path / "many" / "068.png"
    write(judge, walk(str(tmp_path / "many")), out)
    whole, before, old = out.read_bytes(), late.read_bytes(), late.stat()
    if not finished:
        out.rename(part)
    late.write_bytes((tmp_path / "many" / "001.png").read_bytes())
    os.utime(late, ns=(old.st_atime_ns, old.st_mtime_ns))
    words = r"row 69: '.*068\.png' has changed since it was judged, or was .*; start again with --overwrite"
    with pytest.raises(TrajOODError, match=words):
        write(judge, walk(str(tmp_path / "many")), out, resume=True)
    assert (out if finished else part).read_bytes() == whole
    late.write_bytes(before)  # the same bytes again, whatever its time says
    assert write(judge, walk(str(tmp_path / "many")), out, resume=True)[1].count == 70
    assert out.read_bytes() == whole


def test_a_file_that_changes_while_it_is_judged_has_no_score(
    judge: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.write_images(tmp_path / "many", 2, seed=3)
    path = tmp_path / "many" / "001.png"
    whole = rows_of(judge, [Entry(str(path))])
    assert whole[0].content == hashlib.sha256(path.read_bytes()).hexdigest()[:16]

    def replaced(name: Path, reading: Any) -> Image.Image:
        image = open_image(name, reading)
        name.write_bytes((tmp_path / "many" / "000.png").read_bytes())
        return image

    monkeypatch.setattr("traj_ood.stream.rows.open_image", replaced)
    (row,) = rows_of(judge, [Entry(str(path))])
    assert (row.score, row.error) == (None, "the file changed while it was being read; judge it again")
