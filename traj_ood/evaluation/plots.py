"""The figures of a run: histograms and ROC curves of scores, dynamics over steps, the scorers side by side, paths.

Each is made of panels (:func:`histogram`, :func:`roc`, :func:`dynamics`, :func:`overview`, :func:`plane`), which hold
data, axes and what points at a place in them. A figure for the run's folder adds a title and a legend; the report
shows the panels alone, among its own titles and legends, so that their text stays legible on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import ArrayLike, NDArray
from tqdm import tqdm

from traj_ood.drawing.charts import PictureRow, name_rows, picture_rows
from traj_ood.drawing.style import DASHES, INKS, Figure, Frame, Look, canvas, line_of, look, save_png
from traj_ood.errors import TrajOODError
from traj_ood.evaluation.gallery import Pictures, view_limits
from traj_ood.evaluation.metrics import RECALL, check_scores
from traj_ood.evaluation.results import Result, SetScore, mean_interval, near_first
from traj_ood.evaluation.runs import Run

HISTOGRAM = Frame(2.4, 1.35, margins=(0.08, 0.08, 0.25, 0.05))
ROC = Frame(4.2, 4.0, margins=(0.55, 0.12, 0.45, 0.1))
DYNAMICS = Frame(3.4, 2.5)
PLANE = Frame(6.0, 4.4)

QUANTITIES = {
    "residual_sq": "Squared residual ‖f(z) − z‖²",
    "norm": "Latent norm ‖z‖",
    "running": "Still running (%)",
}

Floats = NDArray[np.float64]

_CURVE_POINTS = 100
_ROLES = ("near", "far")
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def alone(frame: Frame, panel: Callable[..., None], *data: object) -> Figure:
    """One panel without a title or a legend, for a page that has its own."""
    figure, (axis,) = canvas(frame)
    panel(axis, *data)
    return figure


def plot_run(folder: Path, quiet: bool = False) -> None:
    """Every figure of a finished run, from the files in its folder, into ``folder/plots``.

    Histograms and ROC curves per scorer, residual and norm curves, paths in the plane where they were kept, and the
    overview of all scorers.

    Raises:
        TrajOODError: the run's tables are missing or damaged, or the folder cannot be written.
    """
    run = Run.load(folder, Path())
    if run.scores is None or run.curves is None:
        raise TrajOODError(f"{folder}: expected scores.parquet and curves.parquet of a finished run; run it again")
    result, plots = run.result, folder / "plots"
    save_png(scorer_overview(result), plots / "scorers.png")
    if len(run.curves):
        save_png(dynamics_curves(run.curves, float(result.config["tol"])), plots / "dynamics.png")
    if run.pictures is not None:
        save_png(paths(run.pictures, f"Paths to the attractors: {_place(result)}"), plots / "paths.png")
    histograms: Figure | None = None
    rocs: Figure | None = None
    for label, scorer in tqdm(result.scorers.items(), "plots", unit="scorer", delay=2, disable=quiet, leave=False):
        id_scores, by_set = run.scores_of(label)
        name = label.replace(":", "_").replace("=", "-")
        title = f"{label}: {_place(result)}"
        histograms = score_histograms(id_scores, by_set, scorer.sets, title, histograms)
        save_png(histograms, plots / f"histogram_{name}.png")
        rocs = roc_curves(id_scores, by_set, scorer.sets, title, rocs)
        save_png(rocs, plots / f"roc_{name}.png")


def _place(result: Result) -> str:
    return f"{result.benchmark}, {result.model['name']}"


# ---------------------------------------------------------------------------------------------- scores


def score_histograms(
    id_scores: ArrayLike,
    ood: Mapping[str, ArrayLike],
    sets: Mapping[str, SetScore],
    title: str,
    onto: Figure | None = None,
) -> Figure:
    """ID scores (n,) against each OOD set (m,) in a panel of its own, as the paper's Figs 5 and 10.

    Args:
        id_scores, ood: scores, HIGHER = MORE OOD. All panels share their bins, see :func:`shared_bins`.
        sets: role and metrics of each set of ``ood``.
        title: of the figure.
        onto: a figure of this function, to be drawn anew in half the time. None makes one.
    Raises:
        TrajOODError: empty or non-finite scores, no OOD set, or one without a role.
    """
    id_scores, scores = _checked(id_scores, ood, sets)
    edges = shared_bins([id_scores, *scores.values()])
    legend = {f"ID (n = {id_scores.size:,})": _patch("id")}
    legend |= {f"{role} OOD": _patch(role) for role in _ROLES if role in {sets[name].role for name in scores}}
    legend["keeps 95 % of ID (FPR95: OOD left of it)"] = {"color": INKS["muted"], "linestyle": ":"}
    note = " ".join(["Further right is more OOD; heights are shares of each set.", beyond(edges, id_scores, scores)])
    figure, axes = canvas(HISTOGRAM, len(scores), 4, f"{title}\n{note}", legend, 0.4, onto)
    for axis, (name, values) in zip(axes, scores.items(), strict=True):
        got = sets[name]
        histogram(axis, id_scores, values, edges, got.role)
        figures = f"AUROC {100 * got.metrics.auroc:.1f} %, FPR95 {100 * got.metrics.fpr95:.1f} %"
        axis.set_title(f"{name} ({got.role}, n = {values.size:,})\n{figures}", fontsize=9, y=1.0)
    return figure


def histogram(axis: Axes, id_scores: Floats, scores: Floats, edges: Floats, role: str) -> None:
    """ID and OOD scores as shares of their images per bin; dotted, the threshold that keeps 95 % of ID.

    Scores, and a threshold, beyond the ``edges`` stand in the outermost bins.
    """
    for values, ink in ((id_scores, "id"), (scores, role)):
        counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
        face = (INKS[ink], 0.3)
        axis.stairs(counts / values.size, edges, fill=True, facecolor=face, edgecolor=INKS[ink], linewidth=1)
    threshold = np.clip(np.quantile(id_scores, RECALL, method="inverted_cdf"), edges[0], edges[-1])
    axis.axvline(threshold, color=INKS["muted"], linestyle=":", linewidth=1.2)
    axis.yaxis.set_visible(False)
    axis.spines["left"].set_visible(False)
    axis.xaxis.set_major_locator(MaxNLocator(3))


def shared_bins(groups: Sequence[Floats], bins: int = 40) -> Floats:
    """Bin edges (bins + 1,) over the central 99 % of all groups, at most 3 widths of the first one beyond it: one wild
    set must not flatten the others."""
    low, high = np.transpose([np.quantile(g, [0.005, 0.995]) for g in groups])
    width = high[0] - low[0]
    start, end = low.min(), high.max()
    if width > 0:
        start, end = max(start, low[0] - 3 * width), min(end, high[0] + 3 * width)
    if end <= start:  # all scores alike: any width around them will do
        margin = 0.5 * max(abs(start), 1e-12)
        start, end = start - margin, end + margin
    return np.linspace(start, end, bins + 1)


def beyond(edges: Floats, id_scores: Floats, ood: Mapping[str, Floats]) -> str:
    """A sentence on the scores beyond the axis; empty where there are none."""
    outside = sum(int(((v < edges[0]) | (v > edges[-1])).sum()) for v in (id_scores, *ood.values()))
    return f"{outside:,} scores lie beyond the axis and stand in the outermost bins." if outside else ""


def roc_curves(
    id_scores: ArrayLike,
    ood: Mapping[str, ArrayLike],
    sets: Mapping[str, SetScore],
    title: str,
    onto: Figure | None = None,
) -> Figure:
    """ROC of ID scores (n,) against each OOD set (m,), OOD positive, with the AUROC of ``sets`` in the legend.

    Arguments are those of :func:`score_histograms`.

    Raises:
        TrajOODError: empty or non-finite scores, no OOD set, or one without a role.
    """
    id_scores, scores = _checked(id_scores, ood, sets)
    legend = {f"{name}  {100 * sets[name].metrics.auroc:.1f} %": look(*line_of(n)) for n, name in enumerate(scores)}
    note = (
        "OOD is positive; AUROC after each set. Dotted: 95 % of ID kept, where FPR95 is what a curve lacks to 100 %; "
    )
    note += "95 % of OOD caught, where FPR95-OpenOOD is read."
    figure, (axis,) = canvas(ROC, title=f"{title}\n{note}", legend=legend, onto=onto)
    roc(axis, id_scores, scores)
    return figure


def roc(axis: Axes, id_scores: Floats, sets: Mapping[str, Floats]) -> None:
    """Share of OOD caught over share of ID rejected, a line for each set in its colour (see :func:`line_of`).

    The two dotted lines are where the two FPR95 are read: at 5 % of ID rejected the paper's (what is missing to 100 %),
    at 95 % of OOD caught OpenOOD's.
    """
    axis.plot([0, 100], [0, 100], color=INKS["rule"], linewidth=1)
    axis.axvline(100 * (1 - RECALL), color=INKS["muted"], linestyle=":", linewidth=1)
    axis.axhline(100 * RECALL, color=INKS["muted"], linestyle=":", linewidth=1)
    for n, scores in enumerate(sets.values()):
        rejected, caught = _roc(id_scores, scores)
        axis.plot(100 * rejected, 100 * caught, linewidth=1.6, **look(*line_of(n)))
    axis.set(xlim=(-1, 101), ylim=(-1, 101), xlabel="ID images rejected (%)", ylabel="OOD images caught (%)")


def _roc(id_scores: Floats, scores: Floats) -> tuple[Floats, Floats]:
    """The ROC curve at about 100 points, evenly spaced along its length, so that steep parts keep their shape."""
    from sklearn.metrics import roc_curve

    is_ood = np.repeat([0, 1], [id_scores.size, scores.size])
    rejected, caught, _ = roc_curve(is_ood, np.concatenate([id_scores, scores]))
    if rejected.size <= _CURVE_POINTS:
        return rejected, caught
    places = np.linspace(0, 2, _CURVE_POINTS)
    return np.interp(places, rejected + caught, rejected), np.interp(places, rejected + caught, caught)


def _checked(
    id_scores: ArrayLike, ood: Mapping[str, ArrayLike], sets: Mapping[str, SetScore]
) -> tuple[Floats, dict[str, Floats]]:
    if not ood:
        raise TrajOODError("plot: expected scores of at least 1 OOD set, got none; name a near or far split")
    for name in ood:
        if name not in sets:
            raise TrajOODError(f"plot: expected the role near or far for {name!r}, got None; add it")
    return check_scores(id_scores, "ID"), {name: check_scores(scores, name) for name, scores in ood.items()}


def _patch(ink: str) -> Look:
    return {"color": INKS[ink], "marker": "s", "markersize": 8, "linestyle": "", "alpha": 0.6}


# ---------------------------------------------------------------------------------------------- all scorers

_MARKS = {"near": ("^", -0.22), "all": ("D", 0.0), "far": ("s", 0.22)}


@dataclass(frozen=True)
class ScorerRow:
    """What :func:`overview` shows of a scorer, in percent: ``means`` by region (near, far, all) as value and interval
    (NaN where there is none), and the (role, value) of each set."""

    name: str
    means: Mapping[str, tuple[float, float, float]]
    sets: Sequence[tuple[str, float]]


def scorer_overview(result: Result) -> Figure:
    """Mean AUROC of every scorer of a run over near, far and all OOD sets, best first; faint dots are single sets.

    Raises:
        TrajOODError: a result without scores.
    """
    rows = []
    scored = [s for s in result.scorers.values() if s.all is not None]
    for scorer in sorted(scored, key=lambda s: -s.all.auroc if s.all else 0.0):
        means = {}
        for region in _MARKS:
            if mean := getattr(scorer, region):
                low, high = mean_interval([s for s in scorer.sets.values() if region in ("all", s.role)], "auroc")
                means[region] = (100 * mean.auroc, 100 * low, 100 * high)
        sets = [(s.role, 100 * s.metrics.auroc) for s in scorer.sets.values()]
        rows.append(ScorerRow(scorer.label, means, sets))
    if not rows:
        raise TrajOODError(
            f"plot: expected at least 1 scorer with scores in result {result.name!r}, got 0; run it again"
        )
    title = f"AUROC by scorer: {_place(result)}, seed {result.seed}"
    if not result.dictionary["healthy"]:
        title += f"\n⚠ unhealthy dictionary: {'; '.join(result.dictionary['warnings']) or 'no reason was recorded'}"
    legend: dict[str, Look] = {
        f"mean of {region} sets": {"color": INKS[_ink(region)], "marker": marker, "linestyle": ""}
        for region, (marker, _) in _MARKS.items()
    }
    legend["one set"] = {"color": INKS["muted"], "marker": ".", "linestyle": ""}
    legend["chance"] = {"color": INKS["muted"], "linestyle": ":"}
    figure, (axis,) = canvas(overview_frame(len(rows)), title=title, legend=legend)
    overview(axis, rows)
    return figure


def overview(axis: Axes, rows: Sequence[ScorerRow]) -> None:
    """AUROC in percent by scorer: a mark for near, far and all sets, with its interval as a thin line, and a faint dot
    for each set."""
    for region, (marker, shift) in _MARKS.items():
        ink = INKS[_ink(region)]
        singles = [(value, y + shift) for y, row in enumerate(rows) for role, value in row.sets if role == region]
        axis.plot(*np.reshape(singles, (-1, 2)).T, "o", color=ink, alpha=0.35, markersize=2.4, markeredgewidth=0)
        means = np.reshape([(*row.means[region], y) for y, row in enumerate(rows) if region in row.means], (-1, 4))
        value, low, high, y = (*means.T[:3], means[:, 3] + shift)
        axis.hlines(y, low, high, color=ink, linewidth=1, alpha=0.6)
        axis.plot(value, y, marker, color=ink, markersize=3.6, linestyle="")
    axis.axvline(50, color=INKS["muted"], linestyle=":", linewidth=1)
    name_rows(axis, [row.name for row in rows])
    axis.set_xlim(right=101)
    axis.set_xlabel("AUROC (%)")


def overview_frame(scorers: int) -> Frame:
    """Of a panel with that many rows."""
    return Frame(6.2, 0.22 * scorers + 0.6)


def _ink(region: str) -> str:
    return "text" if region == "all" else region


# ---------------------------------------------------------------------------------------------- dynamics

_QUANTILES = ("q25", "q50", "q75")


def dynamics_curves(curves: pd.DataFrame, tol: float) -> Figure:
    """Residual, latent norm and share of running samples over steps, ID against OOD, as the paper's Fig 12.

    Args:
        curves: columns ``split``, ``role`` (near, far; anything else is ID), ``step``, ``quantity`` (``residual_sq``,
            ``norm``, ``running``) and the quantiles ``q25``, ``q50`` and ``q75`` over samples. NaN in a residual means
            that the quantile has fallen below ``tol``; ``running`` is a fraction and stands in ``q50``.
        tol: the tolerance of the iteration on the squared residual, drawn as a line.

    Up to 4 OOD sets share a row of panels; more are split into a row of near and a row of far sets, see
    :func:`set_rows`.

    Raises:
        TrajOODError: missing columns, no rows, or a tolerance that is not positive.
    """
    missing = {"split", "role", "step", "quantity", *_QUANTILES} - set(curves.columns)
    if missing or curves.empty:
        got = f"without {', '.join(sorted(missing))}" if missing else "of 0 rows"
        raise TrajOODError(f"plot: expected dynamics by split, step and quantity, got a table {got}; record them first")
    if not tol > 0:
        raise TrajOODError(f"plot: expected a tolerance above 0, got {tol}; 1e-5 is the paper's")
    roles: dict[str, str] = dict(curves[["split", "role"]].drop_duplicates().itertuples(index=False))
    sets = near_first({name: role for name, role in roles.items() if role in _ROLES})
    known = sorted((name for name in roles if name not in sets), key=lambda name: roles[name] != "test")
    ids = {name: look("id", DASHES[n % len(DASHES)]) for n, name in enumerate(known)}
    looks = {**ids, **{name: look(*line_of(n)) for n, name in enumerate(sets)}}
    legend = {f"{name} ({sets.get(name, 'ID')})": own for name, own in looks.items()}
    legend[f"tolerance {tol:g}"] = {"color": INKS["muted"], "linestyle": "--"}
    rows = set_rows(sets)
    title = "Latent dynamics under f = E∘D\nMedians over samples, with the central half of ID ones as a band"
    figure, axes = canvas(DYNAMICS, 3 * len(rows), 3, title, legend, headroom=0.2)
    for n, names in enumerate(rows.values()):
        shown = {name: own for name, own in looks.items() if name in ids or name in names}
        for axis, (quantity, name) in zip(axes[3 * n :], QUANTITIES.items(), strict=False):
            dynamics(axis, curves, quantity, tol, shown)
            axis.title.set_text(name)
    return figure


def set_rows(sets: Mapping[str, str]) -> dict[str, list[str]]:
    """OOD sets, name → role, by the title of the row of panels that shows them: one row up to four, else near and far
    apart."""
    if len(sets) <= 4:
        return {"ID and OOD sets": list(sets)}
    rows = {f"ID and {role} sets": [name for name in sets if sets[name] == role] for role in _ROLES}
    return {title: names for title, names in rows.items() if names}


def dynamics(axis: Axes, curves: pd.DataFrame, quantity: str, tol: float, looks: Mapping[str, Look]) -> None:
    """One quantity over steps (see :func:`dynamics_curves`): the median of each split of ``looks``; those in the ink of
    ID with their central half as a band."""
    table = curves[(curves["quantity"] == quantity) & curves["split"].isin(looks.keys())]
    for split, own in looks.items():
        rows = table[table["split"] == split].sort_values("step")
        if rows.empty:
            continue
        rows = rows.iloc[_thinned(len(rows))]
        steps = rows["step"].to_numpy()
        low, middle, high = (rows[name].to_numpy(dtype=np.float64) for name in _QUANTILES)
        if quantity == "residual_sq":
            # A censored lower edge lies at the tolerance or below: the band reaches down to the line.
            low, middle, high = np.where(np.isnan(low), tol, low), *(down_to_tolerance(tol, q) for q in (middle, high))
        if own["color"] == INKS["id"] and quantity != "running":
            axis.fill_between(steps, low, high, color=INKS["id"], alpha=0.2, linewidth=0)
        axis.plot(steps, 100 * middle if quantity == "running" else middle, linewidth=1.5, **own)
    _step_axis(axis, int(table["step"].max()) if len(table) else 1)
    if quantity == "residual_sq":
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(numticks=5))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter(FuncFormatter(_power_of_ten))
        if tol > 0:
            axis.axhline(tol, color=INKS["muted"], linestyle="--", linewidth=1)
            axis.update_datalim([(0, tol / 3), (0, 3 * tol)])  # the line is seen where every curve lies below it
            axis.autoscale_view(scalex=False)
    elif quantity == "running":
        axis.set_ylim(-2, 102)


def down_to_tolerance(tol: float, values: Floats) -> Floats:
    """The values with the first censored (NaN) step after the last known one set to ``tol``: the curve lands there."""
    known = np.flatnonzero(~np.isnan(values))
    values = values.copy()
    if known.size and known[-1] + 1 < values.size:
        values[known[-1] + 1] = tol
    return values


def _thinned(length: int) -> NDArray[np.int64]:
    """Indices of about 100 of ``length`` steps, all of the first ones: there the curves bend."""
    wanted = np.concatenate([[0], np.geomspace(1, max(1, length - 1), _CURVE_POINTS)]).round().astype(np.int64)
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


# ---------------------------------------------------------------------------------------------- latent space


def paths(pictures: Pictures, title: str) -> Figure:
    """Paths of a few samples in the plane of the run's gallery, see :func:`plane`."""
    legend = {"ID": look("id"), "near OOD": look("near"), "far OOD": look("far")}
    legend["attractor of a training image"] = {"color": INKS["muted"], "marker": ".", "linestyle": ""}
    note = "A ring is where a path starts (z₀), a disc where it ends."
    figure, (axis,) = canvas(PLANE, title=f"{title}\n{note}", legend=legend)
    plane(axis, pictures)
    return figure


