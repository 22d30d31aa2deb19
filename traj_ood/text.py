"""Text on its way out: short one-line messages, names that no terminal obeys, cells that no spreadsheet runs.

Names of files, classes and layers are the user's, or a stranger's: they may hold escape sequences, line breaks or
megabytes. Data files keep them as they are; everything that is read on a screen goes through :func:`one_line` or
:func:`printable`.
"""

from __future__ import annotations

import re
import unicodedata

MAX_MESSAGE = 1800
"""Bytes of a message: below 2 kB on any console, with what the command line puts before and after it."""

_HEAD = 1200  # of these bytes for the beginning: what was expected and what arrived; the rest says what to do
_GAP = " [...] "
_BREAKS = re.compile(r"\s*[\n\r\t\v\f\x1c-\x1e\x85\u2028\u2029]\s*")
_FORMULA = re.compile("'*[=+\\-@\t\r\n＝＋－＠]")  # of OWASP's "CSV injection"; Excel takes the wide forms, too


def printable(text: str) -> str:
    """``text`` with every character that a terminal may obey or hide as its escape, as ``repr`` writes it.

    Controls, marks of writing direction, lone surrogates and unassigned code points; letters of all scripts and spaces
    stay.

    >>> print(printable("cat\\x1b[2J\\u202egnp.png"))
    cat\\x1b[2J\\u202egnp.png
    """
    return "".join(c if c.isprintable() or unicodedata.category(c) == "Zs" else _escaped(c) for c in text)


def one_line(text: str) -> str:
    """A message: printable, on one line, and at most ``MAX_MESSAGE`` bytes in any encoding.

    A longer one keeps its beginning and its end, which says what to do.

    >>> one_line("expected a name,\\n  got '\\x07': choose another")
    "expected a name, got '\\\\x07': choose another"
    """
    if len(text) > 2 * MAX_MESSAGE:  # may be megabytes: the middle is not even looked at
        text = text[:MAX_MESSAGE] + _GAP + text[-MAX_MESSAGE:]
    line = printable(_BREAKS.sub(" ", text.rstrip().lstrip("\n\r\t\v\f")))  # what is indented stays so
    if _bytes(line) <= MAX_MESSAGE:
        return line
    end = _within(line[::-1], MAX_MESSAGE - _HEAD - len(_GAP))[::-1]
    return _within(line, _HEAD) + _GAP + end


def brief(error: BaseException) -> str:
    """The first line of what an error of another library says, and the next after a colon; at most 200 characters.

    Errors of hubs run over pages. One that says nothing is named by its class.

    >>> brief(OSError("no such repository:\\n  owner/name.\\nMany more lines."))
    'no such repository: owner/name'
    """
    lines = re.sub(r":\s+", ": ", str(error).strip()).splitlines()
    return (lines[0] if lines else type(error).__name__)[:200].rstrip(".:; ")


def quote_formula(text: str) -> str:
    """A cell of a table that no spreadsheet takes for a formula: one that begins like one gets a ``'`` before it.

    Begins like one: with ``=``, ``+``, ``-``, ``@``, a tab or a line break. :func:`unquote_formula` is the inverse, so
    a text whose own quotes stand before such a character gets one more.

    >>> [quote_formula(text) for text in ("a.png", "=1+1.png", "'=1.png", "'a.png")]
    ['a.png', "'=1+1.png", "''=1.png", "'a.png"]
    """
    return "'" + text if _FORMULA.match(text) else text


def unquote_formula(cell: str) -> str:
    """The text that :func:`quote_formula` made a cell of."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def _bytes(text: str) -> int:
    """Of the text where every character that is not ASCII has to be escaped, as on an ASCII console."""
    return len(text.encode("ascii", "backslashreplace"))


def _within(text: str, size: int) -> str:
    """The longest beginning of at most ``size`` bytes."""
    for position, character in enumerate(text):
        size -= _bytes(character)
        if size < 0:
            return text[:position]
    return text
