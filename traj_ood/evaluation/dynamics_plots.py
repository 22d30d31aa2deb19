"""Figures of latent dynamics: residuals and norms over steps, paths to the attractors, decoded attractors.

Panels and figures are organised as in :mod:`traj_ood.evaluation.plots`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator
from numpy.typing import NDArray

from traj_ood.data import OOD_ROLES
from traj_ood.drawing.charts import PictureRow, picture_rows
from traj_ood.drawing.style import DASHES, INKS, NARROW, Figure, Frame, Look, canvas, line_of, literal, look
from traj_ood.evaluation.gallery import Pictures, view_limits
from traj_ood.evaluation.results import near_first

DYNAMICS = Frame(3.4, 2.5)
PLANE = Frame(6.0, 4.4)
QUANTITIES = {
    "residual_sq": "Squared residual ‖f(z) − z‖²",
    "norm": "Latent norm ‖z‖",
    "running": "Still running (%)",
}
ROLE_INKS = {"near": "near", "far": "far", "diagnostic": "gold"}
"""Of OOD samples in the plane; others are ID."""
Floats = NDArray[np.float64]
_CURVE_POINTS = 100
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_QUANTILES = ("q25", "q50", "q75")


def dynamics_curves(curves: pd.DataFrame, tol: float, width: float | None = None) -> Figure:
    """Residual, latent norm and share of running samples over steps, ID against OOD, as in the paper's Fig. 12.

    Up to 4 OOD sets share a row of panels; more are split into a row for each role, see :func:`set_rows`. In one column
    of a page the three panels stand above each other, with all sets in each.

    Args:
        curves: columns ``split``, ``role`` (near, far, diagnostic; anything else is ID), ``step``, ``quantity``
            (``residual_sq``, ``norm``, ``running``) and the quantiles ``q25``, ``q50`` and ``q75`` over samples.
            A NaN residual means that the quantile is below ``tol``; ``running`` is a fraction, in ``q50``.
        tol: tolerance on the squared residual, drawn as a line unless it is 0.
        width: width in inches for print, see :func:`traj_ood.drawing.style.canvas`.
    """
    roles: dict[str, str] = dict(curves[["split", "role"]].drop_duplicates().itertuples(index=False))
    sets = near_first({name: role for name, role in roles.items() if role in OOD_ROLES})
    known = sorted((name for name in roles if name not in sets), key=lambda name: roles[name] != "test")
    ids = {name: look("id", DASHES[n % len(DASHES)]) for n, name in enumerate(known)}
    looks = {**ids, **{name: look(*line_of(n)) for n, name in enumerate(sets)}}
    legend = {f"{literal(name)} ({sets.get(name, 'ID')})": own for name, own in looks.items()}
    legend |= {f"tolerance {tol:g}": {"color": INKS["muted"], "linestyle": "--"}} if tol > 0 else {}
    in_column = width is not None and width < NARROW
    rows = {"": list(sets)} if in_column else set_rows(sets)
    frame = replace(DYNAMICS, height=1.7) if in_column else DYNAMICS
    title = "Latent dynamics under f = E∘D\nMedians over samples, with the central half of ID test images as a band"
    figure, axes = canvas(frame, 3 * len(rows), 3, title, legend, headroom=0.2, width=width)
    for n, names in enumerate(rows.values()):
        shown = {name: own for name, own in looks.items() if name in ids or name in names}
        for axis, (quantity, name) in zip(axes[3 * n :], QUANTITIES.items(), strict=False):
            dynamics(axis, curves, quantity, tol, shown)
            axis.set_title(name, fontsize=10 if width is None else 8)
    return figure


def set_rows(sets: Mapping[str, str]) -> dict[str, list[str]]:
    """The OOD sets of each row of panels, by its title: one row for up to four sets, else one row per role. ``sets``
    gives the role of each set."""
    if len(sets) <= 4:
        return {"ID and OOD sets": list(sets)}
    rows = {f"ID and {role} sets": [name for name in sets if sets[name] == role] for role in OOD_ROLES}
    return {title: names for title, names in rows.items() if names}


def dynamics(axis: Axes, curves: pd.DataFrame, quantity: str, tol: float, looks: Mapping[str, Look]) -> None:
    """Draw the median of one quantity over steps (see :func:`dynamics_curves`) for each split of ``looks``; the first
    ID split has its central half as a band."""
    table = curves[(curves["quantity"] == quantity) & curves["split"].isin(looks.keys())]
    for split, own in looks.items():
        rows = table[table["split"] == split].sort_values("step")
        if rows.empty:
            continue
        rows = rows.iloc[_thinned(len(rows))]
        steps = rows["step"].to_numpy()
        low, middle, high = (rows[name].to_numpy(dtype=np.float64) for name in _QUANTILES)
        if quantity == "residual_sq":
            # A censored lower edge is below the tolerance; the band extends down to that line.
            low, middle, high = np.where(np.isnan(low), tol, low), *(down_to_tolerance(tol, q) for q in (middle, high))
        if own["color"] == INKS["id"] and quantity != "running" and not axis.collections:  # one band only
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
            axis.update_datalim([(0, tol / 3), (0, 3 * tol)])  # keeps the line visible if all curves are below it
            axis.autoscale_view(scalex=False)
    elif quantity == "running":
        axis.set_ylim(-2, 102)


def down_to_tolerance(tol: float, values: Floats) -> Floats:
    """``values`` with the first censored (NaN) step after the last known one set to ``tol``, where the curve ends."""
    known = np.flatnonzero(~np.isnan(values))
    values = values.copy()
    if known.size and known[-1] + 1 < values.size:
        values[known[-1] + 1] = tol
    return values


def _thinned(length: int) -> NDArray[np.int64]:
    """Indices of about 100 of ``length`` steps, spaced logarithmically, including all of the first ones."""
    wanted = np.concatenate([[0], np.geomspace(1, max(1, length - 1), _CURVE_POINTS)]).round().astype(np.int64)
    return np.unique(np.clip(wanted, 0, length - 1))


def _step_axis(axis: Axes, last: int) -> None:
    """A logarithmic axis of steps that includes step 0."""
    axis.set_xscale("symlog", linthresh=1)
    ticks = [0, *(t for t in (1, 10, 100, 1000) if t < 0.6 * last), last]
    axis.xaxis.set_major_locator(FixedLocator(sorted(set(ticks))))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axis.set_xlim(0, max(1, last))
    axis.set_xlabel("step t")


def _power_of_ten(value: float, _: int) -> str:
    """A power of ten as plain text, such as ``10⁻⁴``."""
    exponent = round(math.log10(value))
    return {0: "1", 1: "10", 2: "100"}.get(exponent, "10" + str(exponent).translate(_RAISED))


def paths(pictures: Pictures, title: str, width: float | None = None) -> Figure:
    """Figure of the paths of a few samples in the plane of the run's gallery, see :func:`plane`."""
    legend = {"ID": look("id"), "near OOD": look("near"), "far OOD": look("far")}
    if any(sample.role == "diagnostic" for sample in pictures.samples):
        legend["diagnostic OOD"] = look("gold")
    legend["attractor of a training image"] = {"color": INKS["muted"], "marker": ".", "linestyle": ""}
    if width is not None:  # without a title, which says it
        plain = {"color": INKS["muted"], "marker": "o", "markersize": 4.6, "linestyle": ""}
        legend |= {"start z₀": {**plain, "markerfacecolor": INKS["paper"]}, "end": plain}
    note = "Rings are the starts z₀ of paths, discs their ends."
    figure, (axis,) = canvas(PLANE, title=f"{title}\n{note}", legend=legend, width=width)
    plane(axis, pictures)
    return figure


