"""The drawings of the report, one panel each: a page lays panels out, so that their text stays legible on a phone.

Titles, legends and figures are the page's; a panel holds data, axes and what points at a place in them. matplotlib is
imported here beside plots.py because these are pieces of a page (see svg.py), not PNG files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray

from traj_ood.evaluation.gallery import Pictures, view_limits
from traj_ood.evaluation.metrics import RECALL
from traj_ood.evaluation.plots import down_to_tolerance, shared_bins
from traj_ood.report.svg import INKS, inline_svg

Floats = NDArray[np.float64]

_DASHES = ("-", "--", ":")
_SETS = 8  # colours of OOD sets; then dashes
_CURVE_POINTS = 100
_STEPS = 60
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

QUANTITIES = {
    "residual_sq": "Squared residual ‖f(z) − z‖²",
    "norm": "Latent norm ‖z‖",
    "running": "Still running (%)",
}


class Panels:
    """Draws panels whose ids do not meet: one instance for each page."""

    def __init__(self) -> None:
        self._number = count()

    def histogram(self, id_scores: Floats, scores: Floats, edges: Floats, role: str, label: str) -> str:
        """ID and OOD scores as shares of their images per bin; dotted, the threshold that keeps 95 % of ID.

        Scores beyond the ``edges`` stand in the outermost bins.
        """
        figure, axis = _panel(2.4, 1.3)
        for values, ink in ((id_scores, "id"), (scores, role)):
            counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
            axis.stairs(
                counts / values.size, edges, fill=True, facecolor=(INKS[ink], 0.3), edgecolor=INKS[ink], linewidth=1
            )
        threshold = np.clip(np.quantile(id_scores, RECALL, method="inverted_cdf"), edges[0], edges[-1])
        axis.axvline(threshold, color=INKS["muted"], linestyle=":", linewidth=1.2)
        axis.yaxis.set_visible(False)
        axis.spines["left"].set_visible(False)
        axis.xaxis.set_major_locator(MaxNLocator(3))
        return self._drawn(figure, label)

    def roc(self, id_scores: Floats, sets: Mapping[str, Floats], label: str) -> str:
        """Share of OOD caught over share of ID rejected, a line for each set in its colour (see :func:`line_of`)."""
        figure, axis = _panel(4.2, 4.0)
        axis.plot([0, 100], [0, 100], color=INKS["rule"], linewidth=1)
        axis.axvline(100 * (1 - RECALL), color=INKS["muted"], linestyle=":", linewidth=1)
        for n, scores in enumerate(sets.values()):
            rejected, caught = _roc(id_scores, scores)
            axis.plot(100 * rejected, 100 * caught, linewidth=1.6, **_line(n))
        axis.set(xlim=(-1, 101), ylim=(-1, 101), xlabel="ID rejected (%)", ylabel="OOD caught (%)")
        axis.set_aspect("equal")
        return self._drawn(figure, label)

    def overview(self, rows: Sequence[tuple[str, Mapping[str, tuple[float, float, float]]]], label: str) -> str:
        """AUROC in percent by scorer: a mark for near, far and all sets, with its interval as a thin line.

        ``rows`` holds (name, {region: (value, low, high)}), best first; NaN where there is no interval.
        """
        figure, axis = _panel(6.2, 0.22 * len(rows) + 0.6)
        offsets, marks = {"far": -0.22, "all": 0.0, "near": 0.22}, {"far": "s", "all": "D", "near": "^"}
        inks = {"far": "far", "all": "text", "near": "near"}
        for region, offset in offsets.items():
            found = [(-n + offset, *values[region]) for n, (_, values) in enumerate(rows) if region in values]
            if not found:
                continue
            y, value, low, high = np.transpose(found)
            axis.hlines(y, low, high, color=INKS[inks[region]], linewidth=1, alpha=0.6)
            axis.plot(value, y, marks[region], color=INKS[inks[region]], markersize=3.6, linestyle="")
        axis.axvline(50, color=INKS["muted"], linestyle=":", linewidth=1)
        axis.set_yticks([-n for n in range(len(rows))], [name for name, _ in rows])
        axis.set_ylim(-len(rows) + 0.4, 0.6)
        axis.set_xlim(right=101)
        axis.grid(visible=False, axis="y")
        axis.set_xlabel("AUROC (%)")
        return self._drawn(figure, label)

    def dynamics(self, curves: pd.DataFrame, quantity: str, tol: float, sets: Mapping[str, int], label: str) -> str:
        """One quantity of curves.parquet over steps: the ID test split (its central half as a band) and OOD sets.

        ``sets`` holds the number (colour) of each OOD split that is drawn.
        """
        figure, axis = _panel(3.3, 2.4)
        table = curves[curves["quantity"] == quantity]
        drawn = [*table.loc[table["role"] == "test", "split"].unique(), *sets]
        table = table[table["split"].isin(drawn)]
        for split in drawn:
            rows = table[table["split"] == split].sort_values("step")
            if rows.empty:
                continue
            rows = rows.iloc[_thinned(len(rows))]
            steps, middle = rows["step"].to_numpy(), rows["q50"].to_numpy(dtype=np.float64)
            line: dict[str, Any] = _line(sets[split]) if split in sets else {"color": INKS["id"]}
            if quantity == "residual_sq":
                middle = down_to_tolerance(tol, middle)
            if split not in sets and quantity != "running":
                low = rows["q25"].to_numpy(dtype=np.float64)
                bottom = np.where(np.isnan(low), tol, low) if quantity == "residual_sq" else low
                axis.fill_between(steps, bottom, rows["q75"], color=INKS["id"], alpha=0.2, linewidth=0)
            axis.plot(steps, 100 * middle if quantity == "running" else middle, linewidth=1.5, **line)
        _step_axis(axis, int(table["step"].max()) if len(table) else 1)
        if quantity == "residual_sq":
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(numticks=5))
            axis.yaxis.set_minor_locator(NullLocator())
            axis.yaxis.set_major_formatter(FuncFormatter(_power_of_ten))
            if tol > 0:
                axis.axhline(tol, color=INKS["muted"], linestyle="--", linewidth=1)
        elif quantity == "running":
            axis.set_ylim(-2, 102)
        return self._drawn(figure, label)

    def plane(self, pictures: Pictures, label: str) -> str:
        """Paths z_0 … z_N in the plane: a ring where one starts, a disc where it ends, grey the attractors.

        Where the latent is the plane itself, arrows show f(z) − z (the paper's Fig. 1), their opacity its length.
        """
        figure, axis = _panel(6.0, 4.4)
        _arrows(axis, pictures.field)
        axis.plot(*pictures.attractors.T, "o", color=INKS["muted"], markersize=3.2, alpha=0.6, markeredgewidth=0)
        known = [path[np.isfinite(path).all(axis=1)].astype(np.float64) for path in pictures.paths]
        low, high = view_limits(pictures.paths, pictures.attractors)
        for sample, path in zip(pictures.samples, known, strict=True):
            if not len(path):
                continue
            ink = INKS[sample.role if sample.role in ("near", "far") else "id"]
            thin = _without_crowds(path, 0.004 * float(np.max(high - low)))
            axis.plot(*thin.T, color=ink, linewidth=1.1, alpha=0.75)
            axis.plot(*path[0], "o", markerfacecolor=INKS["paper"], markeredgecolor=ink, markersize=4.6)
            axis.plot(*path[-1], "o", color=ink, markersize=4.6, markeredgewidth=0)
        axis.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]))
        if pictures.plane == "latent":
            axis.set(xlabel="z₁", ylabel="z₂")
        else:  # coordinates that nobody will look up
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        axis.grid(visible=False)
        return self._drawn(figure, label)

    def _drawn(self, figure: Figure, label: str) -> str:
        return inline_svg(figure, f"g{next(self._number)}", label)


def line_of(n: int) -> tuple[str, str]:
    """The ink and the dash pattern (as in SVG) of the n-th OOD set: 24 before the first comes again."""
    return f"set{n % _SETS}", ("", "5 3", "1 3")[n // _SETS % 3]


def histogram_edges(id_scores: Floats, sets: Mapping[str, Floats]) -> Floats:
    """Bin edges that all panels of a scorer share, see :func:`traj_ood.evaluation.plots.shared_bins`."""
    return shared_bins([id_scores, *sets.values()], bins=40)


def _panel(width: float, height: float) -> tuple[Figure, Axes]:
    """One panel of ``width`` × ``height`` inches; 9 points of text in 3 inches are about 11 px on the page."""
    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.03), facecolor="none")
    axis = figure.subplots()
    axis.set_facecolor("none")
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(INKS["rule"])
    axis.tick_params(length=0, labelsize=9, labelcolor=INKS["muted"])
    axis.xaxis.label.set(size=9, color=INKS["muted"])
    axis.yaxis.label.set(size=9, color=INKS["muted"])
    axis.grid(color=INKS["rule"], linewidth=0.6)
    axis.set_axisbelow(True)
    return figure, axis


def _line(n: int) -> dict[str, Any]:
    return {"color": INKS[f"set{n % _SETS}"], "linestyle": _DASHES[n // _SETS % len(_DASHES)]}


def _roc(id_scores: Floats, scores: Floats) -> tuple[Floats, Floats]:
    """The ROC curve at about 100 points, evenly spaced along its length, so that steep parts keep their shape."""
    from sklearn.metrics import roc_curve

    is_ood = np.repeat([0, 1], [id_scores.size, scores.size])
    rejected, caught, _ = roc_curve(is_ood, np.concatenate([id_scores, scores]))
    if rejected.size <= _CURVE_POINTS:
        return rejected, caught
    places = np.linspace(0, 2, _CURVE_POINTS)
    return np.interp(places, rejected + caught, rejected), np.interp(places, rejected + caught, caught)


def _thinned(length: int) -> Floats:
    """Indices of about 60 of ``length`` steps, all of the first ones: there the curves bend."""
    wanted = np.concatenate([[0], np.geomspace(1, max(1, length - 1), _STEPS)]).round().astype(int)
    return np.unique(np.clip(wanted, 0, length - 1))


def _step_axis(axis: Axes, last: int) -> None:
    """Steps on a logarithmic axis that still shows step 0."""
    axis.set_xscale("symlog", linthresh=1)
    ticks = [0, *(t for t in (1, 10, 100, 1000) if t < 0.6 * last), last]
    axis.xaxis.set_major_locator(FixedLocator(sorted(set(ticks))))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axis.set_xlim(0, max(1, last))
    axis.set_xlabel("step t")


def _power_of_ten(value: float, _: int) -> str:
    """``10⁻⁴``; text within the drawing, so no markup."""
    exponent = round(math.log10(value))
    return {0: "1", 1: "10", 2: "100"}.get(exponent, "10" + str(exponent).translate(_RAISED))


def _arrows(axis: Axes, field: NDArray[np.float32]) -> None:
    """The direction of f(z) − z at each point of the grid; one length for all, since lengths span decades."""
    lengths = np.hypot(field[:, 2], field[:, 3]) if len(field) else np.zeros(0)
    if not (lengths > 0).any():
        return
    points, lengths = field[lengths > 0], lengths[lengths > 0]
    spacing = math.sqrt(float(np.ptp(field[:, 0]) * np.ptp(field[:, 1])) / len(field))
    unit = points[:, 2:] / lengths[:, None] * 0.7 * spacing
    # Three classes of opacity instead of a colour map: fewer paths, and legible in both themes.
    for low, high, alpha in ((0, 0.33, 0.25), (0.33, 0.67, 0.4), (0.67, 1.01, 0.6)):
        rank = np.argsort(np.argsort(lengths)) / lengths.size
        some = (rank >= low) & (rank < high)
        axis.quiver(*points[some, :2].T, *unit[some].T, angles="xy", scale_units="xy", scale=1, width=0.0022,
                    color=INKS["muted"], alpha=alpha, pivot="mid")  # fmt: skip


def _without_crowds(path: Floats, least: float) -> Floats:
    """The path without points that lie closer than ``least`` to the one drawn before."""
    kept = [path[0]]
    for point in path[1:-1]:
        if np.hypot(*(point - kept[-1])) >= least:
            kept.append(point)
    return np.stack([*kept, path[-1]])
