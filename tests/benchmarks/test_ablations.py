"""benchmarks/ablations.py from end to end on a tiny model; parts against a direct computation where there is one."""

from __future__ import annotations

import csv
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from tiny import VIT, vit, write_benchmark

from traj_ood import ScorerSet, load_autoencoder, load_benchmark
from traj_ood.data.preprocessing import Normalised
from traj_ood.evaluation.metrics import compute_metrics

pytestmark = pytest.mark.slow  # whole benchmark scripts, each of whose parts has quick tests in the package

MEASURED = ["--attractors", "14", "--counts", "10", "14", "20", "--per-set", "8", "--max-steps", "25", "--epochs", "1"]


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    path = Path(__file__).parents[2] / "benchmarks" / "ablations.py"
    spec = importlib.util.spec_from_file_location("ablations", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["ablations"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["ablations"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ablations")
    write_benchmark(folder, train=30)
    vit(changes={"image_size": 16}).save_pretrained(folder / "tiny-mae")  # 16 patches, some of which can be hidden
    geometry = {k: v for k, v in VIT.items() if k not in ("image_size", "num_channels")}
    config = {"name": "tiny-mae", "benchmark": str(folder / "tiny.yaml"), "family": "vit_mae", "image_size": 8}
    config |= {"channels": 1, "model": geometry, "recipe": {"batch_size": 8, "mask_ratios": [0.0, 0.5]}}
    (folder / "tiny-mae.yaml").write_text(yaml.safe_dump(config))
    return folder


def command(place: Path, *more: str) -> list[str]:
    places = {
        "suite": "tiny.yaml",
        "config": "tiny-mae.yaml",
        "model": "tiny-mae",
        "models-dir": "models",
        "out": "out",
    }
    named = [word for key, name in places.items() for word in (f"--{key}", str(place / name))]
    return [*named, *MEASURED, "--quiet", *more]


@pytest.fixture(scope="module")
def parts(script: ModuleType, place: Path) -> dict[str, dict[str, Any]]:
    script.main(command(place))
    return {name: json.loads((place / "out" / f"{name}.json").read_text()) for name in script.PARTS}


def test_every_part_has_a_table_and_a_plot(script: ModuleType, place: Path, parts: dict[str, Any]) -> None:
    for name, part in parts.items():
        column = script.AXES[name][0]
        with open(place / "out" / f"{name}.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == len(part["rows"]) > 1
        assert [float(r["auroc"]) for r in rows] == [r["auroc"] for r in part["rows"]]
        assert len({(str(r[column]), r["scorer"]) for r in part["rows"]}) == len(rows), "each setting once"
        assert (place / "out" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert part["images"] == {"test": 8, "dim": 8, "bright": 8}
        assert str(place) not in json.dumps(part)
        assert f"--part {name} --suite tiny.yaml --model tiny-mae" in part["command"]


def direct(place: Path, spec: str, train: int = 14, tol: float = 1e-5, **options: Any) -> float:
    """Mean AUROC of one scorer on its own, through the public API."""
    model = load_autoencoder(place / "tiny-mae", **options)
    data = load_benchmark(str(place / "tiny.yaml")).subsample(train=train, per_set=8, seed=0)

    def images(split: Any) -> torch.Tensor:
        return torch.stack([model.transform(split.images.load(i)) for i in range(len(split.images))])

    scorers = ScorerSet(model, [spec], tol=tol, max_steps=25).fit(Normalised(images(data.train)))
    test, *sets = (
        next(iter(scorers.score(Normalised(images(s))).scores.values())).numpy() for s in (data.test, *data.ood)
    )
    return sum(compute_metrics(test, s).auroc for s in sets) / len(sets)


def test_parts_are_what_single_runs_give(place: Path, parts: dict[str, Any]) -> None:
    def value(part: str, scorer: str, **setting: Any) -> float:
        (row,) = (
            r for r in parts[part]["rows"] if r["scorer"] == scorer and all(r[k] == v for k, v in setting.items())
        )
        return row["auroc"]

    def is_close(found: float, spec: str, **options: Any) -> None:
        assert found == pytest.approx(direct(place, spec, **options), abs=1e-9)

    is_close(value("horizon", "trajectory:view=mean", horizon=4), "trajectory:view=mean:horizon=4")
    is_close(value("horizon", "trajectory:view=tokens", horizon="own length"), "trajectory")
    is_close(value("attractors", "field", attractors=10), "field", train=10)
    is_close(value("attractors", "trajectory:horizon=16", attractors=20), "trajectory:horizon=16", train=20)
    is_close(value("tolerance", "trajectory", tolerance=1e-2), "trajectory", tol=1e-2)
    is_close(value("view", "mahalanobis", view="cls"), "mahalanobis:view=cls")
    is_close(value("masking", "knn", mask_ratio=0.5), "knn", mask_ratio=0.5)


def test_recipes_are_trained_as_named(script: ModuleType, place: Path, parts: dict[str, Any]) -> None:
    assert list(dict.fromkeys(r["recipe"] for r in parts["recipe"]["rows"])) == list(script.RECIPES)
    for name, (changes, geometry) in script.RECIPES.items():
        folder = place / "models" / name.replace(",", "").replace(" ", "-")
        config = json.loads((folder / "training.json").read_text())["config"]
        assert config["recipe"]["epochs"] == 1
        assert all(config["recipe"][k] == (list(v) if isinstance(v, tuple) else v) for k, v in changes.items())
        assert all(config["model"][k] == v for k, v in geometry.items())
    assert all({"converged", "distinct"} <= set(r) for r in parts["recipe"]["rows"])


def test_finished_parts_are_skipped(
    script: ModuleType, place: Path, parts: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "score", lambda *_, **__: pytest.fail("scored again"))
    script.main(command(place, "--part", "view,recipe"))


def test_errors_in_one_line(
    script: ModuleType, place: Path, parts: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for more, text in (
        (["--part", "recipe", "--epochs", "2", "--out", str(tmp_path)], "expected a model of 2 epochs, got one of 1"),
        (["--part", "views"], "unknown part 'views': expected some of horizon, attractors"),
        (["--part", "view", "--out", str(tmp_path), "--attractors", "99"], "between 2 and 30 training images"),
    ):
        with pytest.raises(SystemExit) as stopped:
            script.main(command(place, *more))
        assert stopped.value.code == 2
        assert text in capsys.readouterr().err.strip().splitlines()[-1]
