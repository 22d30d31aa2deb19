"""Code of a user's own: --import on every command, plugins that are installed, templates, detectors that name it."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from click.testing import CliRunner, Result

import traj_ood
from traj_ood.autoencoders import FAMILIES
from traj_ood.backbones import LIBRARIES
from traj_ood.cli import main
from traj_ood.data import registry as benchmarks
from traj_ood.errors import TrajOODError
from traj_ood.io import extensions
from traj_ood.io.provenance import code_digest, environment, package_digest
from traj_ood.scorers import SCORERS, default_suite

MINE = """
from dataclasses import dataclass
from typing import ClassVar
import traj_ood

@traj_ood.register
@dataclass
class Mine(traj_ood.FeatureScorer):
    name: ClassVar[str] = "mine"
    summary: ClassVar[str] = "norm of the feature"
    k: int | None = 5

    def score(self, evidence):
        return self.features(evidence).double().norm(dim=1)
"""

NORMS = "h = self.features(evidence).double().norm(dim=1)"
PATH_SCORER = """
from dataclasses import dataclass
from typing import ClassVar
import traj_ood

@traj_ood.register
@dataclass
class MinePath(traj_ood.Scorer):
    name: ClassVar[str] = "mine-path"
    summary: ClassVar[str] = "length of the first step"

    def needs(self):
        return traj_ood.Needs(steps=2)

    def score(self, evidence):
        return evidence.path().residuals[:, 0]
"""


@pytest.fixture(autouse=True)
def registries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test registers is forgotten; what it imports, too."""
    tables: list[dict[str, Any]] = [SCORERS, FAMILIES, LIBRARIES, benchmarks._REGISTRY, extensions._IMPORTED]
    before = [dict(table) for table in tables]
    yield
    for table, content in zip(tables, before, strict=True):
        table.clear()
        table.update(content)
    extensions.entry_points.cache_clear()


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def mine(folder: Path, text: str = MINE) -> Path:
    (folder / "mine.py").write_text(text)
    return folder / "mine.py"


def forget() -> None:
    SCORERS.pop("mine", None)
    extensions._IMPORTED.clear()


# ---------------------------------------------------------------------------------------------- --import


def test_every_command_takes_imports(tmp_path: Path) -> None:
    for name, command in main.commands.items():
        assert "--import" in {text for p in command.params for text in p.opts}, name
    listed = call("list", "scorers", "--import", mine(tmp_path))
    assert "norm of the feature" in listed.stdout


def test_a_detector_of_an_own_scorer_names_its_file_and_runs_nothing(tmp_path: Path) -> None:
    yaml, script, out = tiny.write_benchmark(tmp_path, train=40), mine(tmp_path), tmp_path / "detector"
    tiny.conv().save_pretrained(tmp_path / "conv")
    arguments = ["fit", yaml, "--model", tmp_path / "conv", "--scorer", "mine", "--tpr", "0.5", "--out", out]
    made = call(*arguments, "--import", script, "-q")
    assert made.exit_code == 0, made.output
    record = json.loads((out / "detector.json").read_text())["scorer"]["origin"]
    assert (record["file"], len(record["sha256"])) == ("mine.py", 64)
    image = next((tmp_path / "images").rglob("*.png"))
    with_it = call("score", out, image, "-q")
    forget()
    without = call("score", out, image, "-q")
    assert without.exit_code == 2
    assert "its scorer 'mine' is defined in mine.py (SHA-256 " in without.stderr
    assert "give --import mine.py with its path" in without.stderr
    again = call("score", out, image, "-q", "--import", script)
    assert (again.exit_code, again.stdout) == (0, with_it.stdout)
    forget()
    script.write_text(MINE + "# another comment\n")
    extensions.import_extension(str(script))
    with pytest.warns(UserWarning, match=r"mine\.py here is not the same file"):
        traj_ood.Detector.load(out, device="cpu")
    forget()
    script.write_text(MINE.replace("norm(dim=1)", "sum(dim=1)"))
    extensions.import_extension(str(script))
    with pytest.warns(UserWarning, match="not the same file"), pytest.raises(TrajOODError, match=r"probe|test images"):
        traj_ood.Detector.load(out, device="cpu")


def test_what_was_computed_with_an_imported_file_is_computed_again_when_it_changes(tmp_path: Path) -> None:
    plain = code_digest()
    assert "imported" not in environment()
    script = mine(tmp_path)
    extensions.import_extension(str(script))
    first = code_digest()
    assert environment()["imported"].startswith("mine.py ")
    forget()
    script.write_text(MINE + "# new\n")
    extensions.import_extension(str(script))
    assert len({plain, first, code_digest()}) == 3
    assert package_digest() == plain


