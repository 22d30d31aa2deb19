"""Plots: every file is a real PNG with something on it, bad input is named, nothing global changes."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from PIL import Image

from traj_ood.drawing import charts
from traj_ood.drawing.style import CYCLE, INKS, Figure, lines_of, save_figure
from traj_ood.errors import TrajOODError
from traj_ood.evaluation.dynamics_plots import attractor_gallery, dynamics_curves
from traj_ood.evaluation.metrics import Metrics, compute_metrics
from traj_ood.evaluation.plots import (
    leaders,
    roc_curves,
    score_histograms,
    scorer_overview,
    shared_bins,
)
from traj_ood.evaluation.results import Result, ScorerResult, SetScore, with_diagnostics

RNG = np.random.default_rng(0)
ID = RNG.gamma(20, 2, 200)
OOD = {name: RNG.gamma(20 + 4 * i, 2, 50) for i, name in enumerate(["bag", "digits", "noise", "faces", "textures"])}
ROLES = {name: "near" if name == "bag" else "far" for name in OOD}
SETS = {name: SetScore(ROLES[name], len(OOD[name]), compute_metrics(ID, OOD[name]), {}) for name in OOD}


def assert_plot(figure: Figure, path: Path) -> None:
    """As a PNG of a sensible size, light, with ink of several colours on it."""
    save_figure(figure, path)
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert round(image.info["dpi"][0]) == 150
        image = image.convert("RGB")
    colours = image.getcolors(image.width * image.height)  # far faster than np.unique over pixels
    pixels = np.asarray(image)
    assert min(pixels.shape[:2]) > 200
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert 0.4 < np.mean(pixels == 255) < 0.99
    assert colours is not None
    assert len(colours) > 50


def curves(sets: dict[str, str]) -> pd.DataFrame:
    rows = []
    for rank, (name, role) in enumerate(sets.items()):
        for step in range(0, 50, 5):
            residual = 100 * np.exp(-step / (2 + rank)) * np.array([0.1, 0.5, 1, 2, 10])
            residual[residual < 1e-5] = np.nan
            rows.append((name, role, step, "residual_sq", *residual))
            rows.append((name, role, step, "norm", *(30 + rank + np.arange(5))))
            rows.append((name, role, step, "running", *[np.exp(-step / 20)] * 5))
    return pd.DataFrame(rows, columns=["split", "role", "step", "quantity", "q05", "q25", "q50", "q75", "q95"])


def make_result(**changes: Any) -> Result:
    def score(role: str, auroc: float) -> SetScore:
        return SetScore(role, 10, Metrics(auroc, auroc, auroc, 0.1, 0.1), {})

    fields: dict[str, Any] = {
        "name": "run",
        "benchmark": "fashion",
        "model": {"name": "vitmae", "fingerprint": "a"},
        "config": {},
        "seed": 0,
        "command": "",
        "commit": None,
        "versions": {},
        "created": "",
        "seconds": {},
        "data": {},
        "dictionary": {"healthy": True, "warnings": []},
        "failures": [],
        "scorers": {
            "trajectory": ScorerResult("Trajectory", {}, "", 9.0, {"a": score("near", 0.7), "b": score("far", 0.9)}),
            "knn": ScorerResult("KNN", {}, "", None, {"b": score("far", 0.4)}),
            "none": ScorerResult("Not scored", {}, "", None, {}),
        },
    }
    return Result(**{**fields, **changes})


@pytest.mark.parametrize("count", [1, 3, 5])
def test_score_histograms(tmp_path: Path, count: int) -> None:
    sets = dict(list(OOD.items())[:count])
    figure = score_histograms(ID, sets, SETS, "Trajectory on fashion")
    assert_plot(figure, tmp_path / "new" / "histogram.png")
    assert len(figure.axes) == count
    got = SETS["bag"].metrics
    title = f"bag (near, n = 50)\nAUROC {100 * got.auroc:.1f} %, FPR95 {100 * got.fpr95:.1f} %"
    assert figure.axes[0].get_title() == title


@pytest.mark.parametrize("value", [0.0, 40.0, -1e12])
def test_scores_that_are_all_equal_can_be_drawn(tmp_path: Path, value: float) -> None:
    same = np.full(5, value)
    sets = {"x": SetScore("far", 5, compute_metrics(same, same), {})}
    assert_plot(score_histograms(same, {"x": same}, sets, "all equal"), tmp_path / "histogram.png")
    assert_plot(roc_curves(same, {"x": same}, sets, "all equal"), tmp_path / "roc.png")


def test_one_wild_set_does_not_flatten_the_others() -> None:
    edges = shared_bins([ID, ID + 5, np.full(10, 1e9), np.full(10, -1e9)])
    low, high = np.quantile(ID, [0.005, 0.995])
    assert edges[0] == pytest.approx(low - 3 * (high - low))
    assert edges[-1] == pytest.approx(high + 3 * (high - low))
    tight = shared_bins([ID, ID])
    assert (tight[0], tight[-1]) == (pytest.approx(low), pytest.approx(high))


def test_roc_curves(tmp_path: Path) -> None:
    figure = roc_curves(ID, OOD, SETS, "Trajectory on fashion")
    assert_plot(figure, tmp_path / "roc.png")
    keys = [text.get_text() for text in figure.legends[0].get_texts()]
    assert keys == [f"{name}  {100 * SETS[name].metrics.auroc:.1f} %" for name in OOD]


@pytest.mark.parametrize("far", [1, 6])
def test_dynamics_curves(tmp_path: Path, far: int) -> None:
    sets = {"train": "train", "test": "test", "bag": "near", **{f"far{i}": "far" for i in range(far)}}
    figure = dynamics_curves(curves(sets), 1e-5)
    assert_plot(figure, tmp_path / "dynamics.png")
    assert len(figure.axes) == (6 if far == 6 else 3)  # near and far sets in rows of their own
    sets["crops"] = "diagnostic"
    figure = dynamics_curves(curves(sets), 1e-5)
    assert len(figure.axes) == (9 if far == 6 else 3)
    keys = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "crops (diagnostic)" in keys, "and no ID split"


def test_dynamics_of_id_alone(tmp_path: Path) -> None:
    assert_plot(dynamics_curves(curves({"train": "train"}), 1e-5), tmp_path / "dynamics.png")


def test_scorer_overview(tmp_path: Path) -> None:
    healthy = scorer_overview(make_result())
    sick = {"healthy": False, "warnings": ["only 61.0 % of 2,000 samples converged, 90 % are expected"]}
    warned = scorer_overview(make_result(dictionary=sick))
    assert_plot(healthy, tmp_path / "healthy.png")
    assert_plot(warned, tmp_path / "sick.png")
    marked = scorer_overview(with_diagnostics([make_result()], ["b"])[0])
    assert_plot(marked, tmp_path / "marked.png")
    keys = [text.get_text() for text in marked.legends[0].get_texts()]
    assert "diagnostic, not in means" in keys
    assert "diagnostic, not in means" not in [t.get_text() for t in healthy.legends[0].get_texts()]
    assert [label.get_text() for label in healthy.axes[0].get_yticklabels()] == ["Trajectory", "KNN"]
    said = " ".join(" ".join(text.get_text() for text in warned.texts).split())
    assert "⚠ unhealthy dictionary: only 61.0 % of 2,000 samples converged" in said


@pytest.mark.parametrize(("count", "channels"), [(1, 1), (8, 3), (13, 1)])
def test_attractor_gallery(tmp_path: Path, count: int, channels: int) -> None:
    decoded, nearest = RNG.normal(size=(2, count, channels, 9, 9))
    captions = [f"{i} images" for i in range(count)]
    limits = np.array([[-1.0] * channels, [1.0] * channels])
    both = attractor_gallery(decoded, nearest, captions, limits, "Attractors of vitmae")
    alone = attractor_gallery(None, nearest, captions, limits, "Attractors of vitmae")
    assert_plot(both, tmp_path / "both.png")
    assert_plot(alone, tmp_path / "alone.png")
    assert both.get_figheight() > alone.get_figheight()
    assert both.get_figwidth() == alone.get_figwidth()
    assert sum(len(axis.images) for axis in both.axes) == 2 * count


def test_a_gallery_is_drawn_between_its_limits(tmp_path: Path) -> None:
    """Both limits of a channel are black and full brightness, whatever the model's units."""
    image = np.array([[[[2.0, 6.0]], [[-1.0, 3.0]], [[0.0, 0.0]]]])
    limits = np.array([[2.0, -1.0, 0.0], [6.0, 3.0, 1.0]])
    save_figure(attractor_gallery(None, image, ["one"], limits, "units"), tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as drawn:
        colours = {tuple(c) for c in np.asarray(drawn.convert("RGB")).reshape(-1, 3)}
    assert {(0, 0, 0), (255, 255, 0)} <= colours


def test_a_tolerance_of_0_is_not_drawn(tmp_path: Path) -> None:
    table = curves({"train": "train"})
    drawn = {tol: dynamics_curves(table, tol) for tol in (1e-5, 0.0)}
    assert_plot(drawn[0.0], tmp_path / "dynamics.png")
    lines = {tol: [line.get_linestyle() for line in figure.axes[0].lines] for tol, figure in drawn.items()}
    assert (lines[1e-5].count("--"), lines[0.0].count("--")) == (1, 0)


def test_empty_results_are_named() -> None:
    with pytest.raises(TrajOODError, match="expected at least 1 scorer with scores in result 'run', got 0"):
        scorer_overview(make_result(scorers={}))


def test_formulas_of_a_legend_are_drawn_as_formulas(tmp_path: Path) -> None:
    lines = [charts.Curve(label, [1, 2], [1, 2]) for label in (r"to $\nabla\,\log\,p$", "other")]
    save_figure(charts.curves([charts.Panel(name, "x", "y", lines) for name in "ab"], "title"), tmp_path / "curves.svg")
    shown = "".join(ElementTree.parse(tmp_path / "curves.svg").getroot().itertext())
    assert "∇" in shown
    assert "nabla" not in shown


def test_names_are_drawn_as_they_are(tmp_path: Path) -> None:
    """Neither as formulas, which ``\\frac`` is none of, nor as characters that no SVG may contain."""
    made = make_result(model={"name": "a$\\frac$\x1b", "fingerprint": "0"})
    scorers = {"knn": replace(made.scorers["knn"], label="knn:of=$x$")}
    save_figure(scorer_overview(replace(made, scorers=scorers)), tmp_path / "scorers.svg")
    text = (tmp_path / "scorers.svg").read_text(encoding="utf-8")
    ElementTree.fromstring(text)
    assert "a$\\frac$\\x1b, seed 0" in text
    assert ">knn:of=$x$<" in text


def test_an_unwritable_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrajOODError, match="expected a folder that can be written"):
        save_figure(roc_curves(ID, OOD, SETS, "title"), tmp_path / "file" / "roc.png")


