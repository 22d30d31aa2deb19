"""The evaluator on a tiny benchmark of generated images: numbers, batch size, order, interruption, failures."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from torch import Tensor

from traj_ood.attractors import AttractorDictionary
from traj_ood.autoencoders import CallableAutoencoder, SurrogateAutoencoder, SurrogateNetwork, load_autoencoder
from traj_ood.backbones import CallableBackbone, Features
from traj_ood.backbones.feature_cache import FeatureCache
from traj_ood.data import load_benchmark
from traj_ood.data.batches import ranges_of
from traj_ood.data.preprocessing import Normalised
from traj_ood.dynamics.iterate import iterate
from traj_ood.dynamics.observers import Norm
from traj_ood.errors import TrajOODError
from traj_ood.evaluation.curves import curve_quantiles
from traj_ood.evaluation.evaluator import Evaluator, RunConfig
from traj_ood.evaluation.passes import even_size
from traj_ood.evaluation.results import Result
from traj_ood.io.parts import Part, PartStore
from traj_ood.scorers.scorer_set import Scored, ScorerSet

SCORERS = ("trajectory", "trajectory:horizon=4", "knn:k=3", "mahalanobis", "reconstruction", "steps", "first-residual")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    tiny.write_benchmark(folder)
    tiny.vit().save_pretrained(folder / "mae")
    return folder


def evaluator(place: Path, out: Path, yaml: str = "tiny.yaml", model: Any = None, **changes: Any) -> Evaluator:
    keys = ("batch_size", "workers", "backend", "quiet", "command")
    outer = {"quiet": True, "batch_size": 5} | {k: changes.pop(k) for k in keys if k in changes}
    config = RunConfig(**{"scorers": SCORERS, "max_steps": 12, "resamples": 20, **changes})
    autoencoder = model or load_autoencoder(place / "mae")
    return Evaluator(autoencoder, load_benchmark(str(place / yaml)), config, out, **outer)


def table(run: Evaluator) -> pd.DataFrame:
    return pd.read_parquet(run.folder / "scores.parquet")


@pytest.fixture(scope="module")
def done(place: Path) -> tuple[Evaluator, Result]:
    run = evaluator(place, place / "done", command="the command")
    return run, run.run()


# ---------------------------------------------------------------------------------------------- one run


def test_folder_and_files(done: tuple[Evaluator, Result]) -> None:
    run, result = done
    assert run.folder.name == result.name == "tiny--mae--seed0"
    names = ["attractors.safetensors", "curves.parquet", "gallery.safetensors", "images.parquet", "result.json"]
    assert sorted(p.name for p in run.folder.rglob("*")) == [*names, "scores.parquet"]
    assert Result.load(run.folder / "result.json") == result


def test_scores_are_those_of_a_scorer_set(done: tuple[Evaluator, Result], place: Path) -> None:
    run, _ = done
    model, bench = load_autoencoder(place / "mae"), load_benchmark(str(place / "tiny.yaml"))

    def images(split: Any) -> Tensor:
        return torch.stack([model.transform(split.images.load(i)) for i in range(len(split.images))])

    scorers = ScorerSet(model, SCORERS, max_steps=12).fit(Normalised(images(bench.train)))
    frame = table(run)
    # the scorer `steps` and the trajectory's own number of steps share a column
    assert list(frame.columns) == list(
        dict.fromkeys(["split", "role", "id", "trajectory_steps", "trajectory_status", *SCORERS])
    )
    assert frame["split"].unique().tolist() == ["test", "dim", "bright"]
    for split in (bench.test, *bench.ood):
        rows = frame[frame["split"] == split.name]
        assert rows["id"].tolist() == list(split.images.ids)
        assert set(rows["role"]) == {split.role}
        scored = scorers.score(Normalised(images(split)))
        assert rows["trajectory_steps"].tolist() == scored.evidence.path().steps.tolist()
        for label, values in scored.scores.items():
            np.testing.assert_allclose(rows[label], values.numpy(), rtol=1e-5, err_msg=label)


def kept(id_scores: np.ndarray, ood: np.ndarray) -> float:
    """The paper's FPR95: the lowest threshold that keeps 95 % of ID, and the share of OOD it keeps."""
    threshold = next(t for t in np.sort(id_scores) if (id_scores <= t).mean() >= 0.95)
    return float((ood <= threshold).mean())