def test_a_finished_run_is_not_that_of_another_version_of_an_imported_file(tmp_path: Path) -> None:
    yaml, script = tiny.write_benchmark(tmp_path), mine(tmp_path)
    tiny.conv().save_pretrained(tmp_path / "conv")
    run = ["bench", yaml, "--model", tmp_path / "conv", "--scorers", "mine", "--out", tmp_path / "runs", "-q"]
    run += ["--bootstrap", "0", "--no-plots", "--no-pictures", "--import"]
    first = call(*run, script)
    assert first.exit_code == 0, first.output
    forget()
    script.write_text(MINE.replace("norm(dim=1)", "sum(dim=1)"))
    second = call(*run, script)
    assert second.exit_code == 2
    assert "has a run with another version of mine.py (--import): choose another --out, or discard it" in second.stderr
    again = call(*run, script, "--fresh")
    assert again.exit_code == 0, again.output
    assert again.stdout != first.stdout
    (tmp_path / "other.py").write_text("")
    returned = call(*run, script, "--import", tmp_path / "other.py")
    assert returned.stdout == again.stdout
    assert "a finished run made with other imports (mine.py there, mine.py, other.py here), whose" in returned.stderr


def test_a_file_is_run_once_and_may_import_its_neighbours_but_hides_no_library(tmp_path: Path) -> None:
    (tmp_path / "neighbour_of_mine.py").write_text("NAME = 'mine'\n")
    (tmp_path / "json.py").write_text("raise RuntimeError('the wrong json')\n")
    script = mine(tmp_path, "import json, neighbour_of_mine\n" + MINE)
    path = list(sys.path)
    assert extensions.import_extension(str(script)) is extensions.import_extension(str(script))
    assert sys.path == path
    assert isinstance(traj_ood.create_scorer("mine"), traj_ood.FeatureScorer)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def f(:\n", "mine.py: line 1 is not Python"),
        ("\n1 / 0\n", "mine.py, line 2: ZeroDivisionError: division by zero: correct it"),
        ("import no_such_library\n", "mine.py: it imports no_such_library, which is not installed"),
        ("raise SystemExit(3)\n", "mine.py: it calls sys.exit (code 3)"),
        (MINE.replace('"mine"', '"knn"'), "scorer name 'knn' is taken by KNN of traj_ood.scorers.knn"),
        (MINE.replace("def score", "def scored"), "Mine is abstract: expected score(): define it"),
        (
            MINE.replace(" = 5", "").replace("@dataclass", "@dataclass(kw_only=True)"),
            "Mine: option k has no default: add one",
        ),
        (MINE + "    def needs(self):\n        return 3\n", "expected needs() to return traj_ood.Needs(...), got int"),
        (MINE + "    def needs(self):\n        return self.x\n", "or its needs() fail ('Mine' object has no attribute"),
    ],
)
def test_files_that_cannot_be_imported_say_why_in_a_line(tmp_path: Path, text: str, words: str) -> None:
    result = call("list", "--import", mine(tmp_path, text))
    assert result.exit_code == 2
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("self.features(evidence).double()", r"expected score() to return one float64 per image, (7,), got (7, 16)"),
        ("torch.zeros(3)", "(7,), got (3,) torch.float32: correct it"),
        ("3", "(7,), got 3: correct it"),
        ("self.state['meen']", "score() failed in mine.py, line 14: KeyError: 'meen': correct it"),
        ("torch.zeros(len(evidence)) / 0 * undefined", "line 14: NameError: name 'undefined' is not defined"),
    ],
)
def test_mistakes_in_an_own_scorer_are_found_in_its_file(tmp_path: Path, body: str, words: str) -> None:
    text = MINE.replace("self.features(evidence).double().norm(dim=1)", body).replace(
        "import traj_ood", "import torch, traj_ood"
    )
    (tmp_path / "mine.py").write_text(text)
    extensions.import_extension(str(tmp_path / "mine.py"))
    scorers = traj_ood.ScorerSet(tiny.vit(), ["mine"]).fit(traj_ood.Normalised(tiny.images(9)))
    with pytest.raises(TrajOODError) as raised:
        scorers.score(traj_ood.Normalised(tiny.images(7)))
    assert "scorer mine: " in str(raised.value)
    assert words in str(raised.value)


