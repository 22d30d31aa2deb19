"""OpenOOD itself: its modules, checked when they are first needed, and its two registries."""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from traj_ood.errors import TrajOODError
from traj_ood.openood.settings import openood_names

_INSTALL = "pip install git+https://github.com/Jingkang50/OpenOOD"


@dataclass(frozen=True)
class Library:
    """The modules of openood that are used here."""

    api: ModuleType
    api_postprocessor: ModuleType
    postprocessors: ModuleType
    utils: ModuleType
    config: ModuleType


_PARTS = {
    "api": ("openood.evaluation_api", ("Evaluator",)),
    "api_postprocessor": ("openood.evaluation_api.postprocessor", ("postprocessors", "get_postprocessor")),
    "postprocessors": ("openood.postprocessors", ("BasePostprocessor",)),
    "utils": ("openood.postprocessors.utils", ("get_postprocessor",)),
    "config": ("openood.utils.config", ("Config",)),
}
_ARGUMENTS = ("id_name", "data_root", "config_root", "preprocessor", "postprocessor_name", "postprocessor")


def load_library() -> Library:
    """The parts of openood, checked.

    Raises:
        TrajOODError: openood is missing, lacks something it needs, or is older than v1.5.
    """
    modules = {}
    for part, (name, attributes) in _PARTS.items():
        modules[part] = module = _import(name)
        absent = [a for a in attributes if not hasattr(module, a)]
        if absent:
            raise _older(f"{name}.{absent[0]}")
    known = inspect.signature(modules["api"].Evaluator.__init__).parameters
    absent = [a for a in _ARGUMENTS if a not in known]
    if absent:
        raise _older(f"argument {absent[0]} of openood.evaluation_api.Evaluator")
    return Library(**modules)


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if missing == "openood":
            raise TrajOODError(f"openood is not installed, and it is not on PyPI: {_INSTALL}") from error
        if missing.split(".")[0] == "openood":
            raise _older(missing) from error
        raise TrajOODError(
            f"openood is installed, but {name} needs {missing!r}, which is not: install it (OpenOOD's own list of "
            "dependencies is incomplete)"
        ) from error
    except Exception as error:  # its undeclared dependencies fail in their own ways, such as imgaug with NumPy 2
        reason = " ".join(str(error).split()) or type(error).__name__
        raise TrajOODError(f"openood is installed, but importing {name} fails ({reason}): repair that first") from error


def _older(missing: str) -> TrajOODError:
    return TrajOODError(f"openood: expected v1.5 (main of December 2025), got a version without {missing}: {_INSTALL}")


def serve_pipelines(utils: ModuleType, cls: type) -> None:
    """Let the function that OpenOOD's pipelines ask know our names, wherever it was imported to."""
    original = utils.get_postprocessor
    if getattr(original, "serves_traj_ood", False):
        return

    @functools.wraps(original)
    def get_postprocessor(config: Any) -> Any:
        return cls(config) if config.postprocessor.name in openood_names() else original(config)

    get_postprocessor.serves_traj_ood = True  # type: ignore[attr-defined]
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "openood" and vars(module).get("get_postprocessor") is original:
            module.get_postprocessor = get_postprocessor  # type: ignore[attr-defined]
