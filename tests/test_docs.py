"""README and the pages of docs/: figures from records, links that lead somewhere, blocks and notebooks that run."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml

from traj_ood.cli import main
from traj_ood.data.fashion_mnist import find_fashion_mnist
from traj_ood.scorers import SCORERS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))
CLASSIFIER = {  # labels of the run on a backbone, where static scorers read its features
    "mahalanobis": "mahalanobis:view=backbone",
    "knn": "knn:view=backbone",
    "mahalanobis:view=grid": None,
}


def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


# ---------------------------------------------------------------------------------------------- README


def test_readme_is_one_sitting() -> None:
    lines = text(ROOT / "README.md").splitlines()
    assert len(lines) <= 150
    table = text(ROOT / "README.md").split("<!-- table:start -->")[1].split("<!-- table:end -->")[0].strip()
    assert len(table.splitlines()) - 2 <= 8


def test_the_table_of_readme_is_that_of_the_records() -> None:
    with (ROOT / "results" / "protocol" / "scorers.csv").open(newline="") as file:
        means = {(row["suite"], row["scorer"]): row for row in csv.DictReader(file) if row["set"] == "all"}
    record = json.loads(text(ROOT / "results" / "backbone" / "fashion--timm-fashion-resnet--seed0" / "result.json"))

    def shown(figures: Any) -> str:
        return "—" if figures is None else f"{100 * float(figures['auroc']):.1f} / {100 * float(figures['fpr95']):.1f}"

    table = text(ROOT / "README.md").split("<!-- table:start -->")[1].split("<!-- table:end -->")[0]
    rows = [[cell.strip() for cell in line.strip(" |").split("|")] for line in table.strip().splitlines()[2:]]
    assert len(rows) == 7
    for title, fashion, cifar, classifier, evaluations in rows:
        found = re.match(r"`([^`]+)`", title)
        label = (
            found[1]
            if found
            else {"reconstruction": title, "the paper's score, 16 steps": "trajectory:horizon=16"}[title]
        )
        assert fashion == shown(means["fashion", label]), label
        assert cifar == shown(means["cifar10-local", label]), label
        own = CLASSIFIER.get(label, label)
        assert classifier == shown(record["scorers"][own]["all"] if own else None), label
        assert evaluations == f"{float(means['fashion', label]['f_evaluations']):.0f}"


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


def test_the_citation_file_is_valid_enough() -> None:
    tree = yaml.safe_load(text(ROOT / "CITATION.cff"))
    assert {"cff-version", "message", "title", "authors", "version"} <= set(tree)
    assert tree["version"] == __import__("traj_ood").__version__


# ---------------------------------------------------------------------------------------------- the site, notebooks


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
