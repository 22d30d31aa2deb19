"""The user's source files behind a file: those that it imports, from its own folder or from anywhere but a library."""

from __future__ import annotations

import ast
import sys
import sysconfig
from collections.abc import Collection, Iterator
from functools import cache
from pathlib import Path


def with_helpers(file: Path) -> list[Path]:
    """``file`` and the files below its folder that it imports, directly or through others, also inside of functions;
    ``file`` first, the others sorted. A library's file stands alone: its version identifies it."""
    return [file, *_helpers(file.resolve())]


def loaded_since(before: Collection[str]) -> list[Path]:
    """The source files, sorted, of the modules that were imported since ``before``, the names in ``sys.modules`` then;
    without libraries."""
    new = [sys.modules[name] for name in list(sys.modules) if name not in before]
    files = {Path(file) for module in new if (file := getattr(module, "__file__", None))}
    # Some libraries make modules with the name of a file that does not exist.
    return sorted(file for file in files if file.suffix == ".py" and file.is_file() and not is_library(file))


def is_library(file: Path) -> bool:
    """Whether a file belongs to Python, to an installed library or to this package."""
    place = file.resolve()
    installed = {"site-packages", "dist-packages"} & set(place.parts)  # also those of another environment
    return bool(installed) or any(place.is_relative_to(folder) for folder in _library_folders())


@cache
def _library_folders() -> tuple[Path, ...]:
    places = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib")]
    return *(Path(place).resolve() for place in places), Path(__file__).resolve().parents[1]


@cache
def _helpers(file: Path) -> tuple[Path, ...]:
    """Cached, because the code that runs is that of the first import."""
    found: set[Path] = set()
    waiting = [] if is_library(file) else [file]
    while waiting:
        new = {path for path in _imported_by(waiting.pop(), file.parent) if path not in found and path != file}
        found |= new
        waiting += new
    return tuple(sorted(found))


def _imported_by(file: Path, root: Path) -> Iterator[Path]:
    """The files below ``root``, or beside ``file``, that it imports."""
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError):  # reported where it is imported
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names, folder = [alias.name for alias in node.names], root
        elif isinstance(node, ast.ImportFrom):
            module = f"{node.module}." if node.module else ""
            names = [module + alias.name for alias in node.names]
            folder = file.parents[node.level - 1] if node.level else root
        else:
            continue
        for name in names:
            parts = name.split(".")
            for depth in range(1, len(parts) + 1):  # a package's __init__ runs, too
                place = folder.joinpath(*parts[:depth])
                yield from (p.resolve() for p in (place.with_suffix(".py"), place / "__init__.py") if p.is_file())
