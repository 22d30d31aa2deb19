"""What is left when things go wrong: benchmarks/reliability.py in small, locks, seals, and properties of any input."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import warnings
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from traj_ood.autoencoders import load_autoencoder
from traj_ood.data import load_benchmark
from traj_ood.data.preprocessing import Normalised
from traj_ood.detector import Detector
from traj_ood.errors import TrajOODError
from traj_ood.evaluation.evaluator import Evaluator, RunConfig
from traj_ood.evaluation.results import Result
from traj_ood.io.files import alone_in
from traj_ood.scorers.scorer_set import ScorerSet
from traj_ood.training.config import TrainConfig

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, file locks and /proc are tested on Linux")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def scripts() -> Iterator[dict[str, ModuleType]]:
    """The scripts of benchmarks/, which are no package."""
    modules = {}
    for name in ("corruptions", "reliability"):
        spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        modules[name] = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(modules[name])
    yield modules
    for name in modules:
        del sys.modules[name]


@pytest.fixture(scope="module")
def reliability(scripts: dict[str, ModuleType]) -> Any:
    return scripts["reliability"]


@pytest.fixture(scope="module")
def place(reliability: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return reliability.Place(tmp_path_factory.mktemp("place") / "in", forked=True, images=30)


# ---------------------------------------------------------------------------------------------- the script in small


@pytest.mark.slow
def test_killed_runs_resume_to_the_same_results(reliability: Any, place: Any) -> None:
    moments, images = 8, 5000
    record = reliability.kill(place, moments, seed=0, images=images)
    assert {name: record[name]["identical_after_resuming"] for name in record} == {"bench": moments, "score": moments}
    rows = [int(text.split()[0]) for text in record["score"]["killed_when_there_was"] if text.endswith("rows")]
    assert rows
    assert all(0 < count <= images for count in rows)


@pytest.mark.slow
def test_full_and_read_only_disks(reliability: Any, place: Any) -> None:
    record = reliability.disk(place, shares=[0.5])
    assert record.keys() in ({"full", "read_only"}, {"tmpfs", "file_limit"})


@pytest.mark.slow
def test_files_of_limited_size_stand_in_for_a_full_disk(reliability: Any, place: Any) -> None:
    assert len(reliability.limited_files(place)) == 2


@pytest.mark.slow
def test_two_processes_on_one_folder(reliability: Any, place: Any) -> None:
    record = reliability.together(place, rounds=1, seed=0)
    assert record.keys() == {"bench", "score", "bench --fresh of other settings", "fit"}


@pytest.mark.slow
def test_soak_in_small(reliability: Any, place: Any) -> None:
    record = reliability.soak(place, images=1000, seconds_between=0.05)
    assert record["images"] == 1000
    assert record.get("resident_mib_last", 0) <= record.get("resident_mib_most", 0)


def test_a_broken_promise_is_noticed(reliability: Any, place: Any, tmp_path: Path) -> None:
    command = place.run("score", place.folder / "detector", tmp_path / "nothing.png", "--device", "cpu", "--quiet")
    with pytest.raises(reliability.BrokenPromiseError, match="exit code 3 instead of 0: score"):
        command.must_end(0)
    refused = place.run("score", tmp_path / "nothing", "x.png", "--device", "cpu", "--quiet")
    assert "expected a folder with detector.json, found nothing" in refused.must_be_refused("nothing")


@pytest.mark.filterwarnings("ignore:.*(unhealthy attractors|saved with)")  # of what is damaged on purpose
@pytest.mark.parametrize("cases", [8, pytest.param(60, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name",
    [
        "detector vit field",
        "detector conv trajectory",
        "resealed vit",
        "resealed conv",
        "model vit",
        "model conv",
        "image list",
        "benchmark YAML",
        "training YAML",
        "images",
    ],
)
def test_damage_is_refused_or_harmless(
    subjects: dict[str, Any], scripts: dict[str, ModuleType], name: str, cases: int
) -> None:
    found = scripts["corruptions"].run_cases(subjects[name], cases, seed=1)
    assert found.findings == []
    record = found.record()
    assert record["cases"] == cases
    assert record["refused"] > 0


@pytest.fixture(scope="module")
def subjects(scripts: dict[str, ModuleType], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # attractors of random weights
        return {s.name: s for s in scripts["corruptions"].subjects(tmp_path_factory.mktemp("subjects"))}


def test_score_goes_on_after_damaged_images(reliability: Any, place: Any) -> None:
    record = reliability.score_damaged(place, cases=40, seed=0)
    assert record["findings"] == []
    assert record["errors"] > 10


def test_no_source_runs_what_a_file_says(reliability: Any) -> None:
    assert reliability.unsafe_sources() == []
    for line in ("x = eval(text)", "torch.load(path)", "yaml.load(text)", "os.system(command)"):
        assert reliability.UNSAFE.search(line)
    for line in ("model.eval()", "re.compile(x)", "yaml.safe_load(text)"):
        assert not reliability.UNSAFE.search(line)


# ---------------------------------------------------------------------------------------------- locks and seals


def test_alone_in_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    with alone_in(folder), pytest.raises(TrajOODError, match="b: in use by another process"), alone_in(folder):
        pass
    assert not (tmp_path / "a").exists()  # nothing was written to it
    with alone_in(folder):
        (folder / "x").write_text("")
    with alone_in(folder):
        assert [p.name for p in folder.iterdir()] == ["x"]
    (tmp_path / "file").write_text("")
    in_the_way = r"file: expected a folder that can be written, got: File exists"
    with pytest.raises(TrajOODError, match=in_the_way), alone_in(tmp_path / "file"):
        pass


def test_a_run_that_is_at_work_is_left_alone_and_fresh_keeps_its_lock(tmp_path: Path) -> None:
    data = load_benchmark(str(tiny.write_benchmark(tmp_path)))

    def run(**changes: Any) -> Evaluator:
        config = RunConfig(scorers=("steps",), max_steps=4, resamples=0, **changes)
        return Evaluator(tiny.conv(), data, config, tmp_path / "out", quiet=True, pictures=False)

    first = run()
    with alone_in(first.folder):
        for fresh in (False, True):
            with pytest.raises(TrajOODError, match="in use by another process"):
                run().run(fresh=fresh)
    assert not (tmp_path / "out").exists()
    first.run()
    inode = first.folder.stat().st_ino
    (first.folder / "parts").mkdir()
    (first.folder / "parts" / "test-00000000.safetensors").write_bytes(b"of an older run")
    assert Result.load(run(tol=1.0).run(fresh=True) and first.folder / "result.json").config["tol"] == 1.0
    assert first.folder.stat().st_ino == inode


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("make", [tiny.vit, tiny.conv])
def test_a_model_that_was_changed_after_saving_is_refused(tmp_path: Path, make: Any) -> None:
    model = make()
    model.save_pretrained(tmp_path)
    assert load_autoencoder(tmp_path).fingerprint() == model.fingerprint()
    whole = (tmp_path / "model.safetensors").read_bytes()
    for place in range(len(whole) - 400, len(whole), 150):
        changed = bytearray(whole)
        changed[place] ^= 1
        (tmp_path / "model.safetensors").write_bytes(bytes(changed))
        with pytest.raises(TrajOODError, match=r"model\.safetensors: damaged or edited: it or the JSON files beside"):
            load_autoencoder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(whole)
    config = (tmp_path / "config.json").read_text()
    edit(tmp_path / "config.json", **({"mean": [0.25]} if "mean" in json.loads(config) else {"hidden_act": "relu"}))
    with pytest.raises(TrajOODError, match="damaged or edited"):
        load_autoencoder(tmp_path)
    (tmp_path / "config.json").write_text(config)
    edit(tmp_path / "config.json", transformers_version="9.0", _name_or_path="elsewhere")
    assert load_autoencoder(tmp_path).fingerprint() == model.fingerprint()
    save_file(load_file(tmp_path / "model.safetensors"), tmp_path / "model.safetensors")  # as others write it
    assert load_autoencoder(tmp_path).fingerprint() == model.fingerprint()


@pytest.mark.parametrize("value", [33_536, 10**12, 10**4000, 1e300])
@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "image_size", "decoder_hidden_size"])
def test_a_config_that_asks_for_all_memory_is_refused_before_it_gets_any(tmp_path: Path, key: str, value: Any) -> None:
    tiny.vit().save_pretrained(tmp_path)
    edit(tmp_path / "config.json", **{key: value})
    with pytest.raises(TrajOODError, match=rf"{key}: expected at most|another architecture|impossible geometry"):
        load_autoencoder(tmp_path)


@pytest.mark.parametrize("key", ["width", "bottleneck", "size", "channels"])
def test_a_conv_config_that_asks_for_all_memory_is_refused(tmp_path: Path, key: str) -> None:
    tiny.conv().save_pretrained(tmp_path)
    network = json.loads((tmp_path / "config.json").read_text())["network"]
    edit(tmp_path / "config.json", network={**network, key: 10**9})
    with pytest.raises(TrajOODError, match=f"{key}: expected at most"):
        load_autoencoder(tmp_path)


@pytest.mark.parametrize("value", ["[" * 2000, "2001-99-99", "9" * 5000], ids=["nesting", "date", "number"])
def test_yaml_that_python_cannot_read_is_refused_in_one_line(tmp_path: Path, value: str) -> None:
    (tmp_path / "x.yaml").write_text(f"name: {value}\n")
    for read in (load_benchmark, TrainConfig.load):
        with pytest.raises(TrajOODError, match=r"x\.yaml.*YAML") as caught:
            read(str(tmp_path / "x.yaml"))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("make", [tiny.vit, tiny.conv])
def test_a_config_without_an_end_is_refused(tmp_path: Path, make: Any) -> None:
    make().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"a":' * 100_000)
    with pytest.raises(TrajOODError, match=r"config\.json"):
        load_autoencoder(tmp_path)
    (tmp_path / "result.json").write_text("[" * 100_000)
    with pytest.raises(TrajOODError, match=r"result\.json: expected JSON"):
        Result.load(tmp_path / "result.json")


# ---------------------------------------------------------------------------------------------- any input

ODD = (0.0, -0.0, 1.0, -1.0, 255.0, 1e-40, 1e6)
HUGE = (-1e30, 3e38)  # the model leaves the finite numbers on it
FEW = settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@pytest.fixture(scope="module")
def detectors() -> list[Detector]:
    fit, held_out = tiny.images(24, seed=1), tiny.images(20, seed=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        made = [(tiny.vit(), "field"), (tiny.conv(), "trajectory"), (tiny.conv(), "knn:k=3")]
        return [
            Detector.fit(model, Normalised(fit), scorer, max_steps=6).calibrate(Normalised(held_out))
            for model, scorer in made
        ]


@st.composite
def batches(draw: st.DrawFn, odd: tuple[float, ...]) -> Tensor:
    """(B, 1, 8, 8), B from 0 to 19: noise, images of one value, and images with one odd pixel."""
    count = draw(st.integers(0, 19))
    images = tiny.images(count, seed=draw(st.integers(0, 5)))
    for row in range(count):
        kind, value = draw(st.sampled_from(["noise", "equal", "pixel"])), draw(st.sampled_from(odd))
        if kind == "equal":
            images[row] = value
        elif kind == "pixel":
            images[row, 0, draw(st.integers(0, 7)), draw(st.integers(0, 7))] = value
    return images


def same(a: Tensor, b: Tensor) -> bool:
    """Bit by bit, NaN and signed zeros included."""
    return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()


def close(a: Tensor, b: Tensor, label: str = "") -> None:
    """What the same images score in other batches."""
    torch.testing.assert_close(a, b, rtol=1e-9, atol=0, equal_nan=True, msg=lambda text: f"{label}: {text}")


@FEW
@given(images=batches(ODD + HUGE), cuts=st.lists(st.integers(0, 19), max_size=4), size=st.integers(1, 24))
def test_no_split_of_a_batch_changes_a_score(
    detectors: list[Detector], images: Tensor, cuts: list[int], size: int
) -> None:
    for detector in detectors:
        whole = detector.judge(Normalised(images))
        assert len(whole) == len(images)
        assert not whole.scores.isnan().any()
        assert ((whole.p_values > 0) & (whole.p_values <= 1)).all()
        places = [0, *sorted(min(c, len(images)) for c in cuts), len(images)]
        parts = [detector.judge(Normalised(images[a:b])) for a, b in pairwise(places)]
        for name in ("scores", "p_values", "decisions"):
            close(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name), name)
        detector.batch_size = size
        close(detector.score(Normalised(images)), whole.scores)
        detector.batch_size = None
        close(detector.score(Normalised(images.clone(memory_format=torch.channels_last))), whole.scores)


@FEW
@given(
    bad=st.sampled_from([float("nan"), float("inf"), -float("inf")]),
    count=st.integers(1, 9),
    row=st.integers(0, 8),
    pixel=st.integers(0, 63),
)
def test_what_is_no_number_is_refused_and_never_scored(
    detectors: list[Detector], bad: float, count: int, row: int, pixel: int
) -> None:
    images = tiny.images(count)
    images[row % count, 0, pixel // 8, pixel % 8] = bad
    for detector in detectors:
        for given_as in (images, Normalised(images)):
            with pytest.raises(TrajOODError, match=r"NaN|finite"):
                detector.judge(given_as)


@FEW
@given(
    shape=st.one_of(st.integers(0, 9).map(lambda count: [count, 1, 8, 8]), st.lists(st.integers(0, 9), max_size=5)),
    dtype=st.sampled_from(
        [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8, torch.int64, torch.bool]
    ),
)
def test_other_shapes_and_dtypes_are_scored_as_pixels_or_refused_in_one_line(
    detectors: list[Detector], shape: list[int], dtype: torch.dtype
) -> None:
    whole = 255 if dtype == torch.uint8 else 1
    images = (whole * torch.rand(shape, generator=torch.Generator().manual_seed(0))).to(dtype)
    pictures = len(shape) in (3, 4) and (dtype.is_floating_point or dtype == torch.uint8)
    for detector in detectors:
        if pictures and shape[-3:] == [1, 8, 8]:
            expected = detector.score(images.float() / whole)
            assert len(expected) == (shape[0] if len(shape) == 4 else 1)
            torch.testing.assert_close(detector.score(images), expected, rtol=1e-5, atol=0)
            continue
        scores, refused = None, ""
        try:  # of another size, they are resized
            scores = detector.score(images)
        except TrajOODError as error:
            refused = str(error)
        assert "\n" not in refused
        if scores is not None:
            assert pictures
            assert scores.isfinite().all()
            assert len(scores) == (shape[0] if len(shape) == 4 else 1)


@pytest.mark.parametrize("value", [1e39, -1e300])
def test_numbers_beyond_the_weights_type_are_no_pixels(detectors: list[Detector], value: float) -> None:
    images = tiny.images(3).double()
    images[1, 0, 2, 2] = value
    for detector in detectors:
        with pytest.raises(TrajOODError, match=r"1 image\(s\) have NaN or infinite pixels, first at row 1"):
            detector.score(Normalised(images))


@pytest.fixture(scope="module")
def scorer_set() -> ScorerSet:
    model, images = tiny.conv(), tiny.images(24, seed=1)
    scorers = ScorerSet(model, ["all"], max_steps=6)
    dictionary, evidence = scorers.explore(model.examine(images), tuple(map(str, range(24))))
    scorers.learn(dictionary, evidence)
    return scorers


@settings(FEW, max_examples=6)  # every scorer there is
@given(images=batches(ODD), cut=st.integers(0, 19))
def test_no_scorer_depends_on_batch_mates(scorer_set: ScorerSet, images: Tensor, cut: int) -> None:
    def score(some: Tensor) -> dict[str, Tensor]:
        return scorer_set.score(scorer_set.autoencoder.examine(some)).scores

    whole, parts = score(images), [score(images[:cut]), score(images[cut:])]
    for label, values in whole.items():
        close(torch.cat([part[label] for part in parts]), values, label)


def test_forked_commands_leave_nothing_behind(place: Any) -> None:
    """Every copy of this process has ended."""
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
