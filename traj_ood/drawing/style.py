"""Style of all figures: colours, panels with sizes in inches, titles, legends, and files.

Figures are plain objects without pyplot, so that there is no global state, no window, and nothing to close.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D

from traj_ood.io.files import write_atomic
from traj_ood.text import printable

DPI = 150
NARROW = 4.0
"""Width in inches below which a figure for print has a smaller legend: one column of a page."""

INKS = {
    "text": "#1c2024",
    "muted": "#596069",
    "rule": "#e1e4e8",
    "paper": "#ffffff",
    "id": "#0b6bcb",
    "near": "#c2410c",
    "far": "#00785a",
    "gold": "#c48b00",
    "pink": "#cc6ab3",
}
"""Colours by name, as in the report's light scheme; its style sheet has a dark counterpart of each.

``id``, ``near`` and ``far`` always stand for this role. ``near``, ``far``, ``gold``, ``pink``, ``id`` and ``text`` are
distinguishable with all common kinds of colour blindness (CIEDE2000 of at least 10 between any two).
"""

CYCLE = ("near", "pink", "gold", "far", "text")
"""Inks of the OOD sets in order. Near sets come first, so that few sets get the ink of the other role."""

DASHES = ("", "5 3", "1 3")

Look = Mapping[str, Any]
"""How a line looks: keyword arguments of :class:`matplotlib.lines.Line2D`."""


def line_of(n: int) -> tuple[str, str]:
    """Ink and dash pattern (in SVG's syntax) of the n-th OOD set; they repeat after 15 sets."""
    return CYCLE[n % len(CYCLE)], DASHES[n // len(CYCLE) % len(DASHES)]


def lines_of(sets: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Ink and dash pattern of each OOD set of a run, the same in every figure; ``sets`` are all of them in order."""
    return {name: line_of(n) for n, name in enumerate(sets)}


def look(ink: str, dash: str = "") -> Look:
    """matplotlib's arguments for a line with this ink and dash pattern."""
    return {"color": INKS[ink], "linestyle": (0, tuple(map(float, dash.split()))) if dash else "-"}


def literal(text: str) -> str:
    """Text that may contain a user's name, for matplotlib, which reads a formula between two ``$``."""
    return printable(text).replace("$", r"\$")


@dataclass(frozen=True)
class Frame:
    """Size of a panel in inches, including the space around its axes.

    Attributes:
        width, height: size of the panel.
        margins: space left, right, below and above the axes. None measures the labels (matplotlib's constrained
            layout), which takes as long as the drawing itself; for figures that are drawn once per run.
    """

    width: float
    height: float
    margins: tuple[float, float, float, float] | None = None


def canvas(
    frame: Frame,
    count: int = 1,
    columns: int = 1,
    title: str = "",
    legend: Mapping[str, Look] | None = None,
    headroom: float = 0.0,
    width: float | None = None,
) -> tuple[Figure, list[Axes]]:
    """Create a white figure; returns it and its panels in reading order.

    Args:
        frame: size of each panel.
        count, columns: number of panels, and of panels in a row.
        title: a bold first line, and further lines of explanation. Lines are wrapped.
        legend: look of each line by label, shown below the panels; users' names in it are made :func:`literal`.
        headroom: inches above each panel, for a title of its own.
        width: width in inches of a figure for print: panels are scaled to fit, down to two thirds of their width before
            fewer stand in a row, and the title is left to the caption. None keeps the size of the panels.
    """
    small = width is not None and width < NARROW
    if width is not None:
        columns = max(1, min(columns, count, int(1.5 * width / frame.width)))
        each, title = width / columns, ""  # a narrower panel gets a smaller height, so that slopes look the same
        frame = replace(frame, width=each, height=frame.height * min(1.0, each / frame.width))
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    wide = max(frame.width * columns, 4.0 if title else 0.0)  # wide enough for a title
    # In DejaVu Sans an inch fits 9 characters of the bold heading and 13 of the text below it.
    heading, _, note = title.partition("\n")
    lines = textwrap.wrap(heading, int(9 * wide))
    notes = [part for line in note.splitlines() for part in textwrap.wrap(line, int(13 * wide))]
    head = 0.1 + 0.21 * len(lines) + 0.16 * len(notes) if title else 0.0
    handle, letter, line = (0.39, 0.058, 0.16) if small else (0.5, 0.078, 0.2)
    across = max(1, min(len(legend), int(wide / (handle + letter * max(map(len, legend)))))) if legend else 1
    foot = 0.1 + line * math.ceil(len(legend) / across) if legend else 0.0
    head = head if width is None else 0.04  # ascenders of a title at the upper edge
    body = rows * (frame.height + headroom)
    height = head + body + foot

    figure = Figure(facecolor=INKS["paper"])
    figure.set_size_inches(wide, height)
    axes = _panels(figure, frame, count, rows, columns, foot, body)
    if frame.margins is not None:
        left, right, below, above = frame.margins
        size = ((frame.width - left - right) / wide, (frame.height - below - above) / height)
        aside = (wide - frame.width * columns) / 2 + left
        for n, axis in enumerate(axes):
            corner = (aside + n % columns * frame.width, foot + body * (1 - (n // columns + 1) / rows) + below)
            axis.set_position((corner[0] / wide, corner[1] / height, *size))
    bold, quiet = {"size": 12, "weight": "bold", "color": INKS["text"]}, {"size": 9, "color": INKS["muted"]}
    for text, top, font in ((lines, 0.07, bold), (notes, 0.07 + 0.21 * len(lines), quiet)):
        figure.text(0.5, 1 - top / height, "\n".join(map(literal, text)), ha="center", va="top", fontdict=font)
    if legend:
        handles = [Line2D([], [], label=label, **own) for label, own in legend.items()]
        style = {"frameon": False, "fontsize": 7 if small else 9, "labelcolor": INKS["text"]}
        figure.legend(handles=handles, loc="lower center", ncols=across, **style)
    return figure, axes


def _panels(figure: Figure, frame: Frame, count: int, rows: int, columns: int, foot: float, body: float) -> list[Axes]:
    """Create the panels; without given margins they share the ``body`` above the ``foot``, both in inches."""
    if frame.margins is not None:
        axes = [figure.add_axes((0, 0, 1, 1)) for _ in range(count)]
    else:
        height = figure.get_figheight()
        rect = (0, foot / height, 1, body / height)
        apart = 0.08 if rows > 1 else 0.0
        figure.set_layout_engine(ConstrainedLayoutEngine(w_pad=0.05, h_pad=0.03, hspace=apart, rect=rect))
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        for spare in axes[count:]:
            spare.remove()
    for axis in axes[:count]:
        _plain(axis)
    return axes[:count]


def _plain(axis: Axes) -> None:
    """Style axes: light grid, no tick marks, muted labels of 9 points (about 11 px on the page for a 3-inch panel)."""
    axis.set_facecolor(INKS["paper"])
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(INKS["rule"])
    axis.tick_params(which="both", bottom=False, left=False, labelsize=9, labelcolor=INKS["muted"])
    axis.xaxis.label.set(size=9, color=INKS["muted"])
    axis.yaxis.label.set(size=9, color=INKS["muted"])
    axis.title.set(size=10, color=INKS["text"])
    axis.grid(color=INKS["rule"], linewidth=0.6)
    axis.set_axisbelow(True)


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure as PNG at 150 dots per inch, SVG or PDF, by the suffix of ``path``; atomically.

    Text stays text in the vector formats, and equal figures give equal bytes.

    Raises:
        TrajOODError: ``path`` cannot be written.
    """
    form = Path(path).suffix[1:]
    metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(form)
    settings: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "traj_ood", "pdf.fonttype": 42}
    with rc_context(settings):
        write_atomic(path, lambda file: figure.savefig(file, format=form, dpi=DPI, metadata=metadata))
