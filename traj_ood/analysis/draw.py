"""What the pictures of several questions share: panels of curves, rows of images.

Together with ``draw_*.py`` beside it, and plots.py, the only files that import matplotlib.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from traj_ood.errors import TrajOODError
from traj_ood.evaluation.plots import _BLUE, _GREEN, _ORANGE, _PINK, _SKY, _VERMILION, _picture
from traj_ood.evaluation.plots import _figure as figure
from traj_ood.evaluation.plots import _save as save

__all__ = ["CYCLE", "Curve", "Panel", "PictureRow", "attractor_rows", "curves", "figure", "picture_rows", "save"]

CYCLE = (_BLUE, _VERMILION, _GREEN, _ORANGE, _PINK, _SKY)
_MARKERS = "osD^vP"


@dataclass(frozen=True)
class Curve:
    """One line: x and y (n,), and optionally a band of y ± spread (n,). None or NaN leaves a gap."""

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    spread: Sequence[float | None] | None = None


@dataclass(frozen=True)
class Panel:
    """Axes with their curves.

    Attributes:
        title, x_label, y_label: texts. curves: at most six, told apart by colour and marker.
        log_x: "2" for powers of two, "10" for decades, "" for a linear axis. log_y: decades on the y axis.
        limits: of the y axis; None fits the data.
    """

    title: str
    x_label: str
    y_label: str
    curves: Sequence[Curve] = field(default_factory=tuple)
    log_x: str = ""
    log_y: bool = False
    limits: tuple[float, float] | None = None


@dataclass(frozen=True)
class PictureRow:
    """A row of images (K, C, H, W), C = 1 or 3, in any units; ``limits`` (2, C) are drawn as black and as full
    brightness."""

    label: str
    images: ArrayLike
    limits: ArrayLike
    captions: Sequence[str] = ()


def curves(panels: Sequence[Panel], title: str, path: Path) -> None:
    """A PNG of panels side by side, at most three in a row.

    Raises:
        TrajOODError: no panel, more curves than colours, or an unwritable path.
    """
    if not panels or max(len(p.curves) for p in panels) > len(CYCLE):
        raise TrajOODError(
            f"plot: expected panels of at most {len(CYCLE)} curves, got {[len(p.curves) for p in panels]}"
        )
    columns = 2 if len(panels) == 4 else min(3, len(panels))
    canvas, axes = figure(math.ceil(len(panels) / columns), columns, 4.2, 3.1, title)
    for axis, panel in zip(axes, panels, strict=False):
        _panel(axis, panel)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    save(canvas, path)


def _panel(axis: Axes, panel: Panel) -> None:
    for i, curve in enumerate(panel.curves):
        x, y = _floats(curve.x), _floats(curve.y)
        axis.plot(x, y, color=CYCLE[i], marker=_MARKERS[i], markersize=4, linewidth=1.5, label=curve.label)
        if curve.spread is not None:
            spread = _floats(curve.spread)
            axis.fill_between(x, y - spread, y + spread, color=CYCLE[i], alpha=0.15, linewidth=0)
    axis.set_title(panel.title, fontsize=10)
    axis.set_xlabel(panel.x_label, fontsize=9)
    axis.set_ylabel(panel.y_label, fontsize=9)
    axis.tick_params(labelsize=8)
    if panel.log_x:
        axis.set_xscale("log", base=int(panel.log_x))
    if panel.log_y:
        axis.set_yscale("log")
    if panel.limits is not None:
        axis.set_ylim(*panel.limits)
    if len(panel.curves) > 1:
        axis.legend(frameon=False, fontsize=8)


def _floats(values: Sequence[float | None]) -> NDArray[np.float64]:
    return np.array([np.nan if v is None else v for v in values], dtype=np.float64)


def attractor_rows(pictures: Mapping[str, Mapping[str, Tensor]], path: Path) -> None:
    """A PNG with two rows for each label: decoded attractors, and the training image closest to each (Fig. 2 right).

    Args:
        pictures: label → tensors ``decoded`` and ``closest`` (K, C, H, W) in pixels of [0, 1]; labels without tensors
            are left out.
        path: the PNG.
    """
    rows = []
    for label, shown in pictures.items():
        if shown:
            limits = np.array([[0.0], [1.0]]).repeat(shown["decoded"].shape[1], axis=1)
            rows.append(PictureRow(f"{label}\nD(z*)", shown["decoded"].numpy(), limits))
            rows.append(PictureRow("closest\ntraining", shown["closest"].numpy(), limits))
    picture_rows(rows, "Decoded attractors, each above the training image closest to it", path)


def picture_rows(rows: Sequence[PictureRow], title: str, path: Path) -> None:
    """A PNG with one row of images per :class:`PictureRow`; rows may differ in length.

    Raises:
        TrajOODError: no images, images that are not (K, C, H, W), or an unwritable path.
    """
    pictures = [np.asarray(row.images, dtype=np.float64) for row in rows]
    if not pictures or any(p.ndim != 4 or p.shape[1] not in (1, 3) or not len(p) for p in pictures):
        raise TrajOODError(f"plot: expected rows of images (K, C, H, W), got shapes {[p.shape for p in pictures]}")
    columns = max(len(p) for p in pictures)
    canvas, axes = figure(len(rows), columns, max(0.85, 4.8 / columns), 1.0, title)
    for axis in axes:
        axis.set(xticks=[], yticks=[])
        axis.grid(visible=False)
        axis.spines[:].set_visible(False)
    for line, (row, images) in enumerate(zip(rows, pictures, strict=True)):
        first = axes[line * columns : (line + 1) * columns]
        first[0].set_ylabel(row.label, fontsize=8)
        for i, (axis, image) in enumerate(zip(first, images, strict=False)):
            _picture(axis, image, np.asarray(row.limits, dtype=np.float64))
            if i < len(row.captions):
                axis.set_title(row.captions[i], fontsize=7)
    save(canvas, path)
