"""Embed a figure in an HTML page as SVG, without style attributes and with the page's colours.

matplotlib writes stand-alone SVG: a style on every element, ids that repeat between figures, six decimals. A strict
Content-Security-Policy forbids style attributes, and a page with a light and a dark scheme needs colours that follow
it, so each colour becomes a custom property of the page (``var(--near)``).
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
    """A figure as ``<svg role="img" aria-label=label>`` without its white background.

    Equal figures, labels and salts give equal text.

    Args:
        figure: a figure drawn with colours of :data:`INKS` only.
        label: alternative text.
        salt: salt of the ids, different for each figure of a page.
    Raises:
        ValueError: a colour is not in :data:`INKS`, which is a mistake in the drawing code.
    """
    file = io.BytesIO()
    settings: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": salt}
    with mpl.rc_context(settings):
        figure.savefig(file, format="svg", transparent=True, metadata=_METADATA)
    text = file.getvalue().decode()
    view = re.search(r'viewBox="([^"]*)"', text)
    assert view is not None
    body = text[text.index("</style>") : text.rindex("</svg>")].partition("</defs>")[2]
    # Text in a drawing has < and > escaped, so that these are tags whatever a scorer's name.
    body = re.sub(r"<[^>]+>", lambda match: _tag(match[0]), re.sub(r">\s+<", "><", body)).strip()
    # Elements without a colour are text.
    root = f'role="img" aria-label="{escape(label)}" fill="var(--text)" stroke-linejoin="round"'
    return f'<svg viewBox="{_rounded(view[1])}" {root}>{body}</svg>'


def _tag(tag: str) -> str:
    """Adapt one tag of matplotlib's SVG to the page, with coordinates rounded to a tenth of a point."""
    tag = re.sub(r'^<g id="[\w.]+_\d+"', "<g", tag).replace(" xlink:href=", " href=").replace("\n", "")
    tag = re.sub(r' transform="rotate\(-0 [^"]*"', "", tag)  # upright text
    tag = re.sub(r' style="([^"]*)"', lambda match: _attributes(match[1]), tag)
    return re.sub(r"#[0-9a-f]{6}\b", _variable, _rounded(tag))


def _attributes(style: str) -> str:
    """``fill: none; stroke-width: 2`` as attributes; of a font, only the size."""
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
