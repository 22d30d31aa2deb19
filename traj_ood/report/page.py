"""Render runs as an HTML page from a template, without a clock, network, model or data.

The template escapes all texts; only the drawings, the style sheet and the script are markup. The drawings are the
panels of the run's figures (``plots`` and ``dynamics_plots`` of :mod:`traj_ood.evaluation`); titles, legends and
numbers are HTML.
"""

from __future__ import annotations

import base64
import hashlib
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import count
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from traj_ood.data import OOD_ROLES
from traj_ood.drawing.style import Figure, line_of, lines_of, look
from traj_ood.drawing.svg import inline_svg
from traj_ood.dynamics.trajectory import Status
from traj_ood.errors import TrajOODError, unknown_name
from traj_ood.evaluation import dynamics_plots, plots
from traj_ood.evaluation.gallery import Frames, Mistake, Pictures, chosen_scorers
from traj_ood.evaluation.results import ScorerResult
from traj_ood.evaluation.runs import Run
from traj_ood.io.files import write_atomic
from traj_ood.report.tables import Board, BoardRow, boards, health_card, provenance, side_by_side
from traj_ood.text import printable

FILE_NAME = "report.html"
TOP = 10
"""Rows of the leaderboard shown at first, and in the figure for phones."""
_NARROW = 3.6  # inches: 360 px, the width between the margins of a phone of 420 px

Draw = Callable[[Figure, str], Markup]
"""(figure, alternative text) → the figure as markup."""

_LOWERED = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


def write_report(folder: str | Path, out: str | Path | None = None, scorers: Sequence[str] | None = None) -> Path:
    """Write the report of every run below ``folder`` and return its path.

    Args:
        folder: results of one or many runs.
        out: the page. Default: ``report.html`` in ``folder``.
        scorers: labels to show in detail, in this order, or ``["all"]``; default: those of
            :func:`traj_ood.evaluation.gallery.chosen_scorers`.
    Raises:
        TrajOODError: there are no runs, a file is damaged, a scorer is unknown, or the page cannot be written.
    """
    path = Path(folder) / FILE_NAME if out is None else Path(out)
    runs = Run.load_all(folder)
    try:
        page = render(runs, scorers)
    except TrajOODError:
        raise
    except (ValueError, TypeError, KeyError, IndexError, OverflowError) as error:  # from values that no run writes
        reason = " ".join(str(error).split())[:200]
        raise TrajOODError(
            f"{folder}: its runs cannot be drawn ({reason}): a file was changed; run it again with --fresh"
        ) from error
    write_atomic(path, page.encode())
    return path


