"""Wrappers of a user's functions: the network behind the functions, and copies that have to use their own."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from types import FunctionType
from typing import Any

from torch import nn

from traj_ood.errors import TrajOODError


class OwnFunctions(ABC):
    """Copies and unpickled objects of a wrapper of functions have a network of their own, and are refused if their
    functions would use another one: Python copies no function, and a function finds the network that its module has in
    the process that unpickles it."""

    name: str
    module: nn.Module

    @abstractmethod
    def functions(self) -> tuple[Callable[..., Any], ...]:
        """The functions that use ``module``."""

    def _use_the_module(self) -> bool:
        return bool(set(self.module.modules()) & set(module_behind(*self.functions()).modules()))

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_used_the_module": self._use_the_module()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        used = state.pop("_used_the_module", False)
        vars(self).update(state)
        if used and not self._use_the_module():
            raise TrajOODError(
                f"{self.name}: cannot be copied or pickled, because its functions would use the original's network: "
                f"copy the network, and make a {type(self).__name__} of the copy"
            )


def module_behind(*functions: Callable[..., Any]) -> nn.Module:
    """The module whose weights the functions use: the function itself, its owner, or modules in its closure or globals.

    Modules that are part of another one are left out. Several are returned as a ModuleList; none, as an empty module.
    """
    found = list({id(m): m for function in functions for m in _reached(function, set())}.values())
    outer = [m for m in found if not any(m is part for other in found if other is not m for part in other.modules())]
    return outer[0] if len(outer) == 1 else nn.ModuleList(outer) if outer else nn.Module()


def original(module: nn.Module) -> nn.Module:
    """The module that ``torch.compile`` wrapped, or the module itself."""
    return getattr(module, "_orig_mod", module)


def _reached(value: Any, seen: set[int]) -> Iterator[nn.Module]:
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, nn.Module):
        yield original(value)
    elif isinstance(value, partial):
        for part in (value.func, *value.args, *value.keywords.values()):
            yield from _reached(part, seen)
    elif inspect.ismethod(value):
        yield from _reached(value.__self__, seen)
    elif isinstance(value, FunctionType):
        names = inspect.getclosurevars(value)
        for part in (*names.nonlocals.values(), *names.globals.values()):
            if not isinstance(part, FunctionType) or part.__module__ == value.__module__:  # not into libraries
                yield from _reached(part, seen)
    elif hasattr(value, "__dict__") and not isinstance(value, type) and not inspect.ismodule(value):
        yield from (original(part) for part in vars(value).values() if isinstance(part, nn.Module))
