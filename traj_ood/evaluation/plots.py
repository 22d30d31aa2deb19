"""The figures of a run: histograms and ROC curves of scores, and an overview of all scorers.

Figures consist of panels (:func:`histogram`, :func:`roc`, :func:`overview`; in
:mod:`traj_ood.evaluation.dynamics_plots` ``dynamics`` and ``plane``). A figure in the run's folder has a title and a
legend. The report shows only the panels, with titles and legends in HTML, which stay legible on a phone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from tqdm import tqdm

from traj_ood.drawing.charts import name_rows
from traj_ood.drawing.style import INKS, Figure, Frame, Look, canvas, lines_of, literal, look, save_figure
from traj_ood.errors import TrajOODError
from traj_ood.evaluation.dynamics_plots import Floats, dynamics_curves, paths
from traj_ood.evaluation.metrics import RECALL
from traj_ood.evaluation.results import CONTROL, Result, SetScore, is_in, mean_interval
from traj_ood.evaluation.runs import Run

HISTOGRAM = Frame(2.4, 1.35, margins=(0.08, 0.08, 0.25, 0.05))
ROC = Frame(4.2, 4.0, margins=(0.55, 0.12, 0.45, 0.1))
_CURVE_POINTS = 100
Lines = Mapping[str, tuple[str, str]]
"""Ink and dash pattern by OOD set."""


def alone(frame: Frame, panel: Callable[..., None], *data: object) -> Figure:
    """A figure of one panel without title or legend, for the report."""
    figure, (axis,) = canvas(frame)
    panel(axis, *data)
    return figure


PlotForm = Literal["png", "svg", "pdf"]
PRINT_WIDTHS = {"screen": None, "one-column": 3.4, "two-columns": 7.0}
"""Width of a figure in inches by purpose: one column, or the page, of two-column papers (IEEE, CVPR, ICML)."""
_FILE_NAME = str.maketrans(":=/", "_--")
_BEST, _PAPERS = 2, "trajectory"  # number of best scorers, and name of the paper's


def plot_run(folder: Path, quiet: bool = False, form: PlotForm = "png", size: str = "screen") -> None:
    """Draw the figures of a finished run from the files in its folder, into ``folder/plots``: the overview of all
    scorers, residual and norm curves, paths in the plane if they were kept, and histograms and ROC curves of
    :func:`leaders`. ``size`` is one of :data:`PRINT_WIDTHS`; figures for print have no titles.

    Raises:
        TrajOODError: the run's tables are missing or damaged, or the folder cannot be written.
    """
    run = Run.load(folder, Path())
    if run.scores is None or run.curves is None:
        raise TrajOODError(
            f"{folder}: expected scores.parquet and curves.parquet of a finished run; run it again with --fresh"
        )
    result, plots, width = run.result, folder / "plots", PRINT_WIDTHS[size]
    lines = lines_of(run.sets())
    save_figure(scorer_overview(result, width), plots / f"scorers.{form}")
    if len(run.curves):
        save_figure(dynamics_curves(run.curves, float(result.config["tol"]), width), plots / f"dynamics.{form}")
    if run.pictures is not None:
        title = f"Paths to the attractors: {_place(result)}"
        save_figure(paths(run.pictures, title, width), plots / f"paths.{form}")
    for label in tqdm(leaders(result), "plots", unit="scorer", delay=2, disable=quiet, leave=False):
        id_scores, by_set = run.scores_of(label)
        name = label.translate(_FILE_NAME)
        data = id_scores, by_set, result.scorers[label].sets, f"{label}: {_place(result)}", lines, width
        save_figure(score_histograms(*data), plots / f"histogram_{name}.{form}")
        save_figure(roc_curves(*data), plots / f"roc_{name}.{form}")


def leaders(result: Result) -> list[str]:
    """Labels of the scorers whose figures are drawn: the best two by mean AUROC with different names, and the
    paper's."""
    means = {k: s.all.auroc for k, s in result.scorers.items() if s.all is not None and k != CONTROL}
    best: dict[str, str] = {}
    for label in sorted(means, key=lambda label: (-means[label], label)):
        best.setdefault(label.split(":")[0], label)
    chosen = list(best.values())[:_BEST]
    return [*chosen, *([_PAPERS] if _PAPERS in means and _PAPERS not in chosen else [])]


def _place(result: Result) -> str:
    return f"{result.benchmark}, {result.model['name']}"


# ---------------------------------------------------------------------------------------------- scores


