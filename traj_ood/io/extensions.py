"""User code that extends traj_ood: files and modules given with ``--import``, and installed plugins.

Only the user decides what runs, by naming a file or by installing a plugin. What the folder of a model or a detector
names is never run. The entry-point groups of plugins are ``traj_ood.scorers``, ``traj_ood.models`` and
``traj_ood.benchmarks``; an entry point's name is that of the scorer, model family or benchmark, its value the module or
class whose import registers it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from traj_ood.errors import TrajOODError, foreign_errors, is_out_of_memory, warn
from traj_ood.io.own_files import loaded_since, with_helpers

_PACKAGE = __name__.split(".")[0]


@dataclass(frozen=True)
class Extension:
    """An imported file or module: its name, for messages, and the SHA-256 of its source files and of those of the user
    that these import."""

    name: str
    digest: str


_IMPORTED: dict[str, Extension] = {}


def imported() -> list[Extension]:
    """All extensions that :func:`import_extension` has imported, sorted by name."""
    return sorted(_IMPORTED.values(), key=lambda extension: (extension.name, extension.digest))


def import_extension(source: str) -> Extension:
    """Run a Python file (a path that ends in ``.py``), or import a module, so that it registers scorers, models,
    benchmarks or questions.

    A file can import modules of its own folder, and a module may be in the working directory. A source is run only once
    per process. An error of its code is reported with the line.
    """
    is_file = source.endswith(".py")
    key = str(Path(source).expanduser().resolve()) if is_file else source
    if key in _IMPORTED:
        return _IMPORTED[key]
    before = set(sys.modules)
    with _importable(str(Path(key).parent) if is_file else "."), _extension_errors(source):
        files = _run_file(Path(key)) if is_file else _files_of(importlib.import_module(source))
    helpers = {*loaded_since(before), *(helper for file in files for helper in with_helpers(file))}
    files = [*files, *sorted(helpers - set(files))]
    made = _IMPORTED[key] = Extension(Path(key).name if is_file else source, _digest(files))
    return made


def load_plugins(group: str, name: str | None = None) -> None:
    """Import the installed plugins of a group; with ``name``, only those of this name. Without it, a broken plugin only
    gives a warning, so that the others remain usable."""
    for point in entry_points(group):
        if name in (None, point.name):
            try:
                with foreign_errors(f"plugin {point.value} ({point.name} of {group}): cannot be imported"):
                    point.load()
            except TrajOODError as error:
                if name is not None:
                    raise
                warn(f"{error}: repair or uninstall it", stacklevel=2)


def origin_of(cls: type[Any]) -> dict[str, str] | None:
    """Where a user's class was defined: its module, the name of its file, and the SHA-256 of this file and of those of
    the user that it imports; None for our own classes. Nothing is ever loaded by these names."""
    if cls.__module__.split(".")[0] == _PACKAGE:
        return None
    file = None
    with contextlib.suppress(TypeError, OSError):  # a notebook's class has no file
        file = Path(inspect.getfile(cls))
    if file is None or not file.is_file():
        return {"module": cls.__module__}
    return {"module": cls.__module__, "file": file.name, "sha256": _digest(with_helpers(file))}


@cache
def entry_points(group: str) -> tuple[metadata.EntryPoint, ...]:
    return tuple(metadata.entry_points(group=group))


def _run_file(path: Path) -> list[Path]:
    if not path.is_file():
        raise TrajOODError(f"--import {path}: expected a Python file, found nothing: correct the path")
    name = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise TrajOODError(f"--import {path}: expected a Python file that can be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their annotations up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return [path]


def _files_of(module: Any) -> list[Path]:
    """The source files of a module; for a package, all files below its folder."""
    if getattr(module, "__path__", None):
        return sorted(file for folder in module.__path__ for file in Path(folder).rglob("*.py"))
    return [Path(module.__file__)] if getattr(module, "__file__", None) else []


def _digest(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes().replace(b"\r\n", b"\n") + b"\0")
    return digest.hexdigest()


@contextlib.contextmanager
def _importable(folder: str) -> Iterator[None]:
    """Context manager that appends ``folder`` to ``sys.path``: at its end, so that it hides no installed library."""
    sys.path.append(folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


@contextlib.contextmanager
def _extension_errors(source: str) -> Iterator[None]:
    """Context manager that turns what the extension raises into a ``TrajOODError`` with its file and line."""
    try:
        yield
    except TrajOODError as error:
        text = str(error)
        raise error if text.startswith("--import") else TrajOODError(f"--import {source}: {text}") from error
    except SyntaxError as error:
        raise TrajOODError(f"--import {source}: line {error.lineno} is not Python ({error.msg}): correct it") from error
    except ModuleNotFoundError as error:
        if error.name is not None and source.split(".")[0] == error.name:
            raise TrajOODError(
                f"--import {source}: no such module: give a path that ends in .py, or a module that is installed or "
                "lies in the working directory"
            ) from error
        raise TrajOODError(f"--import {source}: it imports {error.name}, which is not installed: install it") from error
    except Exception as error:
        line = _line_of(error, source)
        raise TrajOODError(f"--import {source}{line}: {type(error).__name__}: {error}: correct it") from error
    except SystemExit as error:
        raise TrajOODError(f"--import {source}: it calls sys.exit (code {error.code}): remove the call") from error


@contextlib.contextmanager
def own_code(cls: type[Any], call: str) -> Iterator[None]:
    """Context manager that turns what a ``call`` of a user's class raises into a ``TrajOODError`` with its file and
    line; what our own classes raise, and errors for want of memory, pass unchanged."""
    try:
        yield
    except TrajOODError:
        raise
    except Exception as error:
        own = origin_of(cls)
        if own is None or is_out_of_memory(error):  # the caller knows what to make smaller
            raise
        file = own.get("file", own["module"])
        text = f"{call} failed in {file}{_line_of(error, file)}: {type(error).__name__}: {error}: correct it"
        raise TrajOODError(text) from error


def _line_of(error: Exception, source: str) -> str:
    """``, line 7`` if ``source`` is in the error's traceback, else an empty string."""
    lines, trace = [], error.__traceback__
    while trace is not None:
        if Path(trace.tb_frame.f_code.co_filename).name == Path(source).name:
            lines.append(trace.tb_lineno)
        trace = trace.tb_next
    return f", line {lines[-1]}" if lines else ""
