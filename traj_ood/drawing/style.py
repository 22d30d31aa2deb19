"""Colours, panels of a size in inches, titles, legends, and PNG files.

Figures are plain objects (no pyplot): nothing global changes, no window is needed and nothing has to be closed.
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
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D

from traj_ood.io.files import write_atomic

__all__ = [
    "CYCLE",
    "DASHES",
    "DPI",
    "INKS",
    "Figure",
    "Frame",
    "Look",
    "canvas",
    "line_of",
    "lines_of",
    "look",
    "save_figure",
    "save_png",
]

DPI = 150

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
"""Colours by name: those of the report's light scheme, whose style sheet holds a dark one for each.

``id``, ``near`` and ``far`` always mean this role. ``near``, ``far``, ``gold``, ``pink``, ``id`` and ``text`` are told
apart with every common colour blindness (CIEDE2000 of at least 10 between any two).
"""

CYCLE = ("near", "pink", "gold", "far", "text")
"""Inks of the OOD sets, which come near ones first, so that few of them have the ink of the other role."""

DASHES = ("", "5 3", "1 3")

Look = Mapping[str, Any]
"""How a line looks: keyword arguments of :class:`matplotlib.lines.Line2D`."""


def line_of(n: int) -> tuple[str, str]:
    """Ink and dash pattern (as SVG writes it) of the n-th OOD set: 15 lines before the first one comes again."""
    return CYCLE[n % len(CYCLE)], DASHES[n // len(CYCLE) % len(DASHES)]


def lines_of(sets: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Ink and dash pattern of each OOD set of a run, given all of them in its order: the same in every figure."""
    return {name: line_of(n) for n, name in enumerate(sets)}


def look(ink: str, dash: str = "") -> Look:
    """A line of an ink and a dash pattern for matplotlib."""
    return {"color": INKS[ink], "linestyle": (0, tuple(map(float, dash.split()))) if dash else "-"}