@pytest.mark.parametrize(
    ("learnt", "score", "words"),
    [
        ("{}", "h + torch.randn(len(h))", r"score\(\) draws random numbers: .* differ by .*: correct it"),
        ("{}", "h - h.mean()", r"score\(\) depends on batch-mates: .* alone differ by .* of the largest: correct it"),
        ("vars(self).update(mu=2.0) or {}", "h - self.mu", r"no attribute 'mu': correct it. .* before it is saved"),
        ("vars(self).update(mu=2.0) or {}", "h - getattr(self, 'mu', 0)", r"more than options and state.*self\.state"),
    ],
)
@pytest.mark.parametrize("count", [2, 7, 40])
def test_an_own_scorer_whose_scores_depend_on_more_than_the_image_is_refused(
    tmp_path: Path, learnt: str, score: str, words: str, count: int
) -> None:
    body = f"\n    def learn(self, train):\n        return {learnt}\n"
    text = MINE.replace("return self.features(evidence).double().norm(dim=1)", f"{NORMS}\n        return {score}")
    (tmp_path / "mine.py").write_text("import torch\n" + text + body)
    extensions.import_extension(str(tmp_path / "mine.py"))
    scorers = traj_ood.ScorerSet(tiny.vit(), ["mine"]).fit(traj_ood.Normalised(tiny.images(9)))
    assert torch.isfinite(scorers.score(traj_ood.Normalised(tiny.images(1))).scores["mine"]).all()
    with pytest.raises(TrajOODError, match=rf"scorer mine: .*{words}"):
        scorers.score(traj_ood.Normalised(tiny.images(count)))


def test_an_own_scorer_of_the_path_passes_the_trial(tmp_path: Path) -> None:
    extensions.import_extension(str(mine(tmp_path, PATH_SCORER)))
    scorers = traj_ood.ScorerSet(tiny.vit(), ["mine-path"]).fit(traj_ood.Normalised(tiny.images(9)))
    scored = scorers.score(traj_ood.Normalised(tiny.images(7)))
    torch.testing.assert_close(scored.scores["mine-path"], scored.evidence.path().residuals[:, 0])


@pytest.mark.parametrize(("body", "words"), [("3", "tensors by name, got 3"), ("1 / 0", "ZeroDivisionError: division")])
def test_mistakes_in_what_an_own_scorer_learns(tmp_path: Path, body: str, words: str) -> None:
    (tmp_path / "mine.py").write_text(f"{MINE}\n    def learn(self, train):\n        return {body}\n")
    extensions.import_extension(str(tmp_path / "mine.py"))
    with pytest.raises(TrajOODError, match=rf"scorer mine: .*learn\(\).*{words}"):
        traj_ood.ScorerSet(tiny.vit(), ["mine"]).fit(traj_ood.Normalised(tiny.images(9)))


MY_MODEL = """
import torch, traj_ood

@traj_ood.register_autoencoder
class MyAutoencoder(traj_ood.Autoencoder):
    family, summary = "mine", "mine:<folder>"

    def __init__(self):
        self.name, self.input_shape, self.module = "mine", (1, 8, 8), torch.nn.Linear(64, 4)
        self.preprocessing = traj_ood.Preprocessing(self.input_shape)

    @classmethod
    def from_pretrained(cls, source): return cls()
    def save_pretrained(self, folder): pass
    def encode_batch(self, images):
        return ENCODE
    def decode_batch(self, latents):
        return DECODE
"""


