"""The picture of ``contraction``: variance ratios at initialisation, as Fig. 6."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from traj_ood.analysis.draw import CYCLE, figure, save

_GREY = "#555555"
_PANELS = {
    "running_logits": "logits, evaluation mode",
    "running_features": "features, evaluation mode",
    "batch_logits": "logits, batch statistics",
    "batch_features": "features, batch statistics",
}
_RATIOS = {
    "all": (CYCLE[1], "s", 0.16, "variance of all output numbers (Fig. 6)"),
    "between": (CYCLE[0], "o", -0.16, "variance between images"),
}
_LEAST = 1e-12  # smaller ratios are drawn there: a constant output has no place on a logarithmic axis


def ratios(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A line per backbone, a point per run; left of the dashed line the network contracts.

    Args:
        rows: ``model`` and the ratios by :data:`traj_ood.analysis.contraction.KEYS`, None where nothing was measured.
        path: the PNG to write.
    """
    models = list(dict.fromkeys(row["model"] for row in rows))
    measured = [row[f"{key}_{ratio}"] for row in rows for key in _PANELS for ratio in _RATIOS]
    largest = 3 * max([30.0, *(x for x in measured if x is not None)])
    canvas, axes = figure(
        2, 2, 5.0, 0.24 * len(models) + 1.0, "Variance at initialisation: output over input, on N(0, I)"
    )
    for i, (axis, (key, label)) in enumerate(zip(axes, _PANELS.items(), strict=True)):
        for ratio, (colour, marker, shift, text) in _RATIOS.items():
            pairs = [(row[f"{key}_{ratio}"], models.index(row["model"])) for row in rows]
            drawn = np.array([(max(x, _LEAST), y - shift) for x, y in pairs if x is not None]).reshape(-1, 2)
            axis.plot(drawn[:, 0], drawn[:, 1], marker, color=colour, markersize=4, alpha=0.6, label=text)
        axis.axvline(1, color=_GREY, linestyle="--", linewidth=1)
        axis.set(xscale="log", xlim=(_LEAST / 3, largest), ylim=(len(models) - 0.5, -0.5))
        axis.set_xlabel(f"variance ratio ({_LEAST:g}: that or less)", fontsize=9)
        axis.set_title(label, fontsize=10)
        axis.tick_params(labelsize=8)
        axis.set_yticks(range(len(models)), models if i % 2 == 0 else [""] * len(models), fontsize=8)
    handles, labels = axes[0].get_legend_handles_labels()
    canvas.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    save(canvas, path)
