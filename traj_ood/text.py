"""Safe output text: one-line messages, names without control characters, cells without spreadsheet formulas.

Names of files, classes and layers come from users and from downloaded data: they may contain escape sequences or line
breaks, or be megabytes long. Data files keep them unchanged; whatever is shown on a screen goes through
:func:`one_line` or :func:`printable`.
"""

from __future__ import annotations

import re
import unicodedata

MAX_MESSAGE = 1800
"""Bytes in a message. With the text that the command line adds around it, a message stays below 2 kB."""

_HEAD_BYTES = 1200  # of MAX_MESSAGE for the beginning (expected, got); the end says what to do
_GAP = " [...] "
_BREAKS = re.compile(r"\s*[\n\r\t\v\f\x1c-\x1e\x85\u2028\u2029]\s*")
_FORMULA = re.compile("'*[=+\\-@\t\r\n＝＋－＠]")  # OWASP, "CSV injection"; Excel accepts the full-width forms, too


def printable(text: str) -> str:
    """``text`` with every non-printable character replaced by its escape sequence, as in ``repr``.

    Escaped are control characters, marks of writing direction, lone surrogates and unassigned code points. Letters of
    all scripts and spaces are kept.

    >>> print(printable("cat\\x1b[2J\\u202egnp.png"))
    cat\\x1b[2J\\u202egnp.png
    """
    return "".join(c if c.isprintable() or unicodedata.category(c) == "Zs" else _escaped(c) for c in text)


def one_line(text: str) -> str:
    """``text`` as a message: printable, on one line, and at most ``MAX_MESSAGE`` bytes in any encoding.

    A longer text is cut in the middle, because the end of a message says what to do.

    >>> one_line("expected a name,\\n  got '\\x07': choose another")
    "expected a name, got '\\\\x07': choose another"
    """
    if len(text) > 2 * MAX_MESSAGE:  # cut first: the text may be megabytes long
        text = text[:MAX_MESSAGE] + _GAP + text[-MAX_MESSAGE:]
    line = printable(_BREAKS.sub(" ", text.rstrip().lstrip("\n\r\t\v\f")))  # leading spaces are kept
    if _bytes(line) <= MAX_MESSAGE:
        return line
    end = _within(line[::-1], MAX_MESSAGE - _HEAD_BYTES - len(_GAP))[::-1]
    return _within(line, _HEAD_BYTES) + _GAP + end


def brief(error: BaseException) -> str:
    """The first line of an exception's message, at most 200 characters; a line after a colon is joined to it.

    For errors of other libraries, which may be pages long. An exception without a message gives its class name.

    >>> brief(OSError("no such repository:\\n  owner/name.\\nMany more lines."))
    'no such repository: owner/name'
    """
    lines = re.sub(r":\s+", ": ", str(error).strip()).splitlines()
    return (lines[0] if lines else type(error).__name__)[:200].rstrip(".:; ")


def quote_formula(text: str) -> str:
    """``text`` as a table cell that no spreadsheet evaluates: a ``'`` is put before anything like a formula.

    A formula begins with ``=``, ``+``, ``-``, ``@``, a tab or a line break. A text that begins with quotes before such
    a character gets one more quote, so that :func:`unquote_formula` is the exact inverse.

    >>> [quote_formula(text) for text in ("a.png", "=1+1.png", "'=1.png", "'a.png")]
    ['a.png', "'=1+1.png", "''=1.png", "'a.png"]
    """
    return "'" + text if _FORMULA.match(text) else text


def unquote_formula(cell: str) -> str:
    """The inverse of :func:`quote_formula`."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def _bytes(text: str) -> int:
    """Length of ``text`` in bytes with every non-ASCII character escaped, as on an ASCII console."""
    return len(text.encode("ascii", "backslashreplace"))


def _within(text: str, size: int) -> str:
    """The longest prefix of ``text`` of at most ``size`` bytes."""
    for position, character in enumerate(text):
        size -= _bytes(character)
        if size < 0:
            return text[:position]
    return text
