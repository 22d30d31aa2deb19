"""Options: the fields of a dataclass, read from text or from a YAML or JSON tree, and written as text again.

This one parser serves the options of scorers (``knn:k=5``) and of questions (``--option sizes=2,16``), training
configs, OpenOOD's yml files, and the records of runs and questions. A field can be annotated as

    int · float · bool · str · Literal["a", "b"] · tuple[int, ...] · any of these | None (written none)

also as ``Optional[int]``, and as a string under ``from __future__ import annotations``. A tree can also contain another
dataclass, ``dict[str, …]``, ``list[…]``, a tuple of fixed length, and ``Any`` for values that are checked elsewhere.

Pydantic is not used: it reads ``yes`` as true and ``5.0`` and ``1_0`` as integers, and has no text form of tuples and
None. The grammar below would be needed in any case, and its errors would have to be translated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from inspect import get_annotations
from itertools import repeat
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from traj_ood.errors import TrajOODError, unknown_name

MAX_INT = 2**32 - 1
"""Largest accepted integer: the largest seed that NumPy and scikit-learn accept. No other option needs more."""
_MAX_CHARACTERS = 40  # of a number
_SCALARS = (bool, int, float, str)
_UNIONS = (Union, UnionType)


def _read_hints(cls: type[Any]) -> dict[str, Any]:
    """The resolved annotations of a dataclass's fields alone: Python 3.10 does not resolve a plain ``ClassVar``."""
    names = {f.name for f in fields(cls)}
    found: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        own = {name: hint for name, hint in get_annotations(base).items() if name in names}
        bare = type(base.__name__, (), {"__annotations__": own, "__module__": base.__module__})
        found |= get_type_hints(bare, localns=dict(vars(base)))
    return found


_type_hints: Callable[..., dict[str, Any]] = cache(_read_hints)
"""Kept per class: they are needed for every scorer made, and evaluating the annotations took nine tenths of that."""


def option_kinds(cls: type[Any]) -> dict[str, Any]:
    """The resolved type annotation of each option."""
    try:
        hints = _type_hints(cls)
    except Exception as error:  # evaluating a user's annotation may raise anything
        raise TrajOODError(
            f"class {cls.__qualname__}: the annotations of its options cannot be read ({error}): import their types "
            "outside of TYPE_CHECKING, at the top of the module"
        ) from error
    return {f.name: hints[f.name] for f in fields(cls) if f.init}


def option_defaults(cls: type[Any]) -> dict[str, Any]:
    """The default of each option; ``MISSING`` if it has none."""
    return {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(cls) if f.init}


def split_pairs(texts: Iterable[str], owner: str) -> Iterator[tuple[str, str]]:
    """Split each ``key=value`` into its key and value."""
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise TrajOODError(f"{owner}: expected options as key=value, got {text!r}")
        yield key.strip(), value.strip()


def read_options(
    cls: type[Any],
    given: Mapping[str, Any],
    owner: str,
    *,
    noun: str = "option",
    joint: str | None = None,
    strict: bool = False,
) -> dict[str, Any]:
    """Convert the given options to keyword arguments of the dataclass ``cls``, each value to the type of its field.

    Args:
        cls: the dataclass.
        given: values by option: text, or parsed YAML or JSON.
        owner: whose options they are, for error messages, such as ``scorer knn``.
        noun: what an option is called in error messages.
        joint: separator of the parts of a tuple in text. Default None: a tuple must be given as a list.
        strict: for trees written by a program. Default false: text is parsed as a number where a number is expected,
            because YAML reads ``5e-3`` as text, and a section may be empty.
    """
    return _Reader(owner, noun, joint, strict).options(cls, given, "")


def write_option(value: Any, joint: str = "+") -> str:
    """A value as text, the inverse of :func:`read_options`."""
    if isinstance(value, tuple | list):
        return joint.join(write_option(part, joint) for part in value)
    if value is None or isinstance(value, bool):
        return str(value).lower()
    # 1e+20 is written 1e20, because + may be the separator of a tuple.
    return repr(float(value)).replace("e+", "e") if isinstance(value, float) else str(value)


def check_options(cls: type[Any], values: Mapping[str, Any], owner: str, *, reserved: str) -> None:
    """Check that the values of all options of ``cls``, written as text, are read back as the same values, and that
    texts contain none of the ``reserved`` characters, which separate options."""
    reader = _Reader(owner, "option", "+")
    for key, kind in option_kinds(cls).items():
        value = tuple(values[key]) if isinstance(values[key], list) else values[key]
        if isinstance(value, str) and (set(value) & set(reserved) or value != value.strip()):
            signs = " and ".join(map(repr, reserved))
            raise TrajOODError(f"{owner}, option {key}: expected text without {signs}, got {value!r}")
        if reader.read(kind, write_option(value), key) != value:
            raise reader.refused(kind, value, key)


def check_writable(cls: type[Any]) -> None:
    """Check that all options of a dataclass have types whose values can be written as text."""
    for name, kind in option_kinds(cls).items():
        if not _is_writable(kind):
            raise TrajOODError(
                f"class {cls.__qualname__}, option {name}: expected bool, int, float, str, Literal, a tuple of one of "
                f"these, or | None, got {kind}: other values cannot be written as {name}=value"
            )


