"""The picture of ``field``: arrows over the norm of f(z) − z, with the encoder's support and the attractors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from traj_ood.analysis.draw import CYCLE, figure, save

_DECADES = 3  # of norms that the colours span, below the largest


def fields(panels: Sequence[tuple[str, Mapping[str, NDArray[np.float64]]]], title: str, path: Path) -> None:
    """A PNG with one field per panel, each in its own box and with its own scale of colours.

    Args:
        panels: title and ``points`` (P, 2) of a square grid, ``vectors`` (P, 2) f(z) − z, ``codes`` (B, 2) of images
            and ``attractors`` (A, 2).
        title, path: of the figure; the PNG to write.
    """
    columns = min(3, len(panels))
    canvas, axes = figure(math.ceil(len(panels) / columns), columns, 3.9, 3.2, title)
    for axis, (name, tensors) in zip(axes, panels, strict=False):
        _field(axis, tensors)
        axis.set_title(_titled(name, len(tensors["attractors"])), fontsize=10)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    handles = [
        Line2D([], [], color="white", markeredgecolor="#555555", marker=".", linestyle="", label="codes of images"),
        Line2D([], [], color=CYCLE[1], marker="*", markersize=10, linestyle="", label="attractors found"),
    ]
    canvas.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    save(canvas, path)


def _titled(name: str, count: int) -> str:
    return f"{name}: {count} attractor{'' if count == 1 else 's'} found"


def _field(axis: Axes, tensors: Mapping[str, NDArray[np.float64]]) -> None:
    points, vectors = tensors["points"], tensors["vectors"]
    side = round(len(points) ** 0.5)
    x, y, u, v = (column.reshape(side, side) for column in (*points.T, *vectors.T))
    norms = np.hypot(u, v)
    top = max(float(norms.max()), 1e-12)
    bottom = top * 10.0**-_DECADES
    scale = LogNorm(bottom, top, clip=True)
    shades = axis.pcolormesh(x, y, np.maximum(norms, bottom), norm=scale, cmap="viridis", rasterized=True)
    axis.plot(*tensors["codes"].T, ".", color="white", markersize=2, alpha=0.5)
    axis.streamplot(x[0], y[:, 0], u, v, color="black", linewidth=0.6, density=1.0, arrowsize=0.7)
    attractors = tensors["attractors"]
    inside = ((attractors >= points.min(axis=0)) & (attractors <= points.max(axis=0))).all(axis=1)
    axis.plot(*attractors[inside].T, "*", color=CYCLE[1], markersize=10, markeredgecolor="white", markeredgewidth=0.6)
    axis.set(xlim=(x.min(), x.max()), ylim=(y.min(), y.max()), aspect="equal")
    axis.grid(visible=False)
    axis.tick_params(labelsize=7)
    bar = axis.figure.colorbar(shades, ax=axis, shrink=0.85, pad=0.01)
    bar.ax.tick_params(labelsize=7)
    bar.set_label("‖f(z) − z‖", fontsize=8)
