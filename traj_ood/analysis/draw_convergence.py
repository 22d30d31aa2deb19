"""The pictures of ``convergence``: predicted against measured steps, as Fig. 11."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from traj_ood.analysis.draw import CYCLE, figure, save

_GREY = "#555555"
_RATES = {"norm": (CYCLE[1], "s", "by the spectral norm"), "radius": (CYCLE[0], "o", "by the spectral radius")}


def predictions(table: pd.DataFrame, title: str, path: Path) -> None:
    """Three panels: steps over the initial error, predicted against measured from the start, and over the last stretch.

    Args:
        table: a row per image: ``error``, ``measured``, ``by norm``, ``by radius``, and the last three with the prefix
            ``last``; NaN where there is no prediction.
        title, path: of the figure; the PNG to write.
    """
    canvas, axes = figure(1, 3, 4.2, 3.6, title)
    over_error, from_start, last = axes
    over_error.plot(table["error"], table["measured"], ".", color="black", markersize=6, label="measured")
    for rate, (colour, marker, label) in _RATES.items():
        if table[f"by {rate}"].notna().any():
            over_error.plot(
                table["error"], table[f"by {rate}"], marker, color=colour, markersize=3, alpha=0.6, label=label
            )
        _against(from_start, table["measured"], table[f"by {rate}"], colour, marker, label)
        _against(last, table["last measured"], table[f"last by {rate}"], colour, marker, label)
    over_error.set(xlabel="initial error ‖e₀‖", ylabel="steps to error ε", title="over the initial error")
    from_start.set(xlabel="measured steps", ylabel="predicted steps", title="from the start")
    last.set(xlabel="measured steps", ylabel="predicted steps", title="from error 10 ε to ε")
    over_error.set_yscale("log")
    _plain(over_error.yaxis)
    for axis, prefix in ((from_start, ""), (last, "last ")):
        _diagonal(axis, table[[f"{prefix}measured", f"{prefix}by norm", f"{prefix}by radius"]])
    for axis in axes:
        axis.title.set_fontsize(10)
        axis.legend(loc="lower right", frameon=False, fontsize=8)
    save(canvas, path)


def _against(axis: Axes, measured: pd.Series, predicted: pd.Series, colour: str, marker: str, label: str) -> None:
    shown = predicted.notna() & (predicted > 0) & (measured > 0)
    text = f"{label} (n = {int(shown.sum())})" if shown.any() else f"{label}: none, {_reason(predicted)}"
    axis.plot(measured[shown], predicted[shown], marker, color=colour, markersize=4, alpha=0.6, label=text)


def _reason(predicted: pd.Series) -> str:
    """Why there is nothing to show: no image at all, no prediction, or none with a step on both sides."""
    if predicted.empty:
        return "no image to compare"
    return "it is 1 or more" if predicted.isna().all() else "no step predicted or measured"


def _diagonal(axis: Axes, steps: pd.DataFrame) -> None:
    """Both axes logarithmic and alike, with the line on which prediction and measurement agree."""
    values = steps.to_numpy(dtype=np.float64)
    values = values[np.isfinite(values) & (values > 0)]
    low, high = (0.8 * values.min(), 1.25 * values.max()) if values.size else (1.0, 10.0)
    axis.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
    _plain(axis.xaxis)
    _plain(axis.yaxis)
    axis.plot([low, high], [low, high], color=_GREY, linewidth=1, linestyle="--", zorder=0)


def _plain(side: Axis) -> None:
    """Ticks at 1, 2, 5, 10, … written as numbers: powers of ten between the decades collide on short axes."""
    side.set_major_locator(LogLocator(subs=(1, 2, 5)))
    side.set_major_formatter(ScalarFormatter())
    side.set_minor_formatter(NullFormatter())
