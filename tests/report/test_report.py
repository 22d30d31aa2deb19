"""The report page: its figures are the records', its text is escaped, and it reads well without a network or a mouse.

The page is read by Python's own HTML parser and, where there is one, by a headless Chromium (CHROMIUM or PATH).
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from html import escape
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from browser import Browser, find_chromium
from click.testing import CliRunner
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from traj_ood.drawing.style import INKS
from traj_ood.drawing.svg import inline_svg
from traj_ood.errors import TrajOODError
from traj_ood.evaluation import dynamics_plots, plots
from traj_ood.evaluation.gallery import FILE_NAME as GALLERY_NAME
from traj_ood.evaluation.gallery import Frames, Mistake, PathSample, Pictures
from traj_ood.evaluation.metrics import bootstrap, compute_metrics
from traj_ood.evaluation.results import Result, ScorerResult, SetScore, is_in, with_diagnostics
from traj_ood.report import Run, render, tables, write_report
from traj_ood.report.page import TOP
from traj_ood.report.tables import boards, health_card

EVIL = "<script>window.hacked=1</script>"
EVIL_ID = '"><img src=x onerror=window.hacked=1>'
SETS = {"bag": "near", "boot": "near", "digits": "far", "faces": "far", "noise": "diagnostic"}
SCORERS = {"field": 1.6, "knn:k=5": 1.0, EVIL: 0.7, "trajectory:horizon=4": 0.3, "msp": 0.1}
RECORDED = Path(__file__).parents[2] / "results"


def scores(seed: int) -> pd.DataFrame:
    draw = np.random.default_rng(seed)
    parts = []
    for n, (split, role) in enumerate([("test", "test"), *SETS.items()]):
        count = 60 if split == "test" else 40
        columns = {k: draw.normal(0 if split == "test" else n * shift, 1, count) for k, shift in SCORERS.items()}
        ids = [f"{split}/{EVIL_ID}{i}" for i in range(count)]
        parts.append(pd.DataFrame({"split": split, "role": role, "id": ids, **columns}))
    return pd.concat(parts, ignore_index=True)


def curves() -> pd.DataFrame:
    rows = []
    for n, (split, role) in enumerate([("train", "train"), ("test", "test"), *SETS.items()]):
        for step in range(80):
            residual = 50 * np.exp(-step / (4 + n)) * np.array([0.2, 0.5, 1, 2, 5])
            rows.append((split, role, step, "residual_sq", *np.where(residual < 1e-5, np.nan, residual)))
            rows.append((split, role, step, "norm", *(10 + n + np.arange(5))))
            rows.append((split, role, step, "running", *[float(np.exp(-step / 30))] * 5))
    return pd.DataFrame(rows, columns=["split", "role", "step", "quantity", "q05", "q25", "q50", "q75", "q95"])


def result(table: pd.DataFrame, seed: int = 0, **changes: Any) -> Result:
    known = table[table["role"] == "test"]
    scorers = {}
    for label in SCORERS:
        sets = {}
        for split, role in SETS.items():
            values = table.loc[table["split"] == split, label].to_numpy()
            metrics, intervals = compute_metrics(known[label], values), bootstrap(known[label], values, resamples=20)
            sets[split] = SetScore(role, len(values), metrics, intervals)
        scorers[label] = ScorerResult(label, {}, f"what {label} measures", 4.0, sets)
    fields: dict[str, Any] = {
        "name": f"tiny--toy--seed{seed}",
        "benchmark": "tiny",
        "model": {"name": "toy", "fingerprint": "a" * 64, "family": "conv", "parameters": 1234},
        "config": {"tol": 1e-5, "max_steps": 80, "attractors": 30},
        "seed": seed,
        "command": f"traj-ood bench tiny --seed {seed}",
        "commit": "c" * 40,
        "versions": {"python": "3"},
        "created": "2026-01-01T00:00:00+00:00",
        "seconds": {"fit": 1.5},
        "data": {"test": {"role": "test", "count": 60, "sha256": "d" * 64}},
        "dictionary": {
            "used": True,
            "healthy": True,
            "warnings": [],
            "count": 30,
            "converged": 0.98,
            "distinct": 12,
            "verdict": {"word": "healthy", "reason": "98.0% of 30 training trajectories end well", "remedy": ""},
        },
        "failures": [],
        "scorers": scorers,
    }
    return Result(**{**fields, **changes})


def png(seed: int, mode: str = "L") -> bytes:
    array = np.random.default_rng(seed).integers(0, 256, (28, 28) if mode == "L" else (48, 64, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(array).save(file, format="PNG")
    return file.getvalue()


def pictures(table: pd.DataFrame, plane: str = "attractors") -> Pictures:
    draw = np.random.default_rng(0)
    samples = [PathSample("test", "test", f"test/{i}", 20, 0) for i in range(4)]
    samples += [PathSample("bag", "near", "bag/1", 20, 1), PathSample("digits", "far", "digits/1", 20, 0)]
    paths = np.cumsum(draw.normal(size=(6, 21, 2)), axis=1).astype(np.float32)
    paths[0, 10:] = np.nan
    mistakes = {}
    for label in list(SCORERS)[:4]:
        sides = {}
        for side, part in (("ood", table[table["role"] != "test"]), ("id", table[table["role"] == "test"])):
            worst = part.sort_values(label, ascending=side == "ood")[:3]
            rows = zip(worst["split"], worst["role"], worst["id"], worst[label], strict=True)
            sides[side] = tuple(Mistake(s, r, i, float(v), f"{n:03d}") for n, (s, r, i, v) in enumerate(rows))
        mistakes[label] = sides
    field = np.concatenate([draw.normal(size=(50, 2)), draw.normal(size=(50, 2))], axis=1).astype(np.float32)
    return Pictures(
        plane=plane,  # type: ignore[arg-type]
        explained=0.71,
        samples=tuple(samples),
        paths=paths,
        attractors=draw.normal(size=(20, 2)).astype(np.float32),
        field=field if plane == "latent" else field[:0],
        frames=(Frames(0, ("x", "D(z0)", "D(z16)", "D(z*)"), ("000", "001", "002", "003")),),
        no_frames="",
        mistakes=mistakes,
        images={f"{n:03d}": png(n, "RGB" if n == 3 else "L") for n in range(4)},
    )


def write_run(folder: Path, seed: int = 0, gallery: bool = True, **changes: Any) -> Result:
    """A run's folder as the evaluator leaves it."""
    folder.mkdir(parents=True)
    table = scores(seed)
    made = result(table, seed, **changes)
    made.save(folder / "result.json")
    table.to_parquet(folder / "scores.parquet")
    curves().to_parquet(folder / "curves.parquet")
    if gallery:
        pictures(table).save(folder / GALLERY_NAME)
    return made


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    write_run(folder / "one" / "run")
    return folder


