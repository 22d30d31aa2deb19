"""The maps of ``score-field``: angles between the learned field and the true score, over data and latent space."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from traj_ood.analysis.draw import figure, save

_WORST = 90.0  # degrees at which the colours end: a field that ascends nothing
_CODES = 1500  # codes drawn, so that they can be told apart


def score_maps(name: str, maps: Mapping[float, Mapping[str, NDArray[np.float64]]], path: Path) -> None:
    """A column per noise level: above the plane of the data, below the latent codes, both coloured by the angle.

    Args:
        name: of the mixture. maps: σ → ``plane`` (P, 2), ``field`` (P, 2), ``plane_angle`` (P,),
            ``plane_density`` (P,), ``codes`` (B, 2) and ``code_angle`` (B,), P the points of a square grid.
        path: the PNG to write.
    """
    columns = len(maps)
    canvas, axes = figure(2, columns, 3.1, 3.0, f"Score and vector field: {name}")
    for column, (sigma, tensors) in enumerate(maps.items()):
        shades = _plane(axes[column], tensors)
        axes[column].set_title(f"noise σ = {sigma:g}", fontsize=10)
        _codes(axes[columns + column], tensors)
    axes[0].set_ylabel(r"data: $F(x) - x$ against $\nabla\,\log\, p_\sigma$", fontsize=9)
    axes[columns].set_ylabel(r"latent: $f(z) - z$ against $\nabla\,\log\, q$", fontsize=9)
    bar = canvas.colorbar(shades, ax=axes, shrink=0.6, pad=0.01, extend="max")
    bar.set_label("angle (degrees); 90 and more ascends nothing", fontsize=9)
    save(canvas, path)


def _plane(axis: Axes, tensors: Mapping[str, NDArray[np.float64]]):  # type: ignore[no-untyped-def]
    """Angles as shades, the density as contours, the direction of F(x) − x as arrows of one length."""
    side = round(len(tensors["plane"]) ** 0.5)
    x, y = (tensors["plane"][:, i].reshape(side, side) for i in (0, 1))
    angles = tensors["plane_angle"].reshape(side, side)
    shades = axis.pcolormesh(x, y, angles, vmin=0, vmax=_WORST, cmap="viridis", shading="nearest", rasterized=True)
    density = np.exp(tensors["plane_density"].reshape(side, side))
    levels = density.max() * np.array([0.05, 0.2, 0.5, 0.8])
    axis.contour(x, y, density, levels=levels, colors="white", linewidths=0.8)
    every = slice(None, None, max(1, side // 12))
    u, v = (tensors["field"][:, i].reshape(side, side)[every, every] for i in (0, 1))
    length = np.maximum(np.hypot(u, v), 1e-300)
    axis.quiver(
        x[every, every], y[every, every], u / length, v / length, color="white", pivot="mid", scale=18, width=0.005
    )
    _bare(axis, plane=True)
    return shades


def _codes(axis: Axes, tensors: Mapping[str, NDArray[np.float64]]) -> None:
    codes, angles = tensors["codes"][:_CODES], tensors["code_angle"][:_CODES]
    axis.scatter(codes[:, 0], codes[:, 1], c=angles, s=4, vmin=0, vmax=_WORST, cmap="viridis", linewidths=0)
    _bare(axis, plane=False)


def _bare(axis: Axes, plane: bool) -> None:
    axis.grid(visible=False)
    axis.tick_params(labelsize=7)
    axis.set_aspect("equal", adjustable="box" if plane else "datalim")
