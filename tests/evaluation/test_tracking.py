"""Trackers: what a finished run tells MLflow, W&B and TensorBoard; names and libraries that are missing."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from traj_ood.cli import main
from traj_ood.errors import TrajOODError
from traj_ood.evaluation.results import Result
from traj_ood.evaluation.tracking import figures, log_result, tracker

FOLDER = Path(__file__).parents[2] / "results" / "paper" / "fashion--fashion-mae--seed0"


@pytest.fixture(scope="module")
def result() -> Result:
    return Result.load(FOLDER / "result.json")


def test_figures_are_those_of_the_record(result: Result) -> None:
    found = figures(result)
    mean = result.scorers["mahalanobis"].all
    assert mean is not None
    assert found["mahalanobis/all/auroc"] == mean.auroc
    assert found["attractors/healthy"] == 1.0
    assert len(found) == 1 + len(result.scorers) * 3 * 5


def test_the_real_local_mlflow_keeps_them(result: Result, tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow", reason="needs mlflow-skinny: pip install '.[mlflow]'")
    to = tracker(f"mlflow:{tmp_path / 'ml'}")
    log_result(result, FOLDER, to)
    log_result(result, FOLDER, to)  # a second run of the same experiment
    client = mlflow.MlflowClient((tmp_path / "ml").as_uri())
    experiment = client.get_experiment_by_name("fashion")
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == 2
    data = runs[0].data
    assert data.metrics["trajectory_horizon_16/all/auroc"] == pytest.approx(
        figures(result)["trajectory:horizon=16/all/auroc"]
    )
    assert data.params["benchmark"] == "fashion"
    assert data.params["seed"] == "0"
    assert runs[0].info.status == "FINISHED"
    assert [f.path for f in client.list_artifacts(runs[0].info.run_id)] == ["result.json"]


def test_wandb_is_told_offline(result: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, Any] = {}
    made = SimpleNamespace(summary=told, save=lambda *a, **k: told.update(saved=a[0]), finish=lambda: None)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **k: told.update(init=k) or made))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    log_result(result, FOLDER, tracker("wandb:ood"))
    assert (told["init"]["project"], told["init"]["mode"], told["init"]["group"]) == ("ood", "offline", "fashion")
    assert told["mahalanobis/all/auroc"] == figures(result)["mahalanobis/all/auroc"]
    assert told["saved"].endswith("result.json")


def test_the_real_tensorboard_reads_them(result: Result, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log_result(result, FOLDER, tracker(f"tensorboard:{tmp_path}"))
    read = EventAccumulator(str(tmp_path / result.name)).Reload()
    assert set(read.Tags()["scalars"]) == set(figures(result))
    for key, value in figures(result).items():
        assert [event.value for event in read.Scalars(key)] == [pytest.approx(value, rel=1e-6)], key
    (params,) = read.Tensors("params/text_summary")
    assert b"- benchmark: fashion" in params.tensor_proto.string_val[0]


@pytest.mark.slow
def test_the_real_wandb_is_told_offline(result: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="needs wandb")
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    log_result(result, FOLDER, tracker("wandb:ood"))
    (kept,) = tmp_path.rglob("offline-run-*/run-*.wandb")
    words = (b"mahalanobis/all/auroc", b"ood", result.name.encode(), b"fashion")
    for _ in range(600):  # its service writes behind finish(), the later the busier the machine is
        if all(word in kept.read_bytes() for word in words):
            break
        time.sleep(0.1)
    assert [word for word in words if word not in kept.read_bytes()] == []
    (artifact,) = tmp_path.rglob("offline-run-*/files/result.json")
    assert artifact.read_bytes() == (FOLDER / "result.json").read_bytes()


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("mlfow:x", "unknown tracker 'mlfow': did you mean 'mlflow'"),
        ("wandb", "expected wandb:TARGET"),
        ("wandb:x", r"--log wandb:x: wandb cannot be used .*: pip install wandb"),
    ],
)
def test_trackers_that_cannot_be_used_are_named_first(spec: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(TrajOODError, match=words):
        tracker(spec)
    refused = CliRunner().invoke(main, ["bench", "no-such-benchmark", "--log", spec])
    assert refused.exit_code == 2
    assert "tracker" in refused.stderr or "wandb" in refused.stderr


def test_a_tracker_that_fails_leaves_the_run_whole(result: Result) -> None:
    def fail(*_: Any) -> None:
        raise OSError("no route to host")

    with pytest.raises(TrajOODError, match=r"is finished, but could not be logged \(no route to host\); its files are"):
        log_result(result, FOLDER, fail)