def plane(axis: Axes, pictures: Pictures) -> None:
    """Paths z_0 … z_N in the plane: a ring where one starts, a disc where it ends, grey the attractors.

    Where the latent is the plane itself, arrows show f(z) − z (the paper's Fig. 1), their opacity its length.
    """
    _arrows(axis, pictures.field)
    axis.plot(*pictures.attractors.T, "o", color=INKS["muted"], markersize=3.2, alpha=0.6, markeredgewidth=0)
    known = [path[np.isfinite(path).all(axis=1)].astype(np.float64) for path in pictures.paths]
    low, high = view_limits(pictures.paths, pictures.attractors)
    for sample, path in zip(pictures.samples, known, strict=True):
        if not len(path):
            continue
        ink = INKS[sample.role if sample.role in _ROLES else "id"]
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


def attractor_gallery(
    decoded: Floats | None, nearest: Floats, captions: Sequence[str], limits: Floats, title: str
) -> Figure:
    """Decoded attractors, each above the training image nearest to it.

    Args:
        decoded: (K, C, H, W) in the model's units, C = 1 or 3; None draws the training images alone, for a model
            that does not decode to images.
        nearest: (K, C, H, W) training images, likewise.
        captions: K texts, one for each column.
        limits: (2, C) values drawn as black and as full brightness.
        title: of the figure.
    Raises:
        TrajOODError: no attractors, or another number of captions or channels.
    """
    kinds = {"D(z*)": decoded, "nearest\ntraining image": nearest}
    shown = {name: images for name, images in kinds.items() if images is not None}
    sizes = [images.shape[:2] for images in shown.values()]
    if not len(nearest) or any(size != (len(captions), nearest.shape[1]) or size[1] not in (1, 3) for size in sizes):
        raise TrajOODError(
            f"plot: expected grey or RGB images (K, C, H, W) for {len(captions)} captions, got "
            f"{', '.join(str(images.shape) for images in shown.values())}"
        )
    bands = [slice(first, first + 8) for first in range(0, len(nearest), 8)]
    rows = [
        PictureRow(name, images[band], limits, captions[band] if n == 0 else ())
        for band in bands
        for n, (name, images) in enumerate(shown.items())
    ]
    return picture_rows(rows, title)
