"""A matplotlib figure as a piece of an HTML page: text stays text, colours are the page's, and no style is its own.

matplotlib writes a drawing that stands alone: a style on every element, ids that repeat from figure to figure, six
decimals. Within a page under a strict Content-Security-Policy, in light and dark, none of that may stay. Colours become
classes (``f-near``, ``s-near``) that the page's style sheet fills, so one drawing serves both themes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from html import escape
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
from matplotlib.figure import Figure

INKS = {
    "text": "#111111",
    "muted": "#666666",
    "rule": "#dddddd",
    "paper": "#fefefe",
    "id": "#0b6bcb",
    "train": "#70a0d0",
    "near": "#d1490c",
    "far": "#00805e",
    **{f"set{i}": f"#0000{i + 1:02x}" for i in range(8)},
}
"""Colours by name, drawn as these and shown as the page's custom properties of the same names."""

_NAMES = {colour: name for name, colour in INKS.items()}
_KEPT = ("stroke-width", "stroke-dasharray", "text-anchor")
_DROPPED_TAGS = {"metadata", "style", "title"}
_NUMBER = re.compile(r"-?\d+\.\d+(?:e-?\d+)?")


def inline_svg(figure: Figure, prefix: str, label: str) -> str:
    """``<svg role="img" aria-label=label>`` of a figure, drawn with no other colours than :data:`INKS`.

    Args:
        figure: matplotlib's.
        prefix: of the ids in it, unique on the page.
        label: what a reader who does not see it is told.
    Raises:
        ValueError: a colour that is none of the inks; a mistake in the drawing, never in the data.
    """
    file = io.BytesIO()
    settings: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "traj_ood"}
    with mpl.rc_context(settings):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    root = ElementTree.fromstring(file.getvalue())
    ids = {old: f"{prefix}-{n}" for n, old in enumerate(_used_ids(root))}
    body = "".join(_markup(child, ids) for child in root)
    box = " ".join(_short(n) for n in root.attrib["viewBox"].split())
    return f'<svg viewBox="{box}" role="img" aria-label="{escape(label)}">{body}</svg>'


def _used_ids(root: ElementTree.Element) -> Iterator[str]:
    """The ids that something points at, in the order of their definition."""
    text = " ".join(value for element in root.iter() for value in element.attrib.values())
    used = set(re.findall(r"url\(#([^)]+)\)", text)) | set(re.findall(r"(?:^| )#([\w-]+)", text))
    for element in root.iter():
        if element.attrib.get("id") in used:
            yield element.attrib["id"]


def _markup(element: ElementTree.Element, ids: dict[str, str]) -> str:
    tag = _local(element.tag)
    if tag in _DROPPED_TAGS:
        return ""
    attributes = _attributes(element, ids)
    invisible = tag == "path" and "class" not in attributes and "id" not in attributes
    if invisible and element.attrib.get("style", ""):
        return ""
    inner = escape(element.text.strip(), quote=False) if tag == "text" and element.text else ""
    inner += "".join(_markup(child, ids) for child in element)
    if tag in ("g", "defs") and not inner:
        return ""
    if tag == "g" and not attributes:
        return inner
    written = "".join(f' {key}="{escape(value)}"' for key, value in attributes.items())
    return f"<{tag}{written}>{inner}</{tag}>" if inner else f"<{tag}{written}/>"


def _attributes(element: ElementTree.Element, ids: dict[str, str]) -> dict[str, str]:
    """What the page needs to know of an element, numbers to one decimal: a tenth of a point is not seen."""
    kept: dict[str, str] = {}
    for name, value in element.attrib.items():
        key = _local(name)
        if key == "id":
            kept |= {"id": ids[value]} if value in ids else {}
        elif key == "href":
            kept["href"] = "#" + ids[value.removeprefix("#")]
        elif key == "clip-path":
            kept["clip-path"] = re.sub(r"#([^)]+)", lambda m: "#" + ids[m[1]], value)
        elif key == "style":
            kept |= _presentation(value, _local(element.tag))
        elif key == "d":
            kept["d"] = _path(value)
        elif key == "transform" and value.startswith("rotate(-0 "):
            continue  # upright text
        else:
            kept[key] = _shortened(value)
    return kept


def _presentation(style: str, tag: str) -> dict[str, str]:
    """A style as presentation attributes, colours as classes."""
    declared = {k.strip(): v.strip() for k, _, v in (part.partition(":") for part in style.split(";")) if k.strip()}
    classes = []
    for key in ("fill", "stroke"):
        # SVG fills with black what does not say otherwise.
        colour = declared.get(key, "#111111" if tag == "text" and key == "fill" else "none")
        if colour != "none":
            if colour not in _NAMES:
                raise ValueError(f"expected an ink of the page, got the {key} {colour}")
            classes.append(f"{key[0]}-{_NAMES[colour]}")
    kept = {"class": " ".join(classes)} if classes else {}
    kept |= {k: _shortened(declared[k]) for k in _KEPT if k in declared}
    kept |= {k: f"{float(declared[k]):g}" for k in declared if k.endswith("opacity")}
    size = re.search(r"([\d.]+)px", declared.get("font", "") or declared.get("font-size", ""))
    return kept | ({"font-size": _short(size[1])} if size else {})


def _path(commands: str) -> str:
    """A path, rounded; of points in a row on a horizontal or vertical line, as in histograms, only the ends."""
    points: list[tuple[str, list[str]]] = []
    for command, numbers in re.findall(r"([A-Za-z])([^A-Za-z]*)", commands):
        place = [_short(n) for n in numbers.split()]
        if command == "L" and len(points) > 1 and points[-1][0] == "L" and _between(points, place):
            points.pop()
        points.append((command, place))
    return "".join(command + " ".join(place) for command, place in points)


def _between(points: list[tuple[str, list[str]]], place: list[str]) -> bool:
    """Whether the last point lies between the one before and ``place`` on a horizontal or vertical line."""
    before, last = points[-2][1][-2:], points[-1][1]
    for same, along in ((0, 1), (1, 0)):
        if before[same] == last[same] == place[same]:
            low, high = sorted((float(before[along]), float(place[along])))
            return low <= float(last[along]) <= high
    return False


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def _shortened(text: str) -> str:
    return _NUMBER.sub(lambda m: _short(m[0]), text)


def _short(number: str) -> str:
    text = f"{float(number):.1f}"
    return text.removesuffix(".0") if text != "-0.0" else "0"
