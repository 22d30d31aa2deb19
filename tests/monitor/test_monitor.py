"""The monitor: p-values counted one by one, fair bets, alarms at the promised rate, rows of every kind, exit codes."""

from __future__ import annotations

import itertools
import json
import re
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from click.testing import CliRunner
from scipy.integrate import quad
from scipy.stats import beta, kstest

from traj_ood import Detector, Normalised
from traj_ood.cli import main
from traj_ood.detector.conformal import Calibration
from traj_ood.errors import TrajOODError
from traj_ood.monitor import BETS, capitals, online_p_values, read_rows, watch
from traj_ood.stream import Row, open_table


def test_p_values_are_those_counted_one_by_one() -> None:
    draw = np.random.default_rng(0)
    calibration, scores = draw.normal(size=30).round(1), draw.normal(size=700).round(1)
    found, theta = online_p_values(calibration, scores, seed=3), np.random.default_rng(3).random(700)
    for t in (0, 1, 17, 511, 512, 513, 699):
        before = [*calibration.tolist(), *scores[:t].tolist()]
        greater = sum(s > scores[t] for s in before)
        equal = 1 + sum(s == scores[t] for s in before)
        assert found[t] == pytest.approx((greater + theta[t] * equal) / (31 + t), rel=1e-12)
    assert np.array_equal(online_p_values(calibration, scores[:100], seed=3), found[:100])  # a longer stream begins so


def test_p_values_of_exchangeable_scores_are_uniform_with_ties() -> None:
    draw = np.random.default_rng(1)
    found = [
        online_p_values(draw.integers(0, 4, 9).astype(float), draw.integers(0, 4, 3).astype(float), s)
        for s in range(700)
    ]
    for column in np.stack(found).T:
        assert kstest(column, "uniform").pvalue > 1e-4


@pytest.mark.parametrize("name", BETS)
def test_every_bet_is_fair(name: str) -> None:
    edges = [0.0, 0.005, 0.05, 0.95, 1.0]
    total = sum(quad(lambda p: float(BETS[name](np.array(p))), a, b)[0] for a, b in itertools.pairwise(edges))
    assert total == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("restarts", [True, False])
def test_the_capital_is_a_martingale(restarts: bool) -> None:
    """Its mean over all continuations, integrated over the pieces on which bets are linear, is what it was."""
    middle = [0.0025, 0.0275, 0.5, 0.975]  # of pieces with these lengths; linear functions are exact there
    lengths = np.array([0.005, 0.045, 0.9, 0.05])
    path = np.array([[a, b, c] for a in middle for b in middle for c in middle]).T
    weight = np.array([a * b * c for a in lengths for b in lengths for c in lengths])
    for capital in capitals(path, restarts=restarts):
        assert capital @ weight == pytest.approx(1, rel=1e-12)


def test_false_alarms_are_as_rare_as_promised_and_changes_are_found() -> None:
    draw = np.random.default_rng(2)
    runs, long, level = 150, 1500, 0.1
    same = np.stack([online_p_values(draw.normal(size=200), draw.normal(size=long), k) for k in range(runs)], axis=1)
    alarms = (capitals(same).max(axis=0) >= 1 / level).mean()
    assert alarms <= level + 3 * np.sqrt(level / runs)
    late = [
        np.concatenate([draw.normal(size=1000), draw.normal(size=500) + 3 * (draw.random(500) < 0.3)])
        for _ in range(20)
    ]
    odd = np.stack([online_p_values(draw.normal(size=1000), s, k) for k, s in enumerate(late)], axis=1)
    capital = capitals(odd)
    assert (capital[-1] > 1 / level).all()
    assert (capital[999] < 1 / level).sum() >= 18


def test_watch_says_what_there_is() -> None:
    draw = np.random.default_rng(3)
    known = Calibration(torch.tensor(draw.normal(size=500)))
    plain = watch(known, draw.normal(size=1000), invalid=3)
    assert (plain.images, plain.invalid, plain.is_alarm) == (1003, 3, False)
    k, n = plain.ood, 1000  # Clopper–Pearson from the beta distribution
    assert plain.interval == pytest.approx((beta.ppf(0.025, k, n - k + 1), beta.ppf(0.975, k + 1, n - k)), rel=1e-9)
    odd = watch(known, np.concatenate([draw.normal(size=400), draw.normal(size=400) + 2, [np.inf] * 3]))
    assert {alarm.test for alarm in odd.alarms} == {"martingale", "windows"}
    assert all(400 < alarm.at <= 600 for alarm in odd.alarms)
    assert odd.recent is not None
    assert odd.recent["rate"] > 0.4
    empty = watch(known, np.empty(0))
    assert (empty.rate, empty.interval, empty.recent, empty.is_alarm, empty.capital) == (None, None, None, False, 1.0)
    assert json.loads(json.dumps(odd.as_dict()))["alarm"] is True
    for wrong, text in (
        ({"false_alarms": 0.0}, "false_alarms: expected a prob"),
        ({"window": 3}, "window: expected at"),
    ):
        with pytest.raises(TrajOODError, match=text):
            watch(known, np.empty(0), **wrong)


# ---------------------------------------------------------------------- rows and the command


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A detector, and rows of images like its calibration's and of others."""
    place = tmp_path_factory.mktemp("place")
    model = tiny.conv()
    made = Detector.fit(model, Normalised(tiny.images(30, model.input_shape)), "field")
    made.calibrate(Normalised(tiny.images(200, model.input_shape, seed=9))).save(place / "d")
    same, other = tiny.images(150, model.input_shape, seed=10), 2 * tiny.images(150, model.input_shape, seed=11)
    for name, images in (("same", same), ("other", other)):
        said = made.decide(Normalised(images))
        rows = [Row.of(f"{name}/{i}.png", one) for i, one in enumerate(said)]
        rows.insert(5, Row("torn\udce9.png", error="torn"))  # not UTF-8
        for suffix in ("csv", "jsonl", "parquet"):
            with open_table(place / suffix / f"{'1' if name == 'same' else '2'}.{suffix}") as table:
                table.write(rows)
                table.finish()
    return place


