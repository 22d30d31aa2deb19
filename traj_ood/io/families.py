"""Registry of model families. A model is specified as ``family:source``, such as ``timm:resnet18``."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from inspect import get_annotations
from typing import Any, TypeVar

from traj_ood.errors import TrajOODError, foreign_errors, unknown_name
from traj_ood.io.extensions import load_plugins, origin_of

M = TypeVar("M")
_C = TypeVar("_C", bound=type[Any])


class Families(dict[str, type[M]]):
    """Model classes by family name. Each class registers itself in its own file with :meth:`register`.

    ``kind`` is what a class is called in messages, such as ``backbone library``, and ``model`` an instance, such as
    ``backbone``. ``key`` is the class attribute with the family's name. A class must define ``methods`` in addition to
    the abstract ones of ``base``.
    """

    def __init__(self, base: type[Any], kind: str, model: str, key: str, methods: tuple[str, ...]) -> None:
        super().__init__()
        self._base, self.kind, self.model, self.key, self._methods = base, kind, model, key, methods

    def register(self, cls: _C) -> _C:
        """Class decorator that registers a family under its name, a single word, if it is complete."""
        own: Any = cls
        where, name = f"{self.kind} {own.__qualname__}", getattr(own, self.key)
        home = (own.__module__, own.__qualname__)
        defined = {key for part in own.__mro__[: own.__mro__.index(self._base)] for key in vars(part)}
        missing = sorted({*getattr(own, "__abstractmethods__", ()), *(set(self._methods) - defined)})
        if missing or not own.summary:
            raise TrajOODError(f"{where}: expected {', '.join(missing) or 'a summary'} in the class: define it")
        if name == "custom" or not re.fullmatch(r"\w[\w.-]*", name):
            raise TrajOODError(f"{where}: expected {self.key} to be one word other than 'custom', got {name!r}")
        if name in self and (self[name].__module__, self[name].__qualname__) != home:  # a module may be reloaded
            raise TrajOODError(f"{where}: {self.key} {name!r} is taken by {self[name].__qualname__}: choose another")
        self[name] = own
        return cls

    def knows(self, name: str) -> bool:
        """Whether a family of this name is registered, here or by a plugin (entry points ``traj_ood.models``)."""
        if name not in self:
            load_plugins("traj_ood.models", name)
        return name in self

    def named(self, name: str) -> type[M]:
        """The class registered under ``name``, here or by a plugin."""
        if not self.knows(name):
            raise unknown_name(self.kind, name, self)
        return self[name]

    def load(self, spec: str, options: Mapping[str, Any]) -> M:
        """Load the model ``name:source`` with the ``load`` method of its family."""
        name, _, source = spec.partition(":")
        family: Any = self.named(name)
        if not source:
            raise TrajOODError(f"{self.model} {spec!r}: expected a name after {name}: ({family.summary})")
        own = origin_of(family)
        by = f"{family.__qualname__} of {own.get('file', own['module'])}" if own is not None else ""
        trouble = foreign_errors(f"{self.model} {spec!r}: {by} cannot load it") if own is not None else nullcontext()
        with trouble, unknown_options_named(f"{self.model} {spec!r}"):
            return self.complete(family.load(source, **options))

    def complete(self, model: M) -> M:
        """Return ``model``, which a family has made, after checking that it has every attribute that ``base`` declares.

        Raises:
            TrajOODError: it lacks one, or is no model at all.
        """
        if not isinstance(model, self._base):
            raise TrajOODError(
                f"{self.kind}: expected an instance of {self._base.__name__} from the method that loads it, got "
                f"{type(model).__name__}: return the model"
            )
        declared = get_annotations(self._base).items()
        missing = [name for name, kind in declared if not (kind.startswith("ClassVar") or hasattr(model, name))]
        if missing:
            raise TrajOODError(
                f"{self.kind} {type(model).__qualname__}: expected the attributes {', '.join(missing)}: set them in "
                "__init__"
            )
        return model


@contextmanager
def unknown_options_named(where: str) -> Iterator[None]:
    """Context manager that turns an unexpected keyword argument into a ``TrajOODError`` that begins with ``where``."""
    try:
        yield
    except TypeError as error:
        if "unexpected keyword" in str(error):
            raise TrajOODError(f"{where}: {str(error).split(') ')[-1]}") from error
        raise
