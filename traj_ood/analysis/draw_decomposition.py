"""The picture of ``decomposition``: the terms over the dictionary's size, and how tight each bound is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from traj_ood.analysis.draw import CYCLE, _floats, figure, save

_GREY = "#555555"
_TERMS = {
    "error": "reconstruction error ‖x − F(x)‖²",
    "prototype": "prototype error",
    "distortion": "decoder distortion",
    "coverage": r"coverage error $L_D^2\,\|z - \Pi(z)\|^2$",
}


def decomposition(
    rows: Sequence[Mapping[str, Any]],
    error: NDArray[np.float64],
    sides: Mapping[str, NDArray[np.float64]],
    title: str,
    path: Path,
) -> None:
    """Three panels: mean terms and share of images for which each form holds over the dictionary, bound / error.

    Args:
        rows: as the question's figures have them, a row per dictionary.
        error: (B,) of the largest dictionary. sides: form → (B,) its bound.
        title, path: of the figure; the PNG to write.
    """
    canvas, (means, holds, ratios) = figure(1, 3, 4.4, 3.4, title)
    sizes = [row["attractors"] for row in rows]
    for i, (key, label) in enumerate(_TERMS.items()):
        means.plot(sizes, _floats([row[key] for row in rows]), marker="o", markersize=4, color=CYCLE[i], label=label)
    means.set(xscale="log", yscale="log", xlabel="attractors in the dictionary", ylabel="mean over test images")
    means.set_title("terms", fontsize=10)
    for i, form in enumerate(sides):
        share = 100 * _floats([row["forms"][form]["holds"] for row in rows])
        # Forms that always hold lie on one line: the later ones are smaller, so that all can be seen.
        holds.plot(sizes, share, marker="o", markersize=9 - 2 * i, linewidth=4 - i, color=CYCLE[i], label=form)
        _shares(ratios, sides[form][error > 0] / error[error > 0], CYCLE[i], form)
    holds.set(
        xscale="log", ylim=(-3, 103), xlabel="attractors in the dictionary", ylabel="images for which it holds (%)"
    )
    holds.set_title("how often each form holds", fontsize=10)
    ratios.axvline(1, color=_GREY, linestyle="--", linewidth=1)
    ratios.set(xscale="log", xlabel="bound / error (left of the line it fails)", ylabel="images up to here (%)")
    ratios.set_title(f"how tight, with {sizes[-1]} attractors", fontsize=10)
    for axis in (means, holds, ratios):
        axis.legend(frameon=False, fontsize=8)
    save(canvas, path)


def _shares(axis: Axes, ratio: NDArray[np.float64], colour: str, label: str) -> None:
    """The cumulative distribution of ``ratio`` in percent; nothing where L_D, and so a ratio, is not finite."""
    ordered = np.sort(ratio) if np.isfinite(ratio).all() else np.empty(0)
    axis.step(ordered, 100 * np.arange(1, len(ordered) + 1) / len(ordered), color=colour, where="post", label=label)
