"""benchmarks/protocol.py from end to end, on tiny models and images; its tables against the parts they come from."""

from __future__ import annotations

import csv
import importlib.util
import json
import shutil
import statistics
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from delong import delong
from tiny import VIT, conv, vit, write_benchmark

from traj_ood.evaluation.compare import PairedScores, paired_bootstrap
from traj_ood.evaluation.results import Result

pytestmark = pytest.mark.slow  # whole benchmark scripts, each of whose parts has quick tests in the package

MEASURED = ["--attractors", "12", "--per-set", "9", "--max-steps", "20", "--device", "cpu", "--quiet"]
MEASURED += ["--resamples", "50", "--run-resamples", "0"]


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    path = Path(__file__).parents[2] / "benchmarks" / "protocol.py"
    spec = importlib.util.spec_from_file_location("protocol", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["protocol"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["protocol"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A benchmark, and how to train its models."""
    folder = tmp_path_factory.mktemp("protocol")
    write_benchmark(folder, train=40)
    geometry = {k: v for k, v in VIT.items() if k not in ("image_size", "num_channels")}
    config = {
        "name": "tiny-mae",
        "benchmark": str(folder / "tiny.yaml"),
        "family": "vit_mae",
        "image_size": 8,
        "channels": 1,
        "model": geometry,
        "recipe": {"epochs": 1, "batch_size": 8, "learning_rate": 0.01, "mask_ratios": [0.0, 0.5]},
        "health_images": 3,
    }
    (folder / "tiny-mae.yaml").write_text(yaml.safe_dump(config))
    return folder


def command(place: Path, *more: str) -> list[str]:
    places = {"suite": "tiny.yaml", "config": "tiny-mae.yaml", "models-dir": "models", "runs": "runs", "out": "out"}
    named = [word for key, name in places.items() for word in (f"--{key}", str(place / name))]
    return [*named, *MEASURED, "--model-seeds", "1", "2", "--seeds", "0", "1", *more]


@pytest.fixture(scope="module")
def finished(script: ModuleType, place: Path) -> Path:
    script.main(command(place, "--train"))
    return place / "out"


@pytest.fixture(scope="module")
def summary(finished: Path) -> dict[str, Any]:
    return json.loads((finished / "summary.json").read_text())


def results_of(out: Path) -> list[Result]:
    return [Result.load(path) for path in sorted((out / "tiny").glob("*.json"))]


# ---------------------------------------------------------------------------------------------- a whole run


def test_models_are_trained_under_their_seed(finished: Path, place: Path) -> None:
    for seed in (1, 2):
        record = json.loads((place / "models" / f"tiny-mae-s{seed}" / "training.json").read_text())
        assert (record["config"]["name"], record["config"]["seed"]) == (f"tiny-mae-s{seed}", seed)
    found = results_of(finished)
    assert [(r.model["name"], r.seed) for r in found] == [(f"tiny-mae-s{m}", s) for m in (1, 2) for s in (0, 1)]
    assert len({r.model["fingerprint"] for r in found}) == 2
    assert found[0].command.startswith("python benchmarks/protocol.py --suite tiny.yaml --config tiny-mae.yaml")
    assert str(place) not in (finished / "summary.json").read_text()


def test_rows_are_means_over_the_runs(summary: dict[str, Any], finished: Path) -> None:
    rows = summary["suites"]["tiny"]["scorers"]
    found = results_of(finished)
    assert {row["scorer"] for row in rows} == set(found[0].scorers)
    for row in rows:
        means = [r.scorers[row["scorer"]].all for r in found]
        for key in ("auroc", "fpr95"):
            values = [getattr(m, key) for m in means]
            assert row[f"all_{key}"] == pytest.approx(statistics.fmean(values))
            assert row[f"all_{key}_std"] == pytest.approx(statistics.stdev(values))
        assert row["dim_auroc"] == pytest.approx(
            statistics.fmean(r.scorers[row["scorer"]].sets["dim"].metrics.auroc for r in found)
        )
        assert row["f_evaluations"] <= 16
        assert row["runs"] == 4
    assert [r["all_auroc"] for r in rows] == sorted((r["all_auroc"] for r in rows), reverse=True)


def test_the_rival_is_the_best_static_scorer(summary: dict[str, Any]) -> None:
    static = [r for r in summary["suites"]["tiny"]["scorers"] if r["kind"] == "static"]
    rivals = summary["rivals"]
    best = {r["scorer"]: r for r in static}
    assert best[rivals["overall"]["auroc"]]["all_auroc"] == pytest.approx(max(r["all_auroc"] for r in static))
    assert best[rivals["overall"]["fpr95"]]["all_fpr95"] == pytest.approx(min(r["all_fpr95"] for r in static))
    for name in ("dim", "bright"):
        own = best[rivals["sets"]["tiny"][name]]
        assert own[f"{name}_auroc"] == pytest.approx(max(r[f"{name}_auroc"] for r in static))


def test_comparisons_are_the_tests_of_the_published_scores(summary: dict[str, Any], finished: Path) -> None:
    paths = sorted((finished / "tiny").glob("*.parquet"))
    tables = [pd.read_parquet(p) for p in paths]
    assert len(tables) == 4
    assert set(tables[0].columns) == {"split", "role", "id", "field", *(r["rival"] for r in summary["comparisons"])}
    assert "early-path" in tables[0].columns, "another score of the path, kept and compared"
    for row in summary["comparisons"]:
        pair = PairedScores.from_tables(tables, "field", row["rival"])
        expected = paired_bootstrap([pair], resamples=50)
        own = expected.sets[0][row["scope"]] if "delong" in row else expected.mean
        for key in ("auroc", "fpr95"):
            for name, value in row[key].items():
                assert value == pytest.approx(getattr(getattr(own, key), name))
        sets = [row["scope"]] if "delong" in row else ["dim", "bright"]
        gains = [
            np.mean([run.scorers["field"].sets[n].metrics.auroc - run.scorers[row["rival"]].sets[n].metrics.auroc
                     for n in sets])
            for run in results_of(finished)
        ]  # fmt: skip
        assert row["ahead"]["auroc"] == sum(g > 1e-12 for g in gains)
        assert row["ahead"]["runs"] == 4
        if "delong" in row:
            ood = pair.ood[row["scope"]]
            tests = [delong(pair.id[0, r], ood[0, r], pair.id[1, r], ood[1, r]) for r in range(4)]
            assert row["delong"]["p"] == pytest.approx([t.p for t in tests])
            assert row["delong"]["median_p"] == pytest.approx(np.median([t.p for t in tests]))
            clear = [t.z for t in tests if t.p < 0.01]
            assert (row["delong"]["better"], row["delong"]["worse"]) == (
                sum(z > 0 for z in clear),
                sum(z < 0 for z in clear),
            )
    scopes = [(r["scope"], r["suite"]) for r in summary["comparisons"]]
    assert {("all suites", ""), ("suite", "tiny"), ("dim", "tiny"), ("bright", "tiny")} == set(scopes)
    assert len({(r["scope"], r["rival"]) for r in summary["comparisons"]}) == len(scopes), "each rival once"


def test_leaving_sets_out(summary: dict[str, Any], finished: Path) -> None:
    tables = [pd.read_parquet(p) for p in sorted((finished / "tiny").glob("*.parquet"))]
    text = (finished / "tables.md").read_text()
    found = {entry["rival"]: entry for entry in summary["leaving_out"]}
    assert set(found) == {*summary["rivals"]["overall"].values(), "field:start_only=true"}
    for rival, entry in found.items():
        own = paired_bootstrap([PairedScores.from_tables(tables, "field", rival)], resamples=50)
        assert entry["control"] == (rival == "field:start_only=true")
        rows = {(*row["out"], row["statistic"]): row for row in entry["rows"]}
        assert set(rows) == {("mean",), ("tiny/dim", "mean"), ("tiny/bright", "mean"), ("median",)}
        expected = {("mean",): own.mean, ("median",): own.median(), ("tiny/dim", "mean"): own.sets[0]["bright"]}
        for name, comparison in expected.items():
            assert rows[name]["auroc"] == pytest.approx(asdict(comparison.auroc))
            assert rows[name]["fpr95"] == pytest.approx(asdict(comparison.fpr95))
        for key, sign in (("auroc", 1), ("fpr95", -1)):
            gains = {name: sign * getattr(own.sets[0][name], key).difference for name in ("dim", "bright")}
            costs = [row["out"] for row in entry["rows"] if f"costs most {key}" in row["extreme"]]
            assert len(costs) == 1
            (name,) = costs[0]
            assert gains[name.removeprefix("tiny/")] == pytest.approx(max(gains.values()))
            assert entry["sets"][key] == {
                "ahead": sum(g > 1e-12 for g in gains.values()),
                "level": sum(abs(g) <= 1e-12 for g in gains.values()),
                "behind": sum(g < -1e-12 for g in gains.values()),
            }
        assert f"- Against `{rival}`" in text
    assert "## Leaving sets out" in text
    assert "its lead is no blind result" in text


def test_sets_of_crops_are_left_out_together(script: ModuleType) -> None:
    rng = np.random.default_rng(0)
    scores = {
        suite: pd.concat(
            pd.DataFrame({"split": split, "role": role, "id": [f"{prefix}/{i:04d}" for i in range(12)]}
                         | {k: rng.normal(size=12) for k in ("field", "knn")})
            for split, role, prefix in (("test", "test", "t"), ("near", "near", "n"), ("crops", "far", "skimage/brick"))
        )
        for suite in ("one", "two")
    }  # fmt: skip
    contest = script.contest("knn", {suite: [table] for suite, table in scores.items()}, 20)
    suites = [script.Stored(suite, (), ()) for suite in scores]
    (entry,) = script.leaving_out(suites, script.Rivals({"auroc": "knn", "fpr95": "knn"}, {}, {}), [], {"knn": contest})
    assert len(entry["rows"]) == 1 + 4 + 1 + 1
    row = entry["rows"][-2]
    assert row["out"] == ["one/crops", "two/crops"]
    near = [sets["near"].auroc.difference for sets in contest.bootstrap.sets]
    assert row["auroc"]["difference"] == pytest.approx(np.mean(near))


def test_a_control_is_no_rival(script: ModuleType, summary: dict[str, Any]) -> None:
    control = "field:start_only=true"
    assert [script.kind_of(s) for s in ("field", control, "knn:view=cls")] == ["path", "control", "static"]
    assert {r["scorer"] for r in summary["suites"]["tiny"]["scorers"] if r["kind"] == "control"} == {control}
    assert control not in json.dumps(summary["rivals"])
    rows = [r for r in summary["comparisons"] if r["rival"] == control]
    assert [r["chosen"] for r in rows] == [script.CONTROL] * 4, "all suites, the suite and both sets"


def test_the_claim_is_not_met_by_half_a_protocol(summary: dict[str, Any], finished: Path) -> None:
    target = summary["target"]
    assert not target["met"]
    assert {"suite fashion was not run", "suite cifar10-local was not run", "4 runs of tiny, not 9"} <= set(
        target["wanting"]
    )
    assert "**It does not hold.**" in (finished / "tables.md").read_text()


def test_the_control_has_untrained_weights(summary: dict[str, Any], finished: Path) -> None:
    (run,) = summary["suites"]["tiny"]["control_runs"]
    assert run["model"]["name"] == "tiny-mae-s1-untrained"
    assert run["model"]["parameters"] == results_of(finished)[0].model["parameters"]
    assert run["model"]["fingerprint"] not in {r.model["fingerprint"] for r in results_of(finished)}
    assert {r["scorer"] for r in summary["suites"]["tiny"]["control"]} == set(results_of(finished)[0].scorers)
    text = (finished / "tables.md").read_text()
    assert "control, untrained weights" in text
    assert text.index("**Not a result**") > text.index("tiny: all scorers")


def test_markdown_and_csv_hold_every_scorer(summary: dict[str, Any], finished: Path) -> None:
    text = (finished / "tables.md").read_text()
    labels = [r["scorer"] for r in summary["suites"]["tiny"]["scorers"]]
    for label in labels:
        assert text.count(f"\n| `{label}` |") == 2, "once in the table, once in the control's"
    assert "nan" not in text
    assert "Rivals are chosen on the test sets" in text
    with open(finished / "scorers.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(r["scorer"], r["set"]) for r in rows} == {
        (label, name) for label in labels for name in ("all", "near", "far", "dim", "bright")
    }


def test_the_same_command_computes_nothing_again(
    script: ModuleType, place: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (finished / "tables.md").read_bytes()
    (finished / "tables.md").unlink()
    monkeypatch.setattr(script, "train_model", lambda *_, **__: pytest.fail("trained again"))
    monkeypatch.setattr(script.Evaluator, "_compute", lambda *_: pytest.fail("scored again"))
    script.main(command(place, "--train"))
    assert (finished / "tables.md").read_bytes() == before


def test_tables_alone_need_the_published_files_only(script: ModuleType, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "out")
    for name in ("tables.md", "summary.json", "scorers.csv"):
        (tmp_path / "out" / name).unlink()
    assert not list(tmp_path.rglob("result.json")), "`traj-ood leaderboard` would take it for a run of its own"
    alone = ["--tables-only", "--out", str(tmp_path / "out"), "--runs", str(tmp_path / "none"), "--resamples", "50"]
    script.main(alone)
    for name in ("tables.md", "summary.json", "scorers.csv"):
        assert (tmp_path / "out" / name).read_bytes() == (finished / name).read_bytes()


# ---------------------------------------------------------------------------------------------- parts


def test_which_scorers_are_static(script: ModuleType) -> None:
    labels = script.declared_scorers(vit(), whole_path=False)
    static = {label for label in labels if script.is_static(label)}
    assert {
        "mahalanobis",
        "mahalanobis:view=grid",
        "knn:view=tokens",
        "gmm:view=cls",
        "lid",
        "reconstruction",
    } <= static
    assert not static & {"field", "early-path", "start-distance", "first-residual", "trajectory:horizon=16"}
    assert "trajectory" not in labels
    assert len(set(labels)) == len(labels)
    longer = set(script.declared_scorers(vit(), whole_path=True)) - set(labels)
    assert longer == {"trajectory", "trajectory:view=mean", "trajectory:view=cls", "end-distance", "steps"}
    assert not [label for label in script.declared_scorers(conv(), whole_path=False) if ":view=" in label]


def test_the_best_rival_over_two_suites(script: ModuleType) -> None:
    def rows(**values: float) -> list[dict[str, Any]]:
        names = ("knn", "lid", "gmm")
        figures = [dict(zip(values, v, strict=True)) for v in zip(*values.values(), strict=True)]
        return [
            {"scorer": n, "kind": "static"} | {f"{k}_auroc": v for k, v in f.items()}
            | {f"{k}_fpr95": v for k, v in f.items()}
            for n, f in zip(names, figures, strict=True)
        ] + [{"scorer": "field", "kind": "path"}]  # fmt: skip

    tables = {"one": rows(a=(0.9, 0.8, 0.1), b=(0.5, 0.8, 0.1)), "two": rows(c=(0.9, 0.6, 0.1))}  # type: ignore[arg-type]
    rivals = script.rivals_of(tables, {"one": {"a": "near", "b": "far"}, "two": {"c": "far"}})
    assert rivals.overall == {"auroc": "knn", "fpr95": "gmm"}  # 2.3 of 3 sets against 2.2
    assert rivals.suites == {"one": {"auroc": "lid", "fpr95": "gmm"}, "two": {"auroc": "knn", "fpr95": "gmm"}}
    assert rivals.sets == {"one": {"a": "knn", "b": "lid"}, "two": {"c": "knn"}}
    assert rivals.labels() == ["knn", "gmm", "lid"]
    without = script.rivals_of(tables, {"one": {"a": "diagnostic", "b": "far"}, "two": {"c": "far"}})
    assert without.suites["one"] == {"auroc": "lid", "fpr95": "gmm"}  # of b alone
    assert without.sets["one"] == {"a": "knn", "b": "lid"}


@pytest.mark.parametrize("worse", ["auroc", "fpr95", "p", "cost", None])
def test_what_the_claim_asks(script: ModuleType, worse: str | None) -> None:
    row = {
        "scope": "all suites",
        "rival": "knn",
        "auroc": {"difference": -0.01 if worse == "auroc" else 0.01, "p": 0.02 if worse == "p" else 0.001},
        "fpr95": {"difference": 0.01 if worse == "fpr95" else -0.01, "p": 0.001},
    }
    suites = [script.Stored(name, (None,) * 9, ()) for name in script.SUITES]
    row["chosen"] = "best auroc"
    figures = {"auroc": {"difference": -1.0, "p": 1.0}, "fpr95": {"difference": 1.0, "p": 1.0}}
    control = {"scope": "all suites", "rival": "field:start_only=true", "chosen": script.CONTROL, **figures}
    found = script.target([row, control], 17.0 if worse == "cost" else 1.0, suites)
    assert found["met"] == (worse is None)
    assert len(found["wanting"]) == (worse is not None)


# ---------------------------------------------------------------------------------------------- errors


def fails(script: ModuleType, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        script.main(arguments)
    assert stopped.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_errors_in_one_line(
    script: ModuleType, place: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = command(place, "--models-dir", str(tmp_path / "none"), "--out", str(tmp_path / "out"))
    assert "tiny-mae-s1: expected a trained model, found none: add --train" in fails(script, elsewhere, capsys)
    model = str(place / "models" / "tiny-mae-s1")
    twice = command(place, "--models", model, model)
    assert "have the same weights: expected separately trained ones" in fails(script, twice, capsys)
    bare = ["--suite", str(place / "tiny.yaml"), "--out", str(tmp_path / "out")]
    assert "expected --config (how its models are trained) or --models, got neither" in fails(script, bare, capsys)
    nothing = ["--tables-only", "--out", str(tmp_path / "out")]
    assert "expected the runs of at least one suite, found none" in fails(script, nothing, capsys)
    assert "give a --suite to run, or --tables-only" in fails(script, [], capsys)
    without = command(place, "--scorers", "knn", "mahalanobis")
    assert "--scorers: expected field among them, got knn mahalanobis" in fails(script, without, capsys)


def test_other_runs_are_not_mixed_in(
    script: ModuleType, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished, tmp_path / "out")
    path = next((tmp_path / "out" / "tiny").glob("*s2--seed1.json"))
    tree = json.loads(path.read_text())
    tree["config"]["per_set"] = 5
    path.write_text(json.dumps(tree))
    alone = ["--tables-only", "--out", str(tmp_path / "out"), "--runs", str(tmp_path)]
    assert "expected the same protocol as" in fails(script, alone, capsys)
    tree["config"]["per_set"] = 9
    tree["scorers"]["field"] |= {"sets": tree["scorers"]["knn"]["sets"]} | {
        k: tree["scorers"]["knn"][k] for k in ("near", "far", "all")
    }
    path.write_text(json.dumps(tree))
    assert "expected the scores behind the result of tiny--tiny-mae-s2--seed1, got others" in fails(
        script, alone, capsys
    )
    path.unlink()
    next((tmp_path / "out" / "tiny").glob("*s1--seed0.parquet")).unlink()
    text = fails(script, alone, capsys)
    assert "expected the scores of field" in text
    assert "run --suite tiny again" in text
