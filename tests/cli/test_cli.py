"""The command line: a whole run, help with examples, and one line with exit code 2 for every bad input."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import tiny
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from traj_ood.autoencoders import load_autoencoder
from traj_ood.backbones.timm_models import new_network, save_folder
from traj_ood.cli import main
from traj_ood.evaluation.results import Result as RunResult
from traj_ood.io.parts import PartStore
from traj_ood.scorers import default_suite

FAST = ["--max-steps", "6", "--bootstrap", "10", "--no-plots", "--quiet", "--device", "cpu", "--batch-size", "5"]


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """``tiny.yaml`` with its images, ``mae`` and ``conv`` models."""
    tiny.write_benchmark(tmp_path)
    tiny.vit().save_pretrained(tmp_path / "mae")
    tiny.conv().save_pretrained(tmp_path / "conv")
    return tmp_path


def bench(place: Path, *options: object, yaml: str = "tiny.yaml", model: str = "mae", out: str = "out") -> Result:
    """A small run, by default of two scorers."""
    options = options if "--scorers" in options else ("--scorers", "trajectory,knn:k=2", *options)
    return call("bench", place / yaml, "--model", place / model, "--out", place / out, *FAST, *options)


def assert_refused(result: Result, *texts: str) -> None:
    """Exit code 2, one line on stderr that names the file or option, nothing on stdout."""
    assert result.exit_code == 2, result.output + repr(result.exception)
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("traj-ood: error: ")
    assert "Traceback" not in result.output
    assert result.stdout == ""
    for text in texts:
        assert text in lines[0]


def files_below(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


# ---------------------------------------------------------------------------------------------- runs that work


def test_bench_ends_with_a_leaderboard(tmp_path: Path) -> None:
    tiny.write_benchmark(tmp_path)
    tiny.vit().save_pretrained(tmp_path / "mae")
    options = [o for o in FAST if o != "--no-plots"]
    arguments = ["bench", tmp_path / "tiny.yaml", "--model", tmp_path / "mae", "--out", tmp_path / "out", *options]
    result = call(*arguments, "--scorers", "trajectory,knn:k=3,steps")
    assert result.exit_code == 0, result.output
    assert "| trajectory" in result.stdout
    assert "knn:k=3" in result.stdout
    assert "AUROC" in result.stdout
    assert "traj-ood: warning: unhealthy attractors: " in result.stderr
    assert "⚠" in result.stdout or "nhealthy" in result.stdout
    folder = tmp_path / "out" / "tiny--mae--seed0"
    assert f"Written to {folder}" in result.stderr
    names = {p.name for p in folder.iterdir()}
    assert {"result.json", "scores.parquet", "curves.parquet"} <= names
    assert "parts" not in names
    assert len(list(folder.rglob("*.png"))) >= 3
    stored = RunResult.load(folder / "result.json")
    assert set(stored.scorers) == {"trajectory", "knn:k=3", "steps"}
    assert stored.command.startswith("traj-ood ")
    assert not [n for n in files_below(tmp_path / "out") if n.endswith(".tmp")]

    board = call("leaderboard", tmp_path / "out", "--csv", tmp_path / "board.csv")
    assert board.exit_code == 0, board.output
    assert "knn:k=3" in board.stdout
    assert set(pd.read_csv(tmp_path / "board.csv")["scorer"]) == {"trajectory", "knn:k=3", "steps"}
    readme = tmp_path / "README.md"
    readme.write_text("# x\n<!-- leaderboard:start -->\n<!-- leaderboard:end -->\n")
    assert call("leaderboard", tmp_path / "out", "--readme", readme).exit_code == 0
    assert "knn:k=3" in readme.read_text()


@pytest.mark.parametrize("model", [pytest.param("mae", marks=pytest.mark.slow), "conv"])
def test_all_scorers(place: Path, model: str) -> None:
    result = call("bench", place / "tiny.yaml", "--model", place / model, "--out", place / "out", *FAST)
    assert result.exit_code == 0, result.output
    stored = RunResult.load(place / "out" / f"tiny--{model}--seed0" / "result.json")
    assert sorted(stored.scorers) == sorted(default_suite(load_autoencoder(place / model)))


def test_second_call_and_fresh(place: Path) -> None:
    assert bench(place, "--scorers", "steps").exit_code == 0
    path = place / "out" / "tiny--mae--seed0" / "result.json"
    created = path.stat().st_mtime_ns
    again = bench(place, "--scorers", "steps")
    assert again.exit_code == 0
    assert "| steps" in again.stdout
    assert path.stat().st_mtime_ns == created
    assert_refused(bench(place, "--scorers", "knn:k=1"), "another config", "--fresh")
    assert path.stat().st_mtime_ns == created
    assert bench(place, "--scorers", "knn:k=1", "--fresh").exit_code == 0
    assert list(RunResult.load(path).scorers) == ["knn:k=1"]


def test_an_interrupted_command_that_starts_over_promises_nothing_else(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("traj_ood.evaluation.diagnose.diagnose", interrupted)
    arguments = ("--benchmark", place / "tiny.yaml", "--device", "cpu", "--out", place / "d", "-q")
    stopped = call("diagnose", "fashion-mae", *arguments)
    assert (stopped.exit_code, stopped.stderr) == (130, "traj-ood: interrupted\n")


def test_interrupted_command_continues(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = PartStore.save, []

    def interrupted(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(PartStore, "save", interrupted)
        stopped = bench(place, "--scorers", "trajectory,knn:k=2")
    assert stopped.exit_code == 130
    assert stopped.stderr.strip() == "traj-ood: interrupted; the same command continues where this one stopped"
    folder = place / "out" / "tiny--mae--seed0"
    assert not (folder / "result.json").exists()
    assert bench(place, "--scorers", "trajectory,knn:k=2").exit_code == 0
    assert bench(place, "--scorers", "trajectory,knn:k=2", out="whole").exit_code == 0
    whole = place / "whole" / "tiny--mae--seed0" / "scores.parquet"
    assert (folder / "scores.parquet").read_bytes() == whole.read_bytes()


def test_mask_ratio_seed_and_samples(place: Path) -> None:
    options = ["--mask-ratio", 0.5, "--seed", 3, "--attractors", 6, "--per-set", 4, "--scorers", "trajectory"]
    result = bench(place, *options)
    assert result.exit_code == 0, result.output
    stored = RunResult.load(place / "out" / "tiny--mae--seed3" / "result.json")
    assert stored.config["model_options"]["mask_ratio"] == 0.5
    assert {k: v["count"] for k, v in stored.data.items()} == {"train": 6, "val": 4, "test": 4, "dim": 4, "bright": 4}


def test_a_name_that_is_not_utf8_is_refused_before_anything_is_written(place: Path) -> None:
    odd = os.fsencode(place / "images" / "far") + b"/b\xff.png"
    try:
        shutil.copy(place / "images" / "far" / "000.png", odd)
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    words = r"split 'bright': expected file names in UTF-8, got 'bright/b\udcff.png': rename the file, or leave it out"
    assert_refused(bench(place, "--scorers", "steps"), words)
    assert not (place / "out").exists()
    os.remove(odd)
    assert bench(place, "--scorers", "steps").exit_code == 0


def test_a_broken_image_names_the_option_that_skips_it(place: Path) -> None:
    for name in ("000", "004"):  # the first image of a split is read before the run
        broken = place / "images" / "train" / f"{name}.png"
        whole = broken.read_bytes()
        broken.write_bytes(whole[:60])
        refused = bench(place, "--scorers", "steps", "--fresh")
        assert_refused(refused, f"train/{name}.png: ", "; or leave such images out with --on-error skip")
        assert bench(place, "--scorers", "steps", "--on-error", "skip").exit_code == 0
        broken.write_bytes(whole)


def test_skip_counts_failures(place: Path) -> None:
    (place / "images" / "far" / "003.png").write_bytes(b"")
    result = bench(place, "--scorers", "steps", "--on-error", "skip")
    assert result.exit_code == 0, result.output
    assert "traj-ood: warning: 1 image(s) skipped" in result.stderr
    assert "warning: few images (bright 9, dim 9, test 10): FPR95 is read at 5 % of a set, less than" in result.stderr
    stored = RunResult.load(place / "out" / "tiny--mae--seed0" / "result.json")
    assert [f["id"] for f in stored.failures] == ["bright/003.png"]
    assert stored.scorers["steps"].sets["bright"].count == 8


def test_list() -> None:
    result = call("list")
    assert result.exit_code == 0
    for word in ("benchmarks:", "fashion", "imagenet-paper", "scorers:", "trajectory", "models:", "vit-mae-base"):
        assert word in result.stdout
    only = call("list", "scorers").stdout
    assert "mahalanobis" in only
    assert "benchmarks:" not in only


@pytest.mark.parametrize("verb", [[], ["diagnose"], ["bench"], ["train"], ["list"], ["leaderboard"]])
def test_help_shows_examples_to_copy(verb: list[str]) -> None:
    result = call(*verb, "--help")
    assert result.exit_code == 0
    assert "Examples:" in result.stdout
    examples = result.stdout.split("Examples:")[1].strip().splitlines()
    assert examples
    assert all(line.strip().startswith(("traj-ood ", "torchrun ")) for line in examples)


def test_version() -> None:
    assert call("--version").stdout.startswith("traj-ood, version ")


# ---------------------------------------------------------------------------------------------- bad input


def test_unknown_benchmark(place: Path) -> None:
    result = call("bench", "fashio", "--model", place / "mae", "--out", place / "out", *FAST)
    assert_refused(result, "unknown benchmark 'fashio': did you mean 'fashion'")
    missing = call("bench", place / "none.yaml", "--model", place / "mae", "--out", place / "out", *FAST)
    assert_refused(missing, "none.yaml")
    assert not (place / "out").exists()


@pytest.mark.parametrize(
    ("scorers", "text"),
    [
        ("trajektory", "unknown scorer 'trajektory': did you mean 'trajectory'"),
        ("knn,mahalanobi", "unknown scorer 'mahalanobi': did you mean 'mahalanobis'"),
        ("knn:kk=1", "unknown option of scorer knn 'kk'"),
        ("knn:k=none-at-all", "scorer knn, option k: expected int"),
        ("knn:k=1,knn:k=1", "knn:k=1 is listed twice"),
        ("", "scorers: expected at least one"),
        (",", "scorers: expected at least one"),
        ("knn:k=13", "k = 13 neighbours, but only 12 training images"),
        ("trajectory,knn:k=2000", "k = 2000 neighbours, but only 12 training images"),
        ("trajectory:horizon=-1", "horizon"),
    ],
)
def test_bad_scorers(place: Path, scorers: str, text: str) -> None:
    assert_refused(bench(place, "--scorers", scorers), text)
    assert not (place / "out").exists()
    assert bench(place, "--scorers", "knn:k=2").exit_code == 0  # the corrected command runs


@pytest.mark.parametrize(
    ("model", "text"),
    [
        ("fashion-mea", "unknown model 'fashion-mea': did you mean 'fashion-mae'"),
        ("./none", "./none"),
        ("vit-mae-bas", "did you mean 'vit-mae-"),
    ],
)
def test_unknown_model(place: Path, model: str, text: str) -> None:
    result = call("bench", place / "tiny.yaml", "--model", model, "--out", place / "out", *FAST)
    assert_refused(result, text)
    assert not (place / "out").exists()


def spoil_nan(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] = float("nan")
    save_file(weights, folder / "model.safetensors")


def spoil_decoder(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    kept = {k: v for k, v in weights.items() if not k.startswith("decoder.")}
    save_file(kept, folder / "model.safetensors")


def spoil_architecture(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))


def spoil_truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:500])


def spoil_swap(folder: Path) -> None:
    shutil.copy(folder.parent / "conv" / "model.safetensors", folder / "model.safetensors")


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (spoil_nan, "holds NaN or infinite weights"),
        (spoil_decoder, "holds an encoder without a decoder"),
        (spoil_architecture, "weights of another architecture"),
        (spoil_truncate, "cannot be read as plain weights"),
        (spoil_swap, "decoder"),
    ],
)
def test_bad_weights(place: Path, spoil: Callable[[Path], None], text: str) -> None:
    spoil(place / "mae")
    assert_refused(bench(place), text, "model.safetensors")
    assert not (place / "out").exists()


def test_model_options_that_do_not_fit(place: Path) -> None:
    assert_refused(bench(place, "--mask-ratio", 1.5), "mask_ratio: expected 0 <= ratio < 1, got 1.5")
    assert_refused(bench(place, "--mask-ratio", 0.5, model="conv"), "mask_ratio")
    assert not (place / "out").exists()


def test_missing_and_empty_images(place: Path) -> None:
    (place / "lists.txt").write_text("".join(f"test/{i:03d}.png -1\n" for i in (0, 1, 77)))
    text = (place / "tiny.yaml").read_text().replace("test: test", "test: {list: lists.txt, root: images}")
    (place / "listed.yaml").write_text(text)
    assert_refused(bench(place, yaml="listed.yaml"), "test/077.png", "missing or empty")
    (place / "images" / "near" / "005.png").write_bytes(b"")
    assert_refused(bench(place), "near/005.png", "missing or empty")
    assert not (place / "out").exists()


def test_truncated_image(place: Path) -> None:
    path = place / "images" / "test" / "006.png"
    content = path.read_bytes()
    path.write_bytes(content[:-25])
    assert_refused(bench(place), "test/006.png", "cannot be decoded")
    left = files_below(place / "out")
    assert not [n for n in left if n.endswith((".tmp", "result.json", "scores.parquet", "curves.parquet"))]
    path.write_bytes(content)
    assert bench(place).exit_code == 0  # the same command continues


def test_empty_and_missing_splits(place: Path) -> None:
    for name in ("test", "near", "train"):
        shutil.move(place / "images" / name, place / "moved")
        assert_refused(bench(place), "tiny.yaml", name, "found nothing")
        (place / "images" / name).mkdir()
        assert_refused(bench(place), "tiny.yaml", name, "expected at least one image")
        (place / "images" / name).rmdir()
        shutil.move(place / "moved", place / "images" / name)
    assert not (place / "out").exists()


def test_fewer_than_two_id_images(place: Path) -> None:
    for path in sorted((place / "images" / "train").iterdir())[1:]:
        path.unlink()
    assert_refused(bench(place), "fewer than 2 ID samples", "train")
    assert not (place / "out").exists()


@pytest.mark.parametrize(
    ("option", "value", "text"),
    [
        ("--attractors", "1", "training images"),
        ("--attractors", "0", "training images"),
        ("--attractors", "13", "training images"),
        ("--per-set", "0", "at least 1 image per set"),
        ("--per-set", "-2", "at least 1 image per set"),
        ("--seed", "-1", "seed"),
        ("--tol", "-1", "tol"),
        ("--tol", "nan", "tol"),
        ("--max-steps", "0", "max_steps"),
        ("--batch-size", "0", "batch size"),
        ("--workers", "0", "workers"),
        ("--bootstrap", "-1", "resamples"),
        ("--device", "cuda:77", "device 'cuda:77' is not available here"),
        ("--device", "toaster", "device 'toaster' is not available here"),
        ("--data-root", "no/such/folder", "no/such/folder"),
    ],
)
def test_impossible_options(place: Path, option: str, value: str, text: str) -> None:
    assert_refused(bench(place, "--scorers", "trajectory", option, value), text)
    assert not (place / "out").exists()


def test_output_folder_below_a_file(place: Path) -> None:
    (place / "out").write_text("a file")
    assert_refused(bench(place), "out", "expected a folder that can be written")
    assert (place / "out").read_text() == "a file"


def test_output_folder_without_permission(place: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root writes everywhere; the case is covered by an output folder below a file")
    (place / "out").mkdir(mode=0o500)
    assert_refused(bench(place), "out", "expected a folder that can be written")
    assert files_below(place / "out") == []


def test_faiss_that_is_not_there(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    assert_refused(bench(place, "--scorers", "trajectory", "--index", "faiss"), "index backend 'faiss'", "pip install")
    assert not files_below(place / "out") or "result.json" not in "".join(files_below(place / "out"))


def test_a_damaged_result_is_named_and_computed_again_as_its_message_says(place: Path) -> None:
    first = bench(place, "--scorers", "steps")
    path = place / "out" / "tiny--mae--seed0" / "result.json"
    path.write_text(path.read_text()[:100])
    for refused in (bench(place, "--scorers", "steps"), call("leaderboard", place / "out")):
        assert_refused(refused, f"{path}: expected JSON", "restore the file, or run it again with --fresh")
    assert bench(place, "--scorers", "steps", "--fresh").stdout == first.stdout
    assert_refused(call("leaderboard", place / "images"), "result.json")
    path.with_name("gallery.safetensors").unlink()  # is made again from the scores
    path.with_name("scores.parquet").write_bytes(b"PAR1")
    assert_refused(bench(place, "--scorers", "steps"), "scores.parquet: expected a Parquet table", "with --fresh")
    assert bench(place, "--scorers", "steps", "--fresh").stdout == first.stdout


def test_plots_of_a_finished_run_without_its_scores(place: Path) -> None:
    assert bench(place, "--scorers", "steps").exit_code == 0
    (place / "out" / "tiny--mae--seed0" / "scores.parquet").unlink()
    options = [o for o in FAST if o != "--no-plots"]
    arguments = ["--model", place / "mae", "--out", place / "out", "--scorers", "steps"]
    assert_refused(call("bench", place / "tiny.yaml", *arguments, *options), "scores.parquet")


def test_train_bad_input(place: Path) -> None:
    assert_refused(call("train", "fashion-me", "--out", place / "m"), "unknown training config 'fashion-me'")
    assert_refused(call("train", place / "none.yaml", "--out", place / "m"), "none.yaml: no such training config")
    (place / "bad.yaml").write_text("name: [1\n")
    assert_refused(call("train", place / "bad.yaml", "--out", place / "m"), "bad.yaml line 2: malformed YAML")
    (place / "c.yaml").write_text(
        f"name: c\nbenchmark: {place / 'tiny.yaml'}\nfamily: conv\nimage_size: 8\nchannels: 1\nhealth_images: 2\n"
        "model: {width: 2, bottleneck: 3}\nrecipe: {epochs: 1, batch_size: 4}\n"
    )
    (place / "file").write_text("")
    assert_refused(call("train", place / "c.yaml", "--out", place / "file" / "m", "-q", "--device", "cpu"), "file")
    assert not (place / "m").exists()


def test_diagnose_refuses_a_folder_that_cannot_be_written_before_it_computes(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "file").write_text("")
    arguments = ("diagnose", "fashion-mae", "--benchmark", place / "tiny.yaml", "--device", "cpu", "-q")
    assert_refused(
        call(*arguments, "--out", place / "file" / "d"), "file/d: expected a folder that can be written (for diag"
    )
    monkeypatch.chdir(place)
    (place / "runs").write_text("")  # the default is runs/<benchmark>--<model>--diagnosis
    assert_refused(call(*arguments), "runs: expected a folder that can be written (for diag")


def test_train_then_bench(place: Path) -> None:
    (place / "c.yaml").write_text(
        f"name: c\nbenchmark: {place / 'tiny.yaml'}\nfamily: conv\nimage_size: 8\nchannels: 1\nhealth_images: 2\n"
        "model: {width: 2, bottleneck: 3}\nrecipe: {epochs: 1, batch_size: 4}\n"
    )
    trained = call("train", place / "c.yaml", "--out", place / "c", "--device", "cpu", "--quiet")
    assert trained.exit_code == 0, trained.output
    assert f"Written to {place / 'c'}" in trained.stderr
    assert bench(place, "--scorers", "trajectory,reconstruction", model="c").exit_code == 0
    assert torch.get_num_threads() == 1


# ---------------------------------------------------------------------- backbones, several formats


def test_bench_trains_a_surrogate_for_a_backbone_and_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAJ_OOD_DATA", str(tmp_path / "cache"))
    arguments = {"num_classes": 3, "in_chans": 1}
    look = {"input_size": [1, 32, 32], "mean": [0.5], "std": [0.5], "interpolation": "bilinear"}
    folder = tmp_path / "resnet"
    network = new_network("test_resnet", **arguments)
    save_folder(network, folder, "test_resnet", arguments, {**look, "crop_pct": 1.0, "crop_mode": "squash"})
    tiny.write_benchmark(tmp_path, train=40)
    options = ("bench", tmp_path / "tiny.yaml", "--model", f"timm:{folder}", "--max-steps", 3, "-q", "--no-plots")
    scorers = "field,knn,energy,msp"
    first = call(*options, "--scorers", scorers, "--out", tmp_path / "one")
    assert first.exit_code == 0, first.output
    assert "timm:resnet" in first.stdout
    run = tmp_path / "one" / "tiny--timm-resnet--seed0"
    result = json.loads((run / "result.json").read_text())
    assert set(result["scorers"]) == {"field", "knn:view=backbone", "energy", "msp"}
    kept = files_below(tmp_path / "cache")
    assert any(name.endswith("training.json") for name in kept)
    second = call(*options, "--scorers", scorers, "--out", tmp_path / "two")
    assert second.exit_code == 0, second.output
    assert files_below(tmp_path / "cache") == kept
    again = tmp_path / "two" / run.name / "scores.parquet"
    assert again.read_bytes() == (run / "scores.parquet").read_bytes()
    assert_refused(call(*options, "--mask-ratio", 0.5), "--mask-ratio", "apply to a ViT-MAE")
    assert_refused(call(*options, "--model", "timm:resnet81"), "timm", "resnet81")


def test_scorers_of_a_classifier_are_refused_without_one(place: Path) -> None:
    assert_refused(bench(place, "--scorers", "vim"), "scorer vim", "logits of a classifier", "timm:<name>")


def test_leaderboard_in_openood_columns(place: Path) -> None:
    assert bench(place, "--scorers", "knn:k=3").exit_code == 0
    shown = call("leaderboard", place / "out", "--format", "openood", "--csv", place / "rows.csv")
    assert shown.exit_code == 0
    assert shown.stdout == (place / "rows.csv").read_text()
    assert shown.stdout.startswith("Training,Scorer,Near-OOD_AUROC,Far-OOD_AUROC,ID_Accuracy,Outlier_Data,Arch,")
    refused = call("leaderboard", place / "out", "--format", "openood", "--readme", place / "README.md")
    assert_refused(refused, "--readme takes the Markdown table")


@pytest.mark.parametrize("option", [("--precision", "bf16"), ("--approximate", "ivf")])
def test_options_that_change_scores_are_another_run(place: Path, option: tuple[str, str]) -> None:
    assert bench(place, "--scorers", "trajectory").exit_code == 0
    assert_refused(bench(place, "--scorers", "trajectory", *option), "another config", "--fresh")
    fresh = bench(place, "--scorers", "trajectory", *option, "--fresh")
    assert fresh.exit_code == 0, fresh.output


def test_diagnose_says_when_scores_would_be_meaningless(place: Path) -> None:
    out = place / "diagnosis"
    tiny.write_benchmark(place, train=30)
    options = ("--benchmark", place / "tiny.yaml", "--images", 20, "--max-steps", 5, "--out", out, "-q")
    done = call("diagnose", place / "mae", *options)
    assert done.exit_code == 1, done.output
    record = json.loads((out / "diagnosis.json").read_text())
    word = record["verdict"]["word"]
    assert word != "healthy"
    assert word in done.stdout
    assert {"curves.parquet", "diagnosis.json"} <= set(files_below(out))
    assert_refused(call("diagnose", place / "nowhere", *options), "nowhere")
