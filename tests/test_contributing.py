"""What CONTRIBUTING.md shows works as it stands."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from click.testing import CliRunner

import traj_ood
from traj_ood.analysis import Finding, Workspace, base
from traj_ood.cli import main
from traj_ood.data import load_benchmark
from traj_ood.data.preprocessing import Normalised
from traj_ood.errors import TrajOODError
from traj_ood.openood.settings import config_text, openood_names
from traj_ood.scorers import SCORERS, Needs, create_scorers, default_suite

ROOT = Path(__file__).parents[1]


def section(heading: str) -> str:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return text.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def block(heading: str, language: str = "python") -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", section(heading), flags=re.DOTALL)
    return found


def run(heading: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names of a module that holds the block."""
    module = types.ModuleType("contributed")
    monkeypatch.setitem(sys.modules, "contributed", module)
    exec(block(heading), vars(module))
    return vars(module)


@pytest.fixture
def scorers() -> Iterator[None]:
    before = dict(SCORERS)
    yield
    SCORERS.clear()
    SCORERS.update(before)


def test_a_scorer(monkeypatch: pytest.MonkeyPatch, scorers: None) -> None:
    run("Add a scorer", monkeypatch)
    train, test, model = tiny.images(20, seed=1), tiny.images(5, seed=2), tiny.conv()
    scored = traj_ood.ScorerSet(model, ["farthest-feature"]).fit(Normalised(train)).score(Normalised(test))
    mean = model.encode(train).double().mean(dim=0)
    expected = (model.encode(test).double() - mean).abs().amax(dim=1)
    torch.testing.assert_close(scored.scores["farthest-feature"], expected)


def test_one_file_puts_a_scorer_wherever_scorers_are_named(monkeypatch: pytest.MonkeyPatch, scorers: None) -> None:
    before = default_suite(tiny.vit())
    made = run("Add a scorer", monkeypatch)["FarthestFeature"]
    assert default_suite(tiny.vit()) == [*before, "farthest-feature"]
    assert [scorer.name for scorer in create_scorers(["all"], tiny.conv())][-1] == "farthest-feature"
    assert openood_names()["traj_ood_farthest_feature"] == "farthest-feature"
    assert made.summary in config_text("farthest-feature")
    listed = CliRunner().invoke(main, ["list", "scorers"]).output
    assert re.search(rf"farthest-feature +{re.escape(made.summary)}; options {{'view': 'mean'}}", listed)
    with pytest.raises(TrajOODError, match="'farthest-featur': did you mean 'farthest-feature'"):
        create_scorers(["farthest-featur"], tiny.conv())


def test_a_scorer_declares_its_part_of_the_suite(monkeypatch: pytest.MonkeyPatch, scorers: None) -> None:
    made = run("Add a scorer", monkeypatch)["FarthestFeature"]
    monkeypatch.setattr(made, "suite", {"": 105, "view=cls": 405})
    suite = default_suite(tiny.vit())  # places 100 and 101, 110 and 111: those of the field and the early path
    assert suite[1:4] == ["field:start_only=true", "farthest-feature", "early-path"]
    assert suite.index("trajectory:view=cls") + 1 == suite.index("farthest-feature:view=cls")
    assert "farthest-feature:view=cls" not in default_suite(tiny.conv())
    monkeypatch.setattr(made, "suite", {})
    assert "farthest-feature" not in default_suite(tiny.vit())
    monkeypatch.setattr(made, "suite", {"": 105})
    for needs in (Needs(labels=True), Needs(logits=True), Needs(features=frozenset({"backbone"}))):
        monkeypatch.setattr(made, "needs", lambda self, needs=needs: needs)
        assert "farthest-feature" not in default_suite(tiny.conv())


