"""README and the pages of docs/: figures from records, links that lead somewhere, blocks and notebooks that run."""

from __future__ import annotations

import csv
import doctest
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import types
from functools import cache
from pathlib import Path
from statistics import fmean

import pytest
import tiny
import torch
import which_score
import yaml

from traj_ood.autoencoders import FAMILIES, load_autoencoder
from traj_ood.cli import main
from traj_ood.data.fashion_mnist import find_fashion_mnist
from traj_ood.detector.packing import pack, unpack
from traj_ood.scorers import SCORERS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))
DIAGNOSTICS = ("textures", "photos", "noise")  # far sets in records older than that role
FIGURES = ("auroc", "fpr95")


def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


# ---------------------------------------------------------------------------------------------- README


def test_readme_is_one_sitting() -> None:
    lines = text(ROOT / "README.md").splitlines()
    assert len(lines) <= 150
    which = text(ROOT / "README.md").split("## Which score?")[1].split("\n## ")[0]
    assert (len(re.findall(r"^- ", which, flags=re.M)), which.count("![")) == (5, 1)


def protocol_means() -> tuple[dict[tuple[str, str], tuple[float, ...]], dict[str, float]]:
    """Means of the recorded protocol over sets that are no diagnostics, by suite and scorer; and evaluations of f."""
    with (ROOT / "results" / "protocol" / "scorers.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    sets: dict[tuple[str, str], list[tuple[float, ...]]] = {}
    for row in rows:
        if row["set"] not in ("all", "near", "far", *DIAGNOSTICS):
            sets.setdefault((row["suite"], row["scorer"]), []).append(tuple(float(row[f]) for f in FIGURES))
    assert {len(found) for found in sets.values()} == {5}
    means = {key: tuple(fmean(figures) for figures in zip(*found, strict=True)) for key, found in sets.items()}
    return means, {row["scorer"]: float(row["f_evaluations"]) for row in rows if row["suite"] == "fashion"}


def shown(figures: tuple[float, ...]) -> str:
    return " / ".join(f"{100 * figure:.1f}" for figure in figures)


def rows_of(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip(" |").split("|")] for line in table.strip().splitlines()]


def test_the_table_of_which_score_is_that_of_the_records() -> None:
    means, costs = protocol_means()
    page = text(DOCS / "which-score.md")
    rows = rows_of(page.split("| | `fashion` | `cifar10-local` | both | f / image |")[1].split("\n\n")[0])[1:]
    assert len(rows) == 7
    for title, *cells, evaluations in rows:
        label = re.findall(r"`([^`]+)`", title)[-1]
        suites = [means[suite, label] for suite in ("fashion", "cifar10-local")]
        both = tuple(fmean(figures) for figures in zip(*suites, strict=True))
        assert cells == [shown(figures) for figures in (*suites, both)], label
        assert evaluations == f"{costs[label]:.0f}"


def test_readme_and_its_picture_say_what_the_records_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    means, _ = protocol_means()
    field = {suite: 100 * means[suite, "field"][0] for suite in ("fashion", "cifar10-local")}
    said = " ".join(text(ROOT / "README.md").split())
    assert f"It has {field['fashion']:.1f} on `fashion` and {field['cifar10-local']:.1f} on `cifar10-local`" in said
    drawn = which_score.small_autoencoders()
    for (suite, label), (auroc, _) in means.items():
        assert drawn[suite][label] == pytest.approx(100 * auroc)
    page = text(DOCS / "which-score.md")
    suites = which_score.photographs("backbone")
    head = "| | " + " | ".join(f"`{suite}`" for suite in suites) + " |"
    for title, *cells in rows_of(page.split(head)[1].split("\n\n")[0])[1:]:
        label = "control: files" if title.startswith("control") else re.findall(r"`([^`]+)`", title)[0]
        for suite, cell in zip(suites, cells, strict=True):
            if cell != "—":
                assert suites[suite][label] == pytest.approx(float(cell.split(" / ")[0]), abs=0.06), (label, suite)
    monkeypatch.setattr(sys, "argv", ["which_score.py", "--out", str(tmp_path / "picture.png")])
    which_score.main()
    assert (tmp_path / "picture.png").stat().st_size > 10_000