def test_metrics_equal_scikit_learn_on_the_table(done: tuple[Evaluator, Result]) -> None:
    from sklearn.metrics import auc, precision_recall_curve, roc_auc_score

    run, result = done
    frame = table(run)
    id_rows = frame[frame["split"] == "test"]
    for label in SCORERS:
        for name, role in (("dim", "near"), ("bright", "far")):
            ours = result.scorers[label].sets[name]
            ood = frame[frame["split"] == name][label].to_numpy()
            known = id_rows[label].to_numpy()
            is_ood, scores = np.repeat([0, 1], [len(known), len(ood)]), np.concatenate([known, ood])
            precision, recall, _ = precision_recall_curve(is_ood, scores)
            precision_in, recall_in, _ = precision_recall_curve(1 - is_ood, -scores)
            assert ours.role == role
            assert ours.count == 9
            assert ours.metrics.auroc == pytest.approx(roc_auc_score(is_ood, scores))
            assert ours.metrics.aupr_out == pytest.approx(auc(recall, precision))
            assert ours.metrics.aupr_in == pytest.approx(auc(recall_in, precision_in))
            assert ours.metrics.fpr95 == pytest.approx(kept(known, ood))
            assert ours.metrics.fpr95_openood == pytest.approx(kept(-ood, -known))
            low, high = ours.intervals["auroc"]
            assert 0 <= low <= ours.metrics.auroc + 1e-9
            assert high >= ours.metrics.auroc - 0.2


def test_result_says_what_was_done(done: tuple[Evaluator, Result]) -> None:
    run, result = done
    assert result.benchmark == "tiny"
    assert result.seed == 0
    assert result.command == "the command"
    assert result.model["fingerprint"] == run.autoencoder.fingerprint()
    assert result.config["attractors"] == 12
    assert result.config["max_steps"] == 12
    assert result.config["scorers"] == list(SCORERS)
    assert result.config["model_options"] == run.autoencoder.options()
    assert {k: v["count"] for k, v in result.data.items()} == {"train": 12, "val": 4, "test": 10, "dim": 9, "bright": 9}
    assert result.dictionary["used"] is True
    assert result.dictionary["count"] == 12
    assert result.failures == []
    frame = table(run)
    assert result.scorers["trajectory"].f_evaluations == pytest.approx(frame["trajectory_steps"].mean())
    assert result.scorers["knn:k=3"].f_evaluations == 0


def test_finished_run_returns_at_once(
    done: tuple[Evaluator, Result], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, result = done
    before = {p: p.stat().st_mtime_ns for p in run.folder.iterdir()}

    def refuse(*args: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(ScorerSet, "explore_all", refuse)
    monkeypatch.setattr(ScorerSet, "score_all", refuse)
    assert evaluator(place, place / "done", batch_size=3).run() == result
    assert {p: p.stat().st_mtime_ns for p in run.folder.iterdir()} == before


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"max_steps": 13}, "another config (config.max_steps: 12 there, 13 here)"),
        ({"tol": 1e-4}, "another config (config.tol: 1e-05 there, 0.0001 here)"),
        (
            {"scorers": ("knn:k=3", "knn:k=2")},
            "another config (config.scorers: knn:k=2 only here, trajectory, trajectory:horizon=4, mahalanobis and 3 "
            "more only there)",
        ),
        ({"scorers": SCORERS[::-1]}, "another config (config.scorers: in another order)"),
        (
            {"attractors": 11},
            "another config, data (config.attractors: 12 there, 11 here; data.train.count: 12 there, 11 here)",
        ),
        ({"on_error": "skip"}, "another config (config.on_error: 'raise' there, 'skip' here)"),
        (
            {"tol": 1e-4, "max_steps": 13, "resamples": 1, "on_error": "skip"},
            "another config (config.max_steps: 12 there, 13 here; config.on_error: 'raise' there, 'skip' here; "
            "config.resamples: 20 there, 1 here; …)",
        ),
    ],
)
def test_other_settings_in_the_same_folder(
    done: tuple[Evaluator, Result], place: Path, changes: dict[str, Any], text: str
) -> None:
    words = re.escape(f"tiny--mae--seed0: has a run with {text}: choose another --out")
    with pytest.raises(TrajOODError, match=words):
        evaluator(place, place / "done", **changes).run()


def test_other_weights_in_the_same_folder(done: tuple[Evaluator, Result], place: Path) -> None:
    words = r"has a run with another model \(model.fingerprint: '\w+… there, '\w+… here\): choose another --out"
    with pytest.raises(TrajOODError, match=words):
        evaluator(place, place / "done", model=tiny.vit(seed=5, name="mae")).run()


