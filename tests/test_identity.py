"""Identity is content: no cache and no resumed run gives numbers of other images, another transform or other code.

Each right value is computed again in an empty folder.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from PIL import Image
from torch import Tensor, nn
from toy_autoencoder import LinearAutoencoder

from traj_ood import surrogate_for
from traj_ood.autoencoders import CallableAutoencoder
from traj_ood.backbones import CallableBackbone, Features
from traj_ood.backbones.feature_cache import FeatureCache
from traj_ood.data import ArrayImages, Benchmark, FileImages, Split, load_benchmark, read_folder
from traj_ood.data import images as data_images
from traj_ood.dynamics.behaviour import answers, transform_digest
from traj_ood.errors import TrajOODError
from traj_ood.evaluation import evaluator as evaluator_module
from traj_ood.evaluation import identity as identity_module
from traj_ood.evaluation.evaluator import Evaluator, RunConfig
from traj_ood.evaluation.leaderboard import leaderboard
from traj_ood.evaluation.leaderboard_text import render
from traj_ood.evaluation.results import Result
from traj_ood.io import provenance
from traj_ood.io.parts import PartStore
from traj_ood.scorers import SCORERS
from traj_ood.scorers.scorer_set import Scored, ScorerSet
from traj_ood.training.surrogate import SurrogateRecipe

QUICK = SurrogateRecipe(steps=4, check_every=2, hidden=(8,), bottleneck=4)


def darker(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image.convert("L").resize((8, 8)), dtype=np.float32))[None] / 1000


@pytest.fixture
def place(tmp_path: Path) -> Path:
    tiny.write_benchmark(tmp_path)
    return tmp_path


def run_of(place: Path, out: str = "out", *, model: Any = None, batch_size: int = 3, **options: Any) -> Evaluator:
    bench = load_benchmark(str(place / "tiny.yaml"))
    config = RunConfig(scorers=("knn:k=3", "first-residual"), max_steps=4, resamples=0)
    settings = {"quiet": True, "pictures": False, "batch_size": batch_size} | options
    return Evaluator(model or tiny.conv(), bench, config, place / out, **settings)


def scores(run: Evaluator) -> pd.DataFrame:
    return pd.read_parquet(run.folder / "scores.parquet")


def other_picture(path: Path, seed: int = 99) -> None:
    """Another picture under the same name, with the old time of modification."""
    old = path.stat()
    tiny.write_images(path.parent / "new", 1, seed)
    (path.parent / "new" / "000.png").replace(path)
    (path.parent / "new").rmdir()
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))


def stop_at(monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    """Interrupt scoring before that batch (counted over test and OOD sets)."""
    save, calls = PartStore.save, []

    def counting(self: PartStore, key: str, *args: Any) -> None:
        calls.extend([1] * (not key.startswith("train-")))
        if len(calls) == batch:
            raise KeyboardInterrupt
        save(self, key, *args)

    monkeypatch.setattr(PartStore, "save", counting)


def same(one: Evaluator, other: Evaluator) -> bool:
    return scores(one).equals(scores(other))


# ---------------------------------------------------------------------------------------------- bench


@pytest.mark.parametrize("name", ["train/004.png", "test/001.png", "far/008.png"])
def test_a_finished_run_is_not_that_of_other_pictures(place: Path, name: str) -> None:
    run_of(place).run()
    other_picture(place / "images" / name)
    split = {"train": "train", "test": "test", "far": "bright"}[name.split("/")[0]]
    with pytest.raises(
        TrajOODError,
        match=rf"has a run with another data \(1 of \d+ images of split '{split}' have changed: '{split}/"
        rf"{name.split('/')[1]}'\): choose another --out, or discard it with --fresh",
    ):
        run_of(place).run()
    again = run_of(place)
    again.run(fresh=True)
    fresh = run_of(place, "elsewhere")
    fresh.run()
    assert same(again, fresh)


def test_many_changes_are_counted_and_the_first_are_named(place: Path) -> None:
    run_of(place).run()
    tiny.write_images(place / "images" / "far", 9, seed=77)
    other_picture(place / "images" / "test" / "000.png")
    words = (
        r"1 of 10 images of split 'test' have changed: 'test/000\.png'; 9 of 9 images of split 'bright' have changed: "
        r"'bright/000\.png', 'bright/001\.png', 'bright/002\.png', …\)"
    )
    with pytest.raises(TrajOODError, match=words):
        run_of(place).run()


def test_a_killed_run_never_mixes_pictures(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, 3)  # of the test images, 000 to 005 have their scores
        with pytest.raises(KeyboardInterrupt):
            run_of(place).run()
    read, unread = place / "images" / "test" / "001.png", place / "images" / "test" / "009.png"
    before = read.read_bytes()
    other_picture(read)
    with pytest.raises(TrajOODError, match=r"another data \(1 of 10 images of split 'test' have changed: 'test/001"):
        run_of(place).run()
    read.write_bytes(before)
    other_picture(unread)  # no score was made of it: the run goes on with what is there
    resumed = run_of(place)
    resumed.run()
    fresh = run_of(place, "elsewhere")
    fresh.run()
    assert same(resumed, fresh)
    other_picture(unread, seed=5)
    with pytest.raises(TrajOODError, match=r"1 of 10 images of split 'test' have changed: 'test/009\.png'"):
        run_of(place).run()


def test_pictures_replaced_while_the_run_is_at_work(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    score, path = ScorerSet.score_all, place / "images" / "test" / "004.png"
    before = path.read_bytes()

    def replaced_meanwhile(self: ScorerSet, *args: Any) -> Iterator[Scored]:
        for scored in score(self, *args):
            other_picture(path)
            yield scored

    with monkeypatch.context() as patch:
        patch.setattr(ScorerSet, "score_all", replaced_meanwhile)
        with pytest.raises(TrajOODError, match=r"split 'test': 1 image\(s\) changed while .*, first 'test/004\.png'"):
            run_of(place, batch_size=5).run()
    path.write_bytes(before)  # whoever puts the old one back must not get scores of the new one
    resumed = run_of(place, batch_size=5)
    resumed.run()
    fresh = run_of(place, "elsewhere", batch_size=5)
    fresh.run()
    assert same(resumed, fresh)


def test_runs_of_other_code(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run_of(place)
    result = first.run()
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            run_of(place, "killed").run()
    for module in (evaluator_module, identity_module):
        monkeypatch.setattr(module, "code_digest", lambda: "0" * 16)
    with pytest.warns(
        UserWarning,
        match=r"a finished run made by another version of the code \(traj_ood .*, commit .*\), whose results",
    ):
        assert run_of(place, pictures=True).run() == result
    older = replace(result, versions={**result.versions, "torch": "1.0"})
    older.save(first.folder / "result.json")
    with pytest.warns(UserWarning, match=r"commit [^;]*; torch 1\.0 there, \S+ here\), whose results"):
        run_of(place).run()
    result.save(first.folder / "result.json")
    assert not (first.folder / "gallery.safetensors").exists()
    with pytest.raises(
        TrajOODError, match=r"has a run with another code \(code: that of traj_ood, of a .*: choose another --out"
    ):
        run_of(place, "killed").run()


def test_results_older_than_digests_of_contents(place: Path) -> None:
    first = run_of(place)
    result = first.run()
    data = {name: {k: entry[k] for k in ("role", "count", "sha256")} for name, entry in result.data.items()}
    versions = {k: v for k, v in result.versions.items() if k != "code"}
    model = {k: result.model[k] for k in ("name", "family", "fingerprint", "parameters")}
    old = replace(result, data=data, versions=versions, model=model)
    old.save(first.folder / "result.json")
    (first.folder / "images.parquet").unlink()
    with pytest.warns(UserWarning, match="a finished run made by another version of the code"):
        assert run_of(place).run() == old
    assert set(leaderboard([old, replace(result, seed=1)])["seeds"]) == {2}  # of the same list, as before


@pytest.mark.parametrize(
    "other",
    [
        {"transform": darker},
        {"encode": lambda x: x.flatten(1) * 2},
        {"decode": lambda z: z.reshape(-1, 1, 8, 8) / 3},
    ],
    ids=["transform", "encode", "decode"],
)
def test_callables_are_known_by_what_they_do(place: Path, other: dict[str, Callable[..., Tensor]]) -> None:
    def model(**changes: Any) -> CallableAutoencoder:
        parts = {"encode": lambda x: x.flatten(1), "decode": lambda z: z.reshape(-1, 1, 8, 8) / 2} | changes
        return CallableAutoencoder(parts.pop("encode"), parts.pop("decode"), (1, 8, 8), **parts)

    first = run_of(place, model=model()).run()
    assert run_of(place, model=model()).run() == first  # other functions that do the same
    with pytest.raises(TrajOODError, match=r"has a run with another model \(model.*: choose another --out"):
        run_of(place, model=model(**other)).run()


def test_a_class_of_the_users_own_is_known_by_what_it_does(place: Path) -> None:
    class Own(LinearAutoencoder):
        brightness = 1.0

        def decode_batch(self, latents: Tensor) -> Tensor:
            return super().decode_batch(latents) * self.brightness

    class Edited(Own):
        brightness = 0.5

    first = run_of(place, model=Own(5)).run()
    assert run_of(place, model=Own(5)).run() == first
    with pytest.raises(TrajOODError, match=r"another model \(model: its code has changed\): choose another"):
        run_of(place, model=Edited(5)).run()


def test_code_counts_that_answers_alike_for_one_picture(place: Path) -> None:
    def model(threshold: float) -> CallableAutoencoder:
        def decode(latents: Tensor) -> Tensor:  # differs for very bright images alone
            return latents.clamp(max=threshold).reshape(-1, 1, 8, 8) / 2

        return CallableAutoencoder(lambda x: x.flatten(1), decode, (1, 8, 8))

    first = run_of(place, model=model(50.0)).run()
    assert run_of(place, model=model(50.0)).run() == first
    with pytest.raises(TrajOODError, match=r"another model \(model: its code has changed\): choose another"):
        run_of(place, model=model(60.0)).run()


class Brightened(nn.Module):
    """Its decoder multiplies by an attribute that is no weight."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def encode(self, images: Tensor) -> Tensor:
        return 50 * images.flatten(1)

    def decode(self, latents: Tensor) -> Tensor:
        return (0.5 + 0.01 * self.factor * latents.sigmoid()).reshape(-1, 1, 8, 8)


