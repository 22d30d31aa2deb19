"""benchmarks/recipes.py rehearsed on a tiny suite, and its summary on figures made for it."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest
import tiny
from toy_backbone import PixelBackbone

from traj_ood.backbones import LIBRARIES
from traj_ood.training.surrogate import SurrogateRecipe

pytest.importorskip("scikit_posthocs", reason="scikit-posthocs is not installed")


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    folder = Path(__file__).parents[2] / "benchmarks"
    before = list(sys.path)
    spec = importlib.util.spec_from_file_location("recipes", folder / "recipes.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["recipes"] = module
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before
    for name in ("recipes", "natural", "verdicts"):
        sys.modules.pop(name, None)


def test_every_recipe_can_be_made(script: ModuleType) -> None:
    made = {name: script.recipe_of(name, 64, 10) for name in script.RECIPES}
    assert made["default"] == SurrogateRecipe(steps=10)
    assert (made["no bottleneck"].bottleneck, made["no bottleneck"].hidden) == (64, (64,))
    assert made["width 256"].network(1280).bottleneck == 256
    assert len({str(recipe) for recipe in made.values()}) == len(made)
    assert len({script.slug(name) for name in made}) == len(made)
    assert all(set(script.slug(name)) <= set("abcdefghijklmnopqrstuvwxyz0123456789.-") for name in made)


def test_the_summary_takes_the_best_of_each_side_in_each_figure(script: ModuleType) -> None:
    base = {"suite": "s", "recipe": "default", "converged": 0.5, "distinct": 4, "healthy": True}
    figures = {"field": ("path", 0.7, 0.5), "msma": ("path", 0.8, 0.6), "knn": ("static", 0.75, 0.4)}
    figures["control: files"] = ("control", 0.9, 0.1)
    rows = pd.DataFrame(
        {**base, "seed": seed, "scorer": s, "kind": kind, "auroc": auroc + seed / 10, "fpr95": fpr}
        for s, (kind, auroc, fpr) in figures.items()
        for seed in (0, 1)
    )
    (row,) = script.summarise(rows)
    assert (row["auroc"]["path"], row["auroc"]["rival"], row["seeds"]) == ("msma", "knn", 2)
    assert (row["auroc"]["of_path"], row["auroc"]["ahead"]) == (pytest.approx(0.85), pytest.approx(0.05))
    assert (row["fpr95"]["path"], row["fpr95"]["ahead"]) == ("field", pytest.approx(-0.1))
    assert row["control"] == pytest.approx(0.95)
    assert row["leads_in_all"] == []
    text = script.render({"rehearsal": False, "recipes": [row]})
    assert text.rstrip().endswith("ahead in both figures: none.")


def test_two_scorers_that_lead_in_a_figure_each_are_not_one_that_leads_in_both(script: ModuleType) -> None:
    base = {"suite": "s", "recipe": "default", "seed": 0, "converged": 1, "distinct": 4, "healthy": True}
    figures = {"field": ("path", 0.7, 0.3), "msma": ("path", 0.8, 0.6), "knn": ("static", 0.75, 0.4)}
    figures["control: files"] = ("control", 0.9, 0.1)

    def text_of(figures: dict[str, tuple[str, float, float]]) -> str:
        rows = [{**base, "scorer": s, "kind": k, "auroc": a, "fpr95": f} for s, (k, a, f) in figures.items()]
        return script.render({"rehearsal": False, "recipes": script.summarise(pd.DataFrame(rows))})

    assert "in each figure: default (s).\n\nRecipes with one scorer" in text_of(figures)
    assert text_of(figures).rstrip().endswith("ahead in both figures: none.")
    assert text_of({**figures, "field": ("path", 0.8, 0.3)}).rstrip().endswith("ahead in both figures: default (s).")


@pytest.mark.slow
def test_a_rehearsal_from_end_to_end(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(LIBRARIES, "pixels", PixelBackbone)
    suite = tiny.write_benchmark(tmp_path, train=48, test=12, ood=12)
    suite.write_text(suite.read_text().replace("far: {bright: far}", "far: {bright: far}\ndiagnostic: {spare: val}"))
    suite.write_text(suite.read_text().replace("val: val\n", ""))
    command = ["--tiny", "--suite", str(suite), "--model", "pixels:12", "--device", "cpu", "--quiet"]
    command += ["--recipes", "default", "symmetric 1, four noise levels", "no bottleneck"]
    command += ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    with pytest.warns(UserWarning, match="unhealthy attractors"):
        script.main(command)
    text = capsys.readouterr().out
    assert "**A rehearsal** of few images and steps" in text
    records = {r["recipe"]: r for r in (json.loads(p.read_text()) for p in (tmp_path / "out" / "tiny").glob("*.json"))}
    assert set(records) == {"default", "symmetric 1, four noise levels", "no bottleneck"}
    assert records["no bottleneck"]["options"]["bottleneck"] == 12
    first, other = records["default"], records["no bottleneck"]
    for scorer in ("mahalanobis", "knn"):
        assert first["figures"][scorer] == other["figures"][scorer], "of the same features"
    assert first["figures"]["field"] != other["figures"]["field"]
    assert first["missing"]["rmds:covariance=ledoit-wolf"] == "the suite has no class labels"
    assert set(first["figures"]["knn"]) == {"dim", "bright", "spare"}
    rows = pd.read_csv(tmp_path / "out" / "recipes.csv")
    own = rows[(rows["recipe"] == "default") & (rows["scorer"] == "knn")].iloc[0]
    means = [first["figures"]["knn"][name]["auroc"] for name in ("dim", "bright")]
    assert own["auroc"] == pytest.approx(sum(means) / 2), "the diagnostic is not in the means"
    written = {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "tiny").glob("*.json")}
    script.main(command)
    assert {p: p.stat().st_mtime_ns for p in written} == written
    with pytest.raises(SystemExit):
        script.main([*command, "--steps", "20"])
    assert "expected a record of the same options, got another" in capsys.readouterr().err