def test_a_file_and_its_import_are_all_that_a_scorer_and_a_question_need(tmp_path: Path) -> None:
    package = shutil.copytree(ROOT / "traj_ood", tmp_path / "traj_ood", ignore=shutil.ignore_patterns("models"))
    for heading, folder in (("Add a scorer", "scorers"), ("Add a question", "analysis")):
        (found,) = re.findall(rf"`(from\s+traj_ood\.{folder}\.\w+\s+import \w+ as \w+)`", section(heading))
        line = " ".join(found.split())
        file = line.split()[1].replace(".", "/") + ".py"
        assert f"`{file}`" in section(heading)
        (tmp_path / file).write_text(block(heading), encoding="utf-8")
        index = package / folder / "__init__.py"  # as its first import, when the room's other names are not there yet
        index.write_text(index.read_text(encoding="utf-8").replace("\nfrom ", f"\n{line}\nfrom ", 1), encoding="utf-8")
    code = (
        "import traj_ood, traj_ood.analysis as analysis\n"
        "print(traj_ood.__file__, traj_ood.create_scorer('farthest-feature').label, *analysis.QUESTIONS)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    path, scorer, *questions = done.stdout.split()
    assert (path, scorer) == (str(package / "__init__.py"), "farthest-feature"), done.stderr
    assert "mean-of-draws" in questions


def test_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.linalg.qr(torch.randn(64, 5, generator=torch.Generator().manual_seed(0)))[0].T
    model = run("Add a model", monkeypatch)["LinearAutoencoder"](weight, (1, 8, 8))
    images = tiny.images(30)
    path = traj_ood.iterate(model.self_map, model.encode(images))
    assert path.steps.tolist() == [2] * 30  # a projection: f(z) = z
    detector = traj_ood.Detector.fit(model, images.sigmoid(), "knn")
    latents = (images[:1].sigmoid().flatten(1) @ weight.T).double()
    assert bool(detector.score(images[:1].sigmoid()).isfinite().all())
    torch.testing.assert_close(model.encode(images[:1].sigmoid()).double(), latents, rtol=1e-5, atol=1e-6)


def test_the_command_that_runs_a_family_in_one_file(tmp_path: Path) -> None:
    (found,) = re.findall(r"`traj-ood\s+(bench\s[^`]+)`", section("Add a model"))
    command = found.split()
    assert command[1:3] == ["fashion", "--quick"]
    command[1:3] = [str(tiny.write_benchmark(tmp_path)), "--no-plots", "--bootstrap", "0"]
    command += ["--out", str(tmp_path / "runs"), "--device", "cpu", "--quiet"]
    command = [sys.executable, "-m", "traj_ood", *command]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=tiny.PATIENCE)
    assert done.returncode == 0, done.stderr
    assert "| trajectory |" in done.stdout


def test_a_benchmark(tmp_path: Path) -> None:
    (tmp_path / "pets.yaml").write_text(block("Add a benchmark", "yaml"))
    for seed, folder in enumerate(("cats/train", "cats/test", "dogs", "textures")):
        tiny.write_images(tmp_path / "images" / folder, 4, seed)
    made = load_benchmark(str(tmp_path / "pets.yaml"))
    assert [(split.name, split.role, len(split.images)) for split in made.splits()] == [
        ("train", "train", 4),
        ("test", "test", 4),
        ("dogs", "near", 4),
        ("textures", "far", 4),
    ]


def test_a_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    questions = dict(base.QUESTIONS)
    monkeypatch.setattr(base, "QUESTIONS", questions)
    question = run("Add a question", monkeypatch)["MeanOfDraws"](draws=400)
    assert list(questions)[-1] == "mean-of-draws"
    finding = question.run(Workspace(tmp_path / "units"), tmp_path)
    expected = torch.randn(400, generator=torch.Generator().manual_seed(0)).mean()
    assert finding.figures["mean"] == pytest.approx(float(expected))
    assert Finding.load(tmp_path) == finding
    assert finding.differences == ("draws: 400 here, 100000 in the paper",)


def test_the_picture_of_the_house_is_that_of_the_imports() -> None:
    spec = importlib.util.spec_from_file_location("house", ROOT / "benchmarks" / "house.py")
    assert spec is not None
    assert spec.loader is not None
    house = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(house)
    drawn = (ROOT / "docs" / "house.svg").read_text(encoding="utf-8")
    assert house.described().replace(">", "&gt;") in drawn, "python benchmarks/house.py draws it anew"
