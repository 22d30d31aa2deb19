"""Wrappers of a user's functions: the network behind the functions, and copies that have to use their own."""

from __future__ import annotations

import dis
import hashlib
import inspect
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from itertools import chain
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import numpy as np
from torch import Tensor, nn

from traj_ood.errors import TrajOODError, is_out_of_memory
from traj_ood.io.own_files import is_library
from traj_ood.io.tensor_file import digest_of

_BY_PYTHON = ("__firstlineno__", "__static_attributes__", "__annotations__", "__dataclass_fields__")
"""Entries of a class that Python makes, in some versions with line numbers or in an order that is not fixed."""
_FILLING = {"append", "extend", "insert", "update", "setdefault", "pop", "popitem", "remove", "add", "clear"}
"""Methods that change a collection."""
_MAX_ENTRIES = 10_000
"""Entries of a collection that count, beside their number: a million take seconds."""
_MAX_VALUES = 2**22
"""Values of a tensor or an array that count, beside its shape."""


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


@contextmanager
def errors_of_functions(call: str) -> Iterator[None]:
    """Context manager that turns what a user's functions raise in a ``call`` into a ``TrajOODError``; errors for want
    of memory pass unchanged, because the caller knows what to make smaller."""
    try:
        yield
    except TrajOODError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        remedy = "correct the function, or give functions and an input_shape (C, H, W) that fit each other"
        raise TrajOODError(f"{call} failed: {type(error).__name__}: {error}: {remedy}") from error


def module_behind(*functions: Callable[..., Any]) -> nn.Module:
    """The module whose weights the functions use: the function itself, its owner, or modules in its closure or globals.

    Modules that are part of another one are left out. Several are returned as a ModuleList; none, as an empty module.
    """
    found = list({id(m): m for function in functions for m in _reached(function, set())}.values())
    outer = [m for m in found if not any(m is part for other in found if other is not m for part in other.modules())]
    return outer[0] if len(outer) == 1 else nn.ModuleList(outer) if outer else nn.Module()


def written_code(*values: Any) -> str:
    """SHA-256 (hex) of the code that functions and modules run, as far as it is the user's: their instructions, the
    numbers, texts, tensors and collections of these that they refer to, the functions that they call, and the classes
    of the objects that they use. Attributes of objects, comments and line numbers do not count, nor does what changes
    while the functions run: names that they assign, and collections beside code that fills any, such as a log."""
    digest, seen = hashlib.sha256(), set[int]()
    for value in values:
        for text in _written(value, seen):
            digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()