def test_a_set_has_one_colour_in_every_figure() -> None:
    """Also where a scorer lacks a set: its line and its histogram are those of the run's list of sets."""
    lines = lines_of(OOD)
    some = dict(list(OOD.items())[1:])
    for figure in (score_histograms(ID, some, SETS, "t", lines=lines), roc_curves(ID, some, SETS, "t", lines=lines)):
        drawn = {to_hex(c) for axis in figure.axes for p in axis.patches for c in [p.get_edgecolor()]}
        drawn |= {to_hex(line.get_color()) for axis in figure.axes for line in axis.lines}
        assert {INKS[lines[name][0]] for name in some} <= drawn
        assert len(drawn & {INKS[ink] for ink in CYCLE}) == len({lines[name][0] for name in some})


@pytest.mark.parametrize("width", [3.4, 7.0])
def test_figures_for_print_have_its_width_and_no_title(width: float) -> None:
    for figure in (
        score_histograms(ID, OOD, SETS, "title", width=width),
        roc_curves(ID, OOD, SETS, "title", width=width),
        scorer_overview(make_result(), width),
        dynamics_curves(curves({"train": "train", "bag": "near"}), 1e-5, width),
    ):
        assert figure.get_figwidth() == pytest.approx(width)
        assert "".join(text.get_text() for text in figure.texts) == ""


