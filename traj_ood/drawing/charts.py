"""Common kinds of figures: panels of curves, named rows of dots, rows of images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, ScalarFormatter
from numpy.typing import ArrayLike, NDArray

from traj_ood.drawing.style import INKS, Figure, Frame, Look, canvas, literal
from traj_ood.errors import TrajOODError

SERIES = ("id", "near", "far", "gold", "pink", "text")
"""Inks of the curves of a panel, in order."""

Values = Sequence[float | None] | ArrayLike

_MARKERS = "osD^vP"
_MAX_MARKED = 30  # points of a curve with markers; more markers would merge into a thick line
_WIDTH = 4.2  # inches, of a panel of curves


def look_of(n: int) -> Look:
    """Colour, marker and size of the n-th series; later ones are smaller, so that coinciding series stay visible."""
    return {"color": INKS[SERIES[n]], "marker": _MARKERS[n], "markersize": 5.5 - 0.5 * n, "linewidth": 1.8 - 0.1 * n}


# ---------------------------------------------------------------------------------------------- curves


@dataclass(frozen=True)
class Curve:
    """One series: x and y (n,), and optionally a band y ± spread (n,). None or NaN leaves a gap.

    ``kind`` is ``line``, ``points`` (no line), or ``steps`` (y is constant up to the next x).
    """

    label: str
    x: Values
    y: Values
    spread: Values | None = None
    kind: Literal["line", "points", "steps"] = "line"


@dataclass(frozen=True)
class Panel:
    """Axes with curves.

    Attributes:
        title, x_label, y_label: texts.
        curves: at most six, which differ in colour and marker.
        log_x: "2" for powers of two, "10" for decades, "" for a linear axis.
        log_y: a logarithmic y axis, on which values of 0 are gaps.
        limits: limits of the y axis; an upper limit of None, or None for both, fits the data.
        mark: x position of a vertical line.
        diagonal: equal logarithmic axes with the line x = y.
    """

    title: str
    x_label: str
    y_label: str
    curves: Sequence[Curve]
    log_x: str = ""
    log_y: bool = False
    limits: tuple[float, float | None] | None = None
    mark: float | None = None
    diagonal: bool = False


def curves(panels: Sequence[Panel], title: str) -> Figure:
    """A figure of panels side by side, at most three in a row; legends stand below, one for all with equal labels.

    Raises:
        TrajOODError: there are no panels, or more curves than colours.
    """
    if not panels or max(len(p.curves) for p in panels) > len(SERIES):
        raise TrajOODError(
            f"plot: expected panels of at most {len(SERIES)} curves, got {[len(p.curves) for p in panels]}"
        )
    labels = {tuple(curve.label for curve in panel.curves) for panel in panels}
    shared = len(panels) > 1 and len(labels) == 1
    legend = {c.label: _look(n, c) for n, c in enumerate(panels[0].curves)} if shared else None
    own = [[] if shared or len(panel.curves) < 2 else [curve.label for curve in panel.curves] for panel in panels]
    lines = max(math.ceil(len(names) / _beside(names)) for names in own)
    columns = 2 if len(panels) == 4 else 3
    frame = Frame(_WIDTH, 3.1 + 0.17 * lines)
    figure, axes = canvas(frame, len(panels), columns, title, legend)
    for axis, panel, names in zip(axes, panels, own, strict=True):
        _draw(axis, panel)
        if names:  # below the panel, where no curve is
            place = (0.5, -0.5 / 2.4)
            axis.legend(
                frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=place, ncols=_beside(names), borderpad=0
            )
    return figure


def _beside(names: Sequence[str]) -> int:
    """Entries of a panel's legend that fit beside each other."""
    return max(1, min(len(names), int(_WIDTH / (0.5 + 0.065 * max(map(len, names), default=0)))))


