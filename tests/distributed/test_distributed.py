"""Over Ray: the rows of one process, whatever dies on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cluster as local
import numpy as np
import pandas as pd
import pytest
import tiny

from traj_ood import Detector, Normalised
from traj_ood.data import Reading
from traj_ood.distributed import engine
from traj_ood.distributed.engine import check_same_run
from traj_ood.distributed.losses import is_loss
from traj_ood.distributed.rows import KEY, ScoreActor, read_rows_of, written_keys
from traj_ood.errors import TrajOODError
from traj_ood.stream import COLUMNS, Entry, Row, judge_entries, walk


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A detector and 60 images, one of them broken."""
    place = tmp_path_factory.mktemp("place")
    model = tiny.conv()
    made = Detector.fit(model, Normalised(tiny.images(30, model.input_shape)), "field")
    made.calibrate(Normalised(tiny.images(40, model.input_shape, seed=9))).save(place / "d")
    tiny.write_images(place / "photos", 60, seed=1)
    (place / "photos" / "031.png").write_bytes(b"")
    return place


def expected(place: Path) -> list[Row]:
    detector = Detector.load(place / "d", device="cpu")
    return judge_entries(detector, walk(str(place / "photos")))


def assert_same(found: Any, rows: list[Row], names: tuple[str, ...] = COLUMNS) -> None:
    assert found[KEY].tolist() == list(range(len(rows)))
    for name in names:
        told = [None if pd.isna(value) else value for value in found[name].tolist()]
        own = [getattr(row, name) for row in rows]
        if name == "score":
            own = [value if value is None else pytest.approx(value, rel=1e-9) for value in own]
        assert told == own, name


def test_an_actor_makes_the_rows_of_one_process(place: Path) -> None:
    """What runs on the cluster, without the cluster."""
    entries = list(walk(str(place / "photos")))
    actor = ScoreActor(str(place / "d"), "cpu", 1)
    paths = np.array([entry.path for entry in entries], dtype=object)
    by_path = actor({"path": paths[:25], KEY: np.arange(25)})
    contents = np.array([Path(path).read_bytes() for path in paths[25:]], dtype=object)
    by_content = actor({"path": paths[25:], "content": contents, KEY: np.arange(25, 60)})
    parts = [{k: list(v) if k == KEY else v.to_pylist() for k, v in part.items()} for part in (by_path, by_content)]
    whole = pd.concat([pd.DataFrame(part) for part in parts], ignore_index=True)
    rows = expected(place)
    assert_same(whole, rows, ("path", "score", "p_value", "decision", "steps", "status"))  # texts name what was read
    assert whole["reason"][31].startswith("invalid: ")