@pytest.mark.parametrize("factor", [1.1, 1.3, 3.0])
def test_the_decoder_counts_beside_latents_of_another_size(
    place: Path, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    def model(factor: float) -> CallableAutoencoder:
        return CallableAutoencoder.from_module(Brightened(factor), (1, 8, 8))

    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            run_of(place, model=model(1.0)).run()
    first = run_of(place, model=model(1.0))
    first.run()
    with pytest.raises(
        TrajOODError, match=r"another model \(model: its code, or what it reads, gives other answers\): choose another"
    ):
        run_of(place, model=model(factor)).run()


def test_answers_do_not_depend_on_torchs_default_type() -> None:
    def found() -> list[list[float]]:
        return answers(lambda images: (images.flatten(1), images.double().square()), (3, 96, 96))

    expected = found()
    torch.set_default_dtype(torch.float64)
    try:
        assert found() == expected
    finally:
        torch.set_default_dtype(torch.float32)


def test_answers_of_an_earlier_version_are_not_compared(place: Path) -> None:
    """Which were one list for E and D; the digest of the code still is."""

    def model(factor: float) -> CallableAutoencoder:
        return CallableAutoencoder(
            lambda x: x.flatten(1), lambda z: factor * z.reshape(-1, 1, 8, 8), (1, 8, 8), name="own"
        )

    run = run_of(place, model=model(0.5))
    first = run.run()
    tree = json.loads((run.folder / "result.json").read_text())
    tree["model"]["answers"] = [0.5] * 8
    (run.folder / "result.json").write_text(json.dumps(tree))
    assert run_of(place, model=model(0.5)).run().scorers == first.scorers
    with pytest.raises(TrajOODError, match=r"another model \(model: its code has changed\)"):
        run_of(place, model=model(0.6)).run()


NOTEBOOK = """
from dataclasses import dataclass
from typing import ClassVar
import traj_ood

@dataclass
class Cell(traj_ood.FeatureScorer):
    name: ClassVar[str] = "cell"
    summary: ClassVar[str] = "of a notebook"

    def learn(self, train):
        return {}

    def score(self, evidence):
        return self.features(evidence).cpu().double().amin(dim=1)
"""


def test_a_scorer_of_a_notebook_is_known_by_its_code(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = ModuleType("notebook")
    monkeypatch.setitem(sys.modules, "notebook", notebook)

    def run(source: str) -> Result:
        exec(source, vars(notebook))  # of a class that no file holds
        monkeypatch.setitem(SCORERS, "cell", notebook.Cell)
        config = RunConfig(scorers=("cell",), max_steps=4, resamples=0)
        bench = load_benchmark(str(place / "tiny.yaml"))
        return Evaluator(tiny.conv(), bench, config, place / "out", quiet=True, pictures=False).run()

    first = run(NOTEBOOK)
    assert run(NOTEBOOK + "# of another cell") == first
    for other in (NOTEBOOK.replace("amin", "amax"), NOTEBOOK.replace("dim=1", "dim=-1")):
        with pytest.raises(TrajOODError, match=r"another config \(config.scorers: another version of cell\)"):
            run(other)


def test_other_weights_are_not_called_other_code(place: Path) -> None:
    model = LinearAutoencoder(5)
    run_of(place, model=model).run()
    model.module.weight.copy_(model.module.weight.flip(1))
    with pytest.raises(TrajOODError, match=r"another model \(model\.fingerprint: \S+ there, \S+ here\)"):
        run_of(place, model=model).run()


# ---------------------------------------------------------------------------------------------- copies


def copy(place: Path, source: str, *targets: str) -> None:
    for target in targets:
        (place / "images" / target).write_bytes((place / "images" / source).read_bytes())


def test_copies_are_counted_named_and_refused_or_warned_of(place: Path) -> None:
    copy(place, "train/003.png", "test/000.png", "test/007.png", "far/002.png")
    words = (
        r"2 of 10 images of 'test' are copies of images of 'train' \(first: 'test/000\.png' of 'train/003\.png'\); "
        r"1 of 9 images of 'bright' are copies of images of 'train' .*; 1 of 9 images of 'bright' .* 'test'"
    )
    for default in (None, "error"):
        with pytest.raises(TrajOODError, match=rf"benchmark 'tiny': {words}.*--on-duplicates warn"):
            run_of(place, on_duplicates=default).run()
    with pytest.warns(UserWarning, match="2 of 10 images of 'test' are copies of images of 'train'"):
        result = run_of(place, on_duplicates="warn").run()
    assert result.data["test"]["copies"] == {"train": 2}
    assert result.data["bright"]["copies"] == {"train": 1, "test": 1}
    assert "copies" not in result.data["dim"]
    assert Result.load(place / "out" / result.name / "result.json") == result
    assert "⚠ 2 of 10 images of `test` are copies of images of `train`." in render([result])
    with pytest.raises(TrajOODError, match="unknown value of on_duplicates 'eror': did you mean 'error'"):
        run_of(place, on_duplicates="eror")


def test_a_few_copies_are_a_warning_and_none_are_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy(place, "near/003.png", "far/000.png")  # OOD sets may share a few images
    assert load_benchmark(str(place / "tiny.yaml")).copies() == []
    copy(place, "train/003.png", "test/000.png")
    monkeypatch.setattr(evaluator_module, "_MAX_COPIED_SHARE", 0.1)
    with pytest.warns(UserWarning, match="1 of 10 images of 'test' are copies"):
        run_of(place).run()
    with pytest.raises(TrajOODError, match="1 of 10 images of 'test' are copies"):
        run_of(place, "strict", on_duplicates="error").run()


def test_two_ood_sets_of_the_same_images_are_not_two_sets(place: Path) -> None:
    for number in range(4):  # less than half of 9: real sets overlap
        copy(place, f"near/{number:03}.png", f"far/{number:03}.png")
    assert load_benchmark(str(place / "tiny.yaml")).copies() == []
    copy(place, "near/004.png", "far/004.png")
    with pytest.raises(TrajOODError, match="5 of 9 images of 'bright' are copies of images of 'dim'"):
        run_of(place).run()


def test_copies_in_memory_and_files_of_no_bytes(place: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 8, 8)).astype(np.uint8)
    pixels[7] = pixels[2]

    def split(name: str, role: Any, rows: slice) -> Split:
        return Split(name, role, ArrayImages(tuple(f"{name}/{i}" for i in range(rows.start, rows.stop)), pixels[rows]))

    parts = split("train", "train", slice(0, 3)), split("test", "test", slice(3, 6)), split("far", "far", slice(6, 9))
    bench = Benchmark("memory", parts[0], None, parts[1], (parts[2],))
    assert [(str(c), c.count) for c in bench.copies()] == [
        ("1 of 3 images of 'far' are copies of images of 'train' (first: 'far/7' of 'train/2')", 1)
    ]
    for name in ("train/000.png", "test/000.png"):
        (place / "images" / name).write_bytes(b"")
    assert load_benchmark(str(place / "tiny.yaml")).copies() == []


def surrogate_run(place: Path, out: str = "out", **options: Any) -> Evaluator:
    """A run that samples 4 of the training images, all of which its surrogate has learnt from."""
    bench = load_benchmark(str(place / "tiny.yaml"))
    model = surrogate_for(backbone(), bench, out=place / "cache", recipe=QUICK, quiet=True)
    config = RunConfig(scorers=("knn:k=3",), attractors=4, resamples=0)
    return Evaluator(model, bench, config, place / out, quiet=True, pictures=False, **options)


def unsampled(run: Evaluator) -> list[str]:
    return sorted(set(run.benchmark.train.images.ids) - set(run.sample.train.images.ids))


@pytest.mark.filterwarnings("ignore:surrogate of b. unhealthy")
def test_copies_of_what_a_surrogate_has_learnt_from_are_copies_of_training_images(tmp_path: Path) -> None:
    tiny.write_benchmark(tmp_path, train=40)
    first, second, *_ = unsampled(surrogate_run(tmp_path))
    assert surrogate_run(tmp_path).run().data["test"].get("copies") is None
    copy(tmp_path, first, "test/000.png", "test/007.png")
    copy(tmp_path, second, "far/002.png")
    words = (
        rf"2 of 10 images of 'test' are copies of images of 'train', from which the surrogate has learnt \(first: "
        rf"'test/000\.png' of '{first}'\); 1 of 9 images of 'bright' are copies of images of 'train', from which"
    )
    with pytest.raises(TrajOODError, match=rf"benchmark 'tiny': {words}.*--on-duplicates warn"):
        surrogate_run(tmp_path, "copied").run()
    with pytest.warns(UserWarning, match="2 of 10 images of 'test' are copies of images of 'train', from which the"):
        result = surrogate_run(tmp_path, "copied", on_duplicates="warn").run()
    assert result.data["test"]["copies"] == {"train": 2}
    data = {**result.data, "test": {**result.data["test"], "copies": {"train": 1}}}
    old = replace(result, data=data)  # of a version that counted sampled images only
    old.save(tmp_path / "copied" / result.name / "result.json")
    assert surrogate_run(tmp_path, "copied").run() == old


def test_what_a_surrogate_has_learnt_from_is_known_by_its_record(tmp_path: Path) -> None:
    bench = load_benchmark(str(tiny.write_benchmark(tmp_path, train=40)))
    model = surrogate_for(backbone(), bench, out=tmp_path / "cache", recipe=QUICK, quiet=True, limit=33)
    learnt = model.learnt_from(bench.train)
    assert learnt is not None
    assert learnt.digest() == model.record["data"]["sha256"]
    assert len(learnt) == 33
    path = tmp_path / "images" / learnt.ids[5]
    before = path.read_bytes()
    other_picture(path)
    assert model.learnt_from(bench.train) is None
    path.write_bytes(before)
    assert model.learnt_from(bench.test) is None
    model.record = {}
    assert model.learnt_from(bench.train) is None


@pytest.mark.filterwarnings("ignore:surrogate of b. unhealthy")
def test_training_images_that_changed_are_named_where_a_surrogate_has_learnt_from_them(tmp_path: Path) -> None:
    tiny.write_benchmark(tmp_path, train=40)
    run = surrogate_run(tmp_path)
    run.run()
    sampled, first = run.sample.train.images.ids[0], unsampled(run)[0]
    before = (tmp_path / "images" / sampled).read_bytes()
    other_picture(tmp_path / "images" / sampled)
    one = rf"1 of 4 images of split 'train' have changed: '{sampled}'"
    with pytest.raises(TrajOODError, match=rf"has a run with another model, data \({one}\): choose another --out, or"):
        surrogate_run(tmp_path).run()
    (tmp_path / "images" / sampled).write_bytes(before)
    other_picture(tmp_path / "images" / first)
    other = rf"1 of 40 images that the surrogate has learnt from have changed: '{first}'"
    with pytest.raises(TrajOODError, match=rf"has a run with another model \({other}\): choose another --out, or"):
        surrogate_run(tmp_path).run()
    other_picture(tmp_path / "images" / sampled)
    two = rf"{one}; 2 of 40 images that the surrogate has learnt from have changed: '{first}', '{sampled}'"
    with pytest.raises(TrajOODError, match=rf"has a run with another model, data \({two}\): choose another --out, or"):
        surrogate_run(tmp_path).run()
    table = pd.read_parquet(run.folder / "images.parquet")
    table[table["split"] != "learnt by the surrogate"].to_parquet(run.folder / "images.parquet")  # an older version's
    with pytest.raises(TrajOODError, match=rf"another model, data \(model\.fingerprint: .* here; {one}\): "):
        surrogate_run(tmp_path).run()


def test_the_same_list_with_other_pictures_is_another_row(place: Path) -> None:
    one = run_of(place).run()
    other_picture(place / "images" / "far" / "000.png")
    two = replace(run_of(place, "elsewhere").run(), seed=1)
    assert one.data["bright"]["sha256"] == two.data["bright"]["sha256"]
    table = leaderboard([one, two])
    assert set(table["seeds"]) == {1}
    assert all(text.startswith("data.bright=") for text in table["variant"])


# ---------------------------------------------------------------------------------------------- features, surrogates


def backbone(transform: Any = None, scale: float = 1.0) -> CallableBackbone:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.ReLU())
    return CallableBackbone(
        lambda x: Features(scale * body(x), None), (1, 8, 8), 6, module=body, name="b", transform=transform, chunk=8
    )