def plane(axis: Axes, pictures: Pictures) -> None:
    """Draw paths z_0 … z_N in the plane, with rings at the starts, discs at the ends, and attractors in grey.

    If the latent space is two-dimensional, arrows show f(z) − z (the paper's Fig. 1), with its length as opacity.
    """
    _arrows(axis, pictures.field)
    axis.plot(*pictures.attractors.T, "o", color=INKS["muted"], markersize=3.2, alpha=0.6, markeredgewidth=0)
    known = [path[np.isfinite(path).all(axis=1)].astype(np.float64) for path in pictures.paths]
    low, high = view_limits(pictures.paths, pictures.attractors)
    for sample, path in zip(pictures.samples, known, strict=True):
        if not len(path):
            continue
        ink = INKS[ROLE_INKS.get(sample.role, "id")]
        thin = _without_crowds(path, 0.004 * float(np.max(high - low)))
        axis.plot(*thin.T, color=ink, linewidth=1.1, alpha=0.75)
        axis.plot(*path[0], "o", markerfacecolor=INKS["paper"], markeredgecolor=ink, markersize=4.6)
        axis.plot(*path[-1], "o", color=ink, markersize=4.6, markeredgewidth=0)
    axis.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]))
    if pictures.plane == "latent":
        axis.set(xlabel="z₁", ylabel="z₂")
    else:  # principal components, whose values are meaningless
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    axis.grid(visible=False)


