"""The one error a user of traj_ood is meant to read, and the "did you mean" of every registry."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, get_args

from traj_ood.text import brief, one_line

_MAX_LISTED = 60


class TrajOODError(ValueError):
    """Bad input or a bad environment, told in one line: what was expected, what arrived, what to do next.

    The command line prints the line and exits with code 2; a library user catches it as a ``ValueError``. Whatever
    names, values and other libraries' words go into it, it is one printable line below 2 kB (see
    :func:`traj_ood.text.one_line`).
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(one_line(str(message)))


@contextmanager
def foreign_errors(before: str, then: str = "") -> Iterator[None]:
    """What the code inside raises becomes one error, ``before (what it says)then``; a ``TrajOODError`` stays as it is.

    For the code of libraries and of users: each has error classes of its own.
    """
    try:
        yield
    except TrajOODError:
        raise
    except Exception as error:
        raise TrajOODError(f"{before} ({brief(error)}){then}") from error


def warn(message: str, stacklevel: int = 1) -> None:
    """A ``UserWarning`` of one printable line below 2 kB; ``stacklevel`` as ``warnings.warn`` has it."""
    warnings.warn(one_line(message), stacklevel=stacklevel + 1)


def unknown_name(kind: str, name: str, known: Iterable[str], then: str = "") -> TrajOODError:
    """The error for a name that no registry holds, with the nearest known names; a long list is counted, not printed.

    ``then`` says what else may help.

    >>> print(unknown_name("scorer", "knnn", ["knn", "mahalanobis"]))
    unknown scorer 'knnn': did you mean 'knn'? Known: knn, mahalanobis
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=2, cutoff=0.5)
    hint = "did you mean " + " or ".join(repr(c) for c in close) + "? " if close else ""
    listed = f"Known: {', '.join(names)}" if len(names) <= _MAX_LISTED else f"{len(names)} names are known"
    return TrajOODError(f"unknown {kind} {name!r}: {hint}{listed}{then}")


def check_word(kind: str, value: object, words: Any) -> None:
    """Raises :func:`unknown_name` unless ``value`` is one of ``words``, a ``Literal``."""
    if value not in get_args(words):
        raise unknown_name(kind, str(value), get_args(words))