def extracted(cache: FeatureCache, net: CallableBackbone, images: FileImages) -> tuple[Tensor, int]:
    """Features of all images through the cache, and how many images it read."""
    asked: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        opened = data_images.open_image
        patch.setattr(data_images, "open_image", lambda path, *options: asked.append(path) or opened(path, *options))
        answer = cache.extract(net, images, range(len(images)))[1]
    assert answer is not None
    return answer.features, len(asked)


def direct(net: CallableBackbone, images: FileImages) -> Tensor:
    return net.extract(torch.stack([net.transform(images.load(i)) for i in range(len(images))])).features


def test_features_belong_to_bytes_transform_and_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed, name in enumerate(("a", "b")):
        tiny.write_images(tmp_path / name, 5, seed)
    a, b, cache = read_folder(tmp_path / "a"), read_folder(tmp_path / "b"), tmp_path / "cache"
    for images, net in ((a, backbone()), (b, backbone()), (a, backbone(darker))):  # equal names, equal weights
        found, read = extracted(FeatureCache(cache), net, images)
        assert read == 5
        torch.testing.assert_close(found, direct(net, images))
        assert extracted(FeatureCache(cache), net, images)[1] == 0
    other_picture(tmp_path / "a" / "002.png")
    found, read = extracted(FeatureCache(cache), backbone(), a)
    assert read == 5
    torch.testing.assert_close(found, direct(backbone(), a))
    with pytest.raises(TrajOODError, match="with the same name 'b' and weights, but other outputs"):
        extracted(FeatureCache(cache), backbone(scale=2.0), a)
    distrusting = FeatureCache(cache)
    distrusting.distrust()
    assert [extracted(distrusting, backbone(), a)[1] for _ in range(2)] == [5, 0]
    monkeypatch.setattr("traj_ood.backbones.feature_cache.package_digest", lambda: "0" * 16)
    assert [extracted(FeatureCache(cache), backbone(), a)[1] for _ in range(2)] == [5, 0]