def test_other_roles_in_the_same_folder(done: tuple[Evaluator, Result], place: Path) -> None:
    text = (place / "tiny.yaml").read_text().replace("far: {bright: far}", "diagnostic: {bright: far}")
    (place / "roles.yaml").write_text(text)
    words = r"has a run with another data \(data.bright.role: 'far' there, 'diagnostic' here\): choose another --out"
    with pytest.raises(TrajOODError, match=words):
        evaluator(place, place / "done", yaml="roles.yaml").run()


def test_other_sets_in_the_same_folder(done: tuple[Evaluator, Result], place: Path) -> None:
    text = (place / "tiny.yaml").read_text().replace("far: {bright: far}", "far: {bright: far, dark: train}")
    (place / "sets.yaml").write_text(text.replace("train: train", "train: val").replace("val: val\n", ""))
    with pytest.raises(TrajOODError, match=r"another config, data .*data.dark: nothing there, something here"):
        evaluator(place, place / "done", yaml="sets.yaml").run()


def test_fresh_discards(place: Path, tmp_path: Path) -> None:
    first = evaluator(place, tmp_path, scorers=("steps",), resamples=0)
    first.run()
    (first.folder / "stray.txt").write_text("old")
    second = evaluator(place, tmp_path, scorers=("steps", "first-residual"), resamples=0)
    result = second.run(fresh=True)
    assert list(result.scorers) == ["steps", "first-residual"]
    assert not (second.folder / "stray.txt").exists()
    assert result.scorers["steps"].sets["dim"].intervals == {}
    assert not (second.folder / "attractors.safetensors").exists()  # no scorer needs them


# ---------------------------------------------------------------------------------------------- independence


@pytest.mark.parametrize("batch_size", [1, 4, None])
def test_batch_size_does_not_change_results(
    done: tuple[Evaluator, Result], place: Path, tmp_path: Path, batch_size: int | None
) -> None:
    run = evaluator(place, tmp_path, batch_size=batch_size, workers=3)
    result = run.run()
    ours, reference = table(run), table(done[0])
    assert ours[["split", "role", "id"]].equals(reference[["split", "role", "id"]])
    for label in SCORERS:
        np.testing.assert_allclose(ours[label], reference[label], rtol=1e-5, err_msg=label)
    for label, scorer in result.scorers.items():
        assert scorer.f_evaluations == pytest.approx(done[1].scorers[label].f_evaluations)


def test_image_order_does_not_change_scores(done: tuple[Evaluator, Result], place: Path, tmp_path: Path) -> None:
    lists = place / "lists"
    lists.mkdir()
    random = np.random.default_rng(0)
    for name in ("train", "test", "near", "far"):
        files = sorted(p.name for p in (place / "images" / name).iterdir())
        lines = [f"{name}/{files[i]} -1" for i in random.permutation(len(files))]
        (lists / f"{name}.txt").write_text("\n".join(lines) + "\n")
    (place / "shuffled.yaml").write_text(
        "root: images\ntrain: {list: lists/train.txt}\ntest: {list: lists/test.txt}\n"
        "near: {dim: {list: lists/near.txt}}\nfar: {bright: {list: lists/far.txt}}\n"
    )
    run = evaluator(place, tmp_path, "shuffled.yaml", batch_size=3)
    run.run()

    def by_file(frame: pd.DataFrame) -> pd.DataFrame:
        return frame.assign(file=frame["id"].str.split("/").str[-1]).sort_values(["split", "file"])

    ours, reference = by_file(table(run)), by_file(table(done[0]))
    assert ours["file"].tolist() == reference["file"].tolist()
    for label in SCORERS:
        np.testing.assert_allclose(ours[label], reference[label], rtol=1e-5, err_msg=label)


def test_unhealthy_attractors_are_told_where_a_scorer_reads_them(place: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"unhealthy attractors: .* More: traj-ood diagnose"):
        evaluator(place, tmp_path / "a", scorers=("trajectory",), max_steps=1).run()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluator(place, tmp_path / "b", scorers=("knn:k=2", "path-energy:two_sided=true"), max_steps=16).run()


def test_seed_draws_the_training_sample_only(place: Path, tmp_path: Path) -> None:
    runs = [evaluator(place, tmp_path, seed=s, attractors=6, per_set=5, scorers=("steps",)) for s in (0, 1)]
    ids = [run.sample.train.images.ids for run in runs]
    assert ids[0] != ids[1]
    assert len(ids[0]) == 6
    assert runs[0].sample.test.images.ids == runs[1].sample.test.images.ids
    assert runs[0].folder != runs[1].folder
    assert {k: v["count"] for k, v in runs[0].run().data.items()} == {
        "train": 6,
        "val": 4,
        "test": 5,
        "dim": 5,
        "bright": 5,
    }


