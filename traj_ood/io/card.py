"""The README.md beside weights: paragraphs and tables under headings, all written from a record."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Block = str | Mapping[str, Any]
"""Markdown as it stands, or the rows of a table of two columns."""


def markdown_card(title: str, lead: Sequence[Block], sections: Mapping[str, Sequence[Block]]) -> str:
    """A card: title, what is said at once, and sections by their heading. Empty blocks and sections are left out."""
    blocks: list[Block] = [f"# {title}", *lead]
    for heading, content in sections.items():
        if any(content):
            blocks += [f"## {heading}", *content]
    return "\n\n".join(block if isinstance(block, str) else _table(block) for block in blocks if block) + "\n"


def listed(values: Mapping[str, Any], between: str = " ") -> str:
    """The names and values, sorted by name: ``python 3.11.7, torch 2.14.1``."""
    return ", ".join(f"{key}{between}{value}" for key, value in sorted(values.items()))


def numbers(values: Iterable[float], form: str) -> str:
    """The numbers, formatted: ``42, 74, 123``."""
    return ", ".join(format(value, form) for value in values)


def _table(rows: Mapping[str, Any]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())])
