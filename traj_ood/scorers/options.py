"""Options of scorers as text and back: what the annotations of their dataclass fields allow, and nothing else.

    int · float · bool · str · Literal["a", "b"] · tuple[int, ...] (written 1+2+4) · any of these | None (written none)

Also as ``Optional[int]``, and as text under ``from __future__ import annotations``.
"""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from traj_ood.errors import TrajOODError, unknown_name

LARGEST = 2**32 - 1
"""The largest seed that NumPy and scikit-learn take; nothing else is as large."""
_JOIN = "+"  # between the parts of a tuple; a comma parts scorers, a colon options
_KINDS = (bool, int, float, str)


def option_types(cls: type[Any]) -> dict[str, Any]:
    """Annotation by option, resolved.

    Raises:
        TrajOODError: an annotation that does not exist at run time, or whose values cannot be written as text.
    """
    try:
        hints = get_type_hints(cls)
    except Exception as error:  # whatever evaluating a stranger's annotation may raise
        raise TrajOODError(
            f"scorer class {cls.__qualname__}: the annotations of its options cannot be read ({error}): import their "
            "types outside of TYPE_CHECKING, at the top of the module"
        ) from error
    found = {f.name: hints[f.name] for f in fields(cls) if f.init}
    for name, kind in found.items():
        if not _is_writable(kind):
            raise TrajOODError(
                f"scorer class {cls.__qualname__}, option {name}: expected bool, int, float, str, Literal, a tuple of "
                f"one of these, or | None, got {_named(kind)}: other values cannot be written as name:{name}=value"
            )
    return found


def option_defaults(cls: type[Any]) -> dict[str, Any]:
    """Default by option; ``MISSING`` where there is none."""
    return {f.name: _default(f) for f in fields(cls) if f.init}


def parse_options(cls: type[Any], scorer: str, options: Mapping[str, str]) -> dict[str, Any]:
    """Values of options written as text.

    Raises:
        TrajOODError: an unknown option (with near ones), one without default that is not given, or a value of another
            kind.
    """
    kinds = option_types(cls)
    for key in options:
        if key not in kinds:
            raise unknown_name(f"option of scorer {scorer}", key, kinds or ["(none)"])
    for key, default in option_defaults(cls).items():
        if default is MISSING and key not in options:
            raise TrajOODError(f"scorer {scorer}: option {key} has no default: write {scorer}:{key}=…")
    return {key: _parse(scorer, key, kinds[key], text) for key, text in options.items()}


def write_option(value: Any) -> str:
    """A value as :func:`parse_options` reads it."""
    if isinstance(value, tuple | list):
        return _JOIN.join(map(write_option, value))
    if value is None or isinstance(value, bool):
        return str(value).lower()
    # In a tuple the sign of an exponent would be another part.
    return repr(float(value)).replace("e+", "e") if isinstance(value, float) else str(value)


def check_options(cls: type[Any], scorer: str, values: Mapping[str, Any]) -> None:
    """Refuse values whose text would not be read as the same value.

    Raises:
        TrajOODError: a value that is not of the option's kind, not among those allowed, or a text with a sign that
            parts options.
    """
    for key, kind in option_types(cls).items():
        value, text = values[key], write_option(values[key])
        if isinstance(value, str) and (set(text) & set(":,") or text != text.strip()):
            raise TrajOODError(f"scorer {scorer}, option {key}: expected text without ':' and ',', got {value!r}")
        if _parse(scorer, key, kind, text) != (tuple(value) if isinstance(value, list) else value):
            raise TrajOODError(f"scorer {scorer}, option {key}: expected {_named(kind)}, got {value!r}")


def _parse(scorer: str, key: str, kind: Any, text: str) -> Any:
    """The value that ``text`` stands for."""
    where = f"scorer {scorer}, option {key}: expected {_named(kind)}, got {text!r}"
    alternatives = [k for k in _alternatives(kind) if k is not type(None)]
    if text == "none" and len(alternatives) < len(_alternatives(kind)):
        return None
    for alternative in alternatives:
        if get_origin(alternative) is Literal:
            allowed = {write_option(value): value for value in get_args(alternative)}
            if text not in allowed and len(alternatives) == 1:
                raise unknown_name(f"{key} of scorer {scorer}", text, allowed)
            if text in allowed:
                return allowed[text]
            continue
        if get_origin(alternative) is tuple:
            (inner, _) = get_args(alternative)
            return tuple(_parse(scorer, key, inner, part) for part in text.split(_JOIN)) if text else ()
        try:
            return _number(alternative, text)
        except (KeyError, ValueError):
            continue
    raise TrajOODError(where)


def _number(kind: Any, text: str) -> Any:
    """``text`` as bool, int, float or str; KeyError or ValueError where it is none."""
    if kind is bool:
        return {"true": True, "false": False}[text.lower()]
    if kind is str:
        return text
    if len(text) > 40 or "_" in text:
        raise ValueError(text)
    number = int(text) if kind is int else float(text)
    if not math.isfinite(number) or (kind is int and abs(number) > LARGEST):
        raise ValueError(text)
    return number


def _alternatives(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def _is_writable(kind: Any) -> bool:
    alternatives = [k for k in _alternatives(kind) if k is not type(None)]
    return bool(alternatives) and all(map(_is_plain, alternatives))


def _is_plain(kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return all(value is None or isinstance(value, str | int | bool) for value in get_args(kind))
    if get_origin(kind) is tuple:
        inner = get_args(kind)
        return len(inner) == 2 and inner[1] is Ellipsis and inner[0] in _KINDS
    return kind in _KINDS


def _named(kind: Any) -> str:
    """A kind in words."""
    words = {type(None): "none", bool: "true or false"}
    parts = []
    for alternative in _alternatives(kind):
        if get_origin(alternative) is Literal:
            parts.append("one of " + ", ".join(map(write_option, get_args(alternative))))
        elif get_origin(alternative) is tuple:
            parts.append(f"{get_args(alternative)[0].__name__}s joined by {_JOIN}")
        else:
            parts.append(words.get(alternative, getattr(alternative, "__name__", str(alternative))))
    return " or ".join(parts)


def _default(option: Field[Any]) -> Any:
    return option.default_factory() if option.default_factory is not MISSING else option.default
