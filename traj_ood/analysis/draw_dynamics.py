"""The pictures of ``dynamics``: curves over hundreds of steps, as Figs 16 and 17."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.ticker import MaxNLocator

from traj_ood.analysis.draw import CYCLE, figure, save
from traj_ood.errors import TrajOODError


def step_curves(
    panels: Mapping[str, Mapping[str, Sequence[float | None]]], steps: int, linear: str, title: str, path: Path
) -> None:
    """A PNG of panels side by side.

    Args:
        panels: title → label → values up to step ``steps``: from step 0 or 1, as many as there are. On a logarithmic
            axis, where 0 is a gap, as None is; the panel ``linear`` has a linear one that begins at 0.
        title, path: of the figure; the PNG to write.
    Raises:
        TrajOODError: no panel, more curves than colours, or an unwritable path.
    """
    counts = [len(lines) for lines in panels.values()]
    if not counts or max(counts) > len(CYCLE):
        raise TrajOODError(f"plot: expected panels of at most {len(CYCLE)} curves, got {counts}; leave some out")
    canvas, axes = figure(1, len(panels), 4.2, 3.3, title)
    for axis, (name, lines) in zip(axes, panels.items(), strict=True):
        for colour, (label, values) in zip(CYCLE, lines.items(), strict=False):
            y = np.array([np.nan if v is None else v for v in values], dtype=np.float64)
            if name != linear:
                y[y <= 0] = np.nan
            axis.plot(np.arange(steps + 1 - len(y), steps + 1), y, color=colour, linewidth=1.5, label=label)
        axis.set(xlabel="step")
        if name == linear:
            top = float(axis.dataLim.y1)  # -inf where no value is finite
            axis.set_ylim(0, 1.1 * top if 0 < top < np.inf else 1)
        else:
            axis.set_yscale("log")
        axis.set_title(name, fontsize=10)
        axis.tick_params(labelsize=8)
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    handles, labels = axes[0].get_legend_handles_labels()
    canvas.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    save(canvas, path)
