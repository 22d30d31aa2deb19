"""Figures: score histograms, ROC curves, latent dynamics over steps, and the scorers of a run side by side.

The only room that imports matplotlib. Figures are plain objects (no pyplot), so nothing global changes, no window is
needed and nothing has to be closed. Colours are those of Okabe and Ito, told apart under every common colour blindness.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray
from tqdm import tqdm

from traj_ood.errors import TrajOODError
from traj_ood.evaluation.metrics import RECALL, check_scores, compute_metrics
from traj_ood.evaluation.results import Result
from traj_ood.io.files import write_atomic

DPI = 150

_BLUE, _SKY = "#0072B2", "#56B4E9"
_VERMILION, _GREEN, _ORANGE, _PINK, _BLACK = "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#000000"
_ROLE_COLOURS = {"near": _VERMILION, "far": _GREEN}
_OOD_CYCLE = (_VERMILION, _GREEN, _ORANGE, _PINK, _BLACK)
_ID_CYCLE = (_BLUE, _SKY)
_DASHES = ("-", "--", ":")
_GREY = "#555555"

Floats = NDArray[np.float64]


def _figure(rows: int, columns: int, width: float, height: float, title: str) -> tuple[Figure, list[Axes]]:
    """A white figure of ``rows`` × ``columns`` panels, each ``width`` × ``height`` inches, panels in reading order."""
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08)  # inches; the default lets labels touch the edge
    figure = Figure(figsize=(width * columns, height * rows + 0.9), layout=layout, facecolor="white")
    # About 10 bold characters fit an inch: a long title is wrapped, not cut at the edge.
    lines = [textwrap.fill(line, int(9 * width * columns)) for line in title.splitlines()]
    figure.suptitle("\n".join(lines), fontsize=12, fontweight="bold")
    axes = [axis for line in figure.subplots(rows, columns, squeeze=False) for axis in line]
    for axis in axes:
        axis.set_facecolor("white")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
    return figure, axes


def _save(figure: Figure, path: str | Path) -> None:
    """PNG at 150 dots per inch, whole or not at all."""
    write_atomic(path, lambda file: figure.savefig(file, format="png", dpi=DPI))


def _checked(id_scores: ArrayLike, ood: Mapping[str, ArrayLike]) -> tuple[Floats, dict[str, Floats]]:
    if not ood:
        raise TrajOODError("plot: expected scores of at least 1 OOD set, got none; name a near or far split")
    return check_scores(id_scores, "ID"), {name: check_scores(scores, name) for name, scores in ood.items()}


# ---------------------------------------------------------------------------------------------- scores


def score_histograms(
    id_scores: ArrayLike, ood: Mapping[str, ArrayLike], roles: Mapping[str, str], title: str, path: str | Path
) -> None:
    """ID scores (n,) against each OOD set (m,) in a panel of its own, as the paper's Figs 5 and 10.

    ``roles`` says ``near`` or ``far`` for each set of ``ood``. All panels share their bins. The axis spans the central
    99 % of every set, but at most three widths of the ID scores beyond them, so that one wild set cannot flatten the
    others; scores outside stand in the outermost bins, and the panel says how many. The dotted line is the threshold
    that keeps 95 % of ID; FPR95 in the title is the paper's.

    Raises ``TrajOODError`` on empty or non-finite scores, no OOD set, a set without a role, or an unwritable path.
    """
    id_scores, sets = _checked(id_scores, ood)
    for name in sets:
        if roles.get(name) not in _ROLE_COLOURS:
            raise TrajOODError(f"plot: expected the role near or far for {name!r}, got {roles.get(name)!r}; add it")
    columns = min(4, len(sets))
    figure, axes = _figure(math.ceil(len(sets) / columns), columns, max(3.1, 6.4 / columns), 2.5, title)
    edges = shared_bins([id_scores, *sets.values()])
    threshold = np.quantile(id_scores, RECALL, method="inverted_cdf")
    for axis, (name, scores) in zip(axes, sets.items(), strict=False):
        _histogram_panel(axis, id_scores, scores, edges, _ROLE_COLOURS[roles[name]])
        # A threshold beyond the axis is drawn at its end, as the scores are.
        axis.axvline(np.clip(threshold, edges[0], edges[-1]), color=_GREY, linestyle=":", linewidth=1.2)
        got = compute_metrics(id_scores, scores)
        figures = f"AUROC {100 * got.auroc:.1f} %, FPR95 {100 * got.fpr95:.1f} %"
        axis.set_title(f"{name} ({roles[name]}, n = {scores.size:,})\n{figures}", fontsize=9)
        axis.set_xlabel("score (higher = more OOD)", fontsize=8)
        axis.set_ylabel("images per bin (%)", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.xaxis.set_major_locator(MaxNLocator(5))
    for axis in axes[len(sets) :]:
        axis.set_visible(False)
    keys = {f"ID (n = {id_scores.size:,})": _BLUE, **{f"{r} OOD": c for r, c in _ROLE_COLOURS.items()}}
    shown = {label: c for label, c in keys.items() if c == _BLUE or c in {_ROLE_COLOURS[roles[n]] for n in sets}}
    handles: list[Artist] = [Patch(color=colour, alpha=0.55, label=label) for label, colour in shown.items()]
    handles.append(Line2D([], [], color=_GREY, linestyle=":", label="keeps 95 % of ID (FPR95: OOD left of it)"))
    figure.legend(handles=handles, loc="outside lower center", ncols=2 if columns < 3 else 4, frameon=False, fontsize=9)
    _save(figure, path)


def shared_bins(groups: Sequence[Floats], bins: int = 48) -> Floats:
    """Bin edges (bins + 1,) over the central 99 % of all groups, at most 3 widths of the first one beyond it."""
    low, high = np.transpose([np.quantile(g, [0.005, 0.995]) for g in groups])
    width = high[0] - low[0]
    start, end = low.min(), high.max()
    if width > 0:
        start, end = max(start, low[0] - 3 * width), min(end, high[0] + 3 * width)
    if end <= start:  # all scores alike: any width around them will do
        margin = 0.5 * max(abs(start), 1e-12)
        start, end = start - margin, end + margin
    return np.linspace(start, end, bins + 1)


def _histogram_panel(axis: Axes, id_scores: Floats, ood_scores: Floats, edges: Floats, colour: str) -> None:
    """Two overlapping histograms in percent of their images, and a note on what lies beyond the axis."""
    for scores, c in ((id_scores, _BLUE), (ood_scores, colour)):
        counts, _ = np.histogram(np.clip(scores, edges[0], edges[-1]), edges)
        shares = 100 * counts / scores.size
        axis.stairs(shares, edges, fill=True, color=c, alpha=0.45)
        axis.stairs(shares, edges, color=c, linewidth=1.0)
    beyond = [float(np.mean((s < edges[0]) | (s > edges[-1]))) for s in (id_scores, ood_scores)]
    if max(beyond) > 0:
        note = f"in the end bins from\nbeyond the axis:\nID {100 * beyond[0]:.1f} %, OOD {100 * beyond[1]:.1f} %"
        axis.text(0.97, 0.97, note, transform=axis.transAxes, ha="right", va="top", fontsize=6.5, color=_GREY)
        axis.set_ylim(top=axis.get_ylim()[1] * 1.25)  # room for the note above the bars


def roc_curves(id_scores: ArrayLike, ood: Mapping[str, ArrayLike], title: str, path: str | Path) -> None:
    """ROC of ID scores (n,) against each OOD set (m,), OOD positive, AUROC in the legend.

    The two thin lines are where the two FPR95 are read: at 5 % of ID rejected the paper's (what is missing to 100 %),
    at 95 % of OOD caught OpenOOD's.

    Raises ``TrajOODError`` on empty or non-finite scores, no OOD set, or an unwritable path.
    """
    from sklearn.metrics import roc_curve

    id_scores, sets = _checked(id_scores, ood)
    figure, (axis,) = _figure(1, 1, 8.0, 5.0, title)
    for i, (name, scores) in enumerate(sets.items()):
        is_ood = np.repeat([0, 1], [id_scores.size, scores.size])
        rejected, caught, _ = roc_curve(is_ood, np.concatenate([id_scores, scores]))
        label = f"{name}  {100 * compute_metrics(id_scores, scores).auroc:.1f} %"
        axis.plot(100 * rejected, 100 * caught, label=label, linewidth=1.8, **_line(i))
    axis.plot([0, 100], [0, 100], color="#999999", linewidth=0.8, label="chance  50.0 %")
    axis.axvline(100 * (1 - RECALL), color=_GREY, linestyle=(0, (1, 2)), linewidth=1)
    axis.axhline(100 * RECALL, color=_GREY, linestyle=(0, (1, 2)), linewidth=1)
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
    for x, y, side, text in (
        (6.5, 4, "left", "95 % of ID kept: FPR95 = 100 % − height of the curve here"),
        (99, 92, "right", "95 % of OOD caught: FPR95-OpenOOD is read here"),
    ):
        axis.text(x, y, text, ha=side, va="center", fontsize=8, color=_GREY, bbox=box)
    axis.set(xlim=(-1, 101), ylim=(-1, 101), xlabel="ID images rejected (%)", ylabel="OOD images caught (%)")
    axis.set_aspect("equal")
    figure.legend(title="AUROC", loc="outside right center", frameon=False, fontsize=9)
    _save(figure, path)


def _line(i: int) -> dict[str, Any]:
    """Colour and dash of the i-th OOD set: 15 lines before the first one comes again."""
    return {"color": _OOD_CYCLE[i % len(_OOD_CYCLE)], "linestyle": _DASHES[i // len(_OOD_CYCLE) % len(_DASHES)]}


# ---------------------------------------------------------------------------------------------- dynamics

_QUANTILES = ("q05", "q25", "q50", "q75", "q95")
_QUANTITIES = {
    "residual_sq": "squared residual ‖f(z) − z‖²",
    "norm": "latent norm ‖z‖",
    "running": "samples still running (%)",
}


def dynamics_curves(curves: pd.DataFrame, tol: float, path: str | Path) -> None:
    """Residual, latent norm and share of running samples over steps, ID against OOD, as the paper's Fig 12.

    Args:
        curves: columns ``split``, ``role`` (near, far; anything else is ID), ``step``, ``quantity`` (``residual_sq``,
            ``norm``, ``running``) and the quantiles ``q05`` to ``q95`` over samples. NaN in a residual means that the
            quantile has fallen below ``tol``; ``running`` is a fraction and stands in ``q50``.
        tol: the tolerance of the iteration on the squared residual, drawn as a line.
        path: the PNG to write.

    Up to 4 OOD sets share a row of panels; more are split into a row of near and a row of far sets. Lines are
    medians, bands the central 50 %, and with up to 4 sets also the central 90 %.

    Raises ``TrajOODError`` for missing columns, no rows, a tolerance that is not positive, or an unwritable path.
    """
    missing = {"split", "role", "step", "quantity", *_QUANTILES} - set(curves.columns)
    if missing or curves.empty:
        got = f"without {', '.join(sorted(missing))}" if missing else "of 0 rows"
        raise TrajOODError(f"plot: expected dynamics by split, step and quantity, got a table {got}; record them first")
    if not tol > 0:
        raise TrajOODError(f"plot: expected a tolerance above 0, got {tol}; 1e-5 is the paper's")
    roles: dict[str, str] = dict(curves[["split", "role"]].drop_duplicates().itertuples(index=False))
    ids = [s for s, role in roles.items() if role not in _ROLE_COLOURS]
    by_role = {r: [s for s, role in roles.items() if role == r] for r in _ROLE_COLOURS}
    ood = [*by_role["near"], *by_role["far"]]
    rows = [ood] if len(ood) <= 4 else [sets for sets in by_role.values() if sets]
    figure, axes = _figure(len(rows), 3, 4.6, 3.3, "Latent dynamics under f = E∘D: medians and quantile bands")
    for i, sets in enumerate(rows):
        styles: dict[str, dict[str, Any]]
        styles = {s: {"color": _ID_CYCLE[j % 2], "linestyle": _DASHES[j // 2 % 3]} for j, s in enumerate(ids)}
        styles |= {s: _line(j) for j, s in enumerate(sets)}
        panels = axes[3 * i : 3 * i + 3]
        for axis, quantity in zip(panels, _QUANTITIES, strict=True):
            table = curves[curves["quantity"] == quantity]
            _dynamics_panel(axis, table, quantity, styles, tol, wide_band=len(sets) <= 4 and len(rows) == 1)
        labels = [f"{s} ({roles[s] if roles[s] in _ROLE_COLOURS else 'ID'})" for s in styles]
        handles = [Line2D([], [], label=label, **style) for label, style in zip(labels, styles.values(), strict=True)]
        panels[2].legend(handles=handles, loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False, fontsize=8)
    _save(figure, path)


def _dynamics_panel(
    axis: Axes, table: pd.DataFrame, quantity: str, styles: Mapping[str, dict[str, Any]], tol: float, *, wide_band: bool
) -> None:
    """One quantity over steps, a line and its bands per split."""
    for split, style in styles.items():
        rows = table[table["split"] == split].sort_values("step")
        steps = rows["step"].to_numpy()
        q = {name: rows[name].to_numpy(dtype=np.float64) for name in _QUANTILES}
        if quantity == "running":
            axis.step(steps, 100 * q["q50"], where="post", linewidth=1.6, **style)
            continue
        if quantity == "residual_sq":
            q = {name: down_to_tolerance(tol, values) for name, values in q.items()}
        bands = [("q25", "q75", 0.22), ("q05", "q95", 0.09)][: 2 if wide_band else 1]
        for low, high, alpha in bands:
            # A censored lower edge lies at the tolerance or below: the band reaches down to the line.
            bottom = np.where(np.isnan(q[low]), tol, q[low]) if quantity == "residual_sq" else q[low]
            axis.fill_between(steps, bottom, q[high], color=style["color"], alpha=alpha, linewidth=0)
        axis.plot(steps, q["q50"], linewidth=1.6, **style)
    axis.set(xlabel="step t", ylabel=_QUANTITIES[quantity], title=_QUANTITIES[quantity].partition(" (")[0])
    axis.title.set_fontsize(10)
    if quantity == "running":
        axis.set_ylim(-2, 102)
    if quantity == "residual_sq":
        axis.set_yscale("log")
        axis.axhline(tol, color=_GREY, linestyle="--", linewidth=1)
        axis.annotate(f"tolerance {tol:g}", (0.99, tol), xycoords=("axes fraction", "data"), xytext=(0, -3),
                      textcoords="offset points", ha="right", va="top", fontsize=8, color=_GREY)  # fmt: skip
        axis.set_ylim(bottom=tol / 10)


def down_to_tolerance(tol: float, values: Floats) -> Floats:
    """The values with the first censored (NaN) step after the last known one set to ``tol``: the curve lands there."""
    known = np.flatnonzero(~np.isnan(values))
    values = values.copy()
    if known.size and known[-1] + 1 < values.size:
        values[known[-1] + 1] = tol
    return values


# ---------------------------------------------------------------------------------------------- attractors


def attractor_gallery(
    decoded: Floats | None, nearest: Floats, captions: Sequence[str], limits: Floats, title: str, path: str | Path
) -> None:
    """Decoded attractors, each above the training image nearest to it.

    Args:
        decoded: (K, C, H, W) in the model's units, C = 1 or 3; None draws the training images alone, for a model
            that does not decode to images.
        nearest: (K, C, H, W) training images, likewise.
        captions: K texts, one for each column.
        limits: (2, C) values drawn as black and as full brightness.
        title, path: of the figure; the PNG to write.

    Raises ``TrajOODError`` for no attractors, another number of captions or channels, or an unwritable path.
    """
    rows = {"D(z*)": decoded, "nearest\ntraining image": nearest}
    shown = {name: images for name, images in rows.items() if images is not None}
    sizes = [images.shape[:2] for images in shown.values()]
    if not len(nearest) or any(size != (len(captions), nearest.shape[1]) or size[1] not in (1, 3) for size in sizes):
        raise TrajOODError(
            f"plot: expected grey or RGB images (K, C, H, W) for {len(captions)} captions, got "
            f"{', '.join(str(images.shape) for images in shown.values())}"
        )
    columns = min(8, len(nearest))
    bands = math.ceil(len(nearest) / columns)
    figure, axes = _figure(bands * len(shown), columns, max(1.2, 4.8 / columns), 1.35, title)
    for axis in axes:
        axis.set_xticks([])
        axis.set_yticks([])
        axis.grid(visible=False)
        axis.spines[:].set_visible(False)
    for band in range(bands):
        for line, (name, images) in enumerate(shown.items()):
            first = (band * len(shown) + line) * columns
            axes[first].set_ylabel(name, fontsize=8)
            part = slice(band * columns, (band + 1) * columns)
            for axis, image, caption in zip(axes[first:], images[part], captions[part], strict=False):
                _picture(axis, image, limits)
                if line == 0:
                    axis.set_title(caption, fontsize=7.5)
    _save(figure, path)


def _picture(axis: Axes, image: Floats, limits: Floats) -> None:
    """One image (C, H, W), ``limits`` (2, C) mapped to 0 and 1; values beyond are clipped, as a screen would."""
    low, high = (np.asarray(limit, dtype=np.float64).reshape(-1, 1, 1) for limit in limits)
    unit = np.clip((image - low) / np.maximum(high - low, 1e-12), 0, 1).transpose(1, 2, 0)
    axis.imshow(unit.squeeze(-1) if unit.shape[-1] == 1 else unit, cmap="gray", vmin=0, vmax=1)


# ---------------------------------------------------------------------------------------------- a run


def plot_run(result: Result, folder: Path, quiet: bool = False) -> None:
    """Every plot of a finished run, from the files in its folder, into ``folder/plots``.

    Histograms and ROC curves per scorer, residual and norm curves, and the overview of all scorers.

    Raises ``TrajOODError`` when the run's tables are missing or the folder cannot be written.
    """
    try:
        scores = pd.read_parquet(folder / "scores.parquet")
        curves = pd.read_parquet(folder / "curves.parquet")
    except OSError as error:
        raise TrajOODError(
            f"{folder}: expected scores.parquet and curves.parquet of a finished run: {error}"
        ) from error
    plots = folder / "plots"
    auroc_bars(result, plots / "scorers.png")
    if len(curves):
        dynamics_curves(curves, float(result.config["tol"]), plots / "dynamics.png")
    roles = dict(zip(scores["split"], scores["role"], strict=True))
    for label in tqdm(result.scorers, desc="plots", unit="scorer", delay=2, disable=quiet, leave=False):
        by_split = {str(name): part[label].to_numpy() for name, part in scores.groupby("split", sort=False)}
        id_scores = by_split.pop(next(name for name, role in roles.items() if role == "test"))
        name = label.replace(":", "_").replace("=", "-")
        title = f"{label}: {result.benchmark}, {result.model['name']}"
        score_histograms(id_scores, by_split, roles, title, plots / f"histogram_{name}.png")
        roc_curves(id_scores, by_split, title, plots / f"roc_{name}.png")


def auroc_bars(result: Result, path: str | Path) -> None:
    """Mean AUROC of every scorer of a run over near, far and all OOD sets, best first; faint dots are single sets.

    Raises ``TrajOODError`` for a result without scores, or an unwritable path.
    """
    scored = [s for s in result.scorers.values() if s.all is not None]
    if not scored:
        raise TrajOODError(
            f"plot: expected at least 1 scorer with scores in result {result.name!r}, got 0; run it again"
        )
    scored.sort(key=lambda s: s.all.auroc if s.all else 0.0)  # the last one stands on top
    title = f"AUROC by scorer: {result.benchmark}, {result.model['name']}, seed {result.seed}"
    if not result.dictionary["healthy"]:
        title += f"\n⚠ unhealthy dictionary: {'; '.join(result.dictionary['warnings']) or 'no reason was recorded'}"
    figure, (axis,) = _figure(1, 1, 8.0, 0.38 * len(scored) + 1.0, title)
    for y, scorer in enumerate(scored):
        means = {"near": scorer.near, "far": scorer.far}
        for score in scorer.sets.values():
            axis.plot(100 * score.metrics.auroc, y, ".", color=_ROLE_COLOURS[score.role], alpha=0.35, markersize=6)
        ends = [100 * m.auroc for m in means.values() if m]
        axis.plot([min(ends), max(ends)], [y, y], color="#bbbbbb", linewidth=1.5, zorder=1)
        for (role, mean), marker in zip(means.items(), "^s", strict=True):
            if mean:
                axis.plot(100 * mean.auroc, y, marker, color=_ROLE_COLOURS[role], markersize=7)
        if scorer.all:
            axis.plot(100 * scorer.all.auroc, y, "D", color=_BLACK, markersize=6)
    axis.axvline(50, color=_GREY, linestyle=":", linewidth=1)
    axis.set_yticks(range(len(scored)), [s.label for s in scored])
    axis.set(xlabel="AUROC (%), dotted: chance", ylim=(-0.6, len(scored) - 0.4))
    axis.set_xlim(right=101)
    keys = [
        (".", _GREY, "one set"),
        ("^", _VERMILION, "mean of near sets"),
        ("s", _GREEN, "mean of far sets"),
        ("D", _BLACK, "mean of all sets"),
    ]
    handles = [Line2D([], [], color=c, marker=m, linestyle="", label=label) for m, c, label in keys]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    _save(figure, path)
