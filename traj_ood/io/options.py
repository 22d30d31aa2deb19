"""Options: fields of a dataclass, read from text or from a YAML or JSON tree, and written as text again.

One parser for the options of scorers (``knn:k=5``), those of questions (``--option sizes=2,16``), training configs,
OpenOOD's yml files, and the records of runs and questions. A field may be annotated as

    int · float · bool · str · Literal["a", "b"] · tuple[int, ...] · any of these | None (written none)

also as ``Optional[int]``, and as text under ``from __future__ import annotations``. In a tree it may also be another
dataclass, ``dict[str, …]``, ``list[…]``, a tuple of fixed length, or ``Any`` for what is checked elsewhere.

It is not pydantic's: that reads ``yes`` as true, ``5.0`` and ``1_0`` as integers, and knows no tuples and no none in
text, so the grammar below would be needed all the same, and a translation of its errors besides.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import MISSING, dataclass, fields, is_dataclass
from itertools import repeat
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from traj_ood.errors import TrajOODError, unknown_name

MAX_INT = 2**32 - 1
"""The largest seed that NumPy and scikit-learn take; nothing else is as large."""
_MAX_CHARACTERS = 40  # of a number
_SCALARS = (bool, int, float, str)
_UNIONS = (Union, UnionType)


def option_kinds(cls: type[Any]) -> dict[str, Any]:
    """Annotation by option, resolved.

    Raises:
        TrajOODError: an annotation that does not exist at run time.
    """
    try:
        hints = get_type_hints(cls)
    except Exception as error:  # whatever evaluating a stranger's annotation may raise
        raise TrajOODError(
            f"class {cls.__qualname__}: the annotations of its options cannot be read ({error}): import their types "
            "outside of TYPE_CHECKING, at the top of the module"
        ) from error
    return {f.name: hints[f.name] for f in fields(cls) if f.init}


def option_defaults(cls: type[Any]) -> dict[str, Any]:
    """Default by option; ``MISSING`` where there is none."""
    return {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(cls) if f.init}


def split_pairs(texts: Iterable[str], owner: str) -> Iterator[tuple[str, str]]:
    """Key and value of each ``key=value``.

    Raises:
        TrajOODError: a text without ``=``.
    """
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
    """Arguments of ``cls``: what is given, each value as the kind its field has.

    Args:
        cls: the dataclass.
        given: by option: text, or what YAML or JSON made of it.
        owner, noun: whose options they are and what one is called, for errors: ``scorer knn``, ``option``.
        joint: parts the text of a tuple. Default: none, a tuple is a list.
        strict: a tree that a program wrote. Default false: text counts as what it says, because YAML takes ``5e-3`` for
            text, and a section may be empty.
    Raises:
        TrajOODError: an unknown option (with near ones), one without default that is not given, or a value of another
            kind; a number that is not finite, or an integer beyond :data:`MAX_INT`, is of none.
    """
    return _Reader(owner, noun, joint, strict).options(cls, given, "")


def write_option(value: Any, joint: str = "+") -> str:
    """A value as :func:`read_options` reads it."""
    if isinstance(value, tuple | list):
        return joint.join(write_option(part, joint) for part in value)
    if value is None or isinstance(value, bool):
        return str(value).lower()
    # The sign of an exponent would be another part of a tuple that + joins.
    return repr(float(value)).replace("e+", "e") if isinstance(value, float) else str(value)


def check_options(cls: type[Any], values: Mapping[str, Any], owner: str, *, reserved: str, joint: str = "+") -> None:
    """Refuse values whose text would not be read as the same value.

    Args:
        cls: the dataclass. values: by option, all of them. owner, joint: see :func:`read_options`.
        reserved: signs that part one option from the next.
    Raises:
        TrajOODError: a value that is not of the option's kind, or a text with a reserved sign or with space around it.
    """
    reader = _Reader(owner, "option", joint)
    for key, kind in option_kinds(cls).items():
        value = tuple(values[key]) if isinstance(values[key], list) else values[key]
        if isinstance(value, str) and (set(value) & set(reserved) or value != value.strip()):
            signs = " and ".join(map(repr, reserved))
            raise TrajOODError(f"{owner}, option {key}: expected text without {signs}, got {value!r}")
        if reader.read(kind, write_option(value, joint), key) != value:
            raise reader.refused(kind, value, key)


def check_writable(cls: type[Any]) -> None:
    """Refuse a dataclass with an option whose values have no text.

    Raises:
        TrajOODError: names the option.
    """
    for name, kind in option_kinds(cls).items():
        if not _is_writable(kind):
            raise TrajOODError(
                f"class {cls.__qualname__}, option {name}: expected bool, int, float, str, Literal, a tuple of one of "
                f"these, or | None, got {kind}: other values cannot be written as {name}=value"
            )


@dataclass(frozen=True)
class _Reader:
    """Attributes as the arguments of :func:`read_options`; a place is the dotted key of a value."""

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
        """The value that is given, as this kind."""
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
    """Whether a number would become text, or text a number."""
    return kind in _SCALARS and isinstance(given, str) != (kind is str)


def _scalar(kind: Any, text: str) -> Any:
    """The value that ``text`` stands for; KeyError or ValueError where it is none."""
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
    """The values of a Literal by their text."""
    return {write_option(value): value for value in get_args(kind)}


def _named(kind: Any, joint: str | None) -> str:
    """A kind in words."""
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