# ---------------------------------------------------------------------------------------------- links and blocks


def anchor(heading: str) -> str:
    words = re.sub(r"[`*]", "", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", words).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    without_code = re.sub(r"```.*?```", "", text(page), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code):
        place, _, fragment = target.partition("#")
        if re.match(r"[a-z]+:", target) or place in ("../reference/commands.md", "reference/commands.md"):
            continue  # the second is made with the site
        file = page.parent / place if place else page
        assert file.exists(), f"{name(page)}: {target}"
        if fragment:
            assert fragment in {anchor(h) for h in re.findall(r"^#+ (.+)$", text(file), flags=re.M)}, target


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_and_options_in_pages_exist(page: Path) -> None:
    for line in re.findall(r"^(?:\$ )?traj-ood ([^\n]*)", text(page), flags=re.M):
        words = re.sub(r"#.*", "", line).split()
        command = main.commands.get(words[0])
        assert command is not None, line
        known = {option for p in command.params for option in (*p.opts, *p.secondary_opts)} | {"-h", "--help"}
        assert not {w for w in words if w.startswith("--")} - known, line


def test_every_picture_says_what_it_shows() -> None:
    for page in PAGES:
        assert all(len(alt) > 10 for alt in re.findall(r"!\[([^\]]*)\]\(", text(page))), name(page)


def test_the_scorer_of_the_guide_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", text(DOCS / "guides" / "own-scorer.md"), flags=re.DOTALL)
    before = dict(SCORERS)
    module = types.ModuleType("guide")
    monkeypatch.setitem(sys.modules, "guide", module)  # dataclasses look their annotations up there
    try:
        exec(block, vars(module))
        assert SCORERS["farthest"]().summary
    finally:
        SCORERS.clear()
        SCORERS.update(before)


def test_the_model_of_the_guide_is_saved_and_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", text(DOCS / "guides" / "own-autoencoder.md"), flags=re.DOTALL)
    before = dict(FAMILIES)
    module = types.ModuleType("guide")
    monkeypatch.setitem(sys.modules, "guide", module)
    try:
        exec(block, vars(module))
        model = vars(module)["MyAutoencoder"](vars(module)["Network"]())
        described = pack(model, tmp_path / "packed")  # into a folder that is not there yet
        assert unpack(described, tmp_path / "packed").fingerprint() == model.fingerprint()
        found = load_autoencoder(f"my-model:{tmp_path / 'packed'}")
        assert torch.equal(found.encode(images := torch.rand(2, 3, 40, 48)), model.encode(images))
    finally:
        FAMILIES.clear()
        FAMILIES.update(before)


def test_the_citation_file_is_valid_enough() -> None:
    tree = yaml.safe_load(text(ROOT / "CITATION.cff"))
    assert {"cff-version", "message", "title", "authors", "version"} <= set(tree)
    assert tree["version"] == __import__("traj_ood").__version__


# ---------------------------------------------------------------------------------------------- docstrings


def with_examples() -> list[str]:
    """Names of the modules with an example that is not skipped."""
    files = {path: text(path) for path in sorted((ROOT / "traj_ood").rglob("*.py"))}
    shown = [path for path, code in files.items() if re.search(r">>> (?!.*# doctest: [+]SKIP)", code)]
    return [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in shown]


@pytest.mark.parametrize("module", with_examples())
def test_examples_in_docstrings_run(module: str) -> None:
    assert doctest.testmod(importlib.import_module(module)).failed == 0


# ---------------------------------------------------------------------------------------------- the site, notebooks


@cache
def hooks() -> types.ModuleType:
    """docs/hooks/pages.py, which makes pages when the site is built."""
    pytest.importorskip("mkdocs", reason="needs mkdocs: pip install '.[docs]'")
    spec = importlib.util.spec_from_file_location("docs_hooks", DOCS / "hooks" / "pages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_sources_that_scorers_name_are_cited_in_full() -> None:
    pages = hooks()
    named = {key for name in SCORERS for key in pages.cited(name)}
    assert named == set(yaml.safe_load(text(DOCS / "hooks" / "sources.yaml")))  # none is missing, none left over
    assert {"Liu 2024", "Sun 2022", "Fumero 2026"} <= {key for n in ("fdbd", "knn-paper") for key in pages.cited(n)}


@pytest.mark.parametrize("scorer", sorted(SCORERS))
def test_every_scorer_has_its_page(scorer: str) -> None:
    page = hooks().scorer_page(scorer)
    assert page.startswith(f"# {scorer}\n")
    for part in ("**Cost an image:**", "## Options", "## Source", "## In the records"):
        assert page.count(part) == 1, part


def test_the_records_on_a_scorers_page_are_the_records() -> None:
    page = hooks().scorer_page("energy")
    record = json.loads(text(ROOT / "results" / "backbone" / "fashion--timm-fashion-resnet--seed0" / "result.json"))
    means = {label: scorer["all"]["auroc"] for label, scorer in record["scorers"].items()}
    place = 1 + sum(mean > means["energy"] for mean in means.values())
    all_sets = record["scorers"]["energy"]["all"]
    figures = f"{100 * all_sets['auroc']:.1f} / {100 * all_sets['fpr95']:.1f}"
    assert f"| `energy` | {figures} | {place} of {len(means)} |" in page


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    for module in ("mkdocs", "material", "mkdocstrings", "mkdocs_jupyter"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"needs {module}: pip install '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=tiny.PATIENCE)
    assert done.returncode == 0, done.stderr[-2000:]
    for page in ("index", "reference/commands", "reference/api", "scorers/field", "guides/own-scorer"):
        assert (tmp_path / "site" / f"{page}.html").stat().st_size > 3000
    found = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    assert not re.findall(
        r'src="https?:|<link[^>]*href="https?:[^"]*[.](?:css|js|woff2?)"', found
    )  # nothing is fetched


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(notebook: Path, tmp_path: Path) -> None:
    if find_fashion_mnist() is None and notebook.stem != "own-model":
        pytest.skip("needs Fashion-MNIST on this machine (run `make demo` once, or set TRAJ_OOD_DATA)")
    cells = [c for c in json.loads(text(notebook))["cells"] if c["cell_type"] == "code"]
    script = "\n".join("".join(cell["source"]) for cell in cells)
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:__main__", "-c", script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=tiny.PATIENCE,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()


def test_there_are_four_notebooks_without_stale_state() -> None:
    assert {n.stem for n in NOTEBOOKS} == {"quickstart", "own-model", "vector-field", "benchmark-to-detector"}
    for notebook in NOTEBOOKS:
        for cell in json.loads(text(notebook))["cells"]:
            assert not any("/tmp/" in line or "/home/" in line for line in json.dumps(cell).splitlines())


@pytest.mark.slow
def test_pyright_finds_no_mistake_in_the_examples(tmp_path: Path) -> None:
    """py.typed is a promise: code that uses the public API as the pages do is clean in pyright's basic mode."""
    program = shutil.which("pyright", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if program is None or shutil.which("node") is None:
        pytest.skip("needs pyright and node: pip install pyright")
    for page in (ROOT / "README.md", DOCS / "quickstart.md", DOCS / "guides" / "own-scorer.md"):
        for n, block in enumerate(re.findall(r"```python\n(.*?)```", text(page), flags=re.DOTALL)):
            (tmp_path / f"{page.stem.replace('-', '_').lower()}_{n}.py").write_text(block)
    settings = {"include": ["."], "typeCheckingMode": "basic", "extraPaths": [str(ROOT)]}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [program, "--pythonpath", sys.executable, "-p", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=tiny.PATIENCE)
    assert done.returncode == 0, done.stdout[-3000:]