@pytest.mark.parametrize(("width", "in_a_row"), [(3.4, (2, 1)), (7.0, (4, 3))])
def test_figures_for_print_of_eight_sets_fit_on_a_page(width: float, in_a_row: tuple[int, int]) -> None:
    ood = {f"set{n}": OOD["bag"] for n in range(8)}
    roles = [*["near"] * 3, *["far"] * 2, *["diagnostic"] * 3]
    sets = {name: SetScore(role, 50, SETS["bag"].metrics, {}) for name, role in zip(ood, roles, strict=True)}
    known = {"test": "test", **dict(zip(ood, roles, strict=True))}
    figures = (score_histograms(ID, ood, sets, "title", width=width), dynamics_curves(curves(known), 1e-5, width))
    for figure, columns in zip(figures, in_a_row, strict=True):
        figure.draw_without_rendering()
        assert figure.get_figheight() < 8
        lefts = {round(axis.get_position().x0, 2) for axis in figure.axes}
        assert len(lefts) == columns
        (legend,) = figure.legends
        drawn = [text.get_window_extent() for axis in figure.axes for text in (axis.title, axis.xaxis.label)]
        for box in (legend.get_window_extent(), *drawn):
            assert box.x0 >= 0
            assert box.x1 <= figure.bbox.x1
            assert box.y1 <= figure.bbox.y1


@pytest.mark.parametrize(("form", "magic"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_vector_files_are_equal_for_equal_figures(tmp_path: Path, form: str, magic: bytes) -> None:
    for name in ("a", "b"):
        save_figure(roc_curves(ID, OOD, SETS, "title"), tmp_path / f"{name}.{form}")
    a, b = ((tmp_path / f"{name}.{form}").read_bytes() for name in ("a", "b"))
    assert a == b
    assert a.startswith(magic)


def test_the_leaders_are_the_best_two_of_different_names_and_the_papers() -> None:
    result = make_result()
    (first, scorer), *_ = result.scorers.items()
    named = {label: replace(scorer, label=label) for label in ("a", "a:view=cls", "b", "trajectory")}
    assert leaders(replace(result, scorers=named)) == ["a", "b", "trajectory"]
    assert leaders(replace(result, scorers={first: scorer})) == [first]


@pytest.mark.slow
def test_plots_never_touch_pyplot() -> None:
    code = "import sys, traj_ood.evaluation.plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
