"""One decision everywhere: Python, rows, the exported file; class-wise calibration; detectors of earlier versions."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from click.testing import CliRunner
from PIL import Image
from torch.utils.data import DistributedSampler
from torch.utils.data import sampler as samplers

from traj_ood import Decision, Detector, Normalised, Status
from traj_ood.cli import main
from traj_ood.data.batches import shuffles
from traj_ood.detector.conformal import Calibration
from traj_ood.errors import TrajOODError
from traj_ood.stream import Entry, score_rows

FEW = 1e-3  # calls of few images have fewer rows than a stream's, and this untrained network passes rounding on
OLD = Path(__file__).parent / "saved"


def fitted(scorer: str = "field", held: int = 40, **options: Any) -> Detector:
    model = tiny.conv()
    made = Detector.fit(model, Normalised(tiny.images(30, model.input_shape)), scorer)
    return made.calibrate(Normalised(tiny.images(held, model.input_shape, seed=9)), **options) if held else made


@pytest.fixture(scope="module")
def detector() -> Detector:
    return fitted()


# ---------------------------------------------------------------------- the same everywhere


@pytest.mark.slow
def test_python_rows_a_cluster_a_service_and_the_exported_file_say_the_same(detector: Detector, tmp_path: Path) -> None:
    for library in ("onnxscript", "onnxruntime"):
        pytest.importorskip(library, reason="needs traj_ood[export]")
    from traj_ood.export import export_detector, open_answers

    tiny.write_images(tmp_path / "photos", 12, seed=1)
    paths = sorted(map(str, (tmp_path / "photos").iterdir()))
    (tmp_path / "torn.png").write_bytes(Path(paths[0]).read_bytes()[:60])
    asked = [*paths[:4], str(tmp_path / "torn.png"), *paths[4:]]
    said = detector.decide(asked)
    assert {one.reason.split(":")[0] for one in said} == {"ok", "ood", "invalid"}
    assert "cannot be decoded" in said[4].reason

    (rows,) = score_rows(detector, [Entry(path) for path in asked])
    for one, row in zip(said, rows, strict=True):
        assert row.score == (one.score and pytest.approx(one.score, rel=FEW))
        assert (row.p_value, row.decision, row.steps, row.status) == (one.p_value, one.decision, one.steps, one.status)
        assert row.reason.split(":")[0] == one.reason.split(":")[0]
    detector.save(tmp_path / "d")
    written = CliRunner().invoke(main, ["score", str(tmp_path / "d"), *asked, "--format", "jsonl", "--device", "cpu"])
    assert written.exit_code == 3
    for one, line in zip(said, map(json.loads, written.stdout.splitlines()), strict=True):
        assert line["score"] == (one.score and pytest.approx(one.score, rel=FEW))
        assert (line["p_value"], line["decision"]) == (one.p_value, one.decision)
        assert line["reason"].split(":")[0] == one.reason.split(":")[0]

    assert_served_and_spread(tmp_path / "d", asked, said)
    export_detector(detector, tmp_path / "d.onnx", images=torch.rand(3, 1, 8, 8))
    answer, metadata = open_answers("onnx", tmp_path / "d.onnx")
    pixels = torch.stack([torch.tensor(np.asarray(Image.open(path)))[None] / 255 for path in paths])
    bad = torch.rand(2, 1, 8, 8)
    bad[0, 0, 3, 3], bad[1, 0, 0, 0] = torch.nan, 1.5
    got = answer(torch.cat([pixels, bad]))
    whole = [one for one in said if one.score is not None]
    assert got["scores"][:12].tolist() == pytest.approx([one.score for one in whole], rel=1e-4)
    assert got["p_values"][:12].tolist() == [one.p_value for one in whole]
    reasons = [metadata["decisions"][str(code)] for code in got["decisions"].tolist()]
    assert reasons == [*(one.reason for one in whole), "invalid", "invalid"]
    assert bool(got["scores"][12:].isnan().all())
    assert bool(got["p_values"][12:].isnan().all())


def assert_served_and_spread(folder: Path, asked: list[str], said: list[Decision]) -> None:
    """The service, where its libraries are installed, and what an actor of a cluster runs."""
    from traj_ood.distributed.rows import ScoreActor

    found = ScoreActor(str(folder), "cpu", 1)({"path": np.array(asked, dtype=object)})
    columns = {name: column.to_pylist() for name, column in found.items()}
    answers = [{name: column[k] for name, column in columns.items()} for k in range(len(asked))]
    check_answers(answers, said)
    for library in ("fastapi", "multipart", "httpx"):
        if importlib.util.find_spec(library) is None:
            return
    from starlette.testclient import TestClient

    from traj_ood.serve import create_app

    with TestClient(create_app(folder, device="cpu")) as client:
        files = [("images", (Path(path).name, Path(path).read_bytes())) for path in asked]
        check_answers(client.post("/v1/score", files=files).json()["decisions"], said)


def check_answers(answers: list[dict[str, Any]], said: list[Decision]) -> None:
    for answer, one in zip(answers, said, strict=True):
        assert answer["score"] == (one.score and pytest.approx(one.score, rel=FEW))
        for name in ("p_value", "decision", "steps", "status"):
            assert answer[name] == getattr(one, name)
        assert answer["reason"].partition(":")[0] == one.reason.partition(":")[0]


def test_what_a_file_says_of_its_outputs(detector: Detector) -> None:
    from traj_ood.export import describe

    module = detector.as_module()
    assert describe(detector, module)["outputs"] == ["scores", "p_values", "decisions"]
    assert describe(detector, module, "torch")["outputs"] == ["scores"]
    plain = fitted("first-residual", held=0)
    assert describe(plain, plain.as_module())["outputs"] == ["scores"]


def test_reasons_by_hand() -> None:
    assert Decision(1.0, 0.5, "id", 1, "ok").reason == "ok"
    assert Decision(1.0, 0.01, "ood", 1, "ok").reason == "ood"
    assert Decision(1.0, status="ok").reason == "uncalibrated"
    assert Decision(error="torn").reason == "invalid: torn"
    assert Decision(float("inf"), 0.01, "ood").as_dict()["score"] == "Infinity"


def test_one_bad_image_among_many_is_the_only_invalid_one(detector: Detector) -> None:
    images = tiny.images(300, (1, 8, 8), seed=2)
    images[217] = torch.nan
    said = detector.decide(Normalised(images))
    assert [i for i, one in enumerate(said) if one.reason.startswith("invalid")] == [217]
    rest = detector.judge(Normalised(torch.cat([images[:217], images[218:]])))
    scores = [one.score for one in said if one.score is not None]
    assert scores == pytest.approx(rest.scores.tolist(), rel=FEW)
    assert detector.decide([]) == []


def test_the_rows_of_a_column_are_decided_in_their_order(detector: Detector, tmp_path: Path) -> None:
    """A pandas column keeps the index that its rows had before they were sorted or sampled."""
    tiny.write_images(tmp_path, 9, seed=1)
    paths = sorted(map(str, tmp_path.iterdir()))
    Path(paths[4]).write_bytes(b"")
    column = pd.Series(paths, index=[3, 1, 8, 0, 2, 7, 5, 4, 6])
    assert detector.decide(column) == detector.decide(paths)


@pytest.mark.parametrize(
    ("scorer", "status"), [("field", {Status.OK}), ("trajectory:horizon=2", {Status.OK}), ("mahalanobis", None)]
)
def test_a_fixed_number_of_steps_is_ok(scorer: str, status: set[Status] | None) -> None:
    judged = fitted(scorer).judge(Normalised(tiny.images(5, (1, 8, 8))))
    assert (None if judged.status is None else set(map(Status, judged.status.tolist()))) == status
    assert {one.status for one in judged.each()} == {"ok"}


def test_a_path_that_is_read_until_it_settles_says_how_it_ended() -> None:
    judged = fitted("trajectory").judge(Normalised(tiny.images(5, (1, 8, 8))))
    assert {one.status for one in judged.each()} <= {"converged", "step_limit"}


# ---------------------------------------------------------------------- class by class


def brute_force(calibration: np.ndarray, classes: np.ndarray, score: float) -> float:
    """max_c (1 + #{i of class c: c_i >= s}) / (n_c + 1), counted one by one."""
    shares = []
    for c in set(classes.tolist()):
        own = [s for s, k in zip(calibration.tolist(), classes.tolist(), strict=True) if k == c]
        shares.append((1 + sum(s >= score for s in own)) / (len(own) + 1))
    return max(shares)


@pytest.mark.parametrize("tpr", [0.9, 0.95])
def test_class_wise_p_values_are_those_counted_one_by_one(tpr: float) -> None:
    draw = np.random.default_rng(0)
    classes = draw.permutation(np.repeat([0, 1, 2], [19, 40, 33]))
    values = (draw.normal(size=92) + classes).round(1)  # with ties
    known = Calibration.of_classes(torch.tensor(values), [f"class {c}" for c in classes], tpr)
    assert known.names == ("class 0", "class 1", "class 2")
    new = torch.cat([torch.tensor(draw.normal(size=200) * 2).round(decimals=1), torch.tensor([torch.inf]).double()])
    expected = [brute_force(values, classes, score) for score in new.tolist()]
    assert known.p_values(new).tolist() == pytest.approx(expected, rel=1e-12)
    assert known.decide(new).tolist() == (known.p_values(new) <= known.level).tolist()
    assert known.threshold == max(Calibration(torch.tensor(values[classes == c]), tpr).threshold for c in range(3))
    one = Calibration(torch.tensor(values[classes == 1]), tpr)
    labels = ["class 1"] * len(new)
    assert torch.equal(known.p_values(new, labels), one.p_values(new))
    assert torch.equal(known.decide(new, labels), one.decide(new))
    with pytest.raises(TrajOODError, match="expected 1 of the 3 classes that were calibrated, got 1, first unknown"):
        known.p_values(new[:1], ["class 7"])


def test_every_class_is_accepted_as_often_as_asked_for() -> None:
    """The guarantee, over 400 calibration sets: one class scores higher than the other and is still accepted."""
    draw, tpr, accepted = np.random.default_rng(1), 0.8, np.zeros(2)
    for _ in range(400):
        values, classes = draw.normal(size=40), np.arange(40) % 2
        known = Calibration.of_classes(torch.tensor(values + 2 * classes), classes.tolist(), tpr)
        new = torch.tensor(draw.normal(size=2) + np.array([0, 2]))
        accepted += (~known.decide(new)).numpy()
    assert (accepted / 400 >= tpr - 3 * np.sqrt(tpr * (1 - tpr) / 400)).all()


def test_a_class_of_too_few_images_is_named() -> None:
    with pytest.raises(
        TrajOODError, match=r"needs at least 19 ID images of class 'cat' that were not trained on, got 3"
    ):
        Calibration.of_classes(torch.zeros(30).double(), ["cat"] * 3 + ["dog"] * 27)


def test_classes_that_would_go_to_other_images_are_refused() -> None:
    made, pixels, labels = fitted(held=0), torch.rand(40, 1, 8, 8), torch.arange(40) % 2
    own, bare = torch.utils.data.TensorDataset(pixels, labels), torch.utils.data.TensorDataset(pixels)
    made.calibrate(own, 0.9, labels=labels)
    with pytest.raises(TrajOODError, match="labels: contradict those that the images bring"):
        made.calibrate(own, 0.9, labels=labels.cumsum(0) % 2)
    with pytest.raises(TrajOODError, match="got a DataLoader that shuffles"):
        made.calibrate(torch.utils.data.DataLoader(bare, shuffle=True), 0.9, labels=labels)
    batched = samplers.BatchSampler(samplers.RandomSampler(bare), 8, drop_last=False)
    loaders = [torch.utils.data.DataLoader(bare, batch_sampler=batched)]
    for mixed in (True, False):
        own_sampler = DistributedSampler(bare, 1, 0, shuffle=mixed)
        loaders.append(torch.utils.data.DataLoader(bare, sampler=own_sampler))
    assert [shuffles(loader) for loader in loaders] == [True, True, False]


@pytest.mark.parametrize("scorer", ["mahalanobis:classes=true", "trajectory"])
def test_another_default_device_changes_nothing(scorer: str) -> None:
    """``torch.set_default_device("cuda")``; here meta, which holds no values."""
    labels = ["a", "b"] * 30
    model, new = tiny.conv(), Normalised(tiny.images(20, (1, 8, 8), seed=4))
    train, held = (Normalised(tiny.images(60, (1, 8, 8), seed=seed)) for seed in (0, 9))
    said = []
    for device in (None, "meta"):
        torch.set_default_device(device)
        try:
            made = Detector.fit(model, train, scorer, labels=labels).calibrate(held, labels=labels)
            said.append(made.judge(new, labels=["b"] * 20).each())
        finally:
            torch.set_default_device(None)
    assert said[0] == said[1]


def test_class_wise_calibrations_are_saved_loaded_and_exported(tmp_path: Path) -> None:
    made = fitted(held=60, labels=["a", "b"] * 30)
    made.save(tmp_path / "d")
    loaded = Detector.load(tmp_path / "d", device="cpu")
    new = Normalised(tiny.images(20, (1, 8, 8), seed=4))
    assert loaded.judge(new).each() == made.judge(new).each()
    labelled = loaded.judge(new, labels=["b"] * 20)
    assert torch.equal(labelled.p_values, made.calibration.groups[1].p_values(labelled.scores))
    assert "of every class are accepted" in (tmp_path / "d" / "README.md").read_text()

    from traj_ood.export.decisions import DecisionModule

    module = DecisionModule(loaded.as_module(), loaded.calibration)
    pixels = torch.rand(20, 1, 8, 8)
    scores, p_values, decisions = module(pixels)
    assert torch.allclose(p_values, loaded.calibration.p_values(scores), rtol=1e-12)
    assert torch.equal(decisions == 1, loaded.calibration.decide(scores))


# ---------------------------------------------------------------------- calibrated again


@pytest.fixture
def place(tmp_path: Path) -> Path:
    fitted().save(tmp_path / "d")
    tiny.write_images(tmp_path / "new", 42, seed=7, high=200)
    lines = [f"{i:03d}.png {'cat' if i % 2 else 'dog'}\n" for i in range(42)]
    (tmp_path / "new.txt").write_text("".join(lines))
    return tmp_path


def calibrate(*arguments: object) -> Any:
    return CliRunner().invoke(main, ["calibrate", *map(str, arguments), "--device", "cpu"], prog_name="traj-ood")


def test_calibrate_changes_the_threshold_and_nothing_else(place: Path) -> None:
    before = Detector.load(place / "d", device="cpu")
    done = calibrate(place / "d", place / "new", "--tpr", "0.9", "--out", place / "d2")
    assert done.exit_code == 0, done.output
    assert done.stderr.endswith(f"Written to {place / 'd2'}\n")
    quiet = calibrate(place / "d", place / "new", "--tpr", "0.9", "--out", place / "d3", "-q")
    assert (quiet.stdout, quiet.stderr) == (done.stdout, "")
    after = Detector.load(place / "d2", device="cpu")
    photos = [place / "new" / f"{i:03d}.png" for i in range(42)]
    assert torch.equal(after.score(photos), before.score(photos))
    k = int(np.ceil(43 * 0.9))
    assert after.calibration.threshold == float(before.score(photos).sort().values[k - 1])
    assert (
        f"threshold {after.calibration.threshold:.6g} (before: {before.calibration.threshold:.6g} of 40" in done.stdout
    )
    assert [entry["images"] for entry in after.history] == [40, 42]
    card = (place / "d2" / "README.md").read_text()
    assert "All calibrations, of which the last is used" in card
    assert str(place / "new") in card

    again = calibrate(
        place / "d2", place / "new.txt", "--data-root", place / "new", "--by-class", "--out", place / "d2"
    )
    assert again.exit_code == 2
    assert "has a detector already" in again.stderr
    again = calibrate(
        *(place / "d2", place / "new.txt", "--data-root", place / "new", "--by-class", "--out", place / "d2"),
        "--overwrite",
    )
    assert again.exit_code == 0, again.output
    third = Detector.load(place / "d2", device="cpu")
    assert third.calibration.names == ("cat", "dog")
    assert [entry["classes"] for entry in third.history] == [None, None, 2]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["new", "--tpr", "0.99"], "needs at least 99 ID images that were not trained on, got 42"),
        (
            ["new.txt", "--data-root", "new", "--by-class", "--tpr", "0.96"],
            "needs at least 24 ID images of class 'cat'",
        ),
        (["new", "--by-class"], "--by-class: "),
        (["gone"], "no such folder or image list"),
    ],
)
def test_calibrate_refuses_by_name(place: Path, options: list[str], text: str) -> None:
    given = [str(place / o) if o.startswith(("new", "gone")) else o for o in options]
    done = calibrate(place / "d", *given, "--out", place / "d2")
    assert done.exit_code == 2
    assert text in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (place / "d2").exists()


# ---------------------------------------------------------------------- detectors of earlier versions


@pytest.mark.parametrize("record", sorted(OLD.glob("*/*.json")), ids=lambda p: f"{p.parent.name}-{p.stem}")
@pytest.mark.filterwarnings("ignore::UserWarning")  # versions of libraries, and attractors of an untrained network
def test_detectors_of_earlier_versions_load_with_equal_scores(record: Path, tmp_path: Path) -> None:
    known = json.loads(record.read_text())
    images = torch.tensor(known["images"]).reshape(-1, 1, 8, 8)
    loaded = Detector.load(record.with_suffix(""), device="cpu")
    loaded.save(tmp_path / "again")
    for one in (loaded, Detector.load(tmp_path / "again", device="cpu")):
        said = one.judge(Normalised(images))
        # Made on one processor, read on another.
        torch.testing.assert_close(said.scores, torch.tensor(known["scores"]).double(), rtol=1e-4, atol=0)
        assert said.p_values.tolist() == known["p_values"]
        assert said.decisions.tolist() == known["decisions"]
        assert [entry["images"] for entry in one.history] == [40]