def score_histograms(
    id_scores: Floats,
    scores: Mapping[str, Floats],
    sets: Mapping[str, SetScore],
    title: str,
    lines: Lines | None = None,
    width: float | None = None,
) -> Figure:
    """Histograms of ID scores against each OOD set, one panel per set, as in the paper's Figs. 5 and 10.

    Args:
        id_scores: (n,) ID scores, HIGHER = MORE OOD.
        scores: (m,) scores of each OOD set. All panels have the same bins, see :func:`shared_bins`.
        sets: role and metrics of each OOD set.
        title: title of the figure.
        lines: ink and dash pattern of each set. Default: :func:`traj_ood.drawing.style.lines_of` the sets.
        width: width in inches for print, see :func:`traj_ood.drawing.style.canvas`.
    """
    edges = shared_bins([id_scores, *scores.values()])
    patch = {"color": INKS["id"], "marker": "s", "markersize": 8, "linestyle": "", "alpha": 0.6}
    legend: dict[str, Look] = {f"ID (n = {id_scores.size:,})": patch}
    legend["keeps 95 % of ID (FPR95: OOD left of it)"] = {"color": INKS["muted"], "linestyle": ":"}
    note = " ".join(["Further right is more OOD; heights are shares of each set.", beyond(edges, id_scores, scores)])
    figure, axes = canvas(HISTOGRAM, len(scores), 4, f"{title}\n{note}", legend, 0.4, width)
    lines = lines or lines_of(scores)
    for axis, (name, values) in zip(axes, scores.items(), strict=True):
        got = sets[name]
        histogram(axis, id_scores, values, edges, lines[name][0])
        figures = f"AUROC {100 * got.metrics.auroc:.1f} %, FPR95 {100 * got.metrics.fpr95:.1f} %"
        size = 9 if width is None else 7
        axis.set_title(f"{literal(name)} ({got.role}, n = {values.size:,})\n{figures}", fontsize=size, y=1.0)
    return figure


def histogram(axis: Axes, id_scores: Floats, scores: Floats, edges: Floats, ink: str) -> None:
    """Draw histograms of ID scores and of OOD scores (in ``ink``), as shares of images per bin.

    A dotted line is the threshold that keeps 95 % of ID. Values beyond the ``edges`` are in the outermost bins.
    """
    for values, own in ((id_scores, "id"), (scores, ink)):
        counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
        face = (INKS[own], 0.3)
        axis.stairs(counts / values.size, edges, fill=True, facecolor=face, edgecolor=INKS[own], linewidth=1)
    threshold = np.clip(np.quantile(id_scores, RECALL, method="inverted_cdf"), edges[0], edges[-1])
    axis.axvline(threshold, color=INKS["muted"], linestyle=":", linewidth=1.2)
    axis.yaxis.set_visible(False)
    axis.spines["left"].set_visible(False)
    axis.xaxis.set_major_locator(MaxNLocator(3))


def shared_bins(groups: Sequence[Floats]) -> Floats:
    """Edges of 40 bins over the central 99 % of all groups.

    They extend at most 3 widths beyond the first group, so that one extreme set does not flatten the others.
    """
    low, high = np.transpose([np.quantile(g, [0.005, 0.995]) for g in groups])
    width = high[0] - low[0]
    start, end = low.min(), high.max()
    if width > 0:
        start, end = max(start, low[0] - 3 * width), min(end, high[0] + 3 * width)
    if end <= start:  # all scores are equal
        margin = 0.5 * max(abs(start), 1e-12)
        start, end = start - margin, end + margin
    return np.linspace(start, end, 41)


def beyond(edges: Floats, id_scores: Floats, ood: Mapping[str, Floats]) -> str:
    """A sentence on the number of scores beyond the axis; empty if there are none."""
    outside = sum(int(((v < edges[0]) | (v > edges[-1])).sum()) for v in (id_scores, *ood.values()))
    return f"{outside:,} scores are beyond the axis and counted in the outermost bins." if outside else ""


def roc_curves(
    id_scores: Floats,
    scores: Mapping[str, Floats],
    sets: Mapping[str, SetScore],
    title: str,
    lines: Lines | None = None,
    width: float | None = None,
) -> Figure:
    """ROC curves of ID scores against each OOD set, with OOD positive, and the AUROC of each set in the legend.

    Arguments as in :func:`score_histograms`.
    """
    lines = lines or lines_of(scores)
    legend = {f"{literal(n)}  {100 * sets[n].metrics.auroc:.1f} %": look(*lines[n]) for n in scores}
    note = (
        "OOD is positive; AUROC after each set. Dotted: 95 % of ID kept, where FPR95 is 100 % minus the curve; and "
        "95 % of OOD caught, where FPR95-OpenOOD is read."
    )
    figure, (axis,) = canvas(ROC, title=f"{title}\n{note}", legend=legend, width=width)
    roc(axis, id_scores, scores, lines)
    return figure


def roc(axis: Axes, id_scores: Floats, sets: Mapping[str, Floats], lines: Lines | None = None) -> None:
    """Draw the share of OOD caught over the share of ID rejected, one line per set (see :func:`lines_of`).

    The two dotted lines show where the FPR95s are read: the paper's at 5 % of ID rejected (100 % minus the curve), and
    OpenOOD's at 95 % of OOD caught.
    """
    axis.plot([0, 100], [0, 100], color=INKS["rule"], linewidth=1)
    axis.axvline(100 * (1 - RECALL), color=INKS["muted"], linestyle=":", linewidth=1)
    axis.axhline(100 * RECALL, color=INKS["muted"], linestyle=":", linewidth=1)
    lines = lines or lines_of(sets)
    for name, scores in sets.items():
        rejected, caught = _roc(id_scores, scores)
        axis.plot(100 * rejected, 100 * caught, linewidth=1.6, **look(*lines[name]))
    axis.set(xlim=(-1, 101), ylim=(-1, 101), xlabel="ID images rejected (%)", ylabel="OOD images caught (%)")