def _arrows(axis: Axes, field: NDArray[np.float32]) -> None:
    """Draw the direction of f(z) − z at each grid point, with arrows of equal length, as lengths span decades."""
    lengths = np.hypot(field[:, 2], field[:, 3]) if len(field) else np.zeros(0)
    if not (lengths > 0).any():
        return
    points, lengths = field[lengths > 0], lengths[lengths > 0]
    spacing = math.sqrt(float(np.ptp(field[:, 0]) * np.ptp(field[:, 1])) / len(field))
    unit = points[:, 2:] / lengths[:, None] * 0.7 * spacing
    # Three levels of opacity instead of a colour map, which are legible in the light and the dark theme.
    for low, high, alpha in ((0, 0.33, 0.25), (0.33, 0.67, 0.4), (0.67, 1.01, 0.6)):
        rank = np.argsort(np.argsort(lengths)) / lengths.size
        some = (rank >= low) & (rank < high)
        axis.quiver(*points[some, :2].T, *unit[some].T, angles="xy", scale_units="xy", scale=1, width=0.0022,
                    color=INKS["muted"], alpha=alpha, pivot="mid")  # fmt: skip


def _without_crowds(path: Floats, least: float) -> Floats:
    """The path without points closer than ``least`` to the previous one kept."""
    kept = [path[0]]
    for point in path[1:-1]:
        if np.hypot(*(point - kept[-1])) >= least:
            kept.append(point)
    return np.stack([*kept, path[-1]])


def attractor_gallery(
    decoded: Floats | None, nearest: Floats, captions: Sequence[str], limits: Floats, title: str
) -> Figure:
    """Figure of decoded attractors, each above the nearest training image.

    Args:
        decoded: (K, C, H, W) in the model's units, C = 1 or 3; None, for a model that does not decode to images, draws
            only the training images.
        nearest: (K, C, H, W) training images in the same units.
        captions: K texts, one per column.
        limits: (2, C) values drawn as black and as full brightness.
        title: title of the figure.
    """
    kinds = {"D(z*)": decoded, "nearest\ntraining image": nearest}
    shown = {name: images for name, images in kinds.items() if images is not None}
    bands = [slice(first, first + 8) for first in range(0, len(nearest), 8)]
    rows = [
        PictureRow(name, images[band], limits, captions[band] if n == 0 else ())
        for band in bands
        for n, (name, images) in enumerate(shown.items())
    ]
    return picture_rows(rows, title)