def test_features_of_images_that_change_meanwhile_are_not_kept(tmp_path: Path) -> None:
    tiny.write_images(tmp_path / "a", 5, 0)
    images, net = read_folder(tmp_path / "a"), backbone()

    def overwritten(images: Tensor) -> Features:
        other_picture(tmp_path / "a" / "003.png")
        return net.forward_batch(images)

    busy = CallableBackbone(overwritten, (1, 8, 8), 6, module=net.module, name="b", chunk=8)
    busy.extract(torch.zeros(1, 1, 8, 8))  # whose trial is before the images are read
    tiny.write_images(tmp_path / "a", 5, 0)
    with pytest.raises(TrajOODError, match=r"1 image\(s\) changed while they were being read, first '003\.png'"):
        FeatureCache(tmp_path / "cache").extract(busy, images, range(5))
    assert list((tmp_path / "cache").rglob("*.safetensors")) == []


def test_surrogates_belong_to_bytes_transform_and_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = load_benchmark(str(tiny.write_benchmark(tmp_path, train=33)))

    def fitted(cache: str, transform: Any = None, fresh: bool = False) -> dict[str, Any]:
        out = tmp_path / cache
        model = surrogate_for(backbone(transform), bench, out=out, recipe=QUICK, quiet=True, fresh=fresh)
        return model.record

    first = fitted("cache")
    assert fitted("cache")["log"] == first["log"]  # seconds included: it was loaded
    other_picture(tmp_path / "images" / "train" / "007.png")
    replaced, alone = fitted("cache"), fitted("empty")
    assert replaced["fingerprint"] == alone["fingerprint"] != first["fingerprint"]
    assert fitted("cache", darker)["fingerprint"] == fitted("empty2", darker)["fingerprint"]
    for module in ("training.surrogate_cache", "io.parts", "io.provenance"):
        monkeypatch.setattr(f"traj_ood.{module}.code_digest", lambda: "0" * 16)
    later = fitted("cache")
    assert later["versions"]["code"] == "0" * 16
    assert later["fingerprint"] == replaced["fingerprint"]
    assert fitted("cache")["log"] == later["log"]


