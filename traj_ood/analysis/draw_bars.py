"""Named things side by side: horizontal bars in panels that share their rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from traj_ood.analysis.draw import CYCLE, figure, save
from traj_ood.errors import TrajOODError


@dataclass(frozen=True)
class BarPanel:
    """A panel: series by label, one value (or None, drawn as nothing) per row; ``mark`` is a dotted line."""

    title: str
    series: Mapping[str, Sequence[float | None]]
    mark: float | None = None
    limits: tuple[float, float] | None = None


def bars(names: Sequence[str], panels: Sequence[BarPanel], title: str, path: Path) -> None:
    """A PNG with a row of bars for each name, read from the top.

    Raises:
        TrajOODError: no rows or panels, a series of another length, or an unwritable path.
    """
    lengths = [len(values) for panel in panels for values in panel.series.values()]
    if not names or not lengths or set(lengths) != {len(names)}:
        raise TrajOODError(f"plot: expected {len(names)} values in every series, got {lengths}")
    canvas, axes = figure(1, len(panels), 3.6, max(2.4, 0.5 * len(names)), title)
    places = np.arange(len(names))
    for i, (axis, panel) in enumerate(zip(axes, panels, strict=True)):
        height = 0.8 / len(panel.series)
        for j, (label, values) in enumerate(panel.series.items()):
            shown = [np.nan if v is None else v for v in values]
            axis.barh(places - 0.4 + (j + 0.5) * height, shown, height, color=CYCLE[j], label=label)
        if panel.mark is not None:
            axis.axvline(panel.mark, color="#555555", linestyle=":", linewidth=1.2)
        axis.set_title(panel.title, fontsize=10)
        axis.set_yticks(places, labels=list(names) if i == 0 else [""] * len(names), fontsize=9)
        axis.tick_params(axis="x", labelsize=8)
        axis.invert_yaxis()
        if panel.limits is not None:
            axis.set_xlim(*panel.limits)
        axis.legend(frameon=False, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.08))
    save(canvas, path)
