"""benchmarks/natural.py rehearsed on a tiny suite, and its verdicts on figures made for each of them."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny
import yaml

from traj_ood.errors import TrajOODError
from traj_ood.scorers import create_scorer

pytest.importorskip("scikit_posthocs", reason="scikit-posthocs is not installed")
TESTS = {"alpha": 0.05, "least_blocks": 6, "resamples": 200, "most_evaluations": 16}
FIGURES = ("auroc", "fpr95")


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    folder = Path(__file__).parents[2] / "benchmarks"
    before = list(sys.path)
    spec = importlib.util.spec_from_file_location("natural", folder / "natural.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["natural"] = module
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before
    for name in ("natural", "verdicts"):
        del sys.modules[name]


def table(shift: dict[str, float], sets: int = 8, noise: float = 0.005, seed: int = 0) -> pd.DataFrame:
    """Figures of two suites, two models and three seeds: a level for each set, and a shift for each scorer."""
    draws, rows = np.random.default_rng(seed), []
    for s in range(sets):
        level = draws.uniform(0.6, 0.9)
        for model in ("one", "two"):
            for run in range(3):
                for scorer, own in shift.items():
                    auroc = level + own + noise * draws.standard_normal()
                    place = {"suite": "ab"[s % 2], "set": f"s{s}", "kind": "backbone", "model": model, "seed": run}
                    rows.append({**place, "scorer": scorer, "auroc": auroc, "fpr95": 1 - auroc})
    return pd.DataFrame(rows)


def word(script: ModuleType, figures: pd.DataFrame, cost: float = 1.0, **changes: Any) -> str:
    tests = {**TESTS, **changes}
    found = {f: script.verdicts.compare(figures, f, ["mine"], ["one", "other"], tests) for f in FIGURES}
    return script.verdicts.verdict(found, {"mine": cost}, tests)[0]


def test_verdicts(script: ModuleType) -> None:
    ahead = table({"mine": 0.05, "one": 0.0, "other": -0.02})
    assert word(script, ahead) == "holds"
    assert word(script, ahead, cost=40.0) == "does not hold"
    assert word(script, ahead, least_blocks=9) == "cannot be told"
    assert word(script, table({"mine": 0.0, "one": 0.05, "other": -0.02})) == "does not hold"
    assert word(script, table({"mine": 0.0, "one": 0.0, "other": -0.05}, noise=0.02)) == "cannot be told"
    assert word(script, table({"mine": 0.05, "one": 0.0, "other": 0.0}, sets=4)) == "cannot be told"


def test_a_scorer_that_is_ahead_everywhere_but_in_one_figure_does_not_hold(script: ModuleType) -> None:
    figures = table({"mine": 0.05, "one": 0.0, "other": 0.0})
    figures.loc[figures["scorer"] == "mine", "fpr95"] += 0.2
    assert word(script, figures) == "does not hold"


def test_the_tests_are_scipys_and_scikit_posthocs(script: ModuleType) -> None:
    from scikit_posthocs import posthoc_conover_friedman
    from scipy.stats import friedmanchisquare

    figures = table({"mine": 0.02, "one": 0.0, "other": -0.01})
    blocks = script.verdicts.block_table(figures, "auroc", ["mine", "one", "other"])
    assert blocks.shape == (8, 3)
    first = figures[(figures["set"] == "s0") & (figures["scorer"] == "one")]
    assert blocks.loc[("a", "s0"), "one"] == pytest.approx(first["auroc"].mean())
    expected = friedmanchisquare(*blocks.to_numpy().T).pvalue
    assert script.verdicts.friedman(blocks) == pytest.approx(expected)
    raw = posthoc_conover_friedman(blocks.to_numpy()).to_numpy()
    found = script.verdicts.compare(figures, "auroc", ["mine"], ["one", "other"], TESTS)["mine"]
    one, other = sorted(raw[0, 1:])
    assert sorted(d.p for d in found) == pytest.approx(sorted([min(1, 2 * one), max(2 * one, other)]))


def test_effects_and_intervals(script: ModuleType) -> None:
    assert script.verdicts.rank_biserial(np.array([1.0, 2.0, -3.0, 0.0])) == pytest.approx(0.0)
    assert script.verdicts.rank_biserial(np.array([1.0, 2.0, 3.0])) == 1.0
    figures = table({"mine": 0.03, "one": 0.0})
    (low, high) = script.verdicts.intervals(figures, "fpr95", "mine", ["one"], 200)["one"]
    assert 0.02 < low < 0.03 < high < 0.04  # to the candidate's advantage, whatever the figure
    whole = script.verdicts.intervals(figures[figures["model"] == "one"], "auroc", "mine", ["one"], 200)["one"]
    assert whole[0] < 0.03 < whole[1]


def test_the_plan_declares_scorers_that_exist(script: ModuleType, tmp_path: Path) -> None:
    plan = script.Plan.load()
    assert {entry["kind"] for entry in plan.scorers.values()} == {"path", "static", "control"}
    for spec, entry in plan.scorers.items():
        reads = create_scorer(spec).needs()
        walks = bool(reads.steps or reads.distances or reads.attractors or {"decoded"} & reads.features)
        assert walks is (entry["kind"] == "path"), spec
    tree = yaml.safe_load(script.PLAN.read_text())
    tree["claims"][0]["candidates"] = ["knn-auto"]
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(TrajOODError, match="expected declared scorers, got knn-auto"):
        script.Plan.load(tmp_path / "other.yaml")


@pytest.mark.slow
def test_a_rehearsal_from_end_to_end(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = yaml.safe_load(script.PLAN.read_text())
    tree["scorers"].append({"spec": "knn:k=41", "kind": "static"})  # of 40 training images
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(tree))
    monkeypatch.setattr(script, "PLAN", tmp_path / "plan.yaml")
    suite = tiny.write_benchmark(tmp_path, train=40, test=12, ood=12)
    tiny.conv().save_pretrained(tmp_path / "conv")
    out = tmp_path / "out"
    command = ["--tiny", "--suites", str(suite), "--models", str(tmp_path / "conv"), "--seeds", "0", "--device", "cpu"]
    command += ["--quiet", "--runs", str(tmp_path / "runs"), "--out", str(out)]
    script.main(command)
    text = capsys.readouterr().out
    assert "**A rehearsal** of few images: no figure below is a result." in text
    assert "| `control: files` | control |" in text
    assert "cannot be told" in text
    (path,) = out.glob("tiny/*.json")
    record = json.loads(path.read_text())
    assert set(record["figures"]["control: files"]) == {"dim", "bright"}
    assert record["rehearsal"]
    assert "41" in record["missing"]["knn:k=41"]
    assert "knn:k=41" not in record["figures"]
    claims = {c["id"]: c for c in json.loads((out / "summary.json").read_text())["claims"]}
    assert claims["path-ahead-on-autoencoders"]["per_set"][0]["auroc"]["p_holm"] <= 1
    assert claims["path-ahead-on-backbones"]["verdict"] == "cannot be told"
    written = path.stat().st_mtime_ns
    script.main(command)
    assert path.stat().st_mtime_ns == written
    capsys.readouterr()
    path.write_text(json.dumps({**record, "plan": "0" * 64}))
    with pytest.raises(SystemExit):
        script.main(["--tables-only", "--out", str(out)])
    assert "a changed plan is a new study" in capsys.readouterr().err
