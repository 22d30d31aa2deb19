"""The control on image files against a brute force, in a run's tables, and where it has no place among scorers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny
from click.testing import CliRunner
from PIL import Image

from traj_ood import Evaluator, RunConfig
from traj_ood.cli import main
from traj_ood.data import load_benchmark
from traj_ood.data.spectrum import image_statistics
from traj_ood.errors import TrajOODError
from traj_ood.evaluation.file_control import control_scores
from traj_ood.evaluation.leaderboard_text import Choice, render
from traj_ood.evaluation.metrics import compute_metrics
from traj_ood.evaluation.plots import leaders
from traj_ood.evaluation.results import CONTROL, Result
from traj_ood.evaluation.runs import Run
from traj_ood.report.tables import boards

LABELS = ["knn:k=2", "mahalanobis"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("control")
    tiny.write_benchmark(folder, train=30, test=12, ood=12)
    for path in (folder / "images" / "far").glob(
        "*.png"
    ):  # given away by their size and nothing else need be looked at
        image = Image.open(path)
        image.resize((24, 24), Image.Resampling.BILINEAR).save(path)
    return folder / "tiny.yaml"


@pytest.fixture(scope="module")
def run(place: Path) -> Run:
    benchmark = replace(load_benchmark(str(place)), control=True)
    config = RunConfig(scorers=tuple(LABELS), attractors=20, per_set=10, resamples=5)
    evaluator = Evaluator(tiny.conv(), benchmark, config, place.parent / "out", quiet=True, pictures=False)
    evaluator.run()
    assert evaluator.run().config["control"] is True, "a finished run is found again"
    return Run.load(evaluator.folder, Path())


def test_scores_are_mahalanobis_distances_of_the_statistics(place: Path, run: Run) -> None:
    assert run.scores is not None
    sample = load_benchmark(str(place)).subsample(train=20, per_set=10, seed=0)

    def statistics(name: str) -> dict[str, np.ndarray]:
        images = next(s.images for s in sample.splits() if s.name == name)
        return {image: image_statistics(images.load(i)) for i, image in enumerate(images.ids)}

    train = np.array(list(statistics("train").values()))
    inverse = np.linalg.inv(np.cov(train.T, bias=True) + 1e-6 * np.eye(4))
    for name, rows in run.scores.groupby("split"):
        own = statistics(str(name))
        offsets = np.array([own[image] for image in rows["id"]]) - train.mean(axis=0)
        expected = [float(np.sqrt(d @ inverse @ d)) for d in offsets]
        np.testing.assert_allclose(rows[CONTROL], expected, rtol=1e-6)
    shuffled = run.scores.sample(frac=1, random_state=0)
    np.testing.assert_allclose(control_scores(sample, shuffled), shuffled[CONTROL], rtol=1e-12)


def test_it_is_a_row_of_tables_and_leads_nothing(run: Run) -> None:
    assert run.scores is not None
    control = run.result.scorers[CONTROL]
    known = run.scores.loc[run.scores["role"] == "test", CONTROL]
    for name, score in control.sets.items():
        assert score.metrics == compute_metrics(known, run.scores.loc[run.scores["split"] == name, CONTROL])
        assert set(score.intervals)
    assert control.sets["bright"].metrics.auroc == 1.0, "the training images all have one size"
    text = render([run.result], choice=Choice(["far_auroc"]))
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {CONTROL} |") and line.count("|") == 6)
    assert "**" not in line
    assert CONTROL not in leaders(run.result)
    (board,) = boards([run])
    assert CONTROL in {row.label for row in board.rows}
    assert board.leader.label != CONTROL
    assert board.scorers == 2
    assert not board.conclusion.startswith(CONTROL)
    assert run.result.config["scorers"] == LABELS


def test_a_run_without_it_is_the_same_run(run: Run) -> None:
    other = {k: v for k, v in run.result.scorers.items() if k != CONTROL}
    config = {k: v for k, v in run.result.config.items() if k != "control"}
    without = replace(run.result, seed=1, scorers=other, config=config)
    text = render([run.result, without], choice=Choice(["far_auroc"]))
    assert "config.control" not in text


def test_the_option_and_the_key(place: Path, tmp_path: Path) -> None:
    model = tmp_path / "conv"
    tiny.conv().save_pretrained(model)
    words = ["bench", str(place), "--model", str(model), "--scorers", "knn:k=2", "--bootstrap", "0", "--no-plots", "-q"]
    words += ["--no-pictures", "--device", "cpu", "--on-duplicates", "warn"]
    labels = {}
    for option in ([], ["--control"], ["--no-control"]):
        done = CliRunner().invoke(main, [*words, *option, "--out", str(tmp_path / f"out{option}")])
        assert done.exit_code == 0, done.output
        (path,) = (tmp_path / f"out{option}").glob("*/result.json")
        labels[" ".join(option)] = set(Result.load(path).scorers)
    assert labels == {"": {"knn:k=2"}, "--control": {"knn:k=2", CONTROL}, "--no-control": {"knn:k=2"}}
    place.with_name("other.yaml").write_text(place.read_text() + "control: true\n")
    assert load_benchmark(str(place.with_name("other.yaml"))).control
    assert not load_benchmark(str(place)).control


def test_images_that_cannot_be_read(tmp_path: Path) -> None:
    sample = load_benchmark(str(tiny.write_benchmark(tmp_path, train=12)))
    (tmp_path / "images" / "train" / "003.png").write_bytes(b"nothing")
    test = sample.test.images.ids
    table = pd.DataFrame({"split": "test", "id": list(test)})
    with pytest.raises(TrajOODError, match=r"003\.png"):
        control_scores(sample, table)
    assert np.isfinite(control_scores(sample, table, on_error="skip")).all()
