"""Result files: the round trip, what strict loading refuses, atomic writing, provenance."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest

from traj_ood.errors import TrajOODError
from traj_ood.evaluation.metrics import METRIC_NAMES, Metrics
from traj_ood.evaluation.results import Result, ScorerResult, SetScore
from traj_ood.io.files import write_atomic
from traj_ood.io.provenance import environment, git_commit


def make_result(**changes: Any) -> Result:
    intervals = {name: (0.1, 0.9) for name in METRIC_NAMES}
    sets = {
        "sandals": SetScore("near", 100, Metrics(0.8, 0.7, 0.6, 0.5, 0.4), intervals),
        "digits": SetScore("far", 1797, Metrics(0.9, 0.9, 0.8, 0.3, 0.2), intervals),
        "noise": SetScore("far", 500, Metrics(1.0, 1.0, 1.0, 0.0, 0.0), {}),
    }
    scorers = {
        "trajectory": ScorerResult("Trajectory", {"view": "tokens"}, "Mean distance to the attractors.", 120.5, sets),
        "knn": ScorerResult("KNN", {"k": 50}, "Distance to the k-th neighbour.", None, sets),
    }
    fields: dict[str, Any] = {
        "name": "fashion-seed0",
        "benchmark": "fashion",
        "model": {"name": "fashion-vitmae", "fingerprint": "abc123", "parameters": 900_000},
        "config": {"tol": 1e-5, "max_steps": 500},
        "seed": 0,
        "command": "traj-ood bench fashion",
        "commit": None,
        "versions": {"python": "3.11"},
        "created": "2026-01-02T03:04:05+00:00",
        "seconds": {"score": 1.5},
        "data": {"test": {"role": "test", "count": 7000, "sha256": "11"}},
        "dictionary": {"healthy": True, "warnings": [], "distinct": 121},
        "failures": [{"id": "test/3.png", "error": "truncated"}],
        "scorers": scorers,
    }
    return Result(**{**fields, **changes})


def test_round_trip_is_exact_and_stable(tmp_path: Path) -> None:
    result = make_result()
    first, second = tmp_path / "a" / "result.json", tmp_path / "b" / "result.json"
    result.save(first)
    assert Result.load(first) == result
    Result.load(first).save(second)
    assert first.read_bytes() == second.read_bytes()
    text = first.read_text()
    assert text.startswith('{\n  "benchmark": "fashion",')
    assert list(json.loads(text)) == sorted(json.loads(text))


def test_means_weigh_sets_equally_and_are_written(tmp_path: Path) -> None:
    result = make_result()
    scorer = result.scorers["trajectory"]
    assert scorer.near == Metrics(0.8, 0.7, 0.6, 0.5, 0.4)
    assert scorer.far is not None
    assert scorer.far.auroc == pytest.approx(0.95)
    assert scorer.all is not None
    assert scorer.all.auroc == pytest.approx(0.9)  # three sets, not (near + far) / 2 = 0.875
    result.save(tmp_path / "result.json")
    written = json.loads((tmp_path / "result.json").read_text())["scorers"]["trajectory"]
    assert written["all"] == asdict(scorer.all)


def test_diagnostics_are_in_no_mean(tmp_path: Path) -> None:
    knn = make_result().scorers["knn"]
    sets = {**knn.sets, "noise": replace(knn.sets["noise"], role="diagnostic")}
    result = make_result(scorers={"knn": replace(knn, sets=sets)})
    assert result.scorers["knn"].far == sets["digits"].metrics
    assert result.scorers["knn"].all.auroc == pytest.approx(0.85)  # type: ignore[union-attr]
    result.save(tmp_path / "result.json")
    assert Result.load(tmp_path / "result.json") == result
    tree = json.loads((tmp_path / "result.json").read_text())
    tree["scorers"]["knn"]["sets"]["noise"]["role"] = "other"
    (tmp_path / "result.json").write_text(json.dumps(tree))
    with pytest.raises(TrajOODError, match=r"sets\.noise\.role"):
        Result.load(tmp_path / "result.json")


def test_a_scorer_without_near_sets_has_no_near_mean(tmp_path: Path) -> None:
    knn = make_result().scorers["knn"]
    far_only = replace(knn, sets={k: s for k, s in knn.sets.items() if s.role == "far"})
    result = make_result(scorers={"knn": far_only})
    assert far_only.near is None
    result.save(tmp_path / "result.json")
    assert Result.load(tmp_path / "result.json") == result


def test_numpy_scalars_are_saved_as_numbers(tmp_path: Path) -> None:
    config = {"tol": np.float32(0.5), "k": np.int64(3), "flag": np.bool_(True)}
    make_result(config=config).save(tmp_path / "result.json")
    assert Result.load(tmp_path / "result.json").config == {"tol": 0.5, "k": 3, "flag": True}


def test_a_command_with_bytes_that_are_not_utf8_is_saved(tmp_path: Path) -> None:
    result = make_result(command="traj-ood bench café photos-\udcff")  # as Python decodes the byte 0xff
    result.save(tmp_path / "result.json")
    assert "café photos-\\udcff" in (tmp_path / "result.json").read_text(encoding="utf-8")
    assert Result.load(tmp_path / "result.json") == result


@pytest.mark.parametrize("value", [float("nan"), float("inf"), np.float32("nan")])
def test_non_finite_figures_are_not_saved(tmp_path: Path, value: float) -> None:
    result = make_result(dictionary={"healthy": False, "warnings": [], "residual": {"quantiles": [0.1, value]}})
    with pytest.raises(TrajOODError) as error:
        result.save(tmp_path / "result.json")
    assert str(error.value) == (
        "result 'fashion-seed0': expected finite numbers, got NaN or infinity at dictionary.residual.quantiles[1]; "
        "store None for undefined values"
    )
    assert list(tmp_path.iterdir()) == []


def test_objects_are_not_saved(tmp_path: Path) -> None:
    with pytest.raises(TrajOODError, match=r"got something else \(PosixPath is not plain data\)"):
        make_result(config={"root": tmp_path}).save(tmp_path / "result.json")


def damage(tree: dict, *keys: str, value: Any = None, drop: bool = False) -> None:
    for key in keys[:-1]:
        tree = tree[key]
    if drop:
        del tree[keys[-1]]
    else:
        tree[keys[-1]] = value


NAN = float("nan")


@pytest.mark.parametrize(
    ("keys", "options", "message"),
    [
        (("schema",), {"value": 2}, "expected a result of schema 1, got schema 2; run it again with --fresh"),
        (("schema",), {"drop": True}, "expected a result of schema 1, got schema None; run it again with --fresh"),
        (
            ("seed",),
            {"drop": True},
            "missing seed: expected a value, as there is no default; run it again with --fresh",
        ),
        (("sead",), {"value": 1}, "result.json 'sead': did you mean 'seed'"),
        (("seed",), {"value": "0"}, "key seed: expected int, got '0'; run it again with --fresh"),
        (("seed",), {"value": True}, "key seed: expected int, got True; run it again with --fresh"),
        (
            ("model", "fingerprint"),
            {"drop": True},
            "model: fingerprint: expected str, got nothing: the file",
        ),
        (
            ("dictionary", "healthy"),
            {"value": "yes"},
            "dictionary: healthy: expected bool, got str 'yes': the file is damaged",
        ),
        (("data", "test"), {"value": []}, "key data.test: expected a mapping, got []; run it again with --fresh"),
        (
            ("seconds", "score"),
            {"value": NAN},
            "expected JSON, got NaN is not a JSON number; restore the file, or run it again with --fresh",
        ),
        (
            ("scorers", "knn", "sets", "digits", "metrics", "auroc"),
            {"value": "high"},
            "key scorers.knn.sets.digits.metrics.auroc: expected float, got 'high'; run it again with --fresh",
        ),
        (
            ("scorers", "knn", "sets", "digits", "role"),
            {"value": "middle"},
            "result.json 'middle': Known: diagnostic, far, near; run it again with --fresh",
        ),
        (
            ("scorers", "knn", "sets", "digits", "intervals", "auroc"),
            {"value": [0.1]},
            "key scorers.knn.sets.digits.intervals.auroc: expected a list of 2 floats, got [0.1]; run it again with "
            "--fresh",
        ),
        (
            ("scorers", "knn", "all", "auroc"),
            {"value": 0.99},
            "expected scorers.knn.all to be the mean over its sets, got other figures; "
            "the file was edited, run it again with --fresh",
        ),
    ],
)
def test_damaged_files_are_refused_by_name(tmp_path: Path, keys: tuple, options: dict, message: str) -> None:
    path = tmp_path / "result.json"
    make_result().save(path)
    tree = json.loads(path.read_text())
    damage(tree, *keys, **options)
    path.write_text(json.dumps(tree))
    with pytest.raises(TrajOODError) as error:
        Result.load(path)
    assert str(path) in str(error.value)
    assert message in str(error.value)


def test_cut_missing_and_foreign_files_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    make_result().save(path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(
        TrajOODError, match=r"result\.json: expected JSON, got .*; restore the file, or run it again with --fresh"
    ):
        Result.load(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TrajOODError, match=r"result\.json: expected JSON"):
        Result.load(path)
    path.write_text("[]")
    with pytest.raises(
        TrajOODError, match="expected a JSON object, got list; restore the file, or run it again with --fresh"
    ):
        Result.load(path)
    with pytest.raises(TrajOODError, match=r"gone\.json: expected a result file, got No such file or directory"):
        Result.load(tmp_path / "gone.json")


def test_load_all_is_recursive_and_sorted(tmp_path: Path) -> None:
    for name in ("b/seed1", "b/seed0", "a"):
        make_result(name=name).save(tmp_path / name / "result.json")
    (tmp_path / "a" / "other.json").write_text("{}")
    assert [r.name for r in Result.load_all(tmp_path)] == ["a", "b/seed0", "b/seed1"]
    empty = tmp_path / "empty"
    for folder in (empty, tmp_path / "absent"):
        with pytest.raises(TrajOODError, match=r"expected at least one result\.json in this folder or below, got none"):
            Result.load_all(folder)


def test_a_failing_writer_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "scores.bin"
    write_atomic(path, b"old")

    def fails_half_way(file: BinaryIO) -> None:
        file.write(b"half of the new ")
        raise RuntimeError("writer broke")

    with pytest.raises(RuntimeError, match="writer broke"):
        write_atomic(path, fails_half_way)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["scores.bin"]


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    def disk_full(file: BinaryIO) -> None:
        file.write(b"some")
        raise OSError(28, "No space left on device")

    with pytest.raises(TrajOODError) as error:
        write_atomic(tmp_path / "scores.bin", disk_full)
    assert str(error.value) == (
        f"{tmp_path}: expected a folder that can be written (for scores.bin), got: No space left on device; "
        "free space, fix its permissions or choose another folder"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrajOODError, match=r"file: expected a folder that can be written \(for result\.json\)"):
        make_result().save(tmp_path / "file" / "result.json")


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_without_write_permission_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(TrajOODError, match=r"expected a folder that can be written .* got: Permission denied"):
            make_result().save(tmp_path / "result.json")
    finally:
        tmp_path.chmod(0o700)


def test_a_written_file_has_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    write_atomic(tmp_path / "atomic", lambda file: file.write(b"x"))
    assert (tmp_path / "atomic").read_bytes() == b"x"
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_environment_is_text_and_names_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    found = environment()
    assert all(isinstance(value, str) and value for value in found.values())
    assert {"python", "traj_ood", "torch", "timm", "scikit-learn", "faiss", "platform", "threads"} <= set(found)
    assert found["numpy"] == np.__version__
    assert found["threads"] == "3"


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


def test_git_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    repository = tmp_path / "repository"
    (repository / "untracked").mkdir(parents=True)
    assert git_commit(repository) is None
    git(repository, "init")
    assert git_commit(repository) is None  # no commit yet
    (repository / "code.py").write_text("1")
    git(repository, "add", "code.py")
    git(repository, "commit", "--no-verify", "-m", "one")
    commit = git_commit(repository)
    assert commit is not None
    assert len(commit) == 40
    (repository / "untracked" / "result.json").write_text("{}")
    assert git_commit(repository) == commit
    assert git_commit(repository / "untracked") is None
    (repository / "code.py").write_text("2")
    assert git_commit(repository) == commit + "-dirty"
    monkeypatch.setenv("PATH", "")
    assert git_commit(repository) is None


def test_only_files_are_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name, found in (("pipe", "a device or pipe"), ("folder", "a folder")):
        with pytest.raises(TrajOODError, match=rf"{name}: expected a file to write, found {found}; choose another"):
            write_atomic(tmp_path / name, b"")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "pipe"]
    assert (tmp_path / "pipe").is_fifo()