@pytest.mark.parametrize(
    ("encode", "decode", "scorer", "words"),
    [
        ("self.module(images)", "None", "knn", "encode of images (2, 1, 8, 8) failed in model.py, line 16: "),
        ("images.flatten(1)", "latents.nothing", "field", "mine: decode failed in model.py, line 18: AttributeError: "),
        ("torch.zeros(10**14)", "None", "knn", "can't allocate memory"),
    ],
)
def test_mistakes_in_an_own_model_are_found_in_its_file(
    tmp_path: Path, encode: str, decode: str, scorer: str, words: str
) -> None:
    (tmp_path / "model.py").write_text(MY_MODEL.replace("ENCODE", encode).replace("DECODE", decode))
    tiny.write_images(tmp_path / "images", 40, 0)
    given = ["--import", tmp_path / "model.py", "--model", "mine:x", "--scorer", scorer]
    result = call("fit", tmp_path / "images", *given, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert words in result.stderr
    assert ("give a smaller --batch-size" in result.stderr) == ("memory" in words)


def test_names_that_are_nothing() -> None:
    assert "expected a Python file, found nothing" in call("list", "--import", "gone.py").stderr
    assert "no such module: give a path" in call("list", "--import", "no_such_module_here").stderr
    with pytest.raises(TrajOODError, match=r"unknown scorer 'myne'.*one of your own needs --import FILE\.py"):
        traj_ood.create_scorer("myne")


# ---------------------------------------------------------------------------------------------- plugins


def plugins(monkeypatch: pytest.MonkeyPatch, group: str, **values: str) -> None:
    points = tuple(importlib.metadata.EntryPoint(name.replace("_", "-"), v, group) for name, v in values.items())
    monkeypatch.setattr(extensions, "entry_points", lambda asked: points if asked == group else ())
    monkeypatch.setattr(extensions.entry_points, "cache_clear", lambda: None, raising=False)


def test_an_installed_scorer_is_found_by_its_name_and_in_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plugin_a.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    plugins(monkeypatch, "traj_ood.scorers", mine="plugin_a:Mine", broken="plugin_of_nobody")
    assert traj_ood.create_scorer("mine:k=3").label == "mine:k=3"
    with pytest.warns(UserWarning, match=r"plugin plugin_of_nobody .*cannot be imported .*repair or uninstall"):
        assert "mine" in default_suite(tiny.conv())
    with pytest.raises(TrajOODError, match="plugin plugin_of_nobody"):
        traj_ood.create_scorer("broken")


def test_a_run_is_not_that_of_another_version_of_an_installed_scorer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    yaml = tiny.write_benchmark(tmp_path)
    tiny.conv().save_pretrained(tmp_path / "conv")
    (tmp_path / "plugin_c.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    plugins(monkeypatch, "traj_ood.scorers", mine="plugin_c:Mine")
    run = ["bench", yaml, "--model", tmp_path / "conv", "--scorers", "mine", "--out", tmp_path / "runs", "-q"]
    run += ["--bootstrap", "0", "--no-plots", "--no-pictures"]
    first = call(*run)
    assert first.exit_code == 0, first.output
    assert call(*run).stdout == first.stdout
    (tmp_path / "plugin_c.py").write_text(MINE.replace("norm(dim=1)", "sum(dim=1)"))
    second = call(*run)
    assert second.exit_code == 2
    assert "has a run with another config (config.scorers: another version of mine): choose" in second.stderr


def test_installed_models_and_benchmarks_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plugin_b.py").write_text(
        "import traj_ood\nfrom toy_autoencoder import LinearAutoencoder\n"
        "@traj_ood.register_autoencoder\nclass Own(LinearAutoencoder):\n    family = 'own-linear'\n    marks = {}\n"
        "@traj_ood.register_benchmark('own-set', 'cats vs dogs', needs='pets/')\n"
        "def load(root):\n    return traj_ood.load_benchmark(str(root / 'tiny.yaml'))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    tiny.write_benchmark(tmp_path)
    plugins(monkeypatch, "traj_ood.models", own_linear="plugin_b")
    assert traj_ood.load_autoencoder("own-linear:5").family == "own-linear"
    assert "own-set" in {info.name for info in traj_ood.list_benchmarks()}
    assert len(traj_ood.load_benchmark("own-set", tmp_path).test.images)
    with pytest.raises(TrajOODError, match=r"benchmark name 'fashion' is taken by .*load_fashion"):
        traj_ood.register_benchmark("fashion", "x")(lambda root: None)  # type: ignore[arg-type, return-value]


# ---------------------------------------------------------------------------------------------- a file to begin with


def test_the_template_passes_its_own_test_and_the_linter(tmp_path: Path) -> None:
    made = call("new", "scorer", "my-score", "--out", tmp_path)
    assert made.exit_code == 0, made.output
    assert {path.name for path in tmp_path.iterdir()} == {"my_score.py", "test_my_score.py"}
    lint = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--line-length", "120", "--select", "E,F,W,I,B", str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert lint.returncode == 0, lint.stdout
    code = pytest.main(["-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(tmp_path / "test_my_score.py")])
    assert code == 0
    assert call("new", "scorer", "my-score", "--out", tmp_path).exit_code == 2
    assert "is taken by KNN" in call("new", "scorer", "knn", "--out", tmp_path).stderr
    assert "expected lower-case letters" in call("new", "scorer", "Mein Score", "--out", tmp_path).stderr
    assert torch.get_default_dtype() == torch.float32
