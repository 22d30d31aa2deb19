"""Import OpenOOD's modules, check them, and extend its registry for pipelines."""

from __future__ import annotations

import functools
import inspect
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

from traj_ood.backbones.openood_networks import import_openood, older_openood
from traj_ood.openood.settings import openood_names

_PARTS = {
    "api": ("openood.evaluation_api", ("Evaluator",)),
    "api_postprocessor": ("openood.evaluation_api.postprocessor", ("postprocessors", "get_postprocessor")),
    "postprocessors": ("openood.postprocessors", ("BasePostprocessor",)),
    "utils": ("openood.postprocessors.utils", ("get_postprocessor",)),
    "config": ("openood.utils.config", ("Config",)),
}
_ARGUMENTS = ("id_name", "data_root", "config_root", "preprocessor", "postprocessor_name", "postprocessor")


def load_library() -> SimpleNamespace:
    """Import openood and check that it has everything used here, as v1.5 has."""
    modules = {part: import_openood(name, *attributes) for part, (name, attributes) in _PARTS.items()}
    known = inspect.signature(modules["api"].Evaluator.__init__).parameters
    absent = [a for a in _ARGUMENTS if a not in known]
    if absent:
        raise older_openood(f"argument {absent[0]} of openood.evaluation_api.Evaluator")
    return SimpleNamespace(**modules)


def serve_pipelines(utils: ModuleType, cls: type) -> None:
    """Wrap ``get_postprocessor``, which OpenOOD's pipelines call, in all modules that have imported it."""
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