@dataclass(frozen=True)
class Frame:
    """The place of a panel in inches, the space around its axes included.

    Attributes:
        width, height: of the panel.
        margins: the space left, right, below and above the axes. None measures the labels (matplotlib's constrained
            layout), which takes as long as the drawing itself: for figures that are drawn once a run.
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
    onto: Figure | None = None,
    width: float | None = None,
) -> tuple[Figure, list[Axes]]:
    """A white figure and its panels in reading order.

    Args:
        frame: of each panel.
        count, columns: how many panels there are, and how many stand in a row.
        title: the first line is bold, the others explain. Lines are wrapped, not cut at the edge.
        legend: label → how its line looks, below the panels.
        headroom: inches above each panel, for a title of its own.
        onto: a figure of this frame, which is emptied and used again where it has as many panels: half of the time of a
            small figure goes into its axes and their ticks. None makes one.
        width: of a figure for print, in inches: panels are made to fit, and the title is left out, since a caption says
            it there. None takes the panels as they are.
    """
    if width is not None:
        columns = max(1, min(columns, count, round(width / frame.width)))
        frame, title = _fitted(frame, width / columns), ""
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    wide = max(frame.width * columns, 4.0 if title else 0.0)  # room for the words of a title
    # In DejaVu Sans 9 characters of the bold heading fit an inch, and 13 of the text below it.
    heading, _, note = title.partition("\n")
    lines = textwrap.wrap(heading, int(9 * wide))
    notes = [part for line in note.splitlines() for part in textwrap.wrap(line, int(13 * wide))]
    head = 0.1 + 0.21 * len(lines) + 0.16 * len(notes) if title else 0.0
    across = max(1, min(len(legend), int(wide / (0.5 + 0.078 * max(map(len, legend)))))) if legend else 1
    foot = 0.1 + 0.2 * math.ceil(len(legend) / across) if legend else 0.0
    body = rows * (frame.height + headroom)
    height = head + body + foot

    if onto is not None and len(onto.axes) != count:
        onto = None
    figure = onto or Figure(facecolor=INKS["paper"])
    figure.set_size_inches(wide, height)
    axes = _panels(figure, frame, count, rows, columns, foot, body) if onto is None else _emptied(onto)
    if frame.margins is not None:
        left, right, below, above = frame.margins
        size = ((frame.width - left - right) / wide, (frame.height - below - above) / height)
        aside = (wide - frame.width * columns) / 2 + left
        for n, axis in enumerate(axes):
            corner = (aside + n % columns * frame.width, foot + body * (1 - (n // columns + 1) / rows) + below)
            axis.set_position((corner[0] / wide, corner[1] / height, *size))
    bold, quiet = {"size": 12, "weight": "bold", "color": INKS["text"]}, {"size": 9, "color": INKS["muted"]}
    for text, top, font in ((lines, 0.07, bold), (notes, 0.07 + 0.21 * len(lines), quiet)):
        figure.text(0.5, 1 - top / height, "\n".join(text), ha="center", va="top", fontdict=font)
    if legend:
        handles = [Line2D([], [], label=label, **own) for label, own in legend.items()]
        style = {"frameon": False, "fontsize": 9, "labelcolor": INKS["text"]}
        figure.legend(handles=handles, loc="lower center", ncols=across, **style)
    return figure, axes


def _fitted(frame: Frame, width: float) -> Frame:
    """The frame at another width; narrower ones become lower, too, so that slopes keep their look."""
    return replace(frame, width=width, height=frame.height * min(1.0, width / frame.width))


def _panels(figure: Figure, frame: Frame, count: int, rows: int, columns: int, foot: float, body: float) -> list[Axes]:
    """New panels: where the labels are measured, they share the ``body`` above the ``foot``, both in inches."""
    if frame.margins is not None:
        axes = [figure.add_axes((0, 0, 1, 1)) for _ in range(count)]
    else:
        height = figure.get_figheight()
        rect = (0, foot / height, 1, body / height)
        figure.set_layout_engine(ConstrainedLayoutEngine(w_pad=0.05, h_pad=0.03, rect=rect))
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        for spare in axes[count:]:
            spare.remove()
    for axis in axes[:count]:
        _plain(axis)
    return axes[:count]


def _emptied(figure: Figure) -> list[Axes]:
    """The panels of a figure without what was drawn in them, and without its heading and legend."""
    for axis in figure.axes:
        for artist in (*axis.lines, *axis.patches, *axis.collections):
            artist.remove()
        axis.relim()
    for artist in (*figure.texts, *figure.legends):
        artist.remove()
    return figure.axes


def _plain(axis: Axes) -> None:
    """Light rules, no tick marks, quiet labels: 9 points in a panel of 3 inches are about 11 px on the page."""
    axis.set_facecolor(INKS["paper"])
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(INKS["rule"])
    axis.tick_params(which="both", bottom=False, left=False, labelsize=9, labelcolor=INKS["muted"])
    axis.xaxis.label.set(size=9, color=INKS["muted"])
    axis.yaxis.label.set(size=9, color=INKS["muted"])
    axis.title.set(size=10, color=INKS["text"])
    axis.grid(color=INKS["rule"], linewidth=0.6)
    axis.set_axisbelow(True)


def save_png(figure: Figure, path: str | Path) -> None:
    """PNG at 150 dots per inch, whole or not at all.

    Raises:
        TrajOODError: an unwritable path.
    """
    save_figure(figure, path)


def save_figure(figure: Figure, path: str | Path) -> None:
    """PNG at 150 dots per inch, SVG or PDF, by the path's suffix; whole or not at all.

    Text of the vector formats stays text, and equal figures give equal bytes.

    Raises:
        TrajOODError: an unwritable path.
    """
    form = Path(path).suffix[1:]
    metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(form)
    settings: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "traj_ood", "pdf.fonttype": 42}
    with rc_context(settings):
        write_atomic(path, lambda file: figure.savefig(file, format=form, dpi=DPI, metadata=metadata))
