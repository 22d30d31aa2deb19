"""Attractors across training and across training-set sizes: known dynamics, tiny runs, resumption, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from known import Known, patterns
from shorthand import raises
from tiny_digits import write_digits
from torch import Tensor

from traj_ood.analysis import Workspace, options_from
from traj_ood.analysis import training as training_file
from traj_ood.analysis.experiment import Sampled
from traj_ood.analysis.memory import MeasuredImages
from traj_ood.analysis.overfitting import Overfitting
from traj_ood.analysis.training import Training, separation_from_noise
from traj_ood.data import ArrayImages

TINY = ["epochs=2", "batch=8", "width=1", "starts=6", "test=10", "max_steps=4", "data=mnist", "bottleneck=3"]


def sampled(images: MeasuredImages) -> Sampled:
    """Images whose pixels are already known."""
    source = ArrayImages(tuple("abcdefgh"), (images.training[:, 0] * 255).byte().numpy())
    data = Sampled((1, 2, 2), source, tuple(images.starts.tolist()), source)
    vars(data)["pixels"] = images
    return data


def test_noise_and_training_images_that_share_their_attractors_are_told_apart_by_nothing() -> None:
    """All sign patterns attract: training images end at eight of them, noise at those and at their opposites."""
    images = MeasuredImages(patterns(), torch.arange(8), patterns())
    asked = Training(bottleneck=4, starts=8, max_steps=200, tol=1e-10)
    found = asked.measure(Known(), sampled(images)).notes
    assert (found["distinct_train"], found["distinct_test"]) == (8, 8)
    assert 1 < found["distinct_noise"] <= 8
    # Every pattern of noise has a cosine of 1 or, with the first sign turned, at least 0.5 with one of the eight.
    assert 0.7 < found["chamfer"] <= 1.0
    # Training images start on their attractors (score 0), noise does not: no noise below any threshold.
    assert (found["fpr95"], found["auroc"], found["fpr95_test"]) == (0.0, 1.0, 0.0)


def test_one_attractor_for_all_is_one_attractor() -> None:
    images = MeasuredImages(patterns(), torch.arange(8), patterns())
    black = Known(lambda z: torch.full_like(z, -1.0))
    found = Training(bottleneck=4, starts=8, max_steps=9).measure(black, sampled(images)).notes
    assert found["distinct_train"] == found["distinct_test"] == found["distinct_noise"] == 1
    assert found["chamfer"] == pytest.approx(1.0)


def test_scores_that_are_not_finite_have_no_metrics() -> None:
    good, bad = torch.zeros(3, dtype=torch.float64), torch.tensor([0.0, torch.nan])
    assert separation_from_noise({"train": good, "test": good, "noise": bad}) == {
        "fpr95": None,
        "auroc": None,
        "fpr95_test": None,
    }
    assert separation_from_noise({"train": good, "test": good, "noise": good + 1})["auroc"] == 1.0


def test_training_measures_every_epoch_and_resumes_between_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = options_from(Training, [*TINY, "images=24", "at=0,1"])
    work = Workspace(tmp_path / "units", data_root=write_digits(tmp_path / "digits"))
    calls: list[int] = []
    original = Training.measure

    def cut_off(self: Training, *args: object) -> object:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(training_file.Training, "measure", cut_off)
    with pytest.raises(KeyboardInterrupt):
        asked.run(work, tmp_path)
    finding = asked.run(work, tmp_path)
    assert len(calls) == 4
    rows = finding.figures["rows"]
    assert [row["epoch"] for row in rows] == [0, 1, 2]
    assert rows[0]["train_loss"] is None
    assert {"memorization", "rank90", "chamfer", "fpr95", "distinct_noise", "test_error"} <= set(rows[0])
    assert finding.sentence.startswith("From epoch 0 to 2 the memorisation coefficient goes from")
    assert (tmp_path / "training.png").is_file()
    assert "bottleneck: 3 here, 128 in the paper" in finding.differences


def test_overfitting_trains_each_size_for_as_many_steps(tmp_path: Path) -> None:
    asked = options_from(Overfitting, [*TINY, "sizes=2,20", "steps=5"])
    work = Workspace(tmp_path / "units", data_root=write_digits(tmp_path / "digits"))
    finding = asked.run(work, tmp_path)
    rows = finding.figures["rows"]
    assert [(row["size"], row["starts"]) for row in rows] == [(2, 2), (20, 6)]
    assert [row["epochs"] for row in rows] == [5, 3]  # one step an epoch, two steps an epoch
    assert rows[0]["reference"] < rows[1]["reference"]  # among fewer images the closest is farther away
    assert "From 2 to 20 training images" in finding.sentence
    assert (tmp_path / "overfitting.png").is_file()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Training(at=(-1, 9)), "training: at: expected ascending epochs from 0, got -1, 9"),
        (lambda: Training(at=(3, 1)), "training: at: expected ascending epochs"),
        (lambda: Training(images=-1), "training: images: expected 0 (all) or more, got -1"),
        (lambda: Overfitting(sizes=(1, 5)), "overfitting: sizes: expected ascending, at least 2, got 1, 5"),
        (lambda: Overfitting(steps=-1), "overfitting: steps: expected 0 (set by epochs) or more, got -1"),
    ],
)
def test_impossible_options_are_refused(make: object, text: str) -> None:
    with raises(text):
        make()  # type: ignore[operator]


def test_the_papers_settings() -> None:
    assert (Training.paper().data, Training.paper().epochs, Training.paper().bottleneck) == ("mnist", 500, 128)
    assert "steps: 1600 here, set by epochs in the paper" in Overfitting().differences()


def test_noise_is_drawn_once_for_all_epochs() -> None:
    images = MeasuredImages(patterns(), torch.arange(8), patterns())
    first: Tensor = Training(bottleneck=4, seed=3)._starts(Known(), sampled(images))["noise"]
    assert torch.equal(first, Training(bottleneck=4, seed=3)._starts(Known(), sampled(images))["noise"])
    assert not torch.equal(first, Training(bottleneck=4, seed=4)._starts(Known(), sampled(images))["noise"])