def run(*arguments: object) -> Any:
    return CliRunner().invoke(main, ["monitor", *map(str, arguments)], prog_name="traj-ood")


def test_every_kind_of_rows_says_the_same(place: Path) -> None:
    tables = [read_rows([place / suffix]) for suffix in ("csv", "jsonl", "parquet")]
    for table in tables:
        assert table.invalid == 2
        assert np.array_equal(table.scores, tables[2].scores)  # to the last bit: they decide ties with the calibration
        assert np.array_equal(table.p_values, tables[2].p_values)
    assert len(tables[0].scores) == 300
    assert pd.read_csv(place / "csv" / "1.csv", encoding_errors="replace")["score"].dropna().tolist() == pytest.approx(
        tables[0].scores[:150].tolist()
    )


def test_the_exit_code_tells_cron(place: Path, tmp_path: Path) -> None:
    fine = run(place / "d", place / "csv" / "1.csv", "--prometheus", tmp_path / "m.prom")
    assert fine.exit_code == 0, fine.output
    assert "resembles the calibration" in fine.stdout
    parser = pytest.importorskip("prometheus_client.parser", reason="needs traj_ood[monitor]")
    families = {f.name: f.samples[0] for f in parser.text_string_to_metric_families((tmp_path / "m.prom").read_text())}
    assert families["traj_ood_monitor_images"].value == 151
    assert families["traj_ood_monitor_alarm"].value == 0
    assert families["traj_ood_monitor_alarm"].labels == {"detector": "d"}
    loud = run(place / "d", place / "jsonl", "--format", "json", "--quiet")
    assert loud.exit_code == 4
    assert json.loads(loud.stdout)["alarms"][0]["at"] > 150
    assert "traj-ood: alarm: the stream differs from the calibration: martingale after" in loud.stderr
    assert run(place / "d", place / "csv" / "1.csv", "--quiet").output == ""


def test_rows_of_a_cluster_are_put_in_order_and_count_once(tmp_path: Path) -> None:
    for name, keys in (("b", [5, 1]), ("a", [4, 1, 3])):
        pd.DataFrame({"score": [10.0 * k for k in keys], "p_value": 0.5, "key": keys}).to_parquet(
            tmp_path / f"{name}.parquet"
        )
    assert read_rows([tmp_path]).scores.tolist() == [10, 30, 40, 50]


def test_an_unfinished_line_waits_and_strangers_are_refused(place: Path, tmp_path: Path) -> None:
    text = (place / "csv" / "1.csv").read_text(errors="replace")
    (tmp_path / "rows.csv.part").write_text(text + "half,1.2")
    assert len(read_rows([tmp_path / "rows.csv.part"]).scores) == 150
    (tmp_path / "empty.jsonl").write_text("")
    assert len(read_rows([tmp_path / "empty.jsonl"]).scores) == 0
    line = json.dumps({"score": "Infinity", "p_value": 1 / 201})
    (tmp_path / "inf.jsonl").write_text(line + "\n")
    assert read_rows([tmp_path / "inf.jsonl"]).scores.tolist() == [np.inf]
    (tmp_path / "blank.jsonl").write_text(f"{line}\r\n\r\n \n{line}\r\n")
    assert read_rows([tmp_path / "blank.jsonl"]).scores.tolist() == [np.inf] * 2
    (tmp_path / "list.jsonl").write_text(f"{line}\n[1]\n")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    (tmp_path / "foreign.csv").write_text("score,p_value\n1.0,0.123\n")
    (tmp_path / "bad.csv").write_text("score,p_value\none,0.1\n")
    (tmp_path / "folder").mkdir()
    nothing = run(place / "d", tmp_path / "empty.jsonl")
    assert (nothing.exit_code, "nothing to compare yet" in nothing.stdout) == (0, True)
    for name, words in (
        ("other.csv", "expected a column score, got none of ours"),
        ("list.jsonl", r"line 2: expected an object, got \[1\]"),
        ("foreign.csv", "expected p-values of this detector's calibration"),
        ("bad.csv", "expected numbers in the columns"),
        ("gone.csv", "found nothing"),
        ("folder", "expected files with rows .* found none in it"),
    ):
        done = run(place / "d", tmp_path / name)
        assert done.exit_code == 2
        assert re.search(words, done.stderr)


def test_the_benchmark_rehearses() -> None:
    module = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "monitoring.py"))
    module["CHANGES"].pop("1 % OOD")
    said = module["simulate"](2, 100, module["CHANGES"]["all OOD"], 300, module["alarms"])
    assert said["monitor"]["found"] == 2
    assert said["monitor"]["images until the alarm"]["median"] < 30


def test_evidently_tests_one_window_as_ours_do_and_says_nothing_of_all_of_them() -> None:
    """Its Kolmogorov-Smirnov test is scipy's, as ours is, at 5 % for each window: half of ten windows' streams ring."""
    pytest.importorskip("evidently.legacy.calculations.stattests.ks_stattest", reason="needs evidently")
    module = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "monitoring.py"))
    same = module["simulate"](20, 0, None, 2000, module["evidently_alarms"])["Kolmogorov-Smirnov windows"]
    assert same["false alarms"] >= 3
    assert module["simulate"](20, 0, None, 2000, module["alarms"])["windows"]["false alarms"] == 0