# ---------------------------------------------------------------------------------------------- transforms and code


def test_transforms_are_told_apart_and_may_refuse() -> None:
    def refuse(image: Image.Image) -> Tensor:
        raise ValueError(image.mode)

    functions = [darker, refuse, lambda image: darker(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)), lambda _: None]
    assert len({transform_digest(f, (1, 8, 8)) for f in functions}) == 4  # type: ignore[arg-type]
    assert transform_digest(darker, (1, 8, 8)) == transform_digest(lambda image: darker(image), (1, 8, 8))


def test_a_transform_that_takes_one_size_alone_is_known_by_what_it_does(place: Path) -> None:
    def model(scale: float) -> CallableAutoencoder:
        def transform(image: Image.Image) -> Tensor:
            return torch.from_numpy(np.asarray(image.convert("L"), dtype=np.float32))[None] * scale

        return CallableAutoencoder(
            lambda x: x.flatten(1), lambda z: z.reshape(-1, 1, 8, 8) / 2, (1, 8, 8), transform=transform
        )

    for path in (place / "images").rglob("*.png"):
        Image.open(path).resize((8, 8)).save(path)
    first = run_of(place, model=model(0.01)).run()
    assert run_of(place, model=model(0.01)).run() == first
    with pytest.raises(TrajOODError, match=r"another model \(model\.transform: .*\): choose another --out"):
        run_of(place, model=model(0.02)).run()