@dataclass(frozen=True)
class _Reader:
    """The parser of :func:`read_options`, with its arguments as attributes; ``place`` is the dotted key of a value."""

    owner: str
    noun: str
    joint: str | None
    strict: bool = False

    def options(self, cls: type[Any], given: Mapping[str, Any], place: str) -> dict[str, Any]:
        kinds, owner = option_kinds(cls), f"{self.owner}, {place}" if place else self.owner
        for key in given:
            if key not in kinds:
                raise unknown_name(f"{self.noun} of {owner}", str(key), kinds or ["(none)"])
        missing = [key for key, default in option_defaults(cls).items() if default is MISSING and key not in given]
        if missing:
            raise TrajOODError(f"{owner}: missing {', '.join(missing)}: expected a value, as there is no default")
        return {key: self.read(kinds[key], value, f"{place}.{key}".strip(".")) for key, value in given.items()}

    def read(self, kind: Any, given: Any, place: str) -> Any:
        """``given`` converted to the type ``kind``."""
        origin, inner = get_origin(kind), get_args(kind)
        if kind is Any:
            return given
        if origin in _UNIONS:
            for alternative in sorted(inner, key=lambda k: k is not NoneType):  # first: "none" would also be a str
                with suppress(TrajOODError):
                    return self.read(alternative, given, place)
        elif is_dataclass(kind) or origin in (dict, Mapping):
            section = {} if given is None and not self.strict else given
            if isinstance(section, Mapping) and is_dataclass(kind):
                return kind(**self.options(kind, section, place))  # type: ignore[arg-type, operator]
            if isinstance(section, Mapping):
                return {key: self.read(inner[1], value, f"{place}.{key}") for key, value in section.items()}
        elif origin in (list, tuple):
            if isinstance(given, str) and self.joint:
                given = [part.strip() for part in given.split(self.joint)] if given else []
            if isinstance(given, list | tuple):
                kinds = inner if origin is tuple and Ellipsis not in inner else inner[:1] * len(given)
                if len(kinds) == len(given):
                    return origin(map(self.read, kinds, given, repeat(place)))
        elif kind is NoneType and (given is None or (given == "none" and not self.strict)):
            return None
        elif isinstance(given, _SCALARS) and not (self.strict and _is_converted(kind, given)):
            with suppress(KeyError, ValueError):
                return _scalar(kind, write_option(given))
        raise self.refused(kind, given, place)

    def refused(self, kind: Any, given: Any, place: str) -> TrajOODError:
        alternatives = [k for k in (get_args(kind) if get_origin(kind) in _UNIONS else (kind,)) if k is not NoneType]
        if len(alternatives) == 1 and get_origin(alternatives[0]) is Literal:
            return unknown_name(f"{place} of {self.owner}", write_option(given), _choices(alternatives[0]))
        return TrajOODError(f"{self.owner}, {self.noun} {place}: expected {_named(kind, self.joint)}, got {given!r}")


def _is_converted(kind: Any, given: Any) -> bool:
    """Whether reading ``given`` as ``kind`` would turn a number into text or text into a number."""
    return kind in _SCALARS and isinstance(given, str) != (kind is str)


def _scalar(kind: Any, text: str) -> Any:
    """``text`` parsed as a scalar; KeyError or ValueError if it is not of this type."""
    if get_origin(kind) is Literal:
        return _choices(kind)[text]
    if kind is bool:
        return {"true": True, "false": False}[text.lower()]
    if kind is str:
        return text
    if kind not in (int, float) or len(text) > _MAX_CHARACTERS or "_" in text:
        raise ValueError(text)
    number = kind(text)
    if not math.isfinite(number) or (kind is int and abs(number) > MAX_INT):
        raise ValueError(text)
    return number


def _choices(kind: Any) -> dict[str, Any]:
    """The values of a ``Literal`` by their text form."""
    return {write_option(value): value for value in get_args(kind)}


def _named(kind: Any, joint: str | None) -> str:
    """A type in words, for error messages."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in _UNIONS:
        return " or ".join(_named(k, joint) for k in sorted(inner, key=lambda k: k is NoneType))
    if origin is Literal:
        return "one of " + ", ".join(_choices(kind))
    if origin is tuple:
        parts = f"{'' if Ellipsis in inner else f'{len(inner)} '}{inner[0].__name__}s"
        return f"{parts} joined by {joint}" if joint else f"a list of {parts}"
    words = {NoneType: "none", bool: "true or false", dict: "a mapping", Mapping: "a mapping", list: "a list"}
    return "a mapping" if is_dataclass(kind) else words.get(origin or kind, getattr(kind, "__name__", str(kind)))


def _is_writable(kind: Any) -> bool:
    origin, inner = get_origin(kind), get_args(kind)
    if origin in _UNIONS:
        return all(map(_is_writable, inner))
    if origin is Literal:
        return all(value is None or isinstance(value, str | int | bool) for value in inner)
    if origin is tuple:
        return len(inner) == 2 and inner[1] is Ellipsis and inner[0] in _SCALARS
    return kind in (*_SCALARS, NoneType)
