"""Several processes: the same numbers as one, one error for all, and nothing lost when one of them fails or dies."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import tiny
import torch

from traj_ood.autoencoders import load_autoencoder
from traj_ood.data import load_benchmark
from traj_ood.errors import TrajOODError
from traj_ood.evaluation.evaluator import Evaluator, RunConfig
from traj_ood.evaluation.parallel import Team, TeammateError
from traj_ood.evaluation.results import Result

NAME = "tiny--mae--seed0"
KEPT = "finished batches are kept: start the same command again"

# What each process runs: the steps of a JSON file, one after the other in one team. It logs how each of them ended
# and prints errors like the command line.
DRIVER = '''
import json, os, signal, sys, time
from pathlib import Path
from traj_ood.autoencoders import load_autoencoder
from traj_ood.data import load_benchmark
from traj_ood.errors import TrajOODError
from traj_ood.evaluation.evaluator import Evaluator, RunConfig
from traj_ood.evaluation.parallel import Team, TeammateError

place, log, team = Path(sys.argv[1]), [], Team.join()

def bench(out, batch_size, kill=None, **config):
    evaluator = Evaluator(
        load_autoencoder(place / "mae"), load_benchmark(str(place / "tiny.yaml")), RunConfig(**config),
        place / out, batch_size=batch_size, quiet=True, team=team,
    )
    save = evaluator.parts.save
    def deadly(key, part):
        if [team.rank, key.split("-")[0]] == kill:
            os.kill(os.getpid(), signal.SIGKILL)
        save(key, part)
    evaluator.parts.save = deadly
    return list(evaluator.run().scorers)

def early():
    """Process 1 fails while process 0 is busy."""
    with team.together():
        if team.rank == 1:
            raise TrajOODError("early")
        for _ in range(100 * 3600):
            team.check()
            time.sleep(0.01)

def bug():
    with team.together():
        return 1 / team.rank

def first(out):
    """Process 1 sees what process 0 has written."""
    path = place / out
    with team.together():
        return team.main_first(lambda: path.write_text("x") if team.is_main else path.read_text())

for step, arguments in json.loads((place / "steps.json").read_text()):
    code = 0
    try:
        log.append(["ok", globals()[step](**arguments)])
    except Exception as error:
        code = 2
        log.append([type(error).__name__, str(error)])
        if isinstance(error, TrajOODError) and not isinstance(error, TeammateError):
            print("traj-ood: error:", error, file=sys.stderr, flush=True)
    (place / f"log-{team.rank}.json").write_text(json.dumps(log))
sys.exit(code)
'''


def sockets() -> bool:
    try:
        socket.create_server(("127.0.0.1", 0)).close()
    except OSError:
        return False
    return True


launched = pytest.mark.skipif(
    find_spec("accelerate") is None or not sockets(), reason="needs accelerate (traj_ood[multi]) and local sockets"
)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    tiny.write_benchmark(tmp_path)
    tiny.vit().save_pretrained(tmp_path / "mae")
    return tmp_path


# One scorer of each kind: of distances, of latents, of the backbone's features; what each of them computes is no matter
# of processes.
CONFIG: dict[str, Any] = {"scorers": ["trajectory", "field", "knn:k=3"], "max_steps": 12, "resamples": 5}


def launch(place: Path, *steps: tuple[str, dict[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Run steps in two processes; returns the error lines that were printed and each process's log."""
    (place / "driver.py").write_text(DRIVER)
    (place / "steps.json").write_text(json.dumps(steps))
    for old in place.glob("log-*.json"):
        old.unlink()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "driver.py"]
    done = subprocess.run(
        [*command, str(place)],
        cwd=place,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=tiny.PATIENCE,
    )
    logs = [json.loads(p.read_text()) if p.is_file() else [] for p in (place / f"log-{r}.json" for r in (0, 1))]
    assert any(logs), done.stderr
    return [line for line in done.stderr.splitlines() if "traj-ood: error:" in line], logs


def alone(place: Path, out: str, batch_size: int | None = None, **changes: Any) -> Evaluator:
    return Evaluator(
        load_autoencoder(place / "mae"),
        load_benchmark(str(place / "tiny.yaml")),
        RunConfig(**{**CONFIG, "scorers": tuple(CONFIG["scorers"]), **changes}),
        place / out,
        batch_size=batch_size,
        quiet=True,
    )