def _written(value: Any, seen: set[int]) -> Iterator[str]:
    if isinstance(value, bool | int | float | complex | str | bytes | None):
        yield repr(value)
        return
    if id(value) in seen or inspect.ismodule(value):
        return
    seen.add(id(value))
    if isinstance(value, tuple | list | dict):
        yield from [str(len(value))] if len(value) > _MAX_ENTRIES else []
        entries = (list(value.items()) if isinstance(value, dict) else value)[:_MAX_ENTRIES]
        for part in chain.from_iterable(entries) if isinstance(value, dict) else entries:
            yield from _written(part, seen)
    elif isinstance(value, frozenset):
        yield repr(sorted("".join(_written(part, {*seen})) for part in value))  # whose order differs between processes
    elif isinstance(value, Tensor | np.ndarray | np.generic):
        yield _values_of(value)
    elif isinstance(value, CodeType):
        yield f"{value.co_name} {value.co_code.hex()} {value.co_names}"
        yield from _written(value.co_consts, seen)
    elif isinstance(value, partial):
        for part in (value.func, *value.args, *value.keywords.values()):
            yield from _written(part, seen)
    elif inspect.ismethod(value):
        yield from _written(value.__func__, seen)
        yield from _written(value.__self__, seen)
    elif isinstance(value, FunctionType):
        if not is_of_library(value):
            defaults = (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
            parts = (*defaults, *_referred(value, _constants(value.__code__)))
            yield from _written(value.__code__, seen)
            yield from _written_beside([value], parts, seen)
    elif isinstance(value, nn.Module):
        for part in value.modules():
            yield from [f"{type(part).__qualname__}({part.extra_repr()})"] if is_of_library(type(part)) else []
            yield from _written(type(part), seen)
    elif isinstance(value, type):
        for cls in value.__mro__:
            if not is_of_library(cls):
                own = [getattr(p, "__func__", p) for name, p in list(vars(cls).items()) if name not in _BY_PYTHON]
                yield from _written_beside([part for part in own if isinstance(part, FunctionType)], own, seen)
    elif type(value).__module__ == "builtins" or is_of_library(type(value)):
        for name in ("fget", "func", "__wrapped__"):  # of a property, and of what functools makes of a function
            if isinstance(part := getattr(value, name, None), FunctionType):
                yield from _written(part, seen)
    else:
        yield from _written(type(value), seen)


def _written_beside(functions: Iterable[FunctionType], parts: Iterable[Any], seen: set[int]) -> Iterator[str]:
    """The code of ``parts``, without the collections among them if one of ``functions`` fills any collection."""
    steps = [step for function in functions for step in _steps(function.__code__)]
    fills = any(step.opname in ("STORE_SUBSCR", "DELETE_SUBSCR") or step.argval in _FILLING for step in steps)
    for part in parts:
        if not (fills and isinstance(part, list | dict)):
            yield from _written(part, seen)


def _values_of(value: Tensor | np.ndarray[Any, Any] | np.generic) -> str:
    """A digest of a tensor or an array; that of its type alone if it has no values that can be read, as on meta."""
    if isinstance(value, Tensor):
        with suppress(RuntimeError, TypeError):
            return f"{value.shape} {digest_of({'': value.flatten()[:_MAX_VALUES]}, None)}"
        return str(value.dtype)
    values = b"" if value.dtype.hasobject else value.reshape(-1)[:_MAX_VALUES].tobytes()
    return f"{value.dtype} {value.shape} {hashlib.sha256(values).hexdigest()}"


def _constants(code: CodeType) -> set[str]:
    """The names of other scopes that a function reads and does not assign."""
    steps = list(_steps(code))
    read = {step.argval for step in steps if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    assigned = {step.argval for step in steps if step.opname in ("STORE_GLOBAL", "STORE_DEREF")}
    return {*read, *code.co_freevars} - assigned


def _steps(code: CodeType) -> Iterator[dis.Instruction]:
    """The instructions of a function and of comprehensions and functions inside of it."""
    yield from dis.get_instructions(code)
    for part in code.co_consts:
        if isinstance(part, CodeType):
            yield from _steps(part)


def _referred(function: FunctionType, among: Collection[str] | None = None) -> Iterator[Any]:
    """What a function refers to by name (by default, by any in its code, also of attributes), also in comprehensions
    and functions inside of it: in its closure, in its globals, and in modules of the user's among these."""
    names = list(_names_in(function.__code__))
    own = [function.__globals__[n] for n in names if n in function.__globals__ and (among is None or n in among)]
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        if among is None or name in among:
            with suppress(ValueError):  # not assigned yet
                yield cell.cell_contents
    yield from own
    for part in own:
        file = getattr(part, "__file__", None) if inspect.ismodule(part) else None
        if file is not None and not is_library(Path(file)):
            yield from (getattr(part, name) for name in names if hasattr(part, name))


def _names_in(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for part in code.co_consts:
        if isinstance(part, CodeType):
            yield from _names_in(part)


def is_of_library(value: Any) -> bool:
    """Whether a class or function belongs to Python, to an installed library or to this package."""
    file = getattr(sys.modules.get(value.__module__), "__file__", None)
    return file is not None and is_library(Path(file))


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
        for part in _referred(value):
            if not isinstance(part, FunctionType) or part.__module__ == value.__module__:  # not into libraries
                yield from _reached(part, seen)
    elif hasattr(value, "__dict__") and not isinstance(value, type) and not inspect.ismodule(value):
        yield from (original(part) for part in vars(value).values() if isinstance(part, nn.Module))