def _roc(id_scores: Floats, scores: Floats) -> tuple[Floats, Floats]:
    """The ROC curve at about 100 points, evenly spaced along it, so that steep parts keep their shape."""
    from sklearn.metrics import roc_curve

    is_ood = np.repeat([0, 1], [id_scores.size, scores.size])
    rejected, caught, _ = roc_curve(is_ood, np.concatenate([id_scores, scores]))
    if rejected.size <= _CURVE_POINTS:
        return rejected, caught
    places = np.linspace(0, 2, _CURVE_POINTS)
    return np.interp(places, rejected + caught, rejected), np.interp(places, rejected + caught, caught)


# ---------------------------------------------------------------------------------------------- all scorers

_MARKS = {"near": ("^", -0.22), "all": ("D", 0.0), "far": ("s", 0.22)}


@dataclass(frozen=True)
class ScorerRow:
    """One row of :func:`overview`, in percent: ``means`` by region (near, far, all), as value and interval (NaN if
    there is none), and the (role, value) of each set."""

    name: str
    means: Mapping[str, tuple[float, float, float]]
    sets: Sequence[tuple[str, float]]


def scorer_overview(result: Result, width: float | None = None) -> Figure:
    """Figure of the mean AUROC of every scorer of a run over near, far and all OOD sets, best first; faint dots are
    single sets.

    Raises:
        TrajOODError: the result has no scores.
    """
    rows = []
    scored = [s for s in result.scorers.values() if s.all is not None]
    for scorer in sorted(scored, key=lambda s: -s.all.auroc if s.all else 0.0):
        means = {}
        for region in _MARKS:
            if mean := getattr(scorer, region):
                low, high = mean_interval([s for s in scorer.sets.values() if is_in(s.role, region)], "auroc")
                means[region] = (100 * mean.auroc, 100 * low, 100 * high)
        sets = [(s.role, 100 * s.metrics.auroc) for s in scorer.sets.values()]
        rows.append(ScorerRow(scorer.label, means, sets))
    if not rows:
        raise TrajOODError(
            f"plot: expected at least 1 scorer with scores in result {result.name!r}, got 0; run it again with --fresh"
        )
    title = f"AUROC by scorer: {_place(result)}, seed {result.seed}"
    if not result.dictionary["healthy"]:
        title += f"\n⚠ unhealthy dictionary: {'; '.join(result.dictionary['warnings']) or 'no reason was recorded'}"
    legend: dict[str, Look] = {
        f"mean of {region} sets": {"color": INKS[_ink(region)], "marker": marker, "linestyle": ""}
        for region, (marker, _) in _MARKS.items()
    }
    if any(role == "diagnostic" for row in rows for role, _ in row.sets):
        legend["diagnostic, not in means"] = {"color": INKS["gold"], "marker": "x", "linestyle": ""}
    legend["one set"] = {"color": INKS["muted"], "marker": ".", "linestyle": ""}
    legend["chance"] = {"color": INKS["muted"], "linestyle": ":"}
    figure, (axis,) = canvas(overview_frame(len(rows), width), title=title, legend=legend, width=width)
    overview(axis, rows)
    return figure


def overview(axis: Axes, rows: Sequence[ScorerRow]) -> None:
    """Draw the AUROC of each scorer in percent: a mark for near, far and all sets, its interval as a thin line, a faint
    dot per set, and a faint cross per diagnostic set."""
    for region, (marker, shift) in _MARKS.items():
        ink = INKS[_ink(region)]
        singles = [(value, y + shift) for y, row in enumerate(rows) for role, value in row.sets if role == region]
        axis.plot(*np.reshape(singles, (-1, 2)).T, "o", color=ink, alpha=0.35, markersize=2.4, markeredgewidth=0)
        means = np.reshape([(*row.means[region], y) for y, row in enumerate(rows) if region in row.means], (-1, 4))
        value, low, high, y = (*means.T[:3], means[:, 3] + shift)
        axis.hlines(y, low, high, color=ink, linewidth=1, alpha=0.6)
        axis.plot(value, y, marker, color=ink, markersize=3.6, linestyle="")
    crosses = [(value, y) for y, row in enumerate(rows) for role, value in row.sets if role == "diagnostic"]
    axis.plot(*np.reshape(crosses, (-1, 2)).T, "x", color=INKS["gold"], alpha=0.6, markersize=2.8)
    axis.axvline(50, color=INKS["muted"], linestyle=":", linewidth=1)
    name_rows(axis, [row.name for row in rows])
    axis.set_xlim(right=101)
    axis.set_xlabel("AUROC (%)")


def overview_frame(scorers: int, width: float | None = None) -> Frame:
    """The frame of a panel with this many rows; the height does not depend on the width, as rows contain text."""
    return Frame(width or 6.2, 0.22 * scorers + 0.6)


def _ink(region: str) -> str:
    return "text" if region == "all" else region