# ---------------------------------------------------------------------------------------------- interruption


class Stop:
    """Counts the batches of a run and interrupts one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int | None) -> None:
        self.seen, original = 0, PartStore.save

        def counted(parts: PartStore, *args: Any) -> None:
            self.seen += 1
            if self.seen == at:
                raise KeyboardInterrupt
            original(parts, *args)

        monkeypatch.setattr(PartStore, "save", counted)


@pytest.mark.parametrize("at", [1, 2, 4, 5, 7])
def test_interrupted_run_continues_with_identical_bytes(
    done: tuple[Evaluator, Result], place: Path, tmp_path: Path, at: int
) -> None:
    # Batches of 5: train 3, test 2, dim 2, bright 2.
    with pytest.MonkeyPatch.context() as patch:
        Stop(patch, at)
        with pytest.raises(KeyboardInterrupt):
            evaluator(place, tmp_path).run()
    run = evaluator(place, tmp_path, batch_size=4)  # the unfinished run keeps its own batch size
    assert not (run.folder / "result.json").exists()
    assert len(list((run.folder / "parts").glob("*.safetensors"))) == at - 1
    with pytest.MonkeyPatch.context() as patch:
        rest = Stop(patch, None)
        result = run.run()
    assert rest.seen == 9 - (at - 1)
    reference = done[0].folder
    for name in ("scores.parquet", "curves.parquet"):
        assert (run.folder / name).read_bytes() == (reference / name).read_bytes(), name
    ours, theirs = (AttractorDictionary.load(f / "attractors.safetensors") for f in (run.folder, reference))
    assert ours.ids == theirs.ids
    for name, tensor in ours.tensors().items():
        assert torch.equal(tensor, theirs.tensors()[name]), name
    assert result.scorers == done[1].scorers
    assert result.dictionary == done[1].dictionary
    assert not (run.folder / "parts").exists()


def test_crash_while_writing_the_result_continues(done: tuple[Evaluator, Result], place: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Result, "save", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            evaluator(place, tmp_path).run()
    with pytest.MonkeyPatch.context() as patch:
        rest = Stop(patch, None)
        run = evaluator(place, tmp_path)
        result = run.run()
    assert result.scorers == done[1].scorers
    assert result.seconds.keys() == done[1].seconds.keys()
    assert rest.seen == 0
    assert (run.folder / "scores.parquet").read_bytes() == (done[0].folder / "scores.parquet").read_bytes()


def test_unfinished_run_of_other_settings(place: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        Stop(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            evaluator(place, tmp_path).run()
    with pytest.raises(TrajOODError, match=r"another config \(config.tol: .*: choose another --out, or discard it"):
        evaluator(place, tmp_path, tol=1e-3).run()
    assert evaluator(place, tmp_path, tol=1e-3).run(fresh=True).config["tol"] == 1e-3


def test_a_run_that_a_broken_image_ended_continues_when_it_is_skipped(tmp_path: Path) -> None:
    tiny.write_benchmark(tmp_path)
    tiny.vit().save_pretrained(tmp_path / "mae")
    broken = tmp_path / "images" / "far" / "004.png"
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(TrajOODError, match=r"far/004\.png: "):
        evaluator(tmp_path, tmp_path / "out").run()
    with pytest.MonkeyPatch.context() as patch:
        rest = Stop(patch, None)
        result = evaluator(tmp_path, tmp_path / "out", on_error="skip").run()
    assert rest.seen == 2  # the batches of train, test and dim had no image to skip
    assert [failure["id"] for failure in result.failures] == ["bright/004.png"]
    assert result.config["on_error"] == "skip"
    assert result.scorers == evaluator(tmp_path, tmp_path / "anew", on_error="skip").run().scorers


def test_a_run_that_skips_is_not_continued_by_one_that_does_not(place: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        Stop(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            evaluator(place, tmp_path, on_error="skip").run()
    with pytest.raises(TrajOODError, match=r"another config \(config.on_error: 'skip' there, 'raise' here\): choose"):
        evaluator(place, tmp_path).run()


def test_damaged_parts_are_named(place: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        Stop(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            evaluator(place, tmp_path).run()
    run = evaluator(place, tmp_path)
    part = next((run.folder / "parts").glob("train-*.safetensors"))
    content = part.read_bytes()
    part.write_bytes(content[:40])
    with pytest.raises(
        TrajOODError,
        match=rf"{part.name}: not a readable batch of a run .*: delete this file to compute its batch again",
    ):
        evaluator(place, tmp_path).run()
    part.unlink()
    evaluator(place, tmp_path).run()


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "null"])
def test_damaged_identity_is_named(place: Path, tmp_path: Path, content: str) -> None:
    run = evaluator(place, tmp_path, scorers=("steps",))
    (run.folder / "parts").mkdir(parents=True)
    (run.folder / "parts" / "run.json").write_text(content)
    with pytest.raises(TrajOODError, match=r"tiny--mae--seed0.*--fresh"):
        run.run()


# ---------------------------------------------------------------------------------------------- unreadable images


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """The benchmark with a truncated OOD image, an empty test image, a missing near image and rubbish in train."""
    tiny.write_benchmark(tmp_path)
    tiny.vit().save_pretrained(tmp_path / "mae")
    images = tmp_path / "images"
    path = images / "far" / "004.png"
    path.write_bytes(path.read_bytes()[:-30])
    (images / "test" / "002.png").write_bytes(b"")
    (images / "train" / "001.png").write_bytes(b"not an image")
    return tmp_path


@pytest.mark.parametrize("batch_size", [1, 5])
def test_skipped_images_are_counted(broken: Path, batch_size: int) -> None:
    run = evaluator(broken, broken / f"out{batch_size}", on_error="skip", batch_size=batch_size)
    result = run.run()
    assert sorted(f["id"] for f in result.failures) == ["bright/004.png", "test/002.png", "train/001.png"]
    errors = {f["id"]: f["error"] for f in result.failures}
    assert "empty file" in errors["test/002.png"]
    assert "cannot be decoded" in errors["bright/004.png"]
    counts = table(run)["split"].value_counts().to_dict()
    assert counts == {"test": 9, "dim": 9, "bright": 8}
    assert result.scorers["knn:k=3"].sets["bright"].count == 8
    assert result.dictionary["count"] == 11


def exploding() -> CallableAutoencoder:
    """f halves dark images and has no finite value at bright ones."""

    def decode(latents: Tensor) -> Tensor:
        bright = latents.mean(dim=1, keepdim=True) > 0.6
        return torch.where(bright, torch.inf, 0.5 * latents).reshape(-1, 1, 8, 8)

    return CallableAutoencoder(lambda x: x.flatten(1), decode, (1, 8, 8), name="mae", chunk=8)


@pytest.mark.parametrize("scorer", ["early-path", "first-residual"])
def test_an_image_without_a_score_is_refused_or_counted(place: Path, tmp_path: Path, scorer: str) -> None:
    with pytest.raises(TrajOODError, match=rf"scorer {scorer}: \d score\(s\) of split 'bright' are not finite.*skip"):
        evaluator(place, tmp_path / "a", scorers=(scorer,), model=exploding()).run()
    run = evaluator(place, tmp_path / "b", scorers=(scorer, "mahalanobis"), model=exploding(), on_error="skip")
    result = run.run()
    assert result.failures
    assert {f["error"] for f in result.failures} == {f"scorer {scorer}: the score is not finite"}
    kept = table(run)
    assert len(kept[kept["split"] == "bright"]) == 9 - len(result.failures)
    assert kept[[scorer, "mahalanobis"]].notna().all(axis=None)


def test_training_images_that_nothing_can_be_learnt_from(place: Path, tmp_path: Path) -> None:
    blind = CallableAutoencoder(lambda x: 0 * x.flatten(1), lambda z: z.reshape(-1, 1, 8, 8), (1, 8, 8), name="mae")
    with pytest.raises(TrajOODError, match=r"mae: the features \(mean\) of all 12 training images are equal"):
        evaluator(place, tmp_path / "a", scorers=("mahalanobis",), model=blind).run()
    lost = CallableAutoencoder(lambda x: x.flatten(1) / 0, lambda z: z.reshape(-1, 1, 8, 8), (1, 8, 8), name="mae")
    with pytest.raises(TrajOODError, match=r"mae: features \(mean\) of 12 of 12 training images are not finite, first"):
        evaluator(place, tmp_path / "b", scorers=("mahalanobis",), model=lost).run()


def test_raise_names_the_file(broken: Path) -> None:
    (broken / "images" / "test" / "002.png").unlink()
    with pytest.raises(TrajOODError, match=r"train/001\.png: .*no format that Pillow knows"):
        evaluator(broken, broken / "out").run()
    (broken / "images" / "train" / "001.png").unlink()
    with pytest.raises(TrajOODError, match=r"far/004\.png: the image cannot be decoded"):
        evaluator(broken, broken / "out2").run()
    assert not (broken / "out2" / "tiny--mae--seed0" / "result.json").exists()


def test_empty_images_are_found_before_anything_is_computed(broken: Path) -> None:
    with pytest.raises(TrajOODError, match=r"1 image files are missing or empty in test \(1 of 10\).*test/002\.png"):
        evaluator(broken, broken / "out").run()
    assert not (broken / "out").exists()


@pytest.mark.parametrize("split", ["test", "far"])
def test_split_without_a_readable_image(broken: Path, split: str) -> None:
    for path in (broken / "images" / split).iterdir():
        path.write_bytes(b"")
    name = {"test": "test", "far": "bright"}[split]
    with pytest.raises(TrajOODError, match=f"split '{name}': none of its .* images could be read"):
        evaluator(broken, broken / "out", on_error="skip").run()


@pytest.mark.parametrize("readable", [0, 1])
@pytest.mark.parametrize("scorers", [("knn:k=1",), ("trajectory",), ("reconstruction",), ("steps",)])
def test_too_few_readable_training_images(broken: Path, readable: int, scorers: tuple[str, ...]) -> None:
    for path in sorted((broken / "images" / "train").iterdir())[readable:]:
        path.write_bytes(b"")
    with pytest.raises(TrajOODError, match=r"train"):
        evaluator(broken, broken / "out", on_error="skip", scorers=scorers).run()


def test_skipping_can_leave_fewer_images_than_k(broken: Path) -> None:
    with pytest.raises(TrajOODError, match="k = 12 neighbours, but only 11 training images"):
        evaluator(broken, broken / "out", on_error="skip", scorers=("knn:k=12",)).run()


def test_damaged_image_repaired_and_continued(broken: Path, place: Path, done: tuple[Evaluator, Result]) -> None:
    for name in ("train/001.png", "test/002.png"):
        (broken / "images" / name).write_bytes((place / "images" / name).read_bytes())
    with pytest.raises(TrajOODError, match=r"far/004\.png"):
        evaluator(broken, broken / "out").run()
    (broken / "images" / "far" / "004.png").write_bytes((place / "images" / "far" / "004.png").read_bytes())
    run = evaluator(broken, broken / "out")
    run.run()
    assert (run.folder / "scores.parquet").read_bytes() == (done[0].folder / "scores.parquet").read_bytes()


def test_colour_images_and_other_sizes_are_converted(tmp_path: Path) -> None:
    tiny.write_benchmark(tmp_path)
    tiny.write_images(tmp_path / "images" / "far", 9, 4, size=13, mode="RGB")
    tiny.vit().save_pretrained(tmp_path / "mae")
    assert evaluator(tmp_path, tmp_path / "out").run().scorers["steps"].sets["bright"].count == 9


# ---------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"scorers": ("knn:k=13",)}, "k = 13 neighbours, but only 12 training images"),
        ({"attractors": 1}, "expected between 2 and 12 training images"),
        ({"attractors": 0}, "expected between 2 and 12 training images"),
        ({"attractors": 13}, "expected between 2 and 12 training images"),
        ({"per_set": 0}, "per_set: expected a whole number of at least 1 image per set, got 0"),
        ({"seed": -1}, "seed: expected a whole number from 0 to 4,294,967,295, got -1"),
        ({"seed": 2**32}, "seed: expected a whole number from 0 to 4,294,967,295, got 4294967296"),
        ({"seed": np.int64(3)}, "seed: expected a whole number from 0 to 4,294,967,295, .*: convert it by int"),
        (
            {"per_set": np.int64(5)},
            "per_set: expected a whole number of at least 1 image per set, got .*: convert it by int",
        ),
        ({"attractors": 5.0}, r"attractors: expected a whole number of at least 0, got 5\.0"),
        ({"batch_size": 0}, "batch size: expected a whole number of at least 1, got 0"),
        ({"workers": 0}, "workers"),
        ({"max_steps": 0}, "max_steps: expected a whole number of at least 1, got 0"),
        ({"tol": -1.0}, "tol: expected a finite squared residual >= 0, got -1"),
        ({"tol": float("inf")}, "tol: expected a finite squared residual >= 0, got inf"),
        ({"tol": "1e-5"}, "tol: expected a finite squared residual >= 0, got '1e-5'"),
        ({"max_steps": 2.5}, r"max_steps: expected a whole number of at least 1, got 2\.5"),
        ({"resamples": 10**9}, "resamples: expected a whole number from 0 to 1,000,000, got 1000000000"),
        ({"resamples": 2.5}, r"resamples: expected a whole number from 0 to 1,000,000, got 2\.5"),
        ({"resamples": -1}, "resamples"),
        ({"scorers": ("trajectory:horizon=-1",)}, "horizon"),
    ],
)
def test_impossible_settings_leave_nothing_behind(
    place: Path, tmp_path: Path, changes: dict[str, Any], text: str
) -> None:
    with pytest.raises(TrajOODError, match=text):
        evaluator(place, tmp_path / "out", **changes).run()
    assert not (tmp_path / "out").exists()


def test_scores_that_are_not_finite_are_refused(place: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        original = ScorerSet.score_all

        def spoiled(scorers: ScorerSet, *args: Any) -> Iterator[Scored]:
            for scored in original(scorers, *args):
                scored.scores["steps"][1] = float("nan")
                yield scored

        patch.setattr(ScorerSet, "score_all", spoiled)
        with pytest.raises(
            TrajOODError, match=r"scorer steps: 1 score\(s\) of split 'test' .*first for image 'test/001"
        ):
            evaluator(place, tmp_path, scorers=("steps",)).run()


@pytest.mark.slow
def test_the_cost_is_that_of_the_images_that_are_measured(tmp_path: Path) -> None:
    yaml = tiny.write_benchmark(tmp_path, train=20, test=20, ood=20)
    weight = torch.linalg.qr(torch.randn(64, 6, generator=torch.Generator().manual_seed(0))).Q

    def encode(x: torch.Tensor) -> torch.Tensor:
        return torch.where((x.flatten(1).mean(1) > 0.4)[:, None], torch.nan, x.flatten(1) @ weight)

    model = CallableAutoencoder(encode, lambda z: (0.9 * z @ weight.T).reshape(-1, 1, 8, 8), (1, 8, 8), chunk=6)
    costs = []
    for size in (1, 5, 100):
        config = RunConfig(("trajectory", "knn:k=1"), resamples=0, on_error="skip")
        run = Evaluator(model, load_benchmark(str(yaml)), config, tmp_path / str(size), batch_size=size, quiet=True)
        result = run.run()
        assert 0 < len(result.failures) < 60
        costs.append(result.scorers["trajectory"].f_evaluations)
    assert costs == pytest.approx([costs[0]] * 3)


# ---------------------------------------------------------------------------------------------- curves


def test_curves(done: tuple[Evaluator, Result], place: Path) -> None:
    frame = pd.read_parquet(done[0].folder / "curves.parquet")
    assert set(frame["split"]) == {"train", "test", "dim", "bright"}
    assert set(frame["quantity"]) == {"residual_sq", "norm", "running"}
    running = frame[(frame["split"] == "test") & (frame["quantity"] == "running")].sort_values("step")
    steps = table(done[0]).query("split == 'test'")["steps"].to_numpy()
    for step, share in zip(running["step"], running["q50"], strict=True):
        assert share == pytest.approx((steps > step).mean())


def test_curve_quantiles_censor_converged_samples() -> None:
    split = load_benchmark_split()
    nan = float("nan")
    tensors = {
        "steps": torch.tensor([3, 2, 1]),
        "status": torch.zeros(3, dtype=torch.int64),
        "residuals": torch.tensor([[9.0, 4.0, 1e-6], [4.0, 1e-6, nan], [1e-6, nan, nan]]),
        "norm": torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, nan], [8.0, 9.0, nan, nan]]),
    }
    frame = curve_quantiles(split, [Part(("a", "b", "c"), [], tensors, {})], tol=1e-5)
    residual = frame[frame["quantity"] == "residual_sq"].set_index("step")
    assert residual.loc[0, "q50"] == 4.0
    assert np.isnan(residual.loc[0, "q05"])
    assert np.isnan(residual.loc[1, "q50"])
    assert residual.loc[2, ["q05", "q95"]].isna().all()
    norm = frame[frame["quantity"] == "norm"].set_index("step")
    assert norm.loc[2, "q50"] == 7.0
    assert norm.loc[2, "q95"] == pytest.approx(np.quantile([3, 7, 9], 0.95))
    assert frame[frame["quantity"] == "running"]["q50"].tolist() == pytest.approx([1, 2 / 3, 1 / 3])
    assert curve_quantiles(split, [Part((), [], {}, {})], tol=1e-5).empty
    diverged = {
        "steps": torch.zeros(2, dtype=torch.int64),
        "status": torch.full((2,), 2),
        "residuals": torch.empty(2, 0),
        "norm": torch.ones(2, 1),
    }
    assert curve_quantiles(split, [Part(("a", "b"), [], diverged, {})], tol=1e-5).empty


def test_the_residual_of_a_sample_that_diverged_is_infinite_not_below_the_tolerance() -> None:
    def part(factor: float, count: int) -> Part:
        path = iterate(lambda z: factor * z, torch.ones(count, 1), observers=[Norm()])
        tensors = {
            "steps": path.steps,
            "status": path.status,
            "residuals": path.residuals,
            "norm": path.measure("norm"),
        }
        return Part(tuple(map(str, range(count))), [], tensors, {})

    diverging, settling = part(10.0, 3), part(0.97, 1)
    frame = curve_quantiles(load_benchmark_split(), [diverging, settling], tol=1e-5)
    residual = frame[frame["quantity"] == "residual_sq"].set_index("step")
    end, most = int(diverging.tensors["steps"][0]), int(settling.tensors["steps"][0])
    assert 0 < end < most - 1
    assert residual.loc[end - 1, "q50"] == diverging.tensors["residuals"][0, -1] > 1e30
    assert residual.loc[end:, "q50"].tolist() == [np.inf] * (most - end)
    assert residual.loc[end : most - 2, "q05"].tolist() == settling.tensors["residuals"][0, end : most - 1].tolist()
    assert np.isnan(residual.loc[most - 1, "q05"])


# ---------------------------------------------------------------------------------------------- batches, cache


def test_batches_are_even_and_as_many_for_each_process() -> None:
    for count in (1, 2, 5, 9, 12, 100, 2000, 2049):
        for most in (1, 4, 5, 64, 2048):
            for processes in (1, 2, 3, 8):
                size = even_size(count, most, processes)
                batches = ranges_of(count, size)
                assert [i for b in batches for i in b] == list(range(count))
                assert 1 <= size <= most
                shares = [len(batches[rank::processes]) for rank in range(processes)]
                assert max(shares) == -(-count // (most * processes))  # no process waits longer than it has to
                if processes == 1:
                    assert len(batches) == -(-count // most)
    assert even_size(2000, 2048, 1) == 2000
    assert even_size(2000, 2048, 8) == 250
    assert even_size(5000, 1024, 4) == 625


def surrogate() -> SurrogateAutoencoder:
    torch.manual_seed(0)
    body = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 16))

    def transform(image: Any) -> Tensor:
        return torch.from_numpy(np.array(image, dtype=np.float32))[None] / 255

    backbone = CallableBackbone(
        lambda images: Features(body(images), None), (1, 8, 8), 16, module=body, transform=transform, chunk=4
    )
    return SurrogateAutoencoder(backbone, SurrogateNetwork(16, (16,), 8), name="surrogate")


@pytest.mark.parametrize("damaged", [False, True])
def test_cached_features_change_nothing_but_the_work(place: Path, broken: Path, tmp_path: Path, damaged: bool) -> None:
    source = broken if damaged else place
    settings = {"scorers": ("trajectory", "knn:k=3:view=backbone"), "on_error": "skip"}
    plain = evaluator(source, tmp_path / "plain", model=surrogate(), **settings)
    expected = plain.run()
    for out, batch_size in (("first", 5), ("second", 4)):
        run = evaluator(source, tmp_path / out, model=surrogate(), batch_size=batch_size, **settings)
        run.cache = FeatureCache(tmp_path / "cache")
        if out == "second" and not damaged:
            run._load = None  # type: ignore[method-assign, assignment]  # no image is read again
        assert run.run().failures == expected.failures
        pd.testing.assert_frame_equal(table(run), table(plain), check_exact=True)


def load_benchmark_split() -> Any:
    from traj_ood.data import ArrayImages, Split

    return Split("test", "test", ArrayImages(("a", "b", "c"), np.zeros((3, 2, 2), dtype=np.uint8)))


def test_result_is_plain_json(done: tuple[Evaluator, Result]) -> None:
    tree = json.loads((done[0].folder / "result.json").read_text())
    assert tree["scorers"]["trajectory"]["near"]["auroc"] == done[1].scorers["trajectory"].sets["dim"].metrics.auroc
