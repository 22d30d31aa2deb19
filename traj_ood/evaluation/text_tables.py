"""Text tables as Markdown, LaTeX (booktabs) or HTML, with all texts escaped, and their place in a page."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from traj_ood.errors import TrajOODError, unknown_name
from traj_ood.io.files import write_atomic
from traj_ood.text import printable

FORMATS = ("markdown", "latex", "html")
_WIDE = 8
"""Most columns that fit on a page in LaTeX; wider tables are scaled to the width of the text."""

_LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "−": "$-$",
    "—": "---",
    "…": r"\dots{}",
    "·": r"$\cdot$",
    "×": r"$\times$",
    "≥": r"$\geq$",
    "≤": r"$\leq$",
    "⚠": r"$\dagger$",
    "∘": r"$\circ$",
}


class Bold(str):
    """A cell shown in bold: the best figure of its column."""

    __slots__ = ()


@dataclass(frozen=True)
class TextTable:
    """Rows of cells below a header; the first column has names, the others figures."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    notes: Sequence[str] = ()

    def text(self, form: str) -> str:
        """The table in one of :data:`FORMATS`, with caption and notes. Raises ``TrajOODError`` for another format."""
        if form == "latex":
            return self._latex()
        if form == "html":
            return self._html()
        if form != "markdown":
            raise unknown_name("table format", form, FORMATS)
        caption = [f"**{_markdown(self.caption)}**"] if self.caption else []
        return "\n\n".join([*caption, self.markdown(), *self.notes])

    def markdown(self) -> str:
        """Only the header and rows, as Markdown."""
        rows = [self.header, [":--", *["--:"] * (len(self.header) - 1)], *self.rows]
        return "\n".join("| " + " | ".join(map(_markdown, row)) + " |" for row in rows)

    def _latex(self) -> str:
        caption = [f"  \\caption{{{latex(self.caption)}}}"] if self.caption else []
        wide = len(self.header) > _WIDE
        lines = [
            "\\begin{table}",
            "  \\centering",
            *caption,
            *(["  \\resizebox{\\textwidth}{!}{%"] if wide else []),
            f"  \\begin{{tabular}}{{l{'r' * (len(self.header) - 1)}}}",
            "    \\toprule",
            _latex_row(self.header),
            "    \\midrule",
            *map(_latex_row, self.rows),
            "    \\bottomrule",
            "  \\end{tabular}" + "}" * wide,
            *(f"  \\par\\footnotesize {latex(_plain(note))}" for note in self.notes),
            "\\end{table}",
        ]
        packages = "booktabs,graphicx" if wide else "booktabs"
        return f"% needs \\usepackage{{{packages}}}\n" + "\n".join(lines)

    def _html(self) -> str:
        def row(cells: Sequence[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{_html_cell(cell)}</{tag}>" for cell in cells) + "</tr>"

        caption = f"<caption>{html.escape(printable(self.caption))}</caption>" if self.caption else ""
        notes = "".join(f"<p>{html.escape(printable(_plain(note)))}</p>" for note in self.notes)
        body = "\n".join(row(cells, "td") for cells in self.rows)
        return f"<table>{caption}\n<thead>{row(self.header, 'th')}</thead>\n<tbody>\n{body}\n</tbody>\n</table>{notes}"


def put_between_markers(path: str | Path, name: str, markdown: str) -> None:
    """Replace the text between the markers ``<!-- name:start -->`` and ``<!-- name:end -->`` of a Markdown file, whose
    line ends are kept.

    Raises ``TrajOODError`` if the file cannot be read, or does not contain each marker once, start before end.
    """
    path, start, end = Path(path), f"<!-- {name}:start -->", f"<!-- {name}:end -->"
    try:
        text = path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise TrajOODError(f"{path}: expected a Markdown file in UTF-8, got {error}; check the path") from error
    if text.count(start) != 1 or text.count(end) != 1 or text.index(start) > text.index(end):
        raise TrajOODError(
            f"{path}: expected {start} once and {end} once after it, got {text.count(start)} and {text.count(end)}; "
            "put both markers where the table belongs"
        )
    before, after = text[: text.index(start)], text[text.index(end) :]
    table = f"\n{markdown.strip()}\n".replace("\n", "\r\n" if "\r\n" in text else "\n")
    write_atomic(path, f"{before}{start}{table}{after}".encode())


def comment(notes: Sequence[str], form: str) -> str:
    """Notes as LaTeX comments or HTML paragraphs."""
    if form == "latex":
        return "\n".join(f"% {printable(_plain(note))}" for note in notes)
    return "\n".join(f"<p>{html.escape(printable(_plain(note)))}</p>" for note in notes)


def latex(text: str) -> str:
    """Escape text for LaTeX; signs such as ± become commands, other letters are unchanged.

    >>> latex("knn:k=5_a · 97.2 ± 0.3 %")
    'knn:k=5\\\\_a $\\\\cdot$ 97.2 $\\\\pm$ 0.3 \\\\%'
    """
    return "".join(_LATEX.get(character, character) for character in printable(text))


def _plain(text: str) -> str:
    """A note without Markdown's marks."""
    return re.sub(r"\*\*|`", "", text)


def _markdown(text: str) -> str:
    """A cell for Markdown; line breaks and ``|``, which would end the row or cell, are escaped."""
    cell = printable(text).replace("|", "\\|")
    return f"**{cell}**" if isinstance(text, Bold) else cell


def _latex_row(cells: Sequence[str]) -> str:
    found = (f"\\textbf{{{latex(cell)}}}" if isinstance(cell, Bold) else latex(cell) for cell in cells)
    return "    " + " & ".join(found) + r" \\"


def _html_cell(text: str) -> str:
    cell = html.escape(printable(text))
    return f"<b>{cell}</b>" if isinstance(text, Bold) else cell