def test_code_that_was_digested_in_an_earlier_way_is_not_compared(place: Path) -> None:
    model = CallableAutoencoder(lambda x: x.flatten(1), lambda z: z.reshape(-1, 1, 8, 8) / 2, (1, 8, 8))
    run = run_of(place, model=model)
    run.run()
    file = run.folder / "result.json"
    tree = json.loads(file.read_text())
    way, _ = tree["model"]["own_code"].split(" ")
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    for written, told in ((f"{python} 00", None), (f"{way} 00", "its code has changed")):
        tree["model"]["own_code"] = written
        file.write_text(json.dumps(tree))
        with pytest.raises(TrajOODError, match=told) if told else nullcontext():
            run_of(place, model=model).run()


def test_the_code_that_decides_numbers_is_known_by_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {path.relative_to(provenance.PACKAGE).as_posix() for path in provenance.deciding_files()}
    assert {
        "dynamics/iterate.py",
        "data/images.py",
        "backbones/base.py",
        "scorers/base.py",
        "training/loop.py",
    } <= names
    assert not {name for name in names if name.startswith(("cli/", "report/", "evaluation/plots"))}
    for start in provenance._WITHOUT_EFFECT:
        assert list(provenance.PACKAGE.glob(f"{start}*")), f"{start} is no longer there"
    monkeypatch.setattr(provenance, "PACKAGE", tmp_path)
    (tmp_path / "cli").mkdir()
    digests = []
    for name, text in (
        ("a.py", "1"),
        ("a.py", "2"),
        ("b.py", "1"),
        ("cli/x.py", "1"),
        ("b.py", "1\r\n"),
        ("b.py", "1\n"),
    ):
        (tmp_path / name).write_bytes(text.encode())
        digests.append(provenance.package_digest.__wrapped__())
    assert len(set(digests[:3])) == 3
    assert digests[3] == digests[2]
    assert digests[5] == digests[4]
    monkeypatch.setattr(provenance.metadata, "version", lambda name: "0.0")  # of the libraries, too
    assert provenance.package_digest.__wrapped__() != digests[5]
