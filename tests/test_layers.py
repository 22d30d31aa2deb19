"""The house rules: imports point down, heavy libraries stay in their room, the public API resolves."""

from __future__ import annotations

import ast
import contextlib
import inspect
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import traj_ood
from traj_ood.scorers import SCORERS

PACKAGE = Path(traj_ood.__file__).parent
# A module may import what stands on a line above its own; modules of one line may not import each other.
# Folders count as one module; within a folder only cycles are forbidden.
LAYERS = [
    ("text",),
    ("errors",),
    ("io",),
    ("data", "drawing", "dynamics"),
    ("backbones", "index"),
    ("autoencoders",),
    ("attractors",),
    ("scorers",),
    ("graph",),
    ("detector", "evaluation", "training"),
    ("analysis", "export", "monitor", "openood", "report", "stream"),
    ("distributed", "serve"),
    ("cli", "postprocessors"),
    ("__main__",),
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
# Library → files, or beginnings of their paths (folders end in "/"), that may import it.
HEAVY = {
    "faiss": {"index/"},
    "matplotlib": {"analysis/drawings.py", "drawing/", "evaluation/plots.py", "evaluation/dynamics_plots.py"},
    "jinja2": {"report/page.py"},
    "transformers": {
        "autoencoders/language.py",
        "autoencoders/vision_encoder.py",
        "autoencoders/rehearsals.py",
        "autoencoders/vit_mae.py",
        "backbones/transformers_models.py",
        "io/pretrained.py",
    },
    "diffusers": {"autoencoders/diffusers_vae.py", "io/pretrained.py"},
    "openood": {"openood/", "backbones/openood_networks.py"},
    "timm": {"backbones/timm_models.py"},
    "torchvision": {
        "analysis/",
        "backbones/openood_networks.py",
        "backbones/torchvision_models.py",
        "data/fashion_mnist.py",
        "openood/",
    },
    "safetensors": {"io/tensor_file.py", "io/checkpoints.py"},
    "accelerate": {"evaluation/parallel.py"},
    "onnxruntime": {"export/formats.py"},
    "prometheus_client": {"monitor/metrics.py", "serve/"},
    "pyarrow": {"data/records.py", "monitor/rows.py", "stream/", "distributed/"},
    "click": {"cli/"},
    "fastapi": {"serve/"},
    "starlette": {"serve/"},
    "uvicorn": {"cli/serve.py", "serve/connections.py"},
}


def files() -> list[str]:
    return sorted(p.relative_to(PACKAGE).as_posix() for p in PACKAGE.rglob("*.py"))


def room(file: str) -> str:
    return file.split("/")[0].removesuffix(".py")


@cache
def imports(file: str) -> list[str]:
    """Full names of all that a file imports, also inside functions and under TYPE_CHECKING."""
    found = []
    for node in ast.walk(ast.parse((PACKAGE / file).read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def internal(file: str) -> set[str]:
    """Names below traj_ood that a file imports, as paths of modules where they are modules."""
    return {name.removeprefix("traj_ood.") for name in imports(file) if name.startswith("traj_ood.")}


@pytest.mark.parametrize("file", [f for f in files() if f != "__init__.py"])
def test_imports_point_down(file: str) -> None:
    own = room(file)
    assert own in RANK, f"give {own} a place in LAYERS"
    for name in internal(file):
        other = name.split(".")[0]
        assert other in RANK, f"{file} imports the package itself: traj_ood.{name}"
        assert other == own or RANK[other] < RANK[own], f"{file} imports traj_ood.{name}, which stands above it"


def test_only_the_public_api_imports_everything() -> None:
    for file in files():
        if file != "__init__.py":
            assert "traj_ood" not in imports(file), f"{file} imports the package instead of a module"


@pytest.mark.parametrize("folder", sorted({room(file) for file in files() if "/" in file}))
def test_no_cycles_inside_a_folder(folder: str) -> None:
    graph = {}
    for file in (f for f in files() if f.startswith(folder + "/") and not f.endswith("__init__.py")):
        inner = {n.split(".")[1] for n in internal(file) if n.startswith(folder + ".")}
        graph[Path(file).stem] = {n for n in inner if (PACKAGE / folder / f"{n}.py").is_file()}
    while graph:
        free = {name for name, needed in graph.items() if not needed & graph.keys()}
        assert free, f"{folder}: {sorted(graph)} import each other in a circle"
        graph = {name: needed for name, needed in graph.items() if name not in free}


@pytest.mark.parametrize("library", HEAVY)
def test_heavy_libraries_stay_in_their_room(library: str) -> None:
    users = {file for file in files() if any(name.split(".")[0] == library for name in imports(file))}
    strangers = {file for file in users if not file.startswith(tuple(HEAVY[library]))}
    assert not strangers


def test_no_other_room_names_a_scorer() -> None:
    """What holds for one scorer is declared by it, so that a new one needs no line elsewhere."""
    classes = {cls.__name__ for cls in SCORERS.values() if cls.__module__.startswith("traj_ood.")}
    for file in (f for f in files() if room(f) != "scorers"):
        named = {n.split(".")[-1] for n in internal(file) if n.startswith("scorers.")} & classes
        assert not named, f"{file} imports {', '.join(sorted(named))}"


def test_checkpoints_are_read_and_written_in_io() -> None:
    for file in files():
        tree = ast.parse((PACKAGE / file).read_text())
        calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        assert file == "io/checkpoints.py" or not calls & {"torch.load", "torch.save"}, f"{file}: use io/checkpoints.py"


def test_the_engine_knows_torch_and_nothing_else() -> None:
    roots = {name.split(".")[0] for name in imports("dynamics/iterate.py")} - set(sys.stdlib_module_names)
    assert roots == {"torch", "traj_ood"}
    assert {n.split(".")[0] for n in internal("dynamics/iterate.py")} == {"dynamics", "errors"}


def test_no_module_of_ours_is_imported_by_name() -> None:
    for file in files():
        for node in ast.walk(ast.parse((PACKAGE / file).read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
                assert file == "__init__.py" or "traj_ood" not in ast.unparse(node), f"{file}, line {node.lineno}"


@pytest.mark.parametrize("path", sorted(Path(__file__).parent.rglob("*.py")), ids=lambda path: path.stem)
def test_tests_import_no_private_name(path: Path) -> None:
    nodes = [n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.ImportFrom)]
    private = [a.name for n in nodes if (n.module or "").startswith("traj_ood") for a in n.names if a.name[0] == "_"]
    assert [name for name in private if not name.startswith("__")] == []


def test_tests_follow_the_rooms() -> None:
    folders = {path.parent.name for path in Path(__file__).parent.glob("*/*.py")}
    assert folders - {"helpers", "benchmarks"} <= {path.name for path in PACKAGE.iterdir() if path.is_dir()}


def test_nothing_imports_the_bridge_or_the_command_line() -> None:
    for file in files():
        rooms = {n.split(".")[0] for n in internal(file)}
        assert "openood" not in rooms or file.startswith("openood/")
        assert "cli" not in rooms or file == "__main__.py" or file.startswith("cli/")


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_import_is_light() -> None:
    heavy = "('torch', 'matplotlib', 'transformers', 'faiss', 'sklearn', 'pandas', 'numpy', 'PIL', 'click')"
    assert run(f"import traj_ood, sys; print([m for m in {heavy} if m in sys.modules])") == "[]"


def test_command_line_starts_light() -> None:
    heavy = "('torch', 'matplotlib', 'transformers', 'faiss', 'sklearn', 'pandas')"
    assert run(f"import traj_ood.cli, sys; print([m for m in {heavy} if m in sys.modules])") == "[]"


def test_importing_everything_but_plots_needs_no_matplotlib_and_no_transformers() -> None:
    code = (
        "import importlib, sys\n"
        "rooms = ('evaluation.evaluator', 'evaluation.leaderboard', 'training.surrogate', 'backbones')\n"
        "for m in rooms: importlib.import_module('traj_ood.' + m)\n"
        "heavy = ('matplotlib', 'transformers', 'faiss', 'sklearn', 'openood', 'timm', 'torchvision', 'accelerate')\n"
        "print([m for m in heavy if m in sys.modules])"
    )
    assert run(code) == "[]"


def test_public_names_resolve() -> None:
    assert len(traj_ood.__all__) == len(set(traj_ood.__all__))
    for name in traj_ood.__all__:
        assert getattr(traj_ood, name) is not None, name
    with pytest.raises(AttributeError, match="module 'traj_ood' has no attribute 'Trajektory'"):
        traj_ood.Trajektory  # noqa: B018


def test_paths_may_be_given_as_text() -> None:
    for name in traj_ood.__all__:
        given = getattr(traj_ood, name)
        methods = inspect.getmembers(given, callable) if inspect.isclass(given) else []
        for method, function in [("", given), *methods] if callable(given) else []:
            if method.startswith("_") or method in ("pack", "unpack"):  # hooks, called with a Path
                continue
            with contextlib.suppress(ValueError):  # built in
                for parameter in inspect.signature(function).parameters.values():
                    kind = str(parameter.annotation)
                    assert "Path" not in kind or "str" in kind, f"{name}.{method}: {parameter}"


@pytest.mark.parametrize("name", ["Postprocessor", "create_postprocessor"])
def test_former_names_warn_and_work(name: str) -> None:
    import traj_ood.postprocessors as former
    from traj_ood import scorers

    own = getattr(scorers, {"Postprocessor": "Scorer", "create_postprocessor": "create_scorer"}[name])
    for module in (traj_ood, former):
        with pytest.warns(DeprecationWarning, match=r"is now traj_ood\.scorers|is now traj_ood\."):
            assert getattr(module, name) is own


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    seen = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("traj_ood.")
        for alias in node.names
    }
    assert seen == set(traj_ood.__all__) - {"__version__"}


def test_version_is_the_packages() -> None:
    from importlib.metadata import version

    assert traj_ood.__version__ == version("traj_ood")
    assert (PACKAGE / "py.typed").is_file()
