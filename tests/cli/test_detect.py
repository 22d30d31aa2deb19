"""``traj-ood fit`` and ``score``: from a folder of ID images to rows, through pipes and lists, and with bad input."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import tiny
import torch
from click.testing import CliRunner, Result
from torch import Tensor

from traj_ood.autoencoders import SurrogateAutoencoder, SurrogateNetwork
from traj_ood.backbones.timm_models import new_network, save_folder
from traj_ood.cli import main
from traj_ood.data import read_folder
from traj_ood.data.id_images import MAX_CALIBRATION, choose_id_images
from traj_ood.detector import Detector
from traj_ood.errors import TrajOODError
from traj_ood.stream import COLUMNS

FAST = ["--device", "cpu", "--quiet"]


def call(*arguments: object, stdin: bytes | None = None) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments], input=stdin, prog_name="traj-ood")


def assert_refused(result: Result, *texts: str) -> None:
    """Exit code 2, one line on stderr, nothing on stdout."""
    assert result.exit_code == 2, result.output + repr(result.exception)
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("traj-ood: error: ")
    assert result.stdout == ""
    for text in texts:
        assert text in lines[0]


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text, newline="")))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, 60 ID images and a detector made of them."""
    place = tmp_path_factory.mktemp("place")
    tiny.vit().save_pretrained(place / "mae")
    tiny.write_images(place / "id", 60, seed=0, high=90)
    result = call("fit", place / "id", "--model", place / "mae", "--out", place / "detector", *FAST)
    assert result.exit_code == 0, result.output
    (place / "fitted.txt").write_text(result.stdout)
    return place


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Eight images like ID ones and four brighter ones; number 3 is empty."""
    tiny.write_images(tmp_path / "photos", 12, seed=5)
    tiny.write_images(tmp_path / "photos", 8, seed=6, high=90)
    (tmp_path / "photos" / "003.png").write_bytes(b"")
    return tmp_path / "photos"


# ---------------------------------------------------------------------------------------------- fit


def test_fit_holds_images_out_and_says_what_was_measured(place: Path, tmp_path: Path) -> None:
    detector = Detector.load(place / "detector", device="cpu")
    assert detector.training["images"] == 41
    assert len(detector.calibration) == 19  # what 95 % needs: a fifth would be too few
    first, second = (place / "fitted.txt").read_text().splitlines()
    assert first == f"field on mae: fitted on 41 images of {place / 'id'}"
    assert second == (
        f"threshold {detector.calibration.threshold:.6g}: accepts 19 of 19 held-out images of {place / 'id'} (100.0%); "
        "requested: 0.95 of new ID images"
    )
    chosen = choose_id_images(str(place / "id"), least=19)
    assert len(chosen.fit) == 41
    assert set(chosen.fit.ids) | set(chosen.calibration.ids) == set(read_folder(place / "id").ids)
    again = Detector.fit(detector.autoencoder, chosen.fit).calibrate(chosen.calibration)
    torch.testing.assert_close(again.calibration.scores, detector.calibration.scores, rtol=1e-9, atol=0)

    options = ["--model", place / "mae", "--out", tmp_path / "d", "--seed", 1, "--images", 20, "--tpr", 0.9, *FAST]
    result = call("fit", place / "id", *options, "--scorer", "knn:k=3")
    assert result.exit_code == 0, result.output
    other = Detector.load(tmp_path / "d", device="cpu")
    assert (other.training["images"], len(other.calibration), other.scorer.label) == (20, 12, "knn:k=3")


def test_fit_on_a_benchmark_takes_its_val_split(place: Path, tmp_path: Path) -> None:
    yaml = tiny.write_benchmark(tmp_path, train=30, val=20)
    (tmp_path / "images" / "train" / "004.png").write_bytes(b"")
    options = ["--model", place / "mae", "--out", tmp_path / "d", "--device", "cpu"]
    assert_refused(call("fit", yaml, *options, "-q"), "1 of 30 files are absent or empty", "004.png")
    result = call("fit", yaml, *options, "--on-error", "skip")
    assert result.exit_code == 0, result.output
    assert f"fitted on 29 images of {yaml} (1 could not be read)" in result.stdout
    assert "of 20 images of the val split" in result.stdout
    assert "Calibrating on 20 images of the val split" in result.stderr
    assert result.stderr.strip().endswith(f"Written to {tmp_path / 'd'}")
    assert_refused(call("fit", yaml, *options), f"{tmp_path / 'd'}: has a detector already", "--overwrite")
    assert call("fit", yaml, *options, "--on-error", "skip", "--overwrite").exit_code == 0


def test_fit_on_lists_and_calibration_images_of_ones_own(place: Path, tmp_path: Path) -> None:
    names = [f"{i:03d}.png 0" for i in range(60)]
    (tmp_path / "fit.txt").write_text("\n".join(names[:30]))
    (tmp_path / "calibrate.txt").write_text("\n".join(names[30:]))
    options = ["--model", place / "mae", "--data-root", place / "id", *FAST]
    arguments = ["fit", tmp_path / "fit.txt", "--calibrate", tmp_path / "calibrate.txt", *options]
    result = call(*arguments, "--out", tmp_path / "d")
    assert result.exit_code == 0, result.output
    detector = Detector.load(tmp_path / "d", device="cpu")
    assert (detector.training["images"], len(detector.calibration)) == (30, 30)

    shared = call("fit", place / "id", "--calibrate", tmp_path / "calibrate.txt", *options, "--out", tmp_path / "e")
    assert_refused(shared, "30 of its images are also in", "calibrate on images that the detector is not fitted on")
    assert_refused(call(*arguments, "--out", tmp_path / "e", "--tpr", 0.99), "needs at least 99 ID images", "got 30")
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"source": "fashoin"}, ["fashoin: no such folder or image list; unknown benchmark", "did you mean 'fashion'"]),
        ({"--model": "fashion-mea"}, ["unknown model 'fashion-mea': did you mean 'fashion-mae'"]),
        ({"--scorer": "feild"}, ["unknown scorer 'feild': did you mean 'field'"]),
        ({"--images": "42"}, ["expected between 2 and 41 images to learn from", "got 42"]),
        ({"--tpr": "1"}, ["tpr: expected a share of ID images between 0 and 1, such as 0.95, got 1.0"]),
        ({"--calibrate": "/nowhere"}, ["image folder /nowhere: expected a folder of images, found nothing"]),
        ({"--seed": "-1"}, ["Invalid value for '--seed': -1 is not in the range 0<=x<=4294967295."]),
        ({"--seed": str(10**23)}, ["is not in the range 0<=x<=4294967295."]),
        ({"--scorer": "gmm:seed=-1"}, ["scorer gmm: expected a seed from 0 to 4294967295, got -1"]),
        ({"--scorer": f"trajectory:horizon={10**20}"}, ["scorer trajectory, option horizon: expected int"]),
        ({"--tol": "inf"}, ["tol"]),
        ({"--device": "meta"}, ["device 'meta' is not available here (it computes nothing)"]),
        ({"--model": ""}, ["Invalid value for '--model': expected a name, got an empty one"]),
        ({"--model": "m" * 300}, ["File name too long"]),
        ({"--out": ""}, ["Invalid value for '--out': expected a name, got an empty one"]),
        ({"source": ""}, ["Invalid value for 'IMAGES': expected a name, got an empty one"]),
        ({"source": "s" * 300}, ["error: File name too long: " + "s" * 80 + ": correct the name"]),
        ({"--device": "cuda:99"}, ["device 'cuda:99' is not available here"]),
        ({"--workers": "0"}, ["workers: expected at least 1, got 0"]),
        ({"--tpr": "0.99"}, ["expected at least 198 images, 99 of them to be held out for calibration, got 60"]),
        ({"--out": "/proc/nowhere/d"}, ["/proc/nowhere/d: expected a folder that can be written, got: "]),
    ],
)
def test_fit_refuses_bad_input_and_writes_nothing(
    place: Path, tmp_path: Path, changed: dict[str, str], words: list[str]
) -> None:
    options = {"--model": str(place / "mae"), "--out": str(tmp_path / "d"), "--device": "cpu", **changed}
    source = options.pop("source", str(place / "id"))
    assert_refused(call("fit", source, "-q", *[x for pair in options.items() for x in pair]), *words)
    assert list(tmp_path.iterdir()) == []


def test_fit_trains_a_backbones_surrogate_without_the_calibration_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRAJ_OOD_DATA", str(tmp_path / "cache"))
    torch.manual_seed(0)
    data = {"interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "squash", "input_size": [3, 32, 32]}
    data |= {"mean": [0.4] * 3, "std": [0.3] * 3}
    save_folder(new_network("test_resnet", num_classes=5), tmp_path / "net", "test_resnet", {"num_classes": 5}, data)
    tiny.write_images(tmp_path / "id", 60, seed=0, size=32)
    seen: list[Tensor] = []

    def untrained(backbone: Any, features: Tensor, *_: Any, **__: Any) -> SurrogateAutoencoder:
        seen.append(features)
        network = SurrogateNetwork(backbone.feature_dim, hidden=(8,), bottleneck=4)
        network.set_statistics(features)
        return SurrogateAutoencoder(backbone, network, name="untrained")

    monkeypatch.setattr("traj_ood.training.surrogate_cache.fit_surrogate", untrained)
    result = call("fit", tmp_path / "id", "--model", f"timm:{tmp_path / 'net'}", "--out", tmp_path / "d", *FAST)
    assert result.exit_code == 0, result.output
    assert [len(features) for features in seen] == [41]
    assert f"fitted on 41 images of {tmp_path / 'id'}" in result.stdout


def test_what_is_held_out_is_capped_drawn_by_the_seed_and_never_more_than_half(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("\n".join(f"{i}.png" for i in range(20_000)))
    one, two, other = (choose_id_images(str(tmp_path / "list.txt"), count=50, seed=s) for s in (0, 0, 1))
    assert (len(one.train), len(one.fit), len(one.calibration)) == (20_000 - MAX_CALIBRATION, 50, MAX_CALIBRATION)
    assert set(one.fit.ids) <= set(one.train.ids)
    assert not set(one.train.ids) & set(one.calibration.ids)
    assert (one.fit.ids, one.calibration.ids) == (two.fit.ids, two.calibration.ids)
    assert one.calibration.ids != other.calibration.ids
    (tmp_path / "short.txt").write_text("\n".join(f"{i}.png" for i in range(38)))
    assert len(choose_id_images(str(tmp_path / "short.txt"), least=19).calibration) == 19
    with pytest.raises(TrajOODError, match=r"short\.txt: expected at least 40 images, 20 of them to be held out for"):
        choose_id_images(str(tmp_path / "short.txt"), least=20)
    (tmp_path / "one.txt").write_text("1.png")
    with pytest.raises(TrajOODError, match=r"one\.txt: expected at least 2 images, 1 of them to be held out"):
        choose_id_images(str(tmp_path / "one.txt"))


def test_fit_on_images_that_are_there_twice_leaves_them_out_of_the_calibration(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "id", tmp_path / "id" / "a")
    shutil.copytree(place / "id", tmp_path / "id" / "b")
    options = ["--model", place / "mae", "--out", tmp_path / "d", *FAST]
    result = call("fit", tmp_path / "id", *options, "--tpr", 0.5)
    assert result.exit_code == 0, result.output
    detector = Detector.load(tmp_path / "d", device="cpu")
    assert f"{24 - len(detector.calibration)} of 24 images are pixel by pixel training images" in result.stderr
    assert "and are left out" in result.stderr
    refused = call("fit", tmp_path / "id", *options, "--overwrite")
    assert_refused(refused, "remove duplicate images, or give separate calibration images")


def test_lists_may_not_reach_out_of_their_root_by_links_unless_allowed(place: Path, tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "there").symlink_to(place / "id")
    (tmp_path / "list.txt").write_text("".join(f"there/{i:03d}.png\n" for i in range(60)))
    options = ["--model", place / "mae", "--data-root", tmp_path / "root", *FAST]
    words = "there/000.png: a link on the way leads out of"
    assert_refused(call("fit", tmp_path / "list.txt", *options, "--out", tmp_path / "d"), words, "--follow-links")
    assert not (tmp_path / "d").exists()
    result = call("fit", tmp_path / "list.txt", *options, "--out", tmp_path / "d", "--follow-links")
    assert result.exit_code == 0, result.output

    tiny.write_images(tmp_path / "root" / "far", 12, seed=3)
    lists = {"train": range(30), "test": range(30, 42)}
    for name, rows_ in lists.items():
        (tmp_path / f"{name}.txt").write_text("".join(f"there/{i:03d}.png\n" for i in rows_))
    (tmp_path / "linked.yaml").write_text("train: {list: train.txt}\ntest: {list: test.txt}\nfar: {far: far}\n")
    bench = ["bench", tmp_path / "linked.yaml", *options, "--out", tmp_path / "runs", "--scorers", "knn:k=3"]
    assert_refused(call(*bench, "--no-plots"), words)
    result = call(*bench, "--no-plots", "--follow-links", "--bootstrap", 0)
    assert result.exit_code == 0, result.output


def test_a_detector_that_came_between_is_not_replaced_unless_that_is_asked_for(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibrate = Detector.calibrate

    def slowly(self: Detector, *arguments: Any, **options: Any) -> Detector:
        if not (tmp_path / "d").exists():
            shutil.copytree(place / "detector", tmp_path / "d")  # what another process did meanwhile
        return calibrate(self, *arguments, **options)

    monkeypatch.setattr(Detector, "calibrate", slowly)
    arguments = ["fit", place / "id", "--model", place / "mae", "--out", tmp_path / "d", "--seed", 3, *FAST]
    before = (place / "detector" / "detector.json").read_bytes()
    assert_refused(call(*arguments), f"{tmp_path / 'd'}: was made by another process meanwhile")
    assert (tmp_path / "d" / "detector.json").read_bytes() == before
    assert call(*arguments, "--overwrite").exit_code == 0
    assert (tmp_path / "d" / "detector.json").read_bytes() != before
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_the_home_folder_and_the_working_directory_are_places_like_others(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("work", "empty"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    fit = ["fit", place / "id", "--model", place / "mae", *FAST]
    for out in (".", "~/d"):
        assert call(*fit, "--out", out).exit_code == 0
    monkeypatch.chdir(tmp_path / "work")
    assert_refused(call(*fit, "--out", "~/d"), f"{tmp_path / 'd'}: has a detector already")
    assert_refused(call(*fit, "--out", "~no-such-user/d"), "'~no-such-user/d' and no such home folder")
    assert call("score", "~/empty", place / "id" / "000.png", "--out=~/rows.csv", *FAST).exit_code == 0
    assert {path.name for path in tmp_path.iterdir()} - {".cache"} == {"d", "empty", "rows.csv", "work"}
    assert list((tmp_path / "work").iterdir()) == []


def test_no_command_writes_into_a_detector(place: Path, tmp_path: Path) -> None:
    inside, model = place / "detector" / "sub", place / "mae"
    yaml = tiny.write_benchmark(tmp_path)
    for arguments in (
        ["bench", yaml, "--model", model, "--out", inside],
        ["diagnose", model, "--benchmark", yaml, "--out", place / "detector"],
        ["fit", place / "id", "--model", model, "--out", inside],
        ["leaderboard", tmp_path, "--csv", inside],
        ["report", tmp_path, "--out", inside],
        ["train", "fashion-mae", "--out", inside],
    ):
        assert_refused(call(*arguments), f"expected a place outside of any detector, but {place / 'detector'} is one")
    assert not inside.exists()
    assert Detector.load(place / "detector", device="cpu")
    (tmp_path / "detector.json").write_text("{}")  # any file may be called so
    assert call("fit", place / "id", "--model", model, "--out", tmp_path / "d", *FAST).exit_code == 0


@pytest.mark.parametrize("command", ["bench", "diagnose", "export", "fit", "score", "train"])
def test_numbers_of_threads_that_are_none_are_refused(command: str) -> None:
    for number in (-1, 0, 3_000_000_000):
        assert_refused(
            call(command, "x", "--threads", number),
            f"Invalid value for '--threads': {number} is not in the range 1<=x<=1024. See traj-ood {command} --help.",
        )


def test_what_nobody_foresaw_is_one_line_unless_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("several\nlines")

    monkeypatch.setattr("traj_ood.cli.detect.check_sources", fail)
    result = call("score", "x", "y")
    assert result.exit_code == 70
    assert result.stderr == (
        "traj-ood: error: internal error: RuntimeError: several lines; TRAJ_OOD_TRACEBACK=1 shows the traceback; "
        "please report it\n"
    )
    monkeypatch.setenv("TRAJ_OOD_TRACEBACK", "1")
    assert isinstance(call("score", "x", "y").exception, RuntimeError)


def test_commands_without_a_name_say_what_there_is() -> None:
    assert_refused(call("scoer"), "No such command 'scoer'.", "See traj-ood --help.")
    assert "Commands:" in call().output
    assert call("--help").exit_code == call("fit", "--help").exit_code == 0


# ---------------------------------------------------------------------------------------------- score


def test_score_writes_what_the_detector_says(place: Path, photos: Path) -> None:
    result = call("score", place / "detector", photos, *FAST)
    assert result.exit_code == 3, result.output
    assert result.stderr == ""
    table = rows(result.stdout)
    assert tuple(table[0]) == COLUMNS
    assert [row["path"] for row in table] == [str(photos / f"{i:03d}.png") for i in range(12)]
    assert table[3]["error"] == "expected an image, found an empty file (0 bytes); restore it or remove it"
    good = [row for row in table if row["status"] != "error"]
    judged = Detector.load(place / "detector", device="cpu").judge([row["path"] for row in good])
    assert [float(row["score"]) for row in good] == judged.scores.tolist()
    assert [float(row["p_value"]) for row in good] == judged.p_values.tolist()
    assert [row["decision"] == "ood" for row in good] == judged.decisions.tolist()
    assert {row["decision"] for row in good} == {"id", "ood"}
    assert [int(row["steps"]) for row in good] == judged.steps.tolist()

    loud = call("score", place / "detector", photos / "000.png", photos / "001.png", "--device", "cpu")
    assert loud.exit_code == 0
    assert_same_rows(rows(loud.stdout), table[:2])
    assert "2 images in " in loud.stderr
    assert " images/s)" in loud.stderr
    failing = call("score", place / "detector", photos / "003.png", photos / "gone.png", "--device", "cpu")
    assert failing.exit_code == 3
    assert "traj-ood: warning: 2 image(s) failed, see the column error" in failing.stderr
    assert "expected an image file, found nothing" in rows(failing.stdout)[1]["error"]


def assert_same_rows(found: list[dict[str, str]], expected: list[dict[str, str]]) -> None:
    """Scores to 1e-9, all else to the letter."""
    assert [row["score"] == "" for row in found] == [row["score"] == "" for row in expected]
    scores = [[float(row["score"]) for row in table if row["score"]] for table in (found, expected)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-9)
    rest = [[{k: v for k, v in row.items() if k != "score"} for row in table] for table in (found, expected)]
    assert rest[0] == rest[1]


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_score_does_not_depend_on_the_batch_size(place: Path, photos: Path, batch: int) -> None:
    plain = call("score", place / "detector", photos, *FAST)
    other = call("score", place / "detector", photos, *FAST, "--batch-size", batch, "--workers", 3)
    assert_same_rows(rows(other.stdout), rows(plain.stdout))


def test_sources_are_read_in_the_order_given(place: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("004.png 7\n../secret.png 0\n")
    shutil.copy(photos / "000.png", tmp_path / "secret.png")
    arguments = [
        "score",
        place / "detector",
        photos / "002.png",
        "-",
        photos / "001.png",
        "--list",
        tmp_path / "list.txt",
    ]
    arguments += ["--root", photos, *FAST]
    piped = f"{photos}/005.png\n\n{photos}/000.png".encode()
    result = call(*arguments, stdin=piped)
    assert result.exit_code == 3
    assert [Path(row["path"]).name for row in rows(result.stdout)] == [
        *("002.png", "005.png", "000.png", "001.png", "004.png", "secret.png")
    ]
    assert "leaves the image root" in rows(result.stdout)[-1]["error"]
    null = call(*arguments, "--null", stdin=piped.replace(b"\n\n", b"\0"))
    assert null.stdout == result.stdout


def test_every_format_and_resuming(place: Path, photos: Path, tmp_path: Path) -> None:
    plain = call("score", place / "detector", photos, *FAST)
    for name in ("a.csv", "a.jsonl", "a.parquet"):
        result = call("score", place / "detector", photos, *FAST, "--out", tmp_path / name)
        assert (result.exit_code, result.stdout) == (3, "")
        again = call("score", place / "detector", photos, *FAST, "--out", tmp_path / name)
        assert_refused(again, f"{name}: exists already", "--overwrite")
    whole = (tmp_path / "a.csv").read_bytes()
    assert whole == plain.stdout_bytes
    comma = pd.read_csv(tmp_path / "a.csv", float_precision="round_trip")
    parquet = pd.read_parquet(tmp_path / "a.parquet").drop(columns="path_bytes")
    pd.testing.assert_frame_equal(parquet, comma, check_dtype=False, check_exact=True)
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [line["score"] for line in lines] == [None if pd.isna(s) else s for s in comma["score"]]

    (tmp_path / "b.csv.part").write_bytes(whole[: len(whole) // 2])
    assert_refused(call("score", place / "detector", photos, *FAST, "--out", tmp_path / "b.csv"), "--resume")
    for _ in range(2):  # the second time, nothing is left to do
        result = call("score", place / "detector", photos, "--device", "cpu", "--out", tmp_path / "b.csv", "--resume")
        assert result.exit_code == 3
        resumed = pd.read_csv(tmp_path / "b.csv", float_precision="round_trip")
        pd.testing.assert_frame_equal(resumed, comma, rtol=1e-9, atol=0)  # it is split into other batches
        assert " of an earlier run; written to " in result.stderr
    assert "0 images in " in result.stderr
    as_told = call(
        "score", place / "detector", photos, *FAST, "--out", tmp_path / "c", "--format", "csv", "--overwrite"
    )
    assert as_told.exit_code == 3
    assert (tmp_path / "c").read_bytes() == whole


def test_a_detector_without_calibration_says_so_once(place: Path, photos: Path, tmp_path: Path) -> None:
    detector = Detector.load(place / "detector", device="cpu")
    detector.calibration = None
    detector.save(tmp_path / "plain")
    result = call("score", tmp_path / "plain", photos / "000.png", *FAST)
    assert result.exit_code == 0
    warning = f"traj-ood: warning: {tmp_path / 'plain'} is not calibrated: p_value and decision stay empty\n"
    assert result.stderr == warning
    (row,) = rows(result.stdout)
    assert (row["p_value"], row["decision"]) == ("", "")
    assert float(row["score"]) == detector.score([photos / "000.png"]).item()


def test_score_refuses_bad_usage_and_leaves_nothing(place: Path, photos: Path, tmp_path: Path) -> None:
    detector = place / "detector"
    for arguments, words in (
        ([detector], "nothing to score: expected files, folders, - for paths on standard input, or --list"),
        ([detector, "-", "-"], "standard input (-) can be read only once"),
        ([detector, photos, "--root", photos], "--root applies to --list"),
        ([detector, photos, "--null"], "--null applies to paths on standard input"),
        ([detector, photos, "--resume"], "--resume: expected a file to write, got standard output"),
        ([detector, photos, "--format", "parquet"], "Parquet: expected a file to write, got standard output"),
        ([detector, photos, "--out", tmp_path / "x.txt"], "x.txt: expected a name that ends in one of .csv"),
        ([detector, photos, "--batch-size", "0"], "batch size: expected at least 1, got 0"),
        ([detector, photos, "--workers", "0", "--out", tmp_path / "x.csv"], "workers: expected at least 1, got 0"),
        ([tmp_path / "gone", photos, "--out", tmp_path / "x.csv"], "gone: expected a folder with detector.json"),
        ([detector, "--list", tmp_path / "gone.txt", "--out", tmp_path / "x.csv"], "gone.txt: cannot be read"),
        (
            [detector, photos, "--out", detector / "x.csv"],
            f"expected a place outside of any detector, but {detector} is one",
        ),
        ([detector, photos, "--out", detector / "model" / "x.csv"], f"outside of any detector, but {detector} is one"),
    ):
        assert_refused(call("score", *arguments, *FAST), words)
    (row,) = rows(call("score", detector, f"{tmp_path}/nowhere/", *FAST).stdout)
    assert row["error"] == "expected an image file, found nothing; restore it or take it out of the set"
    assert [p.name for p in tmp_path.iterdir()] == ["photos"]


def test_an_interruption_says_how_to_go_on(
    place: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = Detector.judge
    calls = []

    def interrupted(self: Detector, images: Any, **options: Any) -> Any:
        calls.append(len(images))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return judge(self, images, **options)

    monkeypatch.setattr(Detector, "judge", interrupted)
    options = ["--out", tmp_path / "a.csv", "--batch-size", 3, *FAST]
    result = call("score", place / "detector", photos, *options)
    assert result.exit_code == 130
    kept = f"rows so far are in {tmp_path / 'a.csv'}.part: continue with --resume"
    assert result.stderr == f"traj-ood: interrupted; {kept}\n"
    assert len((tmp_path / "a.csv.part").read_text().splitlines()) == 4
    assert call("score", place / "detector", photos, *options, "--resume").exit_code == 3
    whole = call("score", place / "detector", photos, "--batch-size", 3, *FAST)
    assert (tmp_path / "a.csv").read_bytes() == whole.stdout_bytes


def test_rows_that_were_read_otherwise_are_not_resumed(
    place: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge, calls = Detector.judge, []

    def interrupted(self: Detector, images: Any, **options: Any) -> Any:
        calls.append(len(images))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return judge(self, images, **options)

    run = ["score", place / "detector", photos, "--out", tmp_path / "a.csv", "--batch-size", 3, *FAST]
    with monkeypatch.context() as patch:
        patch.setattr(Detector, "judge", interrupted)
        assert call(*run).exit_code == 130
    refused = call(*run, "--exif", "--resume")
    assert refused.exit_code == 2
    assert "has changed since it was judged, or was read with other --exif or --bit-depth" in refused.stderr
    assert call(*run, "--resume").exit_code == 3


def test_parquet_that_was_interrupted_is_resumed(
    place: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged = Detector.judge

    def interrupted(self: Detector, images: Any, **options: Any) -> Any:
        if (tmp_path / "a.parquet.part").stat().st_size:
            raise KeyboardInterrupt
        return judged(self, images, **options)

    run = ["score", place / "detector", photos, "--batch-size", 3, *FAST]
    out = ["--out", tmp_path / "a.parquet"]
    with monkeypatch.context() as patch:
        patch.setattr(Detector, "judge", interrupted)
        stopped = call(*run, *out)
    part = tmp_path / "a.parquet.part"
    assert stopped.exit_code == 130
    assert stopped.stderr == f"traj-ood: interrupted; rows so far are in {part}: continue with --resume\n"
    assert call(*run, *out, "--resume").exit_code == 3
    whole = call(*run, "--out", tmp_path / "b.parquet")
    assert whole.exit_code == 3
    expected = pd.read_parquet(tmp_path / "b.parquet")
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "a.parquet"), expected, rtol=1e-9, atol=0)
    assert not part.exists()


def test_sources_that_are_given_twice_are_named(place: Path, photos: Path, tmp_path: Path) -> None:
    image = next(iter(sorted(photos.glob("*.png"))))
    once = call("score", place / "detector", photos, *FAST)
    assert "given twice" not in once.stderr
    (tmp_path / "link").symlink_to(photos)
    for other in (photos, f"{photos}/", tmp_path / "link", image):
        twice = call("score", place / "detector", photos, other, "--device", "cpu")
        assert f"{other}: given twice, or within another source: such images have several rows" in twice.stderr
        assert len(rows(twice.stdout)) == len(rows(once.stdout)) * 2 - (other == image) * (len(rows(once.stdout)) - 1)


# ---------------------------------------------------------------------------------------------- real processes


def start(*arguments: object, **options: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "traj_ood", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stderr=subprocess.PIPE, env=environment, **options)


def test_rows_come_while_the_input_is_open_and_a_closed_pipe_ends_quietly(place: Path, photos: Path) -> None:
    pipe = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with start("score", place / "detector", "-", "--device", "cpu", **pipe) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.write(f"{photos}/000.png\n".encode())
        process.stdin.flush()
        assert process.stdout.readline().decode().strip() == ",".join(COLUMNS)
        assert process.stdout.readline().decode().startswith(f"{photos}/000.png,")
        process.stdout.close()  # as head does
        process.stdin.write(f"{photos}/001.png\n".encode())
        process.stdin.flush()  # and stays open: nothing may wait for its end
        assert process.wait(tiny.PATIENCE) == 141
        noise = [line for line in process.stderr.read().split(b"\r") if line.strip() and b"img" not in line]
        assert noise == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a device that is always full")
def test_a_full_disk_behind_standard_output_is_one_line(place: Path, photos: Path) -> None:
    with open("/dev/full", "wb") as full, start("score", place / "detector", photos, *FAST, stdout=full) as process:
        assert process.wait(tiny.PATIENCE) == 2
        assert process.stderr is not None
        assert process.stderr.read().decode() == (
            "traj-ood: error: standard output cannot be written (No space left on device); it is complete up "
            "to the last line end\n"
        )


@pytest.mark.slow  # the quick one is in test_reliability.py, in copies of the process that runs the tests
def test_a_killed_run_is_resumed_to_the_same_scores(place: Path, photos: Path, tmp_path: Path) -> None:
    out, part = tmp_path / "a.csv", tmp_path / "a.csv.part"
    many = [photos / f"{i % 12:03d}.png" for i in range(600)]
    arguments = ["score", place / "detector", *many, "--out", out, "--batch-size", 8, *FAST]
    with start(*arguments) as process:
        while process.poll() is None and not (part.exists() and part.stat().st_size > 3000):
            time.sleep(0.005)
        process.kill()
        assert process.wait(tiny.PATIENCE) == -9
    assert not out.exists()
    left = part.read_bytes()
    assert len(left) > 3000
    assert call(*arguments, "--resume").exit_code == 3
    whole = out.read_bytes()
    assert whole.startswith(left[: left.rindex(b"\n") + 1])
    assert call(*arguments, "--overwrite").exit_code == 3
    resumed, again = rows(whole.decode()), rows(out.read_text())
    assert [row.pop("path") for row in resumed] == [row.pop("path") for row in again] == [str(path) for path in many]
    scores = [[float(row.pop("score") or "nan") for row in table] for table in (resumed, again)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-9, nan_ok=True)
    assert resumed == again