def render(runs: Sequence[Run], scorers: Sequence[str] | None = None) -> str:
    """The page as HTML, deterministic for given runs; arguments and errors as in :func:`write_report`."""
    known = {label for run in runs for label in run.result.scorers}
    for label in scorers or ():
        if label not in known and list(scorers or ()) != ["all"]:
            raise unknown_name("scorer", label, known)
    environment = Environment(
        loader=PackageLoader("traj_ood.report"),
        autoescape=True,
        finalize=lambda value: printable(value) if type(value) is str else value,  # names may come from anyone
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"percent": percent, "picture": picture_url, "breakable": breakable}
    environment.globals |= {"health_card": health_card, "provenance": provenance}
    folder = resources.files("traj_ood.report") / "templates"
    style, script = ((folder / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    numbers = count()

    def draw(figure: Figure, label: str) -> Markup:
        return Markup(inline_svg(figure, label, salt=str(next(numbers))))

    found = boards(runs)
    return environment.get_template("page.html").render(
        title=f"{found[0].benchmark} · {found[0].model}" if len(found) == 1 else f"{len(found)} models and benchmarks",
        boards=[(board, _overview(draw, board), _overview(draw, board, narrow=True)) for board in found],
        beside=side_by_side(found),
        top=TOP,
        views=[_view(draw, run, scorers) for board in found for run in board.runs],
        style=Markup(style),
        script=Markup(script),
        policy=_policy(style, script),
    )


def percent(fraction: float) -> str:
    """A fraction in percent with one decimal, as in the README's tables.

    >>> percent(0.98349)
    '98.3'
    """
    return f"{100 * fraction:.1f}"


def breakable(text: str) -> Markup:
    """A label or id as markup, with allowed line breaks before options and after folders.

    >>> breakable("knn:k=5")
    Markup('knn<wbr>:k=5')
    """
    return Markup(re.sub(r"(?=:)|(?<=/)", "<wbr>", str(escape(printable(text)))))


def picture_url(png: bytes) -> str:
    """A PNG file as a data URL."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _policy(style: str, script: str) -> str:
    """The Content-Security-Policy, which allows only this style, this script and embedded images, so that no text from
    a result can load anything."""
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)]
    return (
        f"default-src 'none'; img-src data:; style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}'; "
        "base-uri 'none'; form-action 'none'"
    )


def _overview(draw: Draw, board: Board, narrow: bool = False) -> Markup:
    """Figure of the AUROC of all scorers on near and far sets; ``narrow`` shows only the best ones, for a phone."""
    rows = []
    for row in board.rows[:TOP] if narrow else board.rows:
        figures = {region: row.figures[f"{region}_auroc"] for region in ("near", "far", "all")}
        means = {r: (100 * f.value, 100 * f.low, 100 * f.high) for r, f in figures.items() if f.known}
        sets = [(board.sets[name], 100 * figure.value) for name, figure in row.sets.items()]
        rows.append(plots.ScorerRow(_clipped(row, 22 if narrow else 52), means, sets))
    which = f"the first {len(rows)}" if narrow and len(board.rows) > TOP else str(len(rows))
    label = f"AUROC of {which} scorers on near, far and all OOD sets; the table has the figures"
    frame = plots.overview_frame(len(rows), _NARROW if narrow else None)
    return draw(plots.alone(frame, plots.overview, rows), label)


def _clipped(row: BoardRow, most: int) -> str:
    name = printable(row.name)
    return name if len(name) <= most else name[: most - 1] + "…"


# ---------------------------------------------------------------------------------------------- one run


@dataclass(frozen=True)
class Key:
    """A line of a legend: an OOD set, its role, ink, dash pattern and AUROC."""

    name: str
    role: str
    ink: str
    dash: str
    auroc: float | None


@dataclass(frozen=True)
class Drawing:
    """A drawing with its title and a line of detail below it."""

    title: str
    role: str
    detail: str
    svg: Markup


@dataclass(frozen=True)
class Thumbnail:
    """An image with its size, alternative text, caption, and detail lines below it."""

    png: bytes
    width: int
    height: int
    alt: str
    role: str
    caption: str
    details: tuple[str, ...]


@dataclass(frozen=True)
class ScorerView:
    """One scorer of a run in detail; ``missing`` explains what was not kept."""

    result: ScorerResult
    histograms: list[Drawing]
    beyond: str
    roc: Markup | None
    keys: list[Key]
    mistakes: list[tuple[str, list[Thumbnail]]]
    missing: list[str]


@dataclass(frozen=True)
class Film:
    """The decoded frames along one path, with a title and a line of detail."""

    title: str
    role: str
    detail: str
    frames: list[Thumbnail]


@dataclass(frozen=True)
class RunView:
    """One run as the template shows it; texts in place of drawings explain what was not kept."""

    run: Run
    scorers: list[ScorerView]
    others: int
    dynamics: list[tuple[str, list[Drawing], list[Key]]]
    no_dynamics: str
    plane: Markup | None
    plane_text: str
    films: list[Film]


def _view(draw: Draw, run: Run, scorers: Sequence[str] | None) -> RunView:
    labels = _labels(run.result.scorers, scorers)
    pictures = run.pictures
    return RunView(
        run=run,
        scorers=[_scorer_view(draw, run, label) for label in labels],
        others=len(run.result.scorers) - len(labels),
        dynamics=_dynamics(draw, run),
        no_dynamics=_no_dynamics(run),
        plane=draw(plots.alone(dynamics_plots.PLANE, dynamics_plots.plane, pictures), _plane_label(pictures))
        if pictures
        else None,
        plane_text=_plane_text(pictures) if pictures else "",
        films=[_film(pictures, frames) for frames in pictures.frames] if pictures else [],
    )


def _labels(scorers: Mapping[str, ScorerResult], wanted: Sequence[str] | None) -> list[str]:
    if wanted is None:
        return chosen_scorers(scorers)
    if list(wanted) == ["all"]:
        return sorted(scorers, key=lambda label: (-s.auroc if (s := scorers[label].all) else 0.0, label))
    return [label for label in wanted if label in scorers]


def _scorer_view(draw: Draw, run: Run, label: str) -> ScorerView:
    scorer = run.result.scorers[label]
    histograms, roc_curve, beyond, missing = [], None, "", []
    if run.scores is None:
        missing.append("The scores per image (scores.parquet) were not kept, so there is nothing to draw.")
    else:
        id_scores, scores = run.scores_of(label)
        edges, lines = plots.shared_bins([id_scores, *scores.values()]), lines_of(run.sets())
        for name, values in scores.items():
            score = scorer.sets[name]
            text = f"Histogram of {label}: ID against {name} ({score.role}), AUROC {percent(score.metrics.auroc)} %"
            panel = plots.alone(plots.HISTOGRAM, plots.histogram, id_scores, values, edges, lines[name][0])
            figures = {"AUROC": score.metrics.auroc, "FPR95": score.metrics.fpr95}
            detail = ", ".join(f"{metric}\N{NO-BREAK SPACE}{percent(value)}" for metric, value in figures.items())
            histograms.append(Drawing(name, score.role, detail, draw(panel, text)))
        beyond = plots.beyond(edges, id_scores, scores)
        curves = plots.alone(plots.ROC, plots.roc, id_scores, scores, lines)
        roc_curve = draw(curves, f"ROC curves of {label} for each OOD set")
    return ScorerView(scorer, histograms, beyond, roc_curve, _keys(run, label), _mistakes(run, label, missing), missing)


def _keys(run: Run, label: str | None = None) -> list[Key]:
    found = []
    for n, (name, role) in enumerate(run.sets().items()):
        score = run.result.scorers[label].sets.get(name) if label else None
        found.append(Key(name, role, *line_of(n), score.metrics.auroc if score else None))
    return found


def _mistakes(run: Run, label: str, missing: list[str]) -> list[tuple[str, list[Thumbnail]]]:
    if run.pictures is None:
        return []
    sides = run.pictures.mistakes.get(label)
    if sides is None:
        missing.append("The images this scorer gets wrong were not kept: a run keeps those of its best scorers only.")
        return []
    titles = {"ood": "OOD images with the lowest scores", "id": "ID images with the highest scores"}
    return [
        (title, [_mistake(run.pictures.images, label, m) for m in sides[side]])
        for side, title in titles.items()
        if sides[side]
    ]


def _mistake(images: Mapping[str, bytes], label: str, mistake: Mistake) -> Thumbnail:
    kind = f"{mistake.role} OOD" if mistake.role in OOD_ROLES else "ID"
    alt = f"{kind} image {mistake.id} of {mistake.split}, score {mistake.score:.4g} by {label}"
    role = mistake.role if mistake.role in OOD_ROLES else "id"
    return _thumbnail(images[mistake.image], alt, role, mistake.split, [f"{mistake.score:.4g}", mistake.id])


def _thumbnail(png: bytes, alt: str, role: str, caption: str, details: Sequence[str] = ()) -> Thumbnail:
    width, height = struct.unpack(">II", png[16:24])
    return Thumbnail(png, width, height, alt, role, caption, tuple(details))


def _film(pictures: Pictures, film: Frames) -> Film:
    sample = pictures.samples[film.sample]
    role = sample.role if sample.role in OOD_ROLES else "id"
    ended = {
        Status.CONVERGED: f"converged after {sample.steps} steps",
        Status.STEP_LIMIT: f"not converged after {sample.steps} steps",
        Status.NON_FINITE: f"NaN or infinite after {sample.steps} steps",
    }
    title = f"{sample.split} ({sample.role})" if role != "id" else f"{sample.split} (ID)"
    frames = [
        _thumbnail(pictures.images[key], f"{caption} of {sample.id}", role, caption.translate(_LOWERED))
        for caption, key in zip(film.captions, film.images, strict=True)
    ]
    return Film(title, role, f"{sample.id}, {ended[Status(sample.status)]}", frames)


def _plane_label(pictures: Pictures) -> str:
    roles = [s.role for s in pictures.samples]
    near, far, diagnostic = (roles.count(role) for role in OOD_ROLES)
    others = f"{near} near, {far} far and {diagnostic} diagnostic" if diagnostic else f"{near} near and {far} far"
    return (
        f"Paths of {len(roles) - near - far - diagnostic} ID, {others} samples in a plane, "
        f"with {len(pictures.attractors)} attractors"
    )


def _plane_text(pictures: Pictures) -> str:
    if pictures.plane == "latent":
        return "The latent space has two dimensions and is shown completely, with the vector field f(z) − z."
    fitted = (
        f"{len(pictures.attractors)} end points of training images"
        if pictures.plane == "attractors"
        else "the starts z₀ of the samples shown, as the run has fewer than three different attractors"
    )
    return (
        f"The plane of the first two principal components of {fitted}, with {pictures.explained:.0%} of their "
        "variance; points that meet here may be apart in the latent space."
    )


def _no_dynamics(run: Run) -> str:
    if run.curves is None:
        return "The curves over steps (curves.parquet) were not kept."
    return "" if len(run.curves) else "No scorer of this run follows trajectories, so there are no curves over steps."


def _dynamics(draw: Draw, run: Run) -> list[tuple[str, list[Drawing], list[Key]]]:
    """Rows of panels, as in :func:`traj_ood.evaluation.dynamics_plots.set_rows`, each with its title and legend."""
    if run.curves is None or run.curves.empty:
        return []
    tol = run.result.config.get("tol")
    if not isinstance(tol, (int, float)):
        raise TrajOODError(
            f"result {run.result.name!r}: expected config.tol to be a number, got {tol!r}; run it again with --fresh"
        )
    keys = {key.name: key for key in _keys(run)}
    known = {str(name): look("id") for name in run.curves.loc[run.curves["role"] == "test", "split"].unique()}
    found = []
    for title, names in dynamics_plots.set_rows(run.sets()).items():
        looks = known | {name: look(keys[name].ink, keys[name].dash) for name in names}
        panels = []
        for quantity, name in dynamics_plots.QUANTITIES.items():
            figure = plots.alone(dynamics_plots.DYNAMICS, dynamics_plots.dynamics, run.curves, quantity, tol, looks)
            panels.append(Drawing(name, "", "", draw(figure, f"{name} over steps, {title}")))
        found.append((title, panels, [keys[name] for name in names]))
    return found
