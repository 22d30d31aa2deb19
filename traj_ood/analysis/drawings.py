"""Figures in the plane: vector fields (``field``) and angles between fields and scores (``score-field``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from numpy.typing import NDArray

from traj_ood.drawing.style import INKS, Figure, Frame, Look, canvas

Floats = NDArray[np.float64]

_DECADES = 3  # decades of norms, below the largest, that the colours span
_MAX_ANGLE = 90.0  # degrees at which the colour scale ends: from here on the field does not ascend
_MAX_CODES = 1500  # codes drawn; more would overlap
_STAR: Look = {"marker": "*", "markersize": 10, "linestyle": "", "color": INKS["near"]}


def fields(panels: Sequence[tuple[str, Mapping[str, Floats]]], title: str) -> Figure:
    """Draw vector fields, one per panel, each with its own axes and colour scale.

    Args:
        panels: pairs of a title and arrays: ``points`` (P, 2) of a square grid, ``vectors`` (P, 2) f(z) − z, ``codes``
            (B, 2) of images, and ``attractors`` (A, 2).
        title: title of the figure.
    """
    ring = {"marker": ".", "linestyle": "", "color": INKS["paper"], "markeredgecolor": INKS["muted"]}
    legend = {"codes of images": ring, "attractors found": _STAR}
    figure, axes = canvas(Frame(3.9, 3.2), len(panels), 3, title, legend)
    for axis, (name, tensors) in zip(axes, panels, strict=True):
        _field(axis, tensors)
        count = len(tensors["attractors"])
        axis.title.set_text(f"{name}: {count} attractor{'' if count == 1 else 's'} found")
    return figure


def _field(axis: Axes, tensors: Mapping[str, Floats]) -> None:
    """Draw streamlines over the norm of f(z) − z, with the codes of images and the attractors."""
    points, attractors = tensors["points"], tensors["attractors"]
    x, y, u, v = _grid(points, tensors["vectors"])
    norms = np.hypot(u, v)
    top = max(float(norms.max()), 1e-12)
    bottom = top * 10.0**-_DECADES
    scale = LogNorm(bottom, top, clip=True)
    shades = axis.pcolormesh(x, y, np.maximum(norms, bottom), norm=scale, cmap="viridis", rasterized=True)
    axis.plot(*tensors["codes"].T, ".", color="white", markersize=2, alpha=0.5)
    axis.streamplot(x[0], y[:, 0], u, v, color="black", linewidth=0.6, density=1.0, arrowsize=0.7)
    inside = ((attractors >= points.min(axis=0)) & (attractors <= points.max(axis=0))).all(axis=1)
    axis.plot(*attractors[inside].T, **_STAR, markeredgecolor="white", markeredgewidth=0.6)
    axis.set(xlim=(x.min(), x.max()), ylim=(y.min(), y.max()), aspect="equal")
    axis.grid(visible=False)
    bar = axis.figure.colorbar(shades, ax=axis, shrink=0.85, pad=0.01)
    bar.ax.tick_params(labelsize=7)
    bar.set_label("‖f(z) − z‖", fontsize=8)


def score_maps(name: str, maps: Mapping[float, Mapping[str, Floats]]) -> Figure:
    """Draw one column per noise level: the data plane above, the latent codes below, both coloured by the angle.

    Args:
        name: name of the mixture.
        maps: σ → ``plane`` (P, 2), the points of a square grid, ``field`` (P, 2), ``plane_angle`` (P,),
            ``plane_density`` (P,), ``codes`` (B, 2) and ``code_angle`` (B,).
    """
    columns = len(maps)
    figure, axes = canvas(Frame(3.1, 3.0), 2 * columns, columns, f"Score and vector field: {name}")
    for column, (sigma, tensors) in enumerate(maps.items()):
        shades = _plane(axes[column], tensors)
        axes[column].title.set_text(f"noise σ = {sigma:g}")
        codes, angles = tensors["codes"][:_MAX_CODES], tensors["code_angle"][:_MAX_CODES]
        latent = axes[columns + column]
        latent.scatter(codes[:, 0], codes[:, 1], c=angles, s=4, vmin=0, vmax=_MAX_ANGLE, cmap="viridis", linewidths=0)
        latent.set_aspect("equal", adjustable="datalim")
    for axis in axes:
        axis.grid(visible=False)
    axes[0].set_ylabel(r"data: $F(x) - x$ against $\nabla\,\log\, p_\sigma$")
    axes[columns].set_ylabel(r"latent: $f(z) - z$ against $\nabla\,\log\, q$")
    bar = figure.colorbar(shades, ax=axes, shrink=0.6, pad=0.01, extend="max")
    bar.set_label("angle (degrees); 90 and more ascends nothing", fontsize=9)
    return figure


def _plane(axis: Axes, tensors: Mapping[str, Floats]) -> Any:
    """Draw angles as colours (returned), the density as contours, and the direction of F(x) − x as unit arrows."""
    x, y, u, v, angles, density = _grid(
        tensors["plane"], tensors["field"], tensors["plane_angle"], np.exp(tensors["plane_density"])
    )
    shades = axis.pcolormesh(x, y, angles, vmin=0, vmax=_MAX_ANGLE, cmap="viridis", shading="nearest", rasterized=True)
    levels = density.max() * np.array([0.05, 0.2, 0.5, 0.8])
    axis.contour(x, y, density, levels=levels, colors="white", linewidths=0.8)
    every = (slice(None, None, max(1, len(x) // 12)),) * 2
    length = np.maximum(np.hypot(u, v), 1e-300)[every]
    arrows = (x[every], y[every], u[every] / length, v[every] / length)
    axis.quiver(*arrows, color="white", pivot="mid", scale=18, width=0.005)
    axis.set_aspect("equal", adjustable="box")
    return shades


def _grid(*tensors: Floats) -> list[Floats]:
    """Reshape the columns of arrays (P, 2) and (P,) over a square grid to squares."""
    side = round(len(tensors[0]) ** 0.5)
    columns = np.concatenate([tensor.reshape(side * side, -1) for tensor in tensors], axis=1)
    return [column.reshape(side, side) for column in columns.T]