def test_names_that_are_not_utf_8_reach_the_actor(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = os.fsdecode(bytes(tmp_path / "a") + b"\xff.png")
    Path(name).write_bytes((place / "photos" / "000.png").read_bytes())
    monkeypatch.setattr(engine, "_ray", lambda: SimpleNamespace(data=SimpleNamespace(from_arrow=list)))
    (table,) = engine.images_of([Entry(name)])
    columns = {key: np.array(table[key].to_pylist(), dtype=object) for key in table.column_names}
    made = ScoreActor(str(place / "d"), "cpu", 1)(columns)
    assert made["path"].to_pylist() == [f"{tmp_path}/a\\udcff.png"]
    assert made["score"].to_pylist() == [pytest.approx(expected(place)[0].score, rel=1e-9)]


def test_the_readings_of_the_command_are_those_of_one_process(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import traj_ood.distributed
    from traj_ood.cli.detect import score_on_ray

    detector = Detector.load(place / "d", device="cpu")
    detector.reading = Reading(exif=True)
    detector.save(tmp_path / "d")
    found: list[Any] = []
    monkeypatch.setattr(traj_ood.distributed, "score_to", lambda *_, reading, **__: found.append(reading))
    monkeypatch.setattr(traj_ood.distributed, "read_rows_of", lambda out: pd.DataFrame({"status": []}))
    rest = ("format", "overwrite", "compile", "list_path", "threads", "batch_size", "null", "follow_links")
    for exif, depth in ((None, None), (True, None), (False, None), (None, "12")):
        options = {**dict.fromkeys(rest), "out": tmp_path / "rows", "exif": exif, "bit_depth": depth, "stride": 1}
        score_on_ray(str(tmp_path / "d"), ("x.png",), {**options, "allow": (), "resume": False, "quiet": True})
    assert found == [None, None, {}, {"exif": True, "bit_depth": 12}]


def test_unfinished_files_are_removed_or_refused(tmp_path: Path) -> None:
    pd.DataFrame({KEY: [3, 1], "path": ["c", "a"]}).to_parquet(tmp_path / "0.parquet")
    pd.DataFrame({KEY: [1, 2], "path": ["a", "b"]}).to_parquet(tmp_path / "1.parquet")
    assert read_rows_of(tmp_path)["path"].tolist() == ["a", "b", "c"]
    (tmp_path / "2.parquet").write_bytes(b"PAR1")
    with pytest.raises(TrajOODError, match=r"2\.parquet: cannot be read as rows"):
        written_keys(tmp_path)
    assert written_keys(tmp_path, remove_broken=True).tolist() == [1, 2, 3]
    assert not (tmp_path / "2.parquet").exists()


def test_a_run_is_continued_with_its_own_detector_and_images_alone(place: Path, tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    for names, wrong in ((["a", "b"], ""), (["a", "b"], ""), (["b", "a"], "list of images"), (["a"], "list of images")):
        if not wrong:
            check_same_run(tmp_path / "rows", place / "d", names)
            continue
        with pytest.raises(TrajOODError, match=f"expected rows of this {wrong}, found another's: choose another --out"):
            check_same_run(tmp_path / "rows", place / "d", names)
    rows: Any = (tmp_path / "rows", place / "d", ["a", "b"])
    about = json.loads((tmp_path / "rows" / "_run.json").read_text())
    for old in (about, {key: about[key] for key in ("schema", "detector", "sources")}):  # also of earlier versions
        (tmp_path / "rows" / "_run.json").write_text(json.dumps(old))
        check_same_run(*rows)
        for how, words in (({"stride": 2}, "stride"), ({"reading": {"exif": True}}, r"reading of images \(--exif")):
            with pytest.raises(TrajOODError, match=f"expected rows of this {words}"):
                check_same_run(*rows, **how)
    again = Detector.load(place / "d", device="cpu")
    again.calibrate(Normalised(tiny.images(40, (1, 8, 8), seed=8))).save(tmp_path / "d")
    with pytest.raises(TrajOODError, match="expected rows of this detector"):
        check_same_run(tmp_path / "rows", tmp_path / "d", ["a", "b"])


def scoring_of(place: Path, out: Path, count: int) -> engine.Scoring:
    out.mkdir()
    given = [Entry(str(number)) for number in range(count)]
    return engine.Scoring(out, given, place / "d", engine.Workers(), engine.DEFAULT_OPENING, None)


class NodeError(Exception):
    """Stands for Ray's errors."""


@pytest.mark.filterwarnings("ignore:ray. lost a node")
def test_what_is_lost_is_scored_again_while_rows_are_gained(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each start writes the given number of rows, then fails."""
    monkeypatch.setattr(engine, "living", lambda ray: 2)
    monkeypatch.setattr(engine, "wait_until_noticed", lambda ray, nodes: None)
    monkeypatch.setattr(engine, "is_loss", lambda error: isinstance(error, NodeError))
    gains: list[int] = []

    def write(scoring: engine.Scoring, done: Any) -> None:
        left = [key for key in range(scoring.expected) if key not in done]
        new = left[: gains.pop(0)]
        if new:
            pd.DataFrame({KEY: new}).to_parquet(scoring.folder / f"{len(done)}.parquet")
        if len(new) < len(left):
            raise NodeError("node gone") if gains else ValueError("broken")

    monkeypatch.setattr(engine.Scoring, "write", write)
    gains[:] = [2, 0, 0, 0, 1, 0, 0, 0, 5]
    with pytest.warns(UserWarning, match="ray: lost a node or a worker: scoring goes on without it after 2 rows"):
        engine.write_rows(scoring_of(place, tmp_path / "all", 8), None)
    assert gains == []
    assert written_keys(tmp_path / "all").tolist() == list(range(8))
    gains[:] = [1, 0, 0, 0, 0, 7]  # the fourth time without a row
    with (
        pytest.warns(UserWarning, match=r"after 1 rows \(node gone\)"),
        pytest.raises(TrajOODError, match=r"ray: node gone: rows so far are in .*: continue with --resume"),
    ):
        engine.write_rows(scoring_of(place, tmp_path / "stuck", 8), None)
    assert gains == [7]
    gains[:] = [3]  # no loss
    with pytest.raises(TrajOODError, match="ray: broken: rows so far are in"):
        engine.write_rows(scoring_of(place, tmp_path / "other", 8), None)


def test_losses_are_told_from_failures() -> None:
    errors = pytest.importorskip("ray.exceptions", reason="needs traj_ood[ray]")
    failed = errors.RayTaskError("score", "", ValueError("broken"))
    assert is_loss(errors.ActorUnavailableError("gone", None))
    assert is_loss(errors.NodeDiedError("gone"))
    assert is_loss(errors.RayTaskError("write", "", errors.WorkerCrashedError()))
    assert not is_loss(errors.ActorDiedError(failed))  # while it was made
    assert not is_loss(failed)
    caused = RuntimeError("above")
    caused.__cause__ = errors.ActorDiedError()
    assert is_loss(caused)


# ---------------------------------------------------------------------- on a cluster


@pytest.mark.slow
def test_one_worker_and_two_are_timed(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="needs traj_ood[ray]")
    command = [sys.executable, local.__file__, "--tiny", "--out", tmp_path / "cluster.json"]
    subprocess.run(command, check=True, capture_output=True, timeout=tiny.PATIENCE)
    record = json.loads((tmp_path / "cluster.json").read_text())
    for name in ("one process", "1 worker", "2 workers"):
        assert record[name]["seconds, long"] > 0
    assert record["2 workers"]["largest relative difference"] <= 1e-9


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[Any, list[subprocess.Popen[bytes]]]]:
    """ray, connected to two nodes on this machine by `ray start`, and the process of each; they end with the tests."""
    pytest.importorskip("ray", reason="needs traj_ood[ray]")
    with local.nodes(2) as both:
        yield both


@pytest.mark.slow
def test_a_killed_worker_costs_nothing_and_a_run_is_resumed(place: Path, cluster: Any, tmp_path: Path) -> None:
    from traj_ood.distributed import score_to
    from traj_ood.distributed.engine import Workers

    ray = cluster[0]
    assert len(ray.nodes()) == 2
    rows = expected(place)
    killed: list[int] = []

    def kill() -> None:
        """The first actor that has come up, by its process."""
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not killed:
            actors = [a for a in ray._private.state.actors().values() if a["State"] == "ALIVE" and a["Pid"]]
            for actor in [a for a in actors if "MapWorker" in a["ActorClassName"]][:1]:
                os.kill(actor["Pid"], signal.SIGKILL)
                killed.append(actor["Pid"])
            time.sleep(0.2)

    killer = threading.Thread(target=kill)
    killer.start()
    count = score_to(tmp_path / "rows", walk(str(place / "photos")), place / "d", workers=Workers(count=2, batch=8))
    killer.join()
    assert count == 60
    assert_same(read_rows_of(tmp_path / "rows"), rows)
    assert killed

    files = sorted((tmp_path / "rows").glob("*.parquet"))
    files[0].write_bytes(b"PAR1")  # as a killed writer leaves it
    entries = list(walk(str(place / "photos")))
    assert score_to(tmp_path / "rows", entries, place / "d", resume=True, workers=Workers(count=1)) == 60
    assert_same(read_rows_of(tmp_path / "rows"), rows)
    with pytest.raises(TrajOODError, match="expected an empty folder"):
        score_to(tmp_path / "rows", entries, place / "d")


@pytest.mark.slow
def test_the_command_and_sources_of_records(place: Path, cluster: Any, tmp_path: Path) -> None:
    pytest.importorskip("webdataset", reason="needs traj_ood[sources]")
    from click.testing import CliRunner

    from traj_ood.cli import main

    out = tmp_path / "rows"
    command = ["score", str(place / "d"), str(place / "photos"), "--engine", "ray", "--out", str(out), "--quiet"]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 3, done.output  # one image is broken, and has its row
    assert_same(read_rows_of(out), expected(place))
    for shard in range(2):
        with tarfile.open(tmp_path / f"a-{shard}.tar", "w") as archive:
            for i in range(10 * shard, 10 * shard + 10):
                archive.add(place / "photos" / f"{i:03d}.png", f"{i:03d}.png")
    command[2], command[6] = str(tmp_path / "a-{0..1}.tar"), str(tmp_path / "more")
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    assert read_rows_of(tmp_path / "more")["score"].tolist() == pytest.approx(
        [row.score for row in expected(place)[:20]], rel=1e-9
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:ray. lost a node")  # where Ray does not notice in time to repair it by itself
def test_a_lost_node_costs_what_it_had_not_written(
    place: Path, cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last test on this cluster: its second node is lost with what is in its object store, by its raylet."""
    import psutil

    from traj_ood.distributed import score_to

    nodes = cluster[1]
    monkeypatch.setattr(engine, "_BLOCK_ROWS", 48)
    entries, out, before = list(walk(str(place / "photos"))) * 50, tmp_path / "rows", [0]

    def lose() -> None:
        deadline = time.monotonic() + 120
        while not before[0] and time.monotonic() < deadline:
            before[0] = len(list(out.glob("*.parquet")))
            time.sleep(0.05)
        for process in psutil.Process(nodes[1].pid).children(recursive=True):
            if process.name() == "raylet":
                process.kill()

    loser = threading.Thread(target=lose)
    loser.start()
    assert score_to(out, entries, place / "d", workers=engine.Workers(count=2, batch=16)) == 3000
    loser.join()
    assert 0 < before[0] < len(list(out.glob("*.parquet")))
    assert nodes[1].wait(tiny.PATIENCE) != 0
    assert_same(read_rows_of(out), expected(place) * 50)
