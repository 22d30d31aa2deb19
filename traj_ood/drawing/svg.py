"""A figure as a piece of an HTML page: text stays text, colours are the page's, and no style is its own.

matplotlib writes a drawing that stands alone: a style on every element, ids that repeat from figure to figure, six
decimals. A page under a strict Content-Security-Policy takes no style attributes, and one with a light and a dark
scheme needs colours that follow it: each becomes a custom property of the page (``var(--near)``).
"""

from __future__ import annotations

import io
import re
from html import escape
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from traj_ood.drawing.style import INKS

_NAMES = {colour: name for name, colour in INKS.items()}
_METADATA: dict[str, Any] = dict.fromkeys(("Date", "Creator", "Format", "Type"))


def inline_svg(figure: Figure, label: str, salt: str) -> str:
    """``<svg role="img" aria-label=label>`` of a figure without its white ground, drawn with :data:`INKS` alone.

    Equal figures, labels and salts give equal text.

    Args:
        figure: matplotlib's.
        label: what a reader who does not see it is told.
        salt: of the ids in it, another one for each figure of a page.
    Raises:
        ValueError: a colour that is none of the inks; a mistake in the drawing, never in the data.
    """
    file = io.BytesIO()
    settings: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": salt}
    with mpl.rc_context(settings):
        figure.savefig(file, format="svg", transparent=True, metadata=_METADATA)
    text = file.getvalue().decode()
    view = re.search(r'viewBox="([^"]*)"', text)
    assert view is not None
    body = text[text.index("</style>") : text.rindex("</svg>")].partition("</defs>")[2]
    # Text in a drawing escapes < and >: these are tags, whatever a scorer is called.
    body = re.sub(r"<[^>]+>", lambda match: _tag(match[0]), re.sub(r">\s+<", "><", body)).strip()
    # What has no colour of its own is text.
    root = f'role="img" aria-label="{escape(label)}" fill="var(--text)" stroke-linejoin="round"'
    return f'<svg viewBox="{_rounded(view[1])}" {root}>{body}</svg>'


def _tag(tag: str) -> str:
    """One tag of matplotlib's as the page can have it, coordinates to a tenth of a point, which nobody sees."""
    tag = re.sub(r'^<g id="[\w.]+_\d+"', "<g", tag).replace(" xlink:href=", " href=").replace("\n", "")
    tag = re.sub(r' transform="rotate\(-0 [^"]*"', "", tag)  # upright text
    tag = re.sub(r' style="([^"]*)"', lambda match: _attributes(match[1]), tag)
    return re.sub(r"#[0-9a-f]{6}\b", _variable, _rounded(tag))


def _attributes(style: str) -> str:
    """``fill: none; stroke-width: 2`` as attributes; of a font the size alone, the rest is the page's."""
    declared = dict(part.strip().split(": ", 1) for part in style.split(";") if part.strip())
    fonts = [declared.pop(name, "") for name in ("font", "font-size", "font-family")]
    if size := re.search(r"([\d.]+)px", " ".join(fonts)):
        declared["font-size"] = size[1]
    return "".join(f' {name}="{value}"' for name, value in declared.items())


def _variable(colour: re.Match[str]) -> str:
    if colour[0] not in _NAMES:
        raise ValueError(f"expected an ink of the page, got {colour[0]}")
    return f"var(--{_NAMES[colour[0]]})"


def _rounded(text: str) -> str:
    return re.sub(r"-?\d+\.\d{3,}", lambda number: f"{float(number[0]):.1f}".removesuffix(".0"), text)