def _draw(axis: Axes, panel: Panel) -> None:
    for n, curve in enumerate(panel.curves):
        x, y, look = floats(curve.x), floats(curve.y), _look(n, curve)
        if panel.log_y or panel.diagonal:
            y[y <= 0] = np.nan
        axis.plot(x, y, label=curve.label, **look, drawstyle="steps-post" if curve.kind == "steps" else "default")
        if curve.spread is not None:
            spread = floats(curve.spread)
            axis.fill_between(x, y - spread, y + spread, color=look["color"], alpha=0.15, linewidth=0)
    axis.title.set_text(panel.title)
    axis.set(xlabel=panel.x_label, ylabel=panel.y_label)
    if panel.log_x:
        axis.set_xscale("log", base=int(panel.log_x))
    elif all((floats(curve.x) % 1 == 0).all() for curve in panel.curves):
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if panel.log_y:
        axis.set_yscale("log")
    if panel.limits is not None:
        low, high = panel.limits
        axis.set_ylim(low, 1.1 * axis.get_ylim()[1] if high is None else high)
    if panel.mark is not None:
        axis.axvline(panel.mark, color=INKS["muted"], linestyle="--", linewidth=1)
    if panel.diagonal:
        _diagonal(axis, [floats(values) for curve in panel.curves for values in (curve.x, curve.y)])


def _look(n: int, curve: Curve) -> Look:
    """The look of the n-th curve of a panel: points only, or a line, with markers if it has few points."""
    if curve.kind == "points":
        return {**look_of(n), "linestyle": "", "alpha": 0.6, "markeredgewidth": 0}
    return {**look_of(n), "marker": _MARKERS[n] if floats(curve.x).size <= _MAX_MARKED else ""}


def floats(values: Values) -> NDArray[np.float64]:
    """``values`` as float64, with None as NaN."""
    return np.array(values, dtype=np.float64)


def _diagonal(axis: Axes, values: Sequence[NDArray[np.float64]]) -> None:
    known = np.concatenate([*values, np.empty(0)])
    known = known[np.isfinite(known) & (known > 0)]
    low, high = (0.8 * known.min(), 1.25 * known.max()) if known.size else (1.0, 10.0)
    axis.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
    for side in (axis.xaxis, axis.yaxis):  # label 1, 2, 5, 10, … as plain numbers
        side.set_major_locator(LogLocator(subs=(1, 2, 5)))
        side.set_major_formatter(ScalarFormatter())
        side.set_minor_formatter(NullFormatter())
    axis.plot([low, high], [low, high], color=INKS["muted"], linewidth=1, linestyle="--", zorder=0)


# ---------------------------------------------------------------------------------------------- named rows


@dataclass(frozen=True)
class DotPanel:
    """A panel of :func:`dots`: for each series the values of each name, and a dotted line at ``mark``.

    ``least`` makes the axis logarithmic; values below it, such as 0, are drawn at ``least``.
    """

    title: str
    series: Mapping[str, Sequence[Sequence[float | None]]]
    mark: float | None = None
    limits: tuple[float, float] | None = None
    least: float | None = None


def dots(names: Sequence[str], panels: Sequence[DotPanel], columns: int, title: str) -> Figure:
    """A figure with one row of dots per name, from the top, in panels with common rows.

    Raises:
        TrajOODError: there are no names or panels, or a series has another length.
    """
    lengths = [len(values) for panel in panels for values in panel.series.values()]
    if not names or set(lengths) != {len(names)}:
        raise TrajOODError(f"plot: expected values for each of {len(names)} names in every series, got {lengths}")
    shared = len({tuple(panel.series) for panel in panels}) == 1
    looks = [{**look_of(n), "linestyle": "", "alpha": 0.6, "markersize": 4.5} for n in range(len(SERIES))]
    legend = dict(zip(panels[0].series, looks, strict=False)) if shared else None
    crowd = max(len(panel.series) for panel in panels)
    frame = Frame(3.6, max(0.24, 0.12 * crowd) * len(names) + 1.0)
    figure, axes = canvas(frame, len(panels), columns, title, legend)
    for place, (axis, panel) in enumerate(zip(axes, panels, strict=True)):
        for n, (label, rows) in enumerate(panel.series.items()):
            shift = min(0.3, 0.8 / crowd) * (n - (len(panel.series) - 1) / 2)
            found = [(value, row + shift) for row, values in enumerate(rows) for value in values if value is not None]
            value, row = np.transpose(found) if found else np.empty((2, 0))
            axis.plot(np.maximum(value, panel.least) if panel.least else value, row, label=label, **looks[n])
        if panel.least:
            axis.set_xscale("log")
        if panel.limits:
            axis.set_xlim(*panel.limits)
        if panel.mark is not None:
            axis.axvline(panel.mark, color=INKS["muted"], linestyle=":", linewidth=1.2)
        name_rows(axis, names if place % columns == 0 else [""] * len(names))
        axis.title.set_text(panel.title)
        if not shared and len(panel.series) == 1:
            axis.set_xlabel(next(iter(panel.series)))
        elif not shared:
            axis.legend(
                frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.35 / (frame.height - 0.7))
            )
    return figure


