"""The error class of traj_ood, warnings, and the "did you mean" message of every registry."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from numbers import Integral
from typing import Any, get_args

from traj_ood.text import brief, one_line

_MAX_LISTED = 60


class TrajOODError(ValueError):
    """Bad input or a bad environment. The message says what was expected, what arrived and what to do next.

    The command line prints the message and exits with code 2; library code can catch it as a ``ValueError``. The
    message is always one printable line below 2 kB, whatever names, values or texts of other libraries it contains
    (see :func:`traj_ood.text.one_line`).
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(one_line(str(message)))


class UnreadableImageError(TrajOODError):
    """An image cannot be read, and was not to be skipped. Commands that can skip it add how."""


@contextmanager
def foreign_errors(before: str, then: str = "") -> Iterator[None]:
    """Context manager that turns any exception into a ``TrajOODError`` with the message ``before (error)then``.

    For calls into libraries and user code, whose exception classes are not known. A ``TrajOODError`` passes unchanged.
    """
    try:
        yield
    except TrajOODError:
        raise
    except Exception as error:
        raise TrajOODError(f"{before} ({brief(error)}){then}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was exhausted; torch raises a plain RuntimeError on the CPU."""
    words = isinstance(error, RuntimeError) and re.search("out of memory|can't allocate memory", str(error))
    return isinstance(error, MemoryError) or bool(words)


def warn(message: str, stacklevel: int = 1) -> None:
    """Issue a ``UserWarning`` of one printable line below 2 kB; ``stacklevel`` as in ``warnings.warn``."""
    warnings.warn(one_line(message), stacklevel=stacklevel + 1)


def check_whole(name: str, value: object, least: int = 1, most: int | None = None, unit: str = "") -> None:
    """Raise ``TrajOODError`` unless ``value``, of the argument ``name``, is an ``int`` from ``least`` to ``most``.

    NumPy's integers are refused, too: they are not JSON, so a record could not be written in the end.

    >>> check_whole("k", True, unit="neighbours")
    Traceback (most recent call last):
    traj_ood.errors.TrajOODError: k: expected a whole number of at least 1 neighbours, got True
    """
    if type(value) is int and value >= least and (most is None or value <= most):
        return
    bound = f"of at least {least}" if most is None else f"from {least} to {most:,}"
    is_other = isinstance(value, Integral) and not isinstance(value, int)
    then = ": convert it by int()" if is_other else ""
    raise TrajOODError(f"{name}: expected a whole number {bound}{unit and ' ' + unit}, got {value!r}{then}")


def unknown_name(kind: str, name: str, known: Iterable[str], then: str = "") -> TrajOODError:
    """The error for an unknown name. Its message suggests the nearest known names and lists all of them, up to 60.

    ``then`` is appended, for further advice.

    >>> print(unknown_name("scorer", "knnn", ["knn", "mahalanobis"]))
    unknown scorer 'knnn': did you mean 'knn'? Known: knn, mahalanobis
    """
    names = sorted(set(known))
    close = difflib.get_close_matches(name, names, n=2, cutoff=0.5)
    hint = "did you mean " + " or ".join(repr(c) for c in close) + "? " if close else ""
    listed = f"Known: {', '.join(names)}" if len(names) <= _MAX_LISTED else f"{len(names)} names are known"
    return TrajOODError(f"unknown {kind} {name!r}: {hint}{listed}{then}")


def check_word(kind: str, value: object, words: Any) -> None:
    """Raise :func:`unknown_name` unless ``value`` is one of the values of ``words``, a ``Literal``."""
    if value not in get_args(words):
        raise unknown_name(kind, str(value), get_args(words))