def interrupt() -> None:
    raise KeyboardInterrupt


def check_same(place: Path, out: str, reference: Result) -> None:
    """Every column of every image, the curves and the metrics, to what another split into batches may move; and nothing
    else in the folder."""
    ours, theirs = place / out / NAME, place / "alone" / NAME
    names = ["attractors.safetensors", "curves.parquet", "gallery.safetensors", "images.parquet", "result.json"]
    assert sorted(p.name for p in ours.iterdir()) == [*names, "scores.parquet"]
    for name in ("scores.parquet", "curves.parquet"):
        pd.testing.assert_frame_equal(pd.read_parquet(ours / name), pd.read_parquet(theirs / name), rtol=1e-9, atol=0)
    result = Result.load(ours / "result.json")
    check_close({key: asdict(result)[key] for key in ("scorers", "dictionary")}, asdict(reference))


def check_close(found: Any, expected: Any) -> None:
    """Trees of which ``expected`` may hold more."""
    if isinstance(found, dict):
        for key, value in found.items():
            check_close(value, expected[key])
    elif isinstance(found, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            check_close(one, other)
    else:
        assert found == (pytest.approx(expected, rel=1e-9, abs=0) if isinstance(expected, float) else expected)


# ---------------------------------------------------------------------------------------------- two processes


@pytest.mark.slow
@launched
def test_two_processes_equal_one_until_one_is_killed(place: Path) -> None:
    reference = alone(place, "alone").run()
    begun = alone(place, "begun", batch_size=5)
    with pytest.MonkeyPatch.context() as patch:
        save = begun.parts.save
        patch.setattr(begun.parts, "save", lambda key, part: save(key, part) if key[:5] == "train" else interrupt())
        with pytest.raises(KeyboardInterrupt):
            begun.run()
    assert len(list((place / "begun").rglob("*.safetensors"))) == 3 + 1

    printed, logs = launch(
        place,
        ("bench", {"out": "small", "batch_size": None, "per_set": 1, **CONFIG}),
        ("early", {}),
        ("bug", {}),
        ("first", {"out": "file"}),
        ("bench", {"out": "two", "batch_size": 4, **CONFIG}),
        ("bench", {"out": "begun", "batch_size": None, **CONFIG}),
        ("bench", {"out": "two", "batch_size": 7, **CONFIG}),
        ("bench", {"out": "killed", "batch_size": 3, "kill": [1, "dim"], **CONFIG}),
    )
    (how, died), *left = logs[0][7:]
    assert (how, left, logs[1][7:]) == ("TrajOODError", [], [])
    assert "died" in died
    assert died.endswith(KEPT)

    few = "2 processes for 1 images of split 'test': expected at most 1; start fewer processes"
    crash = f"process 0 failed with ZeroDivisionError (division by zero); {KEPT}"
    scorers = list(reference.scorers)
    assert logs[0][:4] == [
        ["TrajOODError", few],
        ["TrajOODError", "early"],
        ["ZeroDivisionError", "division by zero"],
        ["ok", 1],
    ]
    assert logs[1][:4] == [["TeammateError", few], ["TeammateError", "early"], ["TeammateError", crash], ["ok", "x"]]
    assert [[kind, sorted(names)] for log in logs for kind, names in log[4:7]] == [["ok", sorted(scorers)]] * 6
    assert [line.split("error: ")[1] for line in printed] == [few, "early", died]
    assert not (place / "small").exists()
    alone(place, "killed").run()
    check_same(place, "killed", reference)
    for out in ("two", "begun"):
        check_same(place, out, reference)
        assert Result.load(place / out / NAME / "result.json").versions["processes"] == "2"


@pytest.mark.slow
@launched
def test_damaged_image_stops_both_and_the_run_continues(place: Path) -> None:
    reference = alone(place, "alone").run()
    image = place / "images" / "far" / "007.png"  # in the second half, which is process 1's
    whole = image.read_bytes()
    image.write_bytes(whole[:-30])
    printed, logs = launch(place, ("bench", {"out": "two", "batch_size": None, **CONFIG}))
    assert [log[0][0] for log in logs] == ["TrajOODError", "TeammateError"]
    assert len(printed) == 1
    assert "007.png: the image cannot be decoded" in printed[0]
    assert printed[0].endswith(logs[1][0][1])
    kept = {p.name for p in (place / "two" / NAME / "parts").glob("*.safetensors")}
    assert kept >= {f"{n}.safetensors" for n in ("train-00000000", "train-00000006", "test-00000005", "dim-00000005")}
    assert not (place / "two" / NAME / "result.json").exists()
    image.write_bytes(whole)
    run = alone(place, "two")
    computed = []
    save = run.parts.save
    run.parts.save = lambda key, part: (computed.append(f"{key}.safetensors"), save(key, part))[1]  # type: ignore[method-assign, func-returns-value]
    run.run()
    assert not kept & set(computed)
    # How far process 0 came before it heard of the damage is its own pace.
    assert "bright" in {name.split("-")[0] for name in computed}
    check_same(place, "two", reference)


@pytest.mark.slow
@launched
@pytest.mark.parametrize("victim", [0, 1])
def test_killed_process_stops_the_other_and_the_run_continues(place: Path, victim: int) -> None:
    reference = alone(place, "alone").run()
    printed, logs = launch(place, ("bench", {"out": "two", "batch_size": 3, "kill": [victim, "dim"], **CONFIG}))
    assert len(printed) == 1
    assert "died" in printed[0]
    assert printed[0].endswith(KEPT)
    assert [log[0][0] if log else "" for log in logs] == ["" if r == victim else "TrajOODError" for r in (0, 1)]
    kept = {p.name.split("-")[0] for p in (place / "two" / NAME / "parts").glob("*.safetensors")}
    assert kept >= {"train", "test"}
    alone(place, "two").run()
    check_same(place, "two", reference)


# ---------------------------------------------------------------------------------------------- one process


def test_a_team_of_one_is_all_there_is() -> None:
    team = Team.join()
    assert (team.rank, team.size, team.is_main) == (0, 1, True)
    assert team.share([1, 2, 3]) == [1, 2, 3]
    assert [team.device(name) for name in ("auto", "cpu", "cuda", "mps")] == ["auto", "cpu", "cuda", "mps"]
    assert team.main_first(lambda: 5) == 5
    team.wait()
    team.check()
    with pytest.raises(ZeroDivisionError), team.together():
        1 / 0  # noqa: B018
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_shares_cover_everything_once() -> None:
    teams = [Team() for _ in range(3)]
    for rank, team in enumerate(teams):
        team.rank, team.size = rank, 3
    assert sorted(i for team in teams for i in team.share(range(10))) == list(range(10))


def test_each_process_takes_the_gpu_of_its_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    team = Team()
    team.rank, team.size, team.local_rank = 5, 8, 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [team.device(name) for name in ("auto", "cpu", "cuda:0")] == ["auto", "cpu", "cuda:0"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [team.device(name) for name in ("auto", "cuda", "cuda:0")] == ["cuda:1", "cuda:1", "cuda:0"]


@pytest.mark.parametrize(("local_rank", "kind"), [("0", TrajOODError), ("1", TeammateError)])
def test_without_accelerate(monkeypatch: pytest.MonkeyPatch, local_rank: str, kind: type) -> None:
    for name, value in {"RANK": local_rank, "WORLD_SIZE": "2", "LOCAL_RANK": local_rank}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(kind, match=r"one of 2 processes: expected accelerate.*pip install 'traj_ood\[multi\]'") as info:
        Team.join()
    assert type(info.value) is kind


def test_folder_that_is_not_shared(place: Path) -> None:
    run = alone(place, "elsewhere")
    run.team = Team()
    run.team.rank, run.team.size = 1, 2
    with pytest.raises(TrajOODError, match=r"process 1 does not find the main process.s files there: expected --out"):
        run.run()
    assert not (place / "elsewhere").exists()


def test_part_that_another_process_did_not_leave(place: Path) -> None:
    run = alone(place, "gone")
    with pytest.raises(TrajOODError, match=r"train-00000006\.safetensors: expected the batch of a run that another"):
        run.parts.get("train-00000006")


def test_module_is_light() -> None:
    code = "import sys, traj_ood.evaluation.parallel as p; p.Team.join(); print({*sys.modules} & {'torch', 'timm'})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