@pytest.fixture(scope="module")
def page(place: Path) -> Path:
    return write_report(place / "one")


# ---------------------------------------------------------------------------------------------- an independent reader


class Reader(HTMLParser):
    """Tags with their attributes, cells of tables, and whether every tag is closed in order."""

    VOID = frozenset({"meta", "link", "img", "br", "wbr", "input", "hr"})

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: dict[str, list[str]] = {}
        self.tables: list[list[list[tuple[str, dict[str, str | None], str]]]] = []
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append((tag, dict(attrs), ""))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open[-1] == tag, f"</{tag}> where {self.open[-1]} is open"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text.setdefault(self.open[-1] if self.open else "", []).append(data)
        if "td" in self.open or ("th" in self.open and "table" in self.open):
            kind, attributes, before = self.tables[-1][-1][-1]
            self.tables[-1][-1][-1] = (kind, attributes, before + data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def reader(page: Path) -> Reader:
    return Reader(page.read_text(encoding="utf-8"))


def test_structure(reader: Reader) -> None:
    assert reader.all("html") == [{"lang": "en"}]
    assert reader.text["title"] == ["tiny · toy: traj_ood report"]
    for landmark in ("main", "header", "footer", "nav", "h1"):
        assert len(reader.all(landmark)) == 1, landmark
    levels = [int(tag[1]) for tag, _ in reader.tags if re.fullmatch(r"h[1-6]", tag)]
    assert all(b - a <= 1 for a, b in pairwise(levels)), levels
    ids = [a["id"] for _, a in reader.tags if "id" in a]
    assert len(ids) == len(set(ids))
    targets = [a["href"] for _, a in reader.tags if (a.get("href") or "").startswith("#")]
    targets += re.findall(r"url\((#[^)]+)\)", " ".join(a.get("clip-path") or "" for _, a in reader.tags))
    assert targets
    assert {t[1:] for t in targets if t} <= set(ids)


def test_tables_have_real_headers(reader: Reader) -> None:
    assert len(reader.tables) == 3
    assert len(reader.all("caption")) == 3
    for table in reader.tables:
        heads = [c for row in table for c in row if c[0] == "th"]
        assert {c[1].get("scope") for c in heads} <= {"col", "row", "colgroup"}
        body = [row for row in table if any(c[0] == "td" for c in row) and row[0][1].get("scope") == "row"]
        assert body
        width = max(sum(int(c[1].get("colspan") or 1) for c in row) for row in table)
        assert {sum(int(c[1].get("colspan") or 1) for c in row) for row in table} == {width}
    for box in (a for _, a in reader.tags if "scroll" in (a.get("class") or "").split()):
        assert box["tabindex"] == "0"
        assert box["role"] == "region"
        assert box["aria-label"]


def test_pictures_and_drawings_have_words(reader: Reader) -> None:
    images = reader.all("img")
    assert len(images) == 4 * 6 + 4
    for image in images:
        assert image["alt"]
        kind, _, data = (image["src"] or "").partition(",")
        assert kind == "data:image/png;base64"
        with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
            assert picture.size == (int(image["width"] or 0), int(image["height"] or 0))
    for drawing in reader.all("svg"):
        named = drawing.get("role") == "img" and drawing.get("aria-label")
        assert named or drawing.get("aria-hidden") == "true"


def test_nothing_is_loaded_and_nothing_runs_but_its_own_script(page: Path, reader: Reader) -> None:
    text = page.read_text(encoding="utf-8")
    assert "http://" not in text
    assert "https://" not in text
    assert len(reader.all("script")) == len(reader.all("style")) == 1
    assert [link["href"] for link in reader.all("link")] == ["data:,"]
    for tag, attributes in reader.tags:
        assert "style" not in attributes, tag
        assert not [name for name in attributes if name.startswith("on")], tag
    policy = next(m["content"] for m in reader.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    for tag in ("script", "style"):
        content = re.search(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        assert content
        digest = base64.b64encode(hashlib.sha256(content[1].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in (policy or "")
    assert "default-src 'none'" in (policy or "")


def test_text_of_results_is_escaped(page: Path, reader: Reader) -> None:
    text = page.read_text(encoding="utf-8")
    assert EVIL not in text
    assert "<img src=x" not in text
    assert any(EVIL in image["alt"] for image in reader.all("img") if image["alt"])
    assert any(EVIL_ID in (image["alt"] or "") for image in reader.all("img"))
    names = [cell[2] for row in reader.tables[0] for cell in row if cell[1].get("scope") == "row"]
    assert any(EVIL in name for name in names)


# ---------------------------------------------------------------------------------------------- figures


def body(table: list[list[tuple[str, dict[str, str | None], str]]]) -> dict[str, list[tuple[float, str]]]:
    """Values and texts of a table's cells by scorer."""
    rows = [row for row in table if row[0][1].get("scope") == "row"]
    return {
        str(row[0][1]["data-value"]): [(float(c[1]["data-value"]), c[2]) for c in row[1:] if _number(c[1])]
        for row in rows
    }


def _number(attributes: dict[str, str | None]) -> bool:
    return re.fullmatch(r"[\d.e-]+", attributes.get("data-value") or "") is not None


def test_figures_are_those_of_result_json(place: Path, reader: Reader) -> None:
    tree = json.loads((place / "one" / "run" / "result.json").read_text())
    means, sets = body(reader.tables[0]), body(reader.tables[1])
    assert means.keys() == sets.keys() == set(SCORERS)
    order = [("all", "auroc"), ("near", "auroc"), ("far", "auroc"), ("all", "fpr95"), ("near", "fpr95")]
    order += [("far", "fpr95"), ("all", "fpr95_openood"), ("all", "aupr_in"), ("all", "aupr_out")]
    for label, cells in means.items():
        record = tree["scorers"][label]
        assert [value for value, _ in cells[:9]] == [pytest.approx(record[r][m], rel=1e-12) for r, m in order]
        for (value, text), (region, metric) in zip(cells, order, strict=False):
            own = [s for s in record["sets"].values() if is_in(s["role"], region)]
            low, high = np.mean([s["intervals"][metric] for s in own], axis=0)
            assert text.split() == [f"{100 * value:.1f}", f"{100 * low:.1f}–{100 * high:.1f}"]
        assert cells[9][0] == record["f_evaluations"]
    for label, cells in sets.items():
        for (value, text), name in zip(cells, ["bag", "boot", "digits", "faces", "noise"], strict=True):
            record = tree["scorers"][label]["sets"][name]
            low, high = record["intervals"]["auroc"]
            assert value == record["metrics"]["auroc"]
            assert text.split() == [f"{100 * value:.1f}", f"{100 * low:.1f}–{100 * high:.1f}"]
    assert list(means) == sorted(SCORERS, key=lambda label: -tree["scorers"][label]["all"]["auroc"])
    caption = " ".join(reader.text["span"])
    held = "Means include bag, boot (near) and digits, faces (far); noise is a diagnostic and is left out."
    assert held in caption
    assert "crosses: diagnostics, not in means" in " ".join(reader.text["li"])


def test_the_interval_of_a_mean_is_at_least_as_wide_as_it_should_be() -> None:
    """Against the bootstrap of the mean itself, in which the sets share their resampled ID images."""
    table, draw = scores(3), np.random.default_rng(0)
    known = table.loc[table["role"] == "test", "knn:k=5"].to_numpy()
    sets = [table.loc[table["split"] == name, "knn:k=5"].to_numpy() for name in SETS]

    def resampled() -> float:
        ids = draw.choice(known, known.size)
        return float(np.mean([(ids[:, None] < draw.choice(s, s.size)).mean() for s in sets]))

    low, high = np.quantile([resampled() for _ in range(400)], [0.025, 0.975])
    run = Run("run", result(table), table, None, None)
    ours = next(r for r in boards([run])[0].rows if r.label == "knn:k=5").figures["all_auroc"]
    assert ours.high - ours.low > 0.9 * (high - low)
    assert ours.low < ours.value < ours.high


def test_seeds_are_averaged_and_other_settings_marked(tmp_path: Path) -> None:
    runs = []
    for seed in (0, 1):
        table = scores(seed)
        runs.append(Run(f"seed{seed}", result(table, seed), table, None, None))
    board = boards(runs)[0]
    top = next(r for r in board.rows if r.label == "field")
    aurocs = [r.result.scorers["field"].all.auroc for r in runs]  # type: ignore[union-attr]
    assert top.figures["all_auroc"].value == pytest.approx(np.mean(aurocs))
    assert top.figures["all_auroc"].std == pytest.approx(np.std(aurocs, ddof=1))
    assert board.tags == {}
    assert board.seeds == 2
    other = replace(runs[1], result=replace(runs[1].result, config={"tol": 1e-3, "max_steps": 80, "attractors": 30}))
    board = boards([runs[0], other])[0]
    assert board.tags.keys() == {"A", "B"}
    assert set(board.tags.values()) == {"config.tol=1e-05", "config.tol=0.001"}
    assert {row.tag for row in board.rows} == {"A", "B"}
    assert np.isnan(board.best("all_auroc"))
    text = render([runs[0], other])
    assert "Compare rows of one letter only" in text
    Reader(text)


def test_rows_that_divide_the_sets_in_other_ways_say_so() -> None:
    older = result(scores(0))
    (newer,) = with_diagnostics([result(scores(1), 1)], ["faces"])
    for runs in ((older, newer), (newer, older)):
        (board,) = boards([Run("", one, None, None, None) for one in runs])
        letters = {text: letter for letter, text in board.tags.items()}
        far, out = letters["sets.faces=far"], letters["sets.faces=diagnostic"]
        assert f"digits, faces (far); noise is a diagnostic and is left out ({far})." in board.held
        assert f"faces, noise are diagnostics and are left out ({out})." in board.held


def test_verdicts_in_words() -> None:
    table = scores(0)
    healthy = health_card(result(table))
    assert (healthy.state, healthy.title) == ("good", "Healthy")
    assert healthy.text == "98.0% of 30 training trajectories end well."
    assert ("Distinct", "12") in healthy.facts
    verdict = {"word": "collapsed", "reason": "3 end points are distinct", "remedy": "train with more noise"}
    record = {"used": True, "healthy": False, "warnings": ["3 end points are distinct"]}
    card = health_card(result(table, dictionary={**record, "verdict": verdict}))
    assert (card.state, card.title) == ("bad", "Collapsed")
    assert card.text.startswith("3 end points are distinct. Scores against these attractors mean nothing; train with")
    old = health_card(result(table, dictionary=record))
    assert old.text == "3 end points are distinct. Scores against these attractors mean nothing."
    unused = health_card(result(table, dictionary={"used": False, "healthy": True, "warnings": []}))
    assert (unused.state, unused.text) == ("none", "No scorer of this run reads attractors.")


def test_an_unhealthy_dictionary_stands_out(tmp_path: Path) -> None:
    write_run(tmp_path / "run", gallery=False, dictionary={"healthy": False, "warnings": ["nothing converged"]})
    text = write_report(tmp_path, scorers=["msp"]).read_text(encoding="utf-8")
    assert "<strong>Unhealthy attractors.</strong> seed 0: nothing converged." in text
    # In the rows of scorers that read attractors, and of one that is not known here.
    assert text.count('<strong class="warn">unhealthy</strong>') == 2


# ---------------------------------------------------------------------------------------------- what was not kept


def test_a_run_without_pictures_says_which_command_keeps_them(tmp_path: Path) -> None:
    write_run(tmp_path / "run", gallery=False)
    page = write_report(tmp_path, scorers=["msp"])
    text = page.read_text(encoding="utf-8")
    assert "Pictures were not kept by this run" in text
    assert "<code>traj-ood bench tiny --seed 0</code>" in text
    assert not Reader(text).all("img")


def test_a_run_that_is_result_json_alone_still_has_its_tables(tmp_path: Path) -> None:
    write_run(tmp_path / "run", gallery=False)
    for name in ("scores.parquet", "curves.parquet"):
        (tmp_path / "run" / name).unlink()
    text = write_report(tmp_path / "run", tmp_path / "elsewhere" / "page.html").read_text(encoding="utf-8")
    assert "(scores.parquet) were not kept" in text
    assert "(curves.parquet) were not kept" in text
    assert body(Reader(text).tables[0]).keys() == set(SCORERS)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_no_run_leaves_are_refused(place: Path, tmp_path: Path, value: float) -> None:
    shutil.copytree(place, tmp_path / "copy")
    path = next((tmp_path / "copy").rglob("scores.parquet"))
    table = pd.read_parquet(path)
    label = table.columns[-1]
    table.loc[3, label] = value
    table.to_parquet(path)
    with pytest.raises(
        TrajOODError, match=r"scores\.parquet: expected finite scores .* 1 of \d+ rows .*; run it again"
    ):
        write_report(tmp_path / "copy", tmp_path / "r.html")
    table[:0].to_parquet(path)
    with pytest.raises(TrajOODError, match=r"scores\.parquet: expected finite scores of every image, got no row"):
        write_report(tmp_path / "copy", tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_curves_that_cannot_be_drawn_are_one_error(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place, tmp_path / "copy")
    for path in (tmp_path / "copy").rglob("curves.parquet"):
        table = pd.read_parquet(path)
        table["step"] = np.nan
        table.to_parquet(path)
    with pytest.raises(TrajOODError, match=r"copy: cannot be drawn|copy: its runs cannot be drawn"):
        write_report(tmp_path / "copy", tmp_path / "r.html")


def test_no_scorers_are_none_to_show(place: Path) -> None:
    from traj_ood.cli import main

    result = CliRunner().invoke(main, ["report", str(place), "--scorers", " , "])
    assert result.exit_code == 2
    assert result.stderr == "traj-ood: error: --scorers: expected labels, got none: give some, all, or leave it out\n"


def test_scorers_can_be_chosen(place: Path) -> None:
    text = write_report(place / "one", place / "chosen.html", ["msp", "field"]).read_text(encoding="utf-8")
    assert re.findall(r'<span class="name">(.*?)</span>', text) == ["msp", "field"]
    assert "The images this scorer gets wrong were not kept" in text  # msp's


@pytest.mark.skipif(not (RECORDED / "backbone").is_dir(), reason="the recorded results are not here")
@pytest.mark.parametrize("folder", ["paper", "backbone"])
def test_recorded_results_can_be_read(folder: str) -> None:
    runs = [replace(run, scores=None, curves=None) for run in Run.load_all(RECORDED / folder)]
    text = render(runs, ["field"] if folder == "backbone" else ["mahalanobis"])
    assert "Pictures were not kept by this run" in text
    assert len(Reader(text).all("details")) > len(runs)


# ---------------------------------------------------------------------------------------------- drawings


@pytest.mark.slow
def test_the_same_runs_give_the_same_page(place: Path, page: Path) -> None:
    assert render(Run.load_all(place / "one")) == page.read_text(encoding="utf-8")


def panel(*drawn: Any) -> str:
    return inline_svg(plots.alone(*drawn), "label", "salt")


def test_size(place: Path) -> None:
    """8 sets of 2,000 images and 17 scorers have to fit in 5 MB beside 1.5 MB of pictures (2 MB in base64)."""
    draw = np.random.default_rng(0)
    known, sets = draw.gamma(9, 1, 2000), {str(n): draw.gamma(9 + n, 1, 2000) for n in range(8)}
    edges = plots.shared_bins([known, *sets.values()])
    drawn = [panel(plots.HISTOGRAM, plots.histogram, known, s, edges, "far") for s in sets.values()]
    drawn.append(panel(plots.ROC, plots.roc, known, sets))
    assert 17 * sum(map(len, drawn)) < 2.0e6


def test_the_roc_that_is_drawn_has_the_area_of_the_exact_one() -> None:
    draw = np.random.default_rng(0)
    known, ood = draw.normal(0, 1, 3000), draw.normal(1.5, 1, 3000)
    svg = panel(plots.ROC, plots.roc, known, {"x": ood})
    line = next(p for p in re.findall(r'<path d="([^"]+)"[^>]*stroke="var\(--near\)"', svg))
    points = np.array([[float(n) for n in p.split()] for p in line[1:].split("L")])
    frame = re.search(r'<rect x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)"', svg)
    assert frame
    x, y, width, height = (float(n) for n in frame.groups())
    share_x = ((points[:, 0] - x) / width * 102 - 1) / 100
    share_y = ((y + height - points[:, 1]) / height * 102 - 1) / 100
    area = float(np.sum(np.diff(share_x) * (share_y[1:] + share_y[:-1]) / 2))
    assert area == pytest.approx(compute_metrics(known, ood).auroc, abs=3e-3)
    assert len(points) <= 100


def test_a_histogram_shows_every_score() -> None:
    known, ood = np.array([0.0, 1, 1, 2]), np.array([1.0, 5, 1e9])
    svg = panel(plots.HISTOGRAM, plots.histogram, known, ood, np.linspace(0, 4, 5), "near")
    heights = {}
    for ink in ("id", "near"):
        path = re.search(rf'<path d="M([^"]+)"[^>]*fill="var\(--{ink}\)"', svg)
        assert path
        y = [float(p.split()[1]) for p in path[1].split("L")]
        heights[ink] = max(y) - min(y)
    assert heights["near"] / heights["id"] == pytest.approx((2 / 3) / (2 / 4), rel=0.02)  # 5 and 1e9 share the last bin


def test_the_files_of_plots_stand_in_one_folder(tmp_path: Path) -> None:
    """Also of a scorer in whose name or options a user writes a slash."""
    made = write_run(tmp_path / "run", gallery=False)
    label = "my/score:of=a/b"
    scorers = {label: replace(made.scorers["field"], label=label)}
    replace(made, scorers=scorers).save(tmp_path / "run" / "result.json")
    scores(0).rename(columns={"field": label}).to_parquet(tmp_path / "run" / "scores.parquet")
    plots.plot_run(tmp_path / "run", quiet=True)
    names = sorted(path.name for path in (tmp_path / "run" / "plots").iterdir())
    assert names == ["dynamics.png", "histogram_my-score_of-a-b.png", "roc_my-score_of-a-b.png", "scorers.png"]


def test_a_drawing_has_the_pages_colours_or_none() -> None:
    figure = Figure(facecolor="none")
    figure.add_artist(Line2D([0, 1], [0, 1], color="hotpink"))
    with pytest.raises(ValueError, match="expected an ink of the page, got #ff69b4"):
        inline_svg(figure, "x", "y")
    assert len(set(INKS.values())) == len(INKS)


def test_every_ink_has_its_colour_in_the_light_and_a_colour_in_the_dark(reader: Reader) -> None:
    schemes = re.findall(r"color-scheme: (\w+);([^}]*)", reader.text["style"][0])
    assert [name for name, _ in schemes] == ["light", "dark", "dark", "light"]  # the system's, the button's, on paper
    for name, text in schemes:
        colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", text))
        assert INKS.keys() <= colours.keys()
        assert name == "dark" or all(colours[ink] == INKS[ink] for ink in INKS if ink not in ("muted", "rule"))


def test_names_in_a_drawing_are_text() -> None:
    name = 'a<b style="x" #123456 0.12345 &amp;'
    rows = [plots.ScorerRow(name, {"all": (50.0, 40.0, 60.0)}, [])]
    svg = panel(plots.overview_frame(1), plots.overview, rows)
    assert escape(name, quote=False) in svg


def test_a_plane_of_its_own_has_arrows_and_ticks() -> None:
    shown = pictures(scores(0), "latent")
    svg = panel(dynamics_plots.PLANE, dynamics_plots.plane, shown)
    assert "z₁" in svg
    assert svg.count("<path") > 50
    assert "z₁" not in panel(dynamics_plots.PLANE, dynamics_plots.plane, pictures(scores(0)))


def test_paths_that_fly_off_or_stand_still_can_be_drawn() -> None:
    shown = pictures(scores(0))
    wild = shown.paths.copy()
    wild[1, 5] = 3e38
    still, nowhere = np.zeros_like(wild), np.full_like(wild, np.nan)
    for paths in (wild, still, nowhere):
        for attractors in (shown.attractors, shown.attractors[:0]):
            svg = panel(dynamics_plots.PLANE, dynamics_plots.plane, replace(shown, paths=paths, attractors=attractors))
            assert "nan" not in svg
            assert "inf" not in svg


# ---------------------------------------------------------------------------------------------- errors, command


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(TrajOODError, match=r"expected at least one result\.json in this folder or below, got none"):
        write_report(tmp_path)
    write_run(tmp_path / "run")
    with pytest.raises(TrajOODError, match="unknown scorer 'fields': did you mean 'field'"):
        write_report(tmp_path, scorers=["fields"])
    (tmp_path / "file").write_text("")
    with pytest.raises(TrajOODError, match="expected a folder that can be written"):
        write_report(tmp_path, tmp_path / "file" / "page.html", ["field"])
    (tmp_path / "run" / GALLERY_NAME).write_bytes(b"no")
    with pytest.raises(TrajOODError, match=r"gallery\.safetensors: not a readable gallery of a run"):
        write_report(tmp_path)
    (tmp_path / "run" / GALLERY_NAME).unlink()
    curves().drop(columns="q25").to_parquet(tmp_path / "run" / "curves.parquet")
    with pytest.raises(TrajOODError, match=r"curves\.parquet: expected the columns of its run, got none of q25"):
        write_report(tmp_path)
    (tmp_path / "run" / "scores.parquet").write_bytes(b"PAR1")
    with pytest.raises(TrajOODError, match=r"scores\.parquet: expected a Parquet table, got a damaged file"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_command(place: Path) -> None:
    from traj_ood.cli import main

    out = place / "cli.html"
    done = CliRunner().invoke(main, ["report", str(place / "one"), "--out", str(out), "--scorers", "field"])
    assert done.exit_code == 0, done.output
    assert done.output.startswith(f"Written to {out} (0.")
    assert out.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    failed = CliRunner().invoke(main, ["report", str(place / "nothing")])
    assert failed.exit_code == 2
    assert "run `traj-ood bench` first" in failed.output


# ---------------------------------------------------------------------------------------------- the conclusion


RECORDS = Path(__file__).parents[2] / "results"
PLACES = ("paper/fashion--fashion-mae--seed0", "backbone/fashion--timm-fashion-resnet--seed0")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of two recorded runs, without what takes long to draw."""
    folder = tmp_path_factory.mktemp("recorded")
    for place in PLACES:
        (folder / place).mkdir(parents=True)
        shutil.copy(RECORDS / place / "result.json", folder / place)
    return write_report(folder, folder / "page.html")


def test_the_conclusion_is_that_of_the_records(recorded: Path) -> None:
    said = re.findall(r'<p class="conclusion">(.*?)</p>', recorded.read_text(encoding="utf-8"))
    for text, place in zip(said, PLACES, strict=True):
        scorers = json.loads((RECORDS / place / "result.json").read_text())["scorers"]
        means = {label: 100 * s["all"]["auroc"] for label, s in scorers.items()}
        first = max(means, key=means.__getitem__)
        others = {label: m for label, m in means.items() if label.split(":")[0] != first.split(":")[0]}
        second = max(others, key=others.__getitem__)
        lead = means[first] - means[second]
        assert f"{first} leads with a mean AUROC of {means[first]:.1f} % over 8 OOD sets" in text
        assert f"{lead:.1f} points ahead of {second}; the 95 % intervals do not overlap" in text
        assert text.endswith("The attractors are healthy.")


def test_an_unhealthy_board_says_so_and_one_scorer_leads_alone() -> None:
    assert tables.health_words(SimpleNamespace(runs=[])) == "No scorer reads attractors."  # type: ignore[arg-type]
    run = SimpleNamespace(result=SimpleNamespace(dictionary={"healthy": False}))
    assert tables.health_words(SimpleNamespace(runs=[run])) == "The attractors are unhealthy: see below."  # type: ignore[arg-type]


def test_models_stand_side_by_side_and_every_picture_has_words(recorded: Path) -> None:
    text = recorded.read_text(encoding="utf-8")
    beside = text.split('id="beside"')[2 if text.count('id="beside"') > 2 else 1].split("</section>")[0]
    shared = set.intersection(
        *(set(json.loads((RECORDS / place / "result.json").read_text())["scorers"]) for place in PLACES)
    )
    assert beside.count('scope="row"') == len(shared) == 7
    assert text.count("the paper’s</span>") >= 2
    for tag in re.findall(r"<svg [^>]*>", text):
        assert "aria-label=" in tag or "aria-hidden=" in tag
    assert all('alt="' in tag for tag in re.findall(r"<img [^>]*>", text))


def test_two_runs_of_one_model_stand_side_by_side(tmp_path: Path) -> None:
    first, second = (f"paper/fashion--fashion-mae--seed{seed}" for seed in (0, 1))
    scorers = []
    for place in (first, second):
        (tmp_path / place).mkdir(parents=True)
        shutil.copy(RECORDS / place / "result.json", tmp_path / place)
        scorers.append(json.loads((RECORDS / place / "result.json").read_text())["scorers"])
    (table,) = tables.side_by_side(boards(Run.load_all(tmp_path)))
    assert (table.columns, table.averaged, table.same_images) == (["seed 0", "seed 1"], False, True)
    assert {label for label, _, _ in table.rows} == set(scorers[0])
    for label, figures, difference in table.rows:
        means = [recorded[label]["all"]["auroc"] for recorded in scorers]
        assert [figure and figure.value for figure in figures] == means
        assert all(figure and figure.low < figure.value < figure.high for figure in figures)
        assert difference == means[1] - means[0]
    text = render(Run.load_all(tmp_path))
    assert "Side by side" in text
    assert f">{100 * table.rows[0][2]:+.1f}</td>" in text


def test_intervals_side_by_side_are_those_of_the_leaderboard() -> None:
    """Both leave out diagnostics, such as ``noise``."""
    runs = [Run("", result(scores(seed), seed), None, None, None) for seed in (0, 1)]
    (table,) = tables.side_by_side(boards(runs))
    for n, run in enumerate(runs):
        (board,) = boards([run])
        expected = {row.label: row.figures["all_auroc"] for row in board.rows}
        for label, figures, _ in table.rows:
            one = figures[n]
            assert one is not None
            assert (one.value, one.low, one.high) == pytest.approx(
                (expected[label].value, expected[label].low, expected[label].high)
            )


def test_runs_side_by_side_say_what_tells_them_apart(tmp_path: Path) -> None:
    for place, seed, changes in (
        ("a", 0, {}),
        ("b", 1, {}),
        ("c", 0, {"config": {"tol": 1e-3, "max_steps": 80, "attractors": 30}}),
        ("d", 0, {"model": {"name": "other", "fingerprint": "b" * 64}}),
        ("e", 0, {"data": {"test": {"role": "test", "count": 60, "sha256": "e" * 64}}}),
    ):
        write_run(tmp_path / place, seed, gallery=False, **changes)
        if place == "b":
            (same,) = tables.side_by_side(boards(Run.load_all(tmp_path)))
            assert same.columns == ["seed 0", "seed 1"]
    (table,) = tables.side_by_side(boards(Run.load_all(tmp_path)))
    assert len(set(table.columns)) == 5
    assert table.columns[0] == "other · seed 0"
    assert all(re.fullmatch(r"toy · seed [01] · \([A-Z]\)", name) for name in table.columns[1:])
    assert not table.same_images


def test_other_images_of_the_same_names_are_told_side_by_side() -> None:
    for contents, same in (({"contents": "1"}, True), ({}, True), ({"contents": "2"}, False)):
        data = {"role": "test", "count": 60, "sha256": "d" * 64}
        found = [
            result(scores(0), seed, data={"test": data | own}) for seed, own in ((0, {"contents": "1"}), (1, contents))
        ]
        (table,) = tables.side_by_side(boards([Run("", one, None, None, None) for one in found]))
        assert table.same_images == same


def test_models_stand_side_by_side_where_there_are_many_runs(tmp_path: Path) -> None:
    write_run(tmp_path / "other", gallery=False, model={"name": "other", "fingerprint": "b" * 64})
    made = [write_run(tmp_path / str(seed), seed, gallery=False) for seed in range(tables.BESIDE)]
    (table,) = tables.side_by_side(boards(Run.load_all(tmp_path)))
    assert (table.columns, table.averaged, table.same_images) == (["other", "toy"], True, True)
    means = [m.auroc for one in made if (m := one.scorers["field"].all)]
    (field,) = [figures[1] for label, figures, _ in table.rows if label == "field"]
    assert field is not None
    assert field.value == pytest.approx(np.mean(means))


# ---------------------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = find_chromium()
    if program is None:
        pytest.skip("no Chromium: install Debian's chromium, or name one in CHROMIUM")
    with Browser(program) as running:
        yield running


def column(browser: Browser, number: int) -> list[str | None]:
    rows = f"[...document.querySelector('table.board').tBodies[0].rows].map(r => r.cells[{number}].dataset.value)"
    return browser.evaluate(rows)


def test_it_opens_quietly_and_pictures_show(browser: Browser, page: Path) -> None:
    browser.open(page)
    assert browser.complaints() == []
    assert browser.requests() == [page.resolve().as_uri()]
    widths = browser.evaluate("[...document.images].map(i => i.naturalWidth)")
    assert len(widths) == 28
    assert min(widths) > 0
    assert browser.evaluate("window.hacked") is None


def test_the_leaders_are_in_view_and_all_are_a_click_away(browser: Browser, recorded: Path) -> None:
    browser.open(recorded, width=420)
    assert browser.complaints() == []
    assert browser.evaluate("document.documentElement.scrollWidth") <= 420
    shown = "[...document.querySelector('table.board').tBodies[0].rows].filter(r => r.offsetHeight).length"
    assert browser.evaluate(shown) == TOP + 1  # and the paper's
    browser.click("button.all")
    assert browser.evaluate(shown) == 17
    leaders = "document.querySelector('.figure.leaders').getBoundingClientRect()"
    assert browser.evaluate(f"{leaders}.width") > 300
    assert browser.evaluate(f"{leaders}.right") <= 420
    assert browser.evaluate("document.querySelector('.wide-only').offsetHeight") == 0


def test_strips_show_that_they_go_on_as_long_as_they_do(browser: Browser, tmp_path: Path) -> None:
    table = scores(0)
    frames = tuple(["x", *(f"D(z{t})" for t in (0, 1, 2, 4, 8, 16, 64)), "D(z*)"])
    strip = replace(pictures(table), frames=(Frames(0, frames, tuple(f"{n % 4:03d}" for n in range(len(frames)))),))
    write_run(tmp_path / "run", gallery=False)
    strip.save(tmp_path / "run" / GALLERY_NAME)
    path = write_report(tmp_path)
    reel = "document.querySelector('.reel')"
    cue = f"{reel}.parentElement.querySelector('.cue')"
    fades = f"getComputedStyle({reel}).maskImage.includes('gradient')"
    browser.open(path, width=420)
    assert browser.evaluate(f"{reel}.scrollWidth > {reel}.clientWidth")
    assert browser.evaluate(f"{cue}.offsetHeight") > 0
    assert browser.evaluate(f"{cue}.textContent") == "9 frames, scroll →"
    assert browser.evaluate(fades)
    browser.evaluate(f"new Promise(done => {{ {reel}.addEventListener('scroll', () => setTimeout(done, 50));"
                     f" {reel}.scrollLeft = {reel}.scrollWidth; }})")  # fmt: skip
    assert not browser.evaluate(fades)
    browser.open(path, width=1280)  # where all of it fits
    assert browser.evaluate(f"{reel}.scrollWidth <= {reel}.clientWidth")
    assert browser.evaluate(f"{cue}.offsetHeight") == 0
    assert not browser.evaluate(fades)


def test_sorting_by_mouse_and_keyboard(browser: Browser, page: Path) -> None:
    browser.open(page)
    start = [float(v or "nan") for v in column(browser, 1)]
    assert start == sorted(start, reverse=True)
    head = "table.board thead tr:nth-child(2) th:nth-child(5)"
    browser.click(f"{head} button")  # FPR95 of all sets: the lowest first
    values = [float(v or "nan") for v in column(browser, 4)]
    assert values == sorted(values)
    assert browser.evaluate(f"document.querySelector('{head}').ariaSort") == "ascending"
    assert browser.evaluate("document.querySelectorAll('table.board [aria-sort]').length") == 1
    browser.evaluate(f"document.querySelector('{head} button').focus()")
    browser.press("Enter", 13)
    assert [float(v or "nan") for v in column(browser, 4)] == sorted(values, reverse=True)
    browser.click("table.board thead tr:nth-child(2) th:first-child button")
    assert column(browser, 0) == sorted(SCORERS)
    assert browser.complaints() == []


def test_the_keyboard_reaches_the_content_first(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.press("Tab", 9)
    assert browser.evaluate("document.activeElement.className") == "skip"
    assert browser.evaluate("document.activeElement.getBoundingClientRect().left") >= 0
    browser.press("Enter", 13)
    assert browser.evaluate("document.activeElement.id") == "main"


@pytest.mark.parametrize("width", [320, 420, 1280])
def test_nothing_overflows(browser: Browser, page: Path, width: int) -> None:
    browser.open(page, width=width)
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    browser.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    # The first column stays in view while its table scrolls.
    browser.evaluate("document.querySelector('.scroll:has(table)').scrollLeft = 200")
    assert browser.evaluate("document.querySelector('tbody th').getBoundingClientRect().left") >= 0


CONTRAST = """
(() => {
  const channel = v => { v /= 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; };
  const luminance = c => 0.2126 * channel(c[0]) + 0.7152 * channel(c[1]) + 0.0722 * channel(c[2]);
  const rgba = text => { const n = text.match(/[\\d.]+/g).map(Number); return n.length === 3 ? [...n, 1] : n; };
  const behind = e => { for (; e; e = e.parentElement) { const c = rgba(getComputedStyle(e).backgroundColor);
    if (c[3] === 1) return c; } return [255, 255, 255, 1]; };
  document.querySelectorAll("details").forEach(d => d.open = true);
  const bad = [];
  for (const e of document.querySelectorAll("body *")) {
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    if (!own || ["SCRIPT", "STYLE"].includes(e.tagName)) continue;
    const style = getComputedStyle(e);
    const front = rgba(e instanceof SVGElement ? style.fill : style.color);
    const [a, b] = [luminance(front), luminance(behind(e))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) bad.push(`${e.tagName}.${e.getAttribute("class")} ${e.textContent.slice(0, 30)} ${ratio}`);
  }
  return bad;
})()
"""


@pytest.mark.parametrize("dark", [False, True])
def test_text_has_the_contrast_of_wcag_aa(browser: Browser, page: Path, dark: bool) -> None:
    browser.open(page, dark=dark)
    assert browser.evaluate(CONTRAST) == []


def test_the_theme_follows_the_system_until_the_button(browser: Browser, page: Path) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    line = """getComputedStyle(document.querySelector('[stroke="var(--id)"]')).stroke"""
    browser.open(page)
    light, ink = browser.evaluate(background), browser.evaluate(line)
    browser.open(page, dark=True)
    dark = browser.evaluate(background)
    assert dark != light
    assert browser.evaluate(line) != ink
    browser.click("#theme")
    assert browser.evaluate(background) == light
    assert browser.evaluate("document.getElementById('theme').textContent") == "Dark"


def test_paper_shows_what_is_folded(browser: Browser, page: Path, tmp_path: Path) -> None:
    browser.open(page, dark=True)
    browser.evaluate("window.seen = 0; addEventListener('beforeprint', () => {"
                     " window.seen = document.querySelectorAll('details:not([open])').length + 1; })")  # fmt: skip
    browser.pdf(tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF-")
    assert browser.evaluate("window.seen") == 1  # printed with nothing folded
    assert browser.evaluate("document.querySelectorAll('details:not([open])').length") > 0  # and folded again
    browser.send("Emulation.setEmulatedMedia", media="print")
    assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.evaluate("getComputedStyle(document.getElementById('theme')).display") == "none"