def name_rows(axis: Axes, names: Sequence[str]) -> None:
    """Label rows at y = 0, 1, …, from the top, with the names."""
    axis.set_yticks(range(len(names)), [*map(literal, names)])
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.grid(visible=False, axis="y")


# ---------------------------------------------------------------------------------------------- images


@dataclass(frozen=True)
class PictureRow:
    """A row of images (K, C, H, W), C = 1 or 3, in any units; ``limits`` (2, C) are the values drawn as black and as
    full brightness, to which others are clipped."""

    label: str
    images: ArrayLike
    limits: ArrayLike
    captions: Sequence[str] = ()


def picture_rows(rows: Sequence[PictureRow], title: str) -> Figure:
    """A figure with one row of images per :class:`PictureRow`; rows may differ in length.

    Raises:
        TrajOODError: there are no images, or they are not (K, C, H, W).
    """
    pictures = [np.asarray(row.images, dtype=np.float64) for row in rows]
    if not pictures or any(p.ndim != 4 or p.shape[1] not in (1, 3) or not len(p) for p in pictures):
        raise TrajOODError(f"plot: expected rows of images (K, C, H, W), got shapes {[p.shape for p in pictures]}")
    columns = max(map(len, pictures))
    side = min(1.2, max(0.95, 4.8 / columns))  # width of an image in inches, the unit of lengths below
    tops, end = [], 0.0
    for row, images in zip(rows, pictures, strict=True):
        tops.append(end + 0.16 / side * max((caption.count("\n") + 1 for caption in row.captions), default=0))
        end = tops[-1] + images.shape[2] / images.shape[3] + 0.06
    figure, (axis,) = canvas(Frame(side * columns + 0.6, side * end, (0.5, 0.1, 0.0, 0.0)), title=title)
    for row, images, top in zip(rows, pictures, tops, strict=True):
        bottom = top + images.shape[2] / images.shape[3]
        axis.text(-0.05, (top + bottom) / 2, row.label, rotation=90, ha="right", va="center", fontsize=8)
        for n, image in enumerate(_unit(images, floats(row.limits))):
            axis.imshow(image, extent=(n, n + 0.95, bottom, top), aspect="auto", cmap="gray", vmin=0, vmax=1)
        for n, caption in enumerate(row.captions):
            axis.text(n + 0.47, top - 0.03, caption, ha="center", va="bottom", fontsize=7.5)
    axis.set(xlim=(0, columns), ylim=(end, 0))
    axis.set_axis_off()
    return figure


def _unit(images: NDArray[np.float64], limits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Images (K, C, H, W) as (K, H, W) or (K, H, W, 3), ``limits`` (2, C) mapped to 0 and 1."""
    low, high = limits[:, :, None, None]
    unit = np.clip((images - low) / np.maximum(high - low, 1e-12), 0, 1).transpose(0, 2, 3, 1)
    return unit[..., 0] if unit.shape[-1] == 1 else unit
