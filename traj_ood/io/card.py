"""Markdown of a model card, the README.md beside a model's weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Block = str | Mapping[str, Any]
"""Markdown text, or the rows of a two-column table."""


def markdown_card(title: str, lead: Sequence[Block], sections: Mapping[str, Sequence[Block]]) -> str:
    """A card as Markdown: the title, the lead, then the sections by heading. Empty blocks and sections are omitted."""
    blocks: list[Block] = [f"# {title}", *lead]
    for heading, content in sections.items():
        if any(content):
            blocks += [f"## {heading}", *content]
    return "\n\n".join(block if isinstance(block, str) else _table(block) for block in blocks if block) + "\n"


def listed(values: Mapping[str, Any], between: str = " ") -> str:
    """Names and values as one line, sorted by name: ``python 3.11.7, torch 2.14.1``."""
    return ", ".join(f"{key}{between}{value}" for key, value in sorted(values.items()))


def numbers(values: Iterable[float], form: str) -> str:
    """Numbers as one line, each formatted with ``form``: ``42, 74, 123``."""
    return ", ".join(format(value, form) for value in values)


def _table(rows: Mapping[str, Any]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())])
