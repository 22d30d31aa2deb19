"""Detector: every scorer on every kind of model, thresholds from ID data, and a folder that is whole or refused."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import traj_ood
from traj_ood.autoencoders import Autoencoder, CallableAutoencoder, SurrogateAutoencoder, SurrogateNetwork
from traj_ood.backbones import load_backbone
from traj_ood.backbones.timm_models import new_network, save_folder
from traj_ood.data import ArrayImages, Split, read_folder
from traj_ood.data.preprocessing import Normalised
from traj_ood.detector import FILE_NAME, Detector, Judgement, batches
from traj_ood.detector import folder as detector_folder
from traj_ood.dynamics.trajectory import Status
from traj_ood.errors import TrajOODError
from traj_ood.io.tensor_file import DIGEST
from traj_ood.scorers import SCORERS, create_scorer
from traj_ood.scorers.scorer_set import ScorerSet

pytestmark = pytest.mark.filterwarnings("ignore:.* unhealthy attractors")
TRAIN, HELD_OUT, NEW = 30, 20, 9
VARIANTS = [
    "trajectory:horizon=3",
    "early-trajectory:reference=centroids",
    "contraction-rate:two_sided=true",
    "mahalanobis:classes=true",
    "knn:view=mean",
    "pca-residual:normalize=true",
]
# ViM's own rule takes 48 dimensions, and 30 images have no more; the labels are not those of the classifier.
OTHERWISE = {"vim": "vim:dim=8", "residual": "residual:dim=8", "she": "she:patterns=predicted"}
SPECS = [OTHERWISE.get(name, name) for name in SCORERS if name != "test-only"] + VARIANTS


def timm_surrogate(folder: Path) -> SurrogateAutoencoder:
    """Over a timm network of 5 classes on images (3, 32, 32)."""
    torch.manual_seed(0)
    arguments = {"num_classes": 5}
    statistics = {"input_size": [3, 32, 32], "mean": [0.4] * 3, "std": [0.3] * 3}
    data = {"interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "squash", **statistics}
    save_folder(new_network("test_resnet", **arguments), folder, "test_resnet", arguments, data)
    backbone = load_backbone(f"timm:{folder}")
    backbone.chunk = 6
    network = SurrogateNetwork(backbone.feature_dim, hidden=(24,), bottleneck=8)
    network.set_statistics(backbone.extract(images(backbone, TRAIN, 1)).features)
    model = SurrogateAutoencoder(backbone, network, name="tiny-surrogate")
    model.chunk = 6
    return model


@cache
def _surrogate() -> SurrogateAutoencoder:
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        return timm_surrogate(Path(folder))


MODELS: dict[str, Callable[[], Autoencoder]] = {
    "vit": cache(tiny.vit),
    "conv": cache(tiny.conv),
    "surrogate": _surrogate,
    "callable": cache(tiny.toy),
}


def images(model: Any, count: int, seed: int) -> Tensor:
    return tiny.images(count, model.input_shape, seed)


def labels() -> Tensor:
    return torch.arange(TRAIN) % 3


def specs_of(family: str) -> list[str]:
    """Every scorer on some model that can serve it; on each other model one of each kind."""
    needs = {spec: create_scorer(spec).needs() for spec in SPECS}
    if family == "vit":
        return [spec for spec in SPECS if not (needs[spec].logits or "backbone" in needs[spec].features)]
    readers = [spec for spec in SPECS if needs[spec].logits] if family == "surrogate" else []
    return ["field", "trajectory", "early-trajectory:reference=centroids", "knn", "knn:view=mean", *readers]


def fitted(family: str, spec: str, count: int = TRAIN, **options: Any) -> Detector:
    model = MODELS[family]()
    return Detector.fit(model, Normalised(images(model, count, 1)), spec, labels=labels(), max_steps=30, **options)


def calibrated(family: str = "conv", spec: str = "field") -> Detector:
    detector = fitted(family, spec)
    return detector.calibrate(Normalised(images(detector.autoencoder, HELD_OUT, 2)))


def assert_equal(a: Judgement, b: Judgement, relative: float = 0.0) -> None:
    torch.testing.assert_close(a.scores, b.scores, rtol=relative, atol=0)
    for name in ("p_values", "decisions", "steps", "status"):
        one, two = getattr(a, name), getattr(b, name)
        assert (one is None) is (two is None), name
        assert one is None or torch.equal(one, two), name


CASES: list[tuple[str, str]] = [(family, spec) for family in MODELS for spec in specs_of(family)]


# ---------------------------------------------------------------------------------------------- every scorer


def test_no_registered_scorer_is_left_out() -> None:
    assert {spec.split(":")[0] for _, spec in CASES} == SCORERS.keys() - {"test-only"}


@pytest.mark.parametrize(("family", "spec"), CASES)
def test_every_scorer_fits_calibrates_saves_and_loads(family: str, spec: str, tmp_path: Path) -> None:
    detector = calibrated(family, spec)
    model = detector.autoencoder
    new = 1.5 * images(model, NEW, 3)
    judged = detector.judge(Normalised(new))
    assert len(judged) == NEW
    assert judged.scores.dtype == torch.float64
    assert judged.scores.isfinite().all()

    # The same numbers as a ScorerSet's, which sees all training images at once.
    direct = ScorerSet(model, [spec], max_steps=30).fit(Normalised(images(model, TRAIN, 1)), labels=labels())
    torch.testing.assert_close(judged.scores, direct.score(Normalised(new)).scores[direct.labels[0]], rtol=0, atol=0)

    assert torch.equal(judged.scores, detector.score(Normalised(new)))
    assert torch.equal(judged.p_values, detector.p_value(Normalised(new)))
    assert torch.equal(judged.decisions, detector.predict(Normalised(new)))
    assert torch.equal(judged.decisions, judged.p_values <= detector.calibration.level)
    assert (judged.steps is None) is (judged.status is None) is (create_scorer(spec).needs().steps == 0)

    detector.save(tmp_path / "d")
    own = {"autoencoder": model} if family == "callable" else {}
    loaded = Detector.load(tmp_path / "d", device="cpu", **own)
    assert_equal(judged, loaded.judge(Normalised(new)))
    assert repr(loaded) == repr(detector)
    assert loaded.scorer.options() == detector.scorer.options()
    loaded.save(tmp_path / "again")
    assert_equal(judged, Detector.load(tmp_path / "again", device="cpu", **own).judge(Normalised(new)))
    names = [p.relative_to(tmp_path / "d").as_posix() for p in sorted((tmp_path / "d").rglob("*")) if p.is_file()]
    assert names == [
        p.relative_to(tmp_path / "again").as_posix() for p in sorted((tmp_path / "again").rglob("*")) if p.is_file()
    ]
    assert {Path(name).suffix for name in names} == {".json", ".md", ".safetensors"}
    assert ("attractors.safetensors" in names) is bool(create_scorer(spec).needs().distances)


@pytest.mark.parametrize("spec", ["field", "trajectory", "mahalanobis", "isolation-forest", "msp"])
def test_no_result_depends_on_batches(spec: str) -> None:
    family = "surrogate" if spec == "msp" else "vit"
    whole, small = fitted(family, spec), fitted(family, spec, batch_size=7)
    for key, value in whole.scorer.state.items():
        torch.testing.assert_close(value, small.scorer.state[key], rtol=1e-9, atol=1e-12, msg=key)
    new = images(whole.autoencoder, NEW, 3)
    assert_equal(whole.judge(Normalised(new)), small.judge(Normalised(new)), relative=1e-9)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(0, 4), max_size=6), st.integers(1, 20), st.sampled_from(["field", "trajectory", "knn"]))
def test_any_split_of_any_images_gives_the_same(cuts: list[int], size: int, spec: str) -> None:
    detector = _toy(spec)
    new = 3 * images(detector.autoencoder, sum(cuts), 4)
    detector.batch_size = size
    whole = detector.judge(Normalised(new))
    parts = (
        [detector.judge(Normalised(part)) for part in new.split(cuts)] if cuts else [detector.judge(Normalised(new))]
    )
    together = torch.cat([part.scores for part in parts])
    torch.testing.assert_close(together, whole.scores, rtol=1e-9, atol=0)
    for name in ("p_values", "decisions", *(("steps", "status") if whole.steps is not None else ())):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))


@cache
def _toy(spec: str) -> Detector:
    return calibrated("callable", spec)


@pytest.mark.parametrize("spec", ["field", "trajectory", "knn"])
def test_nothing_in_nothing_out(spec: str) -> None:
    detector = _toy(spec)
    for nothing in (torch.empty(0, 1, 2, 2), [], ()):
        judged = detector.judge(nothing)
        assert len(judged) == 0
        assert judged.scores.dtype == judged.p_values.dtype == torch.float64
        assert judged.decisions.dtype == torch.bool
        assert judged.steps is None or judged.steps.shape == judged.status.shape == (0,)
    with pytest.raises(TrajOODError, match=r"toy: expected images \(B, 1, 2, 2\), got shape"):
        detector.score(torch.empty(0, 3, 2, 2))


def test_far_images_are_ood_and_new_id_images_are_not() -> None:
    detector = fitted("callable", "field").calibrate(Normalised(images(tiny.toy(), 200, 5)), tpr=0.9)
    new, far = images(tiny.toy(), 2000, 6), 20 + images(tiny.toy(), 50, 7)
    low, high = detector.calibration.acceptance(0.999)
    assert low < 1 - detector.predict(Normalised(new)).double().mean() < high
    assert detector.predict(Normalised(far)).all()
    assert (detector.p_value(Normalised(far)) == 1 / 201).all()


def test_p_values_of_held_out_id_images_are_uniform() -> None:
    """Kolmogorov–Smirnov, over independent calibration sets: 40 of 60 images each, one p-value of each set."""
    from scipy import stats

    detector = fitted("callable", "field")
    ps = []
    for seed in range(300):
        drawn = images(detector.autoencoder, 41, 1000 + seed)
        detector.calibrate(Normalised(drawn[1:]), tpr=0.5)
        p = detector.p_value(Normalised(drawn[:1])).item()
        ps.append(p - np.random.default_rng(seed).uniform() / 41)  # from its 41 steps to the continuous law
    assert stats.kstest(ps, "uniform").pvalue > 0.001


# ---------------------------------------------------------------------------------------------- kinds of images


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, count, seed in (("train", TRAIN, 0), ("held-out", HELD_OUT, 1), ("new", NEW, 2)):
        tiny.write_images(tmp_path / "images" / name, count, seed)
    return tmp_path / "images"


def test_tensors_sources_paths_and_pictures_say_the_same(folder: Path) -> None:
    model = tiny.conv()
    source = read_folder(folder / "train")
    detector = Detector.fit(model, source, "knn", batch_size=8).calibrate(read_folder(folder / "held-out"))
    assert detector.training["images"] == TRAIN
    assert detector.training["list"] == source.digest()
    paths = sorted((folder / "new").iterdir())
    pictures = [Image.open(path) for path in paths]
    expected = detector.judge(Normalised(torch.stack([model.transform(picture) for picture in pictures])))
    array = np.stack([np.asarray(picture) for picture in pictures])
    kinds: list[Any] = [paths, [str(p) for p in paths], tuple(pictures), read_folder(folder / "new")]
    kinds += [ArrayImages(tuple(p.name for p in paths), array), [p.convert("RGBA") for p in pictures]]
    kinds += [[*pictures[:2], *paths[2:]]]
    for kind in kinds:
        assert_equal(expected, detector.judge(kind))


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (
            "photo.png",
            "images: expected many, got one str: put it into a list, or read a folder with traj_ood.data.read",
        ),
        (Path("photo.png"), "expected many, got one (Posix|Windows)?Path"),
        (Image.new("L", (8, 8)), "expected many, got one Image"),
        (torch.zeros(8, 8), r"expected uint8 or float pixels in \[0, 1\] of shape \(B, C, H, W\).* got .*\(8, 8\)"),
        (torch.zeros(2, 4, 8, 8), r"conv: expected images of 1 or 3 channels, got shape \(4, 8, 8\)"),
        (torch.zeros(2, 1, 8, 8).long(), r"expected uint8 or float pixels .* got torch.int64"),
        (torch.full((2, 1, 8, 8), 255.0), r"in \[0, 1\], got values from 255 to 255: divide 0 … 255 by 255"),
        (torch.full((2, 1, 8, 8), -0.5), r"got values from -0.5 to -0.5: .* traj_ood.Normalised\(images\)"),
        (Normalised(torch.zeros(2, 3, 8, 8)), r"conv: expected float images \(B, 1, 8, 8\), got torch.float32"),
        (np.zeros((2, 1, 8, 8), np.uint16), r"expected uint8 or float pixels, got uint16: scale them"),
        (np.zeros((2, 1, 8, 8), int), r"expected an array of uint8 or float pixels .* got int64 of shape"),
        (torch.full((2, 1, 8, 8), torch.nan), r"conv: 2 image\(s\) have NaN or infinite pixels, first at row 0"),
        (torch.full((2, 1, 8, 8), torch.inf), "have NaN or infinite pixels"),
        (
            iter([]),
            "an ImageSource, a Dataset .* or a list of PIL images or paths, got list_iterator: make a list of it",
        ),
        (7, "got int: make a list of it"),
        (Split("test", "test", ArrayImages(("a",), np.zeros((1, 8, 8), np.uint8))), "got Split: pass its .images"),
        (
            Normalised(torch.utils.data.DataLoader([torch.zeros(1, 8, 8)] * 30)),
            "expected a float tensor, got DataLoader",
        ),  # type: ignore[arg-type]
        (None, "got NoneType"),
        (b"abc", "got one bytes"),
        ([torch.zeros(8, 8)], r"expected one image \(C, H, W\), got shape \(8, 8\) at place 0"),
        ([7], "expected PIL images, paths or pixels, got int at place 0"),
        ([Image.new("F", (8, 8))], "place 0: expected an image of 8 or 16 bits per channel, got floating"),
        ([Image.new("I;16", (8, 8), 700)], "the one at place 0: hardly any 16-bit value is 4096 or more"),
        (["no/such/photo.png"], "no/such/photo.png: expected an image file, found nothing"),
    ],
)
def test_what_is_no_images(given: Any, text: str) -> None:
    for ask in (_conv().score, _conv().judge, lambda x: Detector.fit(tiny.conv(), x, "first-residual")):
        if isinstance(given, torch.Tensor) or not isinstance(given, Sequence) or isinstance(given, str | bytes):
            with pytest.raises(TrajOODError, match=text):
                ask(given)
    with pytest.raises(TrajOODError, match=text):
        _conv().predict(given)


def moving() -> Image.Image:
    """A GIF of two frames."""
    file = io.BytesIO()
    frames = [Image.new("L", (8, 8), shade) for shade in (0, 255)]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    return Image.open(file)


def cut_off() -> Image.Image:
    """Opened, not decoded: the second half of its file is missing."""
    file = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(file, "PNG")
    return Image.open(io.BytesIO(file.getvalue()[: len(file.getvalue()) // 2]))


def closed() -> Image.Image:
    image = cut_off()
    image.fp.close()
    return image


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Image.new("L", (0, 8)), r"the one at place 1: expected an image, got one of 0 x 8 pixels"),
        (lambda: Image.new("1", (10_000, 10_000)), r"the one at place 1: expected an image of at most \d+ pixels, got"),
        (moving, r"the one at place 1: expected a single image, got several frames or pages \(GIF\)"),
        (cut_off, r"the one at place 1: the image cannot be decoded \(.*truncated"),
        (closed, r"the one at place 1: the image cannot be decoded \("),
        (lambda: Image.new("LAB", (8, 8)), r"the one at place 1: expected grey or RGB, got LAB colours"),
    ],
)
def test_pictures_in_memory_are_refused_for_what_files_are_refused_for(make: Any, text: str) -> None:
    good = Image.new("L", (8, 8), 100)
    with pytest.raises(TrajOODError, match=text) as error:
        _conv().score([good, make()])
    assert "\n" not in str(error.value)
    (batch,) = batches(_conv().autoencoder, [good, make(), good], on_error="skip")
    assert batch.ids == ("0", "2")
    assert [failure["id"] for failure in batch.failures] == ["1"]


@cache
def _conv() -> Detector:
    return calibrated("conv", "field")


def test_unreadable_images_are_errors_or_are_left_out_and_counted(folder: Path) -> None:
    (folder / "train" / "003.png").write_bytes(b"no image")
    source = read_folder(folder / "train")
    with pytest.raises(TrajOODError, match=r"003\.png: expected an image, found no format"):
        Detector.fit(tiny.conv(), source, "knn")
    (folder / "train" / "005.png").write_bytes(b"")
    with pytest.raises(
        TrajOODError, match=r"1 of 30 files are absent or empty, first .*005\.png: restore them, or leave them out"
    ):
        Detector.fit(tiny.conv(), source, "knn")
    detector = Detector.fit(tiny.conv(), source, "knn", on_error="skip", batch_size=4)
    assert (detector.training["images"], detector.training["skipped"]) == (28, 2)
    assert detector.scorer.state["bank"].shape[0] == 28
    paths = [p for p in sorted((folder / "train").iterdir()) if p.name not in ("003.png", "005.png")]
    bank = Detector.fit(tiny.conv(), paths, "knn").scorer.state["bank"]
    torch.testing.assert_close(bank, detector.scorer.state["bank"], rtol=1e-5, atol=1e-6)
    with pytest.raises(TrajOODError, match="unknown value of on_error 'ignore'"):
        Detector.fit(tiny.conv(), source, "knn", on_error="ignore")  # type: ignore[arg-type]
    for bad in (folder / "train").iterdir():
        bad.write_bytes(b"x")
    with pytest.raises(TrajOODError, match="fewer than 2 ID samples"):
        Detector.fit(tiny.conv(), source, "knn", on_error="skip")
    with pytest.raises(TrajOODError, match=r"^calibration: accepting 0\.95 .* at least 19 ID images .* got 0"):
        detector.calibrate(source, on_error="skip")


class Counting:
    """A source that knows how many of its images were asked for."""

    ids = tuple(f"{i}.png" for i in range(60))
    labels: tuple[str, ...] = ()
    loaded = 0

    def __len__(self) -> int:
        return len(self.ids)

    def load(self, index: int) -> Image.Image:
        self.loaded += 1
        return Image.fromarray(np.full((8, 8), index, dtype=np.uint8))

    def missing(self) -> list[str]:
        return []

    def digest(self) -> str:
        return "0" * 64


def test_no_more_than_two_batches_are_read_at_a_time() -> None:
    source = Counting()
    for number, batch in enumerate(batches(tiny.conv(), source, size=6, workers=3), start=1):  # type: ignore[arg-type]
        assert source.loaded <= 6 * (number + 1)
        assert batch.ids == source.ids[6 * (number - 1) : 6 * number]
        assert batch.rows == tuple(range(6 * (number - 1), 6 * number))
    assert source.loaded == 60
    for name, options in (("batch size", {"size": 0}), ("workers", {"workers": 0})):
        with pytest.raises(TrajOODError, match=f"{name}: expected at least 1, got 0"):
            batches(tiny.conv(), source, **options)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------- labels


def test_classes_may_be_numbers_texts_or_the_lists_own(tmp_path: Path) -> None:
    model, x = tiny.conv(), Normalised(images(tiny.conv(), TRAIN, 1))
    spec = "mahalanobis:classes=true"
    expected = Detector.fit(model, x, spec, labels=labels()).scorer.state
    texts = ["cat", "dog", "mouse"]
    given: list[Any] = [
        labels().tolist(),
        labels().numpy(),
        [texts[i] for i in labels()],
        [10 + i for i in labels().tolist()],
    ]
    for way in given:
        detector = Detector.fit(model, x, spec, labels=way)
        assert detector.training["classes"] == 3
        assert all(torch.equal(value, expected[key]) for key, value in detector.scorer.state.items())
    array = (np.random.default_rng(0).uniform(0, 255, (TRAIN, 8, 8))).astype(np.uint8)
    source = ArrayImages(tuple(map(str, range(TRAIN))), array, tuple(texts[i] for i in labels()))
    assert Detector.fit(model, source, spec).training["classes"] == 3


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (None, r"mahalanobis:classes=true: needs the class of every training image, got none: pass labels=, or images"),
        ([1, 2], "labels: expected 30 whole numbers or texts, one per image, got 2 of int"),
        ([0.5] * TRAIN, "got 30 of float"),
        ([True] * TRAIN, "got 30 of bool"),
        (torch.zeros(TRAIN), "got 30 of float"),
        ([[1]] * TRAIN, "got 30 of list"),
    ],
)
def test_labels_that_are_none(given: Any, text: str) -> None:
    with pytest.raises(TrajOODError, match=text):
        Detector.fit(tiny.conv(), Normalised(images(tiny.conv(), TRAIN, 1)), "mahalanobis:classes=true", labels=given)


# ---------------------------------------------------------------------------------------------- fit and calibrate


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"scorer": "fild"}, "unknown scorer 'fild': did you mean 'field'"),
        ({"scorer": "all"}, "scorer: expected one name such as 'field', got 'all': a detector has one scorer"),
        ({"scorer": ["knn"]}, "expected one name such as 'field', got"),
        ({"scorer": "msp"}, "reads the logits of a classifier"),
        ({"tol": -1.0}, r"tol: expected a finite squared residual >= 0, got -1\.0"),
        ({"tol": float("nan")}, "tol: expected a finite squared residual >= 0, got nan"),
        ({"max_steps": 0}, "max_steps: expected a whole number of at least 1, got 0"),
        ({"max_steps": 2.5}, r"max_steps: expected a whole number of at least 1, got 2\.5"),
        ({"backend": "fais"}, "unknown backend 'fais': did you mean"),
        ({"approximate": "yes"}, "unknown approximate search 'yes'"),
        ({"batch_size": 0}, "batch size: expected at least 1, got 0"),
    ],
)
def test_impossible_settings(options: dict[str, Any], text: str) -> None:
    with pytest.raises(TrajOODError, match=text):
        Detector.fit(tiny.conv(), Normalised(images(tiny.conv(), TRAIN, 1)), **options)


def test_too_few_training_images() -> None:
    with pytest.raises(TrajOODError, match="scorer field: expected at least 8 training images, got 5"):
        fitted("conv", "field", count=5)
    with pytest.raises(TrajOODError, match="fewer than 2 ID samples"):
        Detector.fit(tiny.conv(), [], "first-residual")


def test_too_few_calibration_images_say_how_many_are_needed() -> None:
    detector = fitted("conv", "first-residual")
    model = detector.autoencoder
    with pytest.raises(TrajOODError, match=r"accepting 0\.95 of new ID images needs at least 19 ID images .* got 18"):
        detector.calibrate(Normalised(images(model, 18, 2)))
    assert detector.calibrate(Normalised(images(model, 19, 2))) is detector
    assert len(detector.calibration) == 19
    with pytest.raises(TrajOODError, match="needs at least 99 ID images that were not trained on, got 19"):
        detector.calibrate(Normalised(images(model, 19, 2)), tpr=0.99)
    assert detector.calibration.tpr == 0.95  # what was there stays
    with pytest.raises(TrajOODError, match="tpr: expected a share"):
        detector.calibrate(Normalised(images(model, 19, 2)), tpr=95)


def test_copies_do_not_calibrate() -> None:
    detector = fitted("conv", "first-residual")
    held_out = images(detector.autoencoder, 60, 2)
    with pytest.raises(TrajOODError, match=r"59 of 60 images are pixel by pixel copies .* the 1 that differ are fewer"):
        detector.calibrate(Normalised(held_out[:1].expand_as(held_out)))
    with pytest.warns(UserWarning, match="3 of 63 images are pixel by pixel copies of others among them, and count"):
        detector.calibrate(Normalised(torch.cat([held_out, held_out[:3]])))
    assert len(detector.calibration) == 63


def test_without_calibration_there_are_scores_alone() -> None:
    detector = fitted("conv", "field")
    new = images(detector.autoencoder, 3, 3)
    judged = detector.judge(Normalised(new))
    assert judged.p_values is None
    assert judged.decisions is None
    for ask in (detector.predict, detector.p_value):
        with pytest.raises(TrajOODError, match="detector of conv: has no threshold: call calibrate with ID images"):
            ask(new)


def test_training_images_do_not_calibrate(folder: Path) -> None:
    detector = fitted("conv", "knn")
    train, held_out = images(detector.autoencoder, TRAIN, 1), images(detector.autoencoder, 200, 2)
    with pytest.raises(
        TrajOODError,
        match=r"30 of 30 images are .* training images .* \(first: '0'\), which score too low",
    ):
        detector.calibrate(Normalised(train))
    assert detector.calibration is None
    with pytest.raises(TrajOODError, match="3 of 203 images are pixel by pixel training images"):
        detector.calibrate(Normalised(torch.cat([held_out, train[:3]])))
    with pytest.warns(UserWarning, match="2 of 202 images are pixel by pixel training images"):
        detector.calibrate(Normalised(torch.cat([held_out, train[:2]])))
    # Known again by their pixels: under another path, and after loading.
    by_path = Detector.fit(tiny.conv(), read_folder(folder / "train"), "knn")
    shutil.copytree(folder / "train", folder / "copy")
    by_path.save(folder / "detector")
    for one in (by_path, Detector.load(folder / "detector", device="cpu")):
        with pytest.raises(TrajOODError, match=r"30 of 30 images are pixel by pixel training .*copy/000\.png"):
            one.calibrate(sorted((folder / "copy").iterdir()))


def test_training_images_among_held_out_ones_can_be_left_out() -> None:
    detector = fitted("conv", "knn")
    train, held_out = images(detector.autoencoder, TRAIN, 1), images(detector.autoencoder, 25, 2)
    with pytest.warns(UserWarning, match=r"20 of 45 images are pixel by pixel training .*, and are left out"):
        detector.calibrate(Normalised(torch.cat([train[:20], held_out])), on_known="skip")
    both = detector.calibration
    torch.testing.assert_close(
        both.scores, detector.calibrate(Normalised(held_out)).calibration.scores, rtol=1e-9, atol=0
    )
    with pytest.raises(TrajOODError, match=r"20 of 38 .* the 18 others are fewer than the 19 .* remove dup"):
        detector.calibrate(Normalised(torch.cat([train[:20], held_out[:18]])), on_known="skip")
    with pytest.raises(TrajOODError, match=r"unknown value of on_known 'drop': .*Known: raise, skip"):
        detector.calibrate(Normalised(held_out), on_known="drop")


def test_unhealthy_attractors_are_told_of(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="detector with trajectory: unhealthy attractors: "):
        detector = fitted("conv", "trajectory")
    assert detector.training["attractors"]["healthy"] is False
    detector.save(tmp_path / "d")
    with pytest.warns(UserWarning, match=r"d: fitted on unhealthy attractors, its scores may mean nothing: .*distinct"):
        Detector.load(tmp_path / "d", device="cpu")


def test_nothing_is_written_into_a_detectors_folder(saved: Path) -> None:
    for path in (saved / "inner", saved / "deep" / "er"):
        with pytest.raises(TrajOODError, match=r"expected a place outside of any detector, but .* refused as damaged"):
            Detector.load(saved, device="cpu").save(path)
    Detector.load(saved, device="cpu").save(saved)
    assert Detector.load(saved, device="cpu")


# ---------------------------------------------------------------------------------------------- not finite


def overflowing(seed: int = 0) -> CallableAutoencoder:
    """f(z) = z / 2, but infinite for an image whose first pixel is above 5."""

    def decode(latents: Tensor) -> Tensor:
        return torch.where(latents[:, :1] > 5, torch.inf, latents / 2).reshape(-1, 1, 2, 2)

    return CallableAutoencoder(lambda x: x.flatten(1), decode, (1, 2, 2), name="overflow", chunk=4)


@pytest.mark.parametrize("spec", ["first-residual", "path-energy"])
def test_an_image_that_overflows_is_ood_by_rule(spec: str) -> None:
    model = overflowing()
    detector = Detector.fit(model, Normalised(tiny.images(TRAIN, (1, 2, 2), 1)), spec).calibrate(
        Normalised(tiny.images(40, (1, 2, 2), 2))
    )
    new = tiny.images(4, (1, 2, 2), 3)
    alone = detector.judge(Normalised(new[:3]))
    new[3, 0, 0, 0] = 9
    judged = detector.judge(Normalised(new))
    assert judged.scores[3] == torch.inf
    assert judged.p_values[3] == 1 / 41
    assert judged.decisions[3]
    assert judged.status[3] == Status.NON_FINITE
    torch.testing.assert_close(judged.scores[:3], alone.scores, rtol=1e-9, atol=0)
    with pytest.raises(TrajOODError, match="1 of 44 ID images have scores that are not finite"):
        detector.calibrate(Normalised(torch.cat([tiny.images(40, (1, 2, 2), 2), new])))


def test_training_images_on_which_the_model_overflows_are_refused() -> None:
    model = CallableAutoencoder(
        lambda x: x.flatten(1) * 1e38, lambda z: z.reshape(-1, 1, 2, 2), (1, 2, 2), name="big", chunk=4
    )
    with pytest.raises(TrajOODError, match=r"training image '\d+': the model.s values become NaN or infinite"):
        Detector.fit(model, Normalised(100 * tiny.images(TRAIN, (1, 2, 2), 1)), "mahalanobis")


# ---------------------------------------------------------------------------------------------- the folder


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    detector = calibrated("conv", "trajectory:horizon=3")
    detector.save(tmp_path / "d")
    return tmp_path / "d"


def refused(folder: Path, text: str) -> None:
    """One line, naming the folder, whatever is wrong."""
    with pytest.raises(TrajOODError, match=text) as caught:
        Detector.load(folder, device="cpu")
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def all_files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def reseal(folder: Path, change: Callable[[dict[str, Any]], object] = lambda _: None) -> None:
    """As somebody would who knows the format: change the record, and make every hash fit again."""
    record = json.loads((folder / FILE_NAME).read_text())
    record.pop("digest")
    for file in record["files"]:
        if (folder / file).is_file():
            content = (folder / file).read_bytes()
            record["files"][file] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    change(record)
    text = json.dumps(record, indent=2, sort_keys=True) + "\n"
    record["digest"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / FILE_NAME).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")


def test_what_is_in_it(saved: Path) -> None:
    record = json.loads((saved / FILE_NAME).read_text())
    files = {p.relative_to(saved).as_posix() for p in all_files(saved)} - {FILE_NAME}
    assert files == record["files"].keys()
    assert files == {
        "README.md",
        "attractors.safetensors",
        "calibration.safetensors",
        "model/config.json",
        "model/model.safetensors",
        "scorer.safetensors",
        "training.safetensors",
    }
    for file, facts in record["files"].items():
        content = (saved / file).read_bytes()
        assert facts == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert record["schema"] == "traj_ood.detector/2"
    assert record["scorer"]["options"] == {"horizon": 3, "view": "tokens"}
    assert record["calibration"]["images"] == HELD_OUT
    assert record["versions"]["torch"] == torch.__version__.split("+")[0] or record["versions"]["torch"]
    assert str(saved.parent) not in (saved / FILE_NAME).read_text()


def test_the_card_says_what_it_is(saved: Path, tmp_path: Path) -> None:
    text = (saved / "README.md").read_text()
    detector = Detector.load(saved, device="cpu")
    assert text.startswith("# OOD detector: trajectory:horizon=3 on conv\n")
    for part in (
        'detector = Detector.load("this-folder")',
        detector.scorer.summary,
        f"| training images | {TRAIN}, 3 classes |",
        f"above **{detector.calibration.threshold:.6g}** counts as OOD",
        f"conformal quantile of {HELD_OUT} held-out ID images",
        "at least 0.95 of new ID images are accepted",
        "Nothing here was measured on OOD images",
        "torch ",
        "Unhealthy attractors",
        "| trajectories | at most 3 steps, tolerance 1e-05 on",
    ):
        assert part in text, part
    fitted("callable", "knn").save(tmp_path / "own")
    text = (tmp_path / "own" / "README.md").read_text()
    assert 'Detector.load("this-folder", autoencoder=my_model)' in text
    assert "None: `detector.calibrate(" in text
    assert "trajectories" not in text  # of no interest to knn


def test_one_flipped_bit_anywhere_is_an_error(saved: Path) -> None:
    draw = np.random.default_rng(0)
    for path in all_files(saved):
        content = path.read_bytes()
        places = {0, len(content) - 1, *draw.integers(0, len(content), 12).tolist()}
        for place in places:
            damaged = bytearray(content)
            damaged[place] ^= 1 << int(draw.integers(8))
            path.write_bytes(damaged)
            refused(saved, f"{path.name}")
        path.write_bytes(content)
    Detector.load(saved, device="cpu")


def test_other_lengths_are_errors(saved: Path) -> None:
    for path in all_files(saved):
        content = path.read_bytes()
        for changed in (b"", content[:-1], content + b"\n", content[: len(content) // 2]):
            path.write_bytes(changed)
            refused(saved, path.name)
        path.unlink()
        refused(saved, path.name)
        path.write_bytes(content)
    Detector.load(saved, device="cpu")


def test_files_too_many_and_links_are_errors(saved: Path, tmp_path: Path) -> None:
    (saved / ".gitattributes").write_text("*.safetensors filter=lfs")
    Detector.load(saved, device="cpu")  # what nothing reads
    for name in ("notes.txt", "model/tokenizer.json", "model/.hidden", "more/deep.bin"):
        (saved / name).parent.mkdir(exist_ok=True)
        (saved / name).write_text("x")
        refused(saved, f"{name}: not part of the detector .1 such.: remove it")
        (saved / name).unlink()
    for name in ("scorer.safetensors", FILE_NAME, "README.md"):
        shutil.move(saved / name, tmp_path / "elsewhere")
        (saved / name).symlink_to(tmp_path / "elsewhere")
        refused(saved, f"{name}: expected a file, found a link")
        (saved / name).unlink()
        shutil.move(tmp_path / "elsewhere", saved / name)
    shutil.move(saved / "model", tmp_path / "model")
    (saved / "model").symlink_to(tmp_path / "model")
    refused(saved, "model: expected a folder, found a link: copy the folder")
    (saved / "model").unlink()
    shutil.move(tmp_path / "model", saved / "model")
    if hasattr(os, "mkfifo"):
        os.mkfifo(saved / "pipe")
        refused(saved, "pipe: expected a file, found something else")
        (saved / "pipe").unlink()
    (tmp_path / "link").symlink_to(saved)  # the folder itself may be reached by one
    Detector.load(tmp_path / "link", device="cpu")


def test_what_is_no_detector(tmp_path: Path) -> None:
    refused(tmp_path / "none", "expected a folder with detector.json, found nothing: correct the path")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "expected a folder with detector.json, found something else")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "detector.json: expected a file, found nothing: this folder is no detector")
    for content, text in (
        ("", "damaged"),
        ("[]", "damaged .no object."),
        ("{}", "expected schema traj_ood.detector/2, got 'None': no detector"),
        ('{"schema": "traj_ood.result/1"}', "got 'traj_ood.result/1': no detector"),
        ('{"schema": "traj_ood.detector/3"}', "schema 3 is newer than 2, the newest this traj_ood reads: upgrade"),
        ('{"schema": "traj_ood.detector/99999999999999999999"}', "is newer than 2"),
        ('{"schema": "traj_ood.detector/1"}', "damaged or edited by hand"),
        ('{"schema": "traj_ood.detector/1", "digest": NaN}', "damaged .NaN is not a JSON number."),
        ('{"schema": "traj_ood.detector/1", "x": 1e999}', "damaged"),
        ("[" * 100_000, "damaged"),
        ('{"schema": ' + "9" * 9999 + "}", "damaged"),
    ):
        (tmp_path / "empty" / FILE_NAME).write_text(content)
        refused(tmp_path / "empty", text)
    (tmp_path / "empty" / FILE_NAME).write_bytes(b"\xff\xfe{}")
    refused(tmp_path / "empty", "damaged")


@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "/etc/passwd", "model/../../x", "a//b", "./scorer.safetensors", "C:x", "a\\b", ""],
)
def test_names_outside_the_folder_are_refused(saved: Path, name: str) -> None:
    (saved.parent / "outside.safetensors").write_bytes(b"x")
    reseal(saved, lambda record: record["files"].update({name: {"size": 1, "sha256": "0" * 64}}))
    refused(saved, "which is outside the folder: do not trust this folder")


def put(*path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(record: dict[str, Any]) -> None:
        *inner, last = path
        for key in inner:
            record = record[key]
        record[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (put("files", value=[]), "files: expected a table of files"),
        (put("files", "README.md", value={"size": "7"}), "expected a size and a sha256"),
        (put("model", value=None), "model: expected dict, got NoneType"),
        (put("model", "fingerprint", value="0" * 64), "its weights differ"),
        (put("model", "kind", value="vit_mae"), "model"),
        (put("scorer", "name", value="fild"), "unknown scorer"),
        (put("scorer", "name", value="knn"), "unknown option of scorer knn"),
        (put("scorer", "options", "horizon", value=-4), "horizon must be at least 0"),
        (put("scorer", "options", "horizon", value=4), "expected a scorer file of"),
        (
            put("scorer", "options", "horizon", value="3:view=cls"),
            "options of trajectory: expected|option view is given twice",
        ),
        (put("scorer", "options", value=3), "options: expected dict, got int"),
        (put("settings", "tol", value=-1.0), "tol: expected a finite squared residual >= 0"),
        (put("settings", "tol", value="1e-5"), "tol: expected float, got str"),
        (put("settings", "max_steps", value=0), "max_steps: expected a whole number of at least 1, got 0"),
        (put("settings", "max_steps", value=True), "max_steps: expected int, got bool"),
        (put("settings", "backend", value="abacus"), "unknown backend 'abacus'"),
        (put("calibration", "tpr", value=1.5), "tpr: expected a share of ID images between 0 and 1"),
        (put("calibration", "tpr", value=0.99), "needs at least 99 ID images"),
        (put("calibration", "threshold", value=-7.0), "its threshold is .*, but detector.json says -7.0: damaged"),
        (put("tensors", value={}), "tensor digests: expected None, got|tensor .*: expected None, got"),
        (put("probe", value={}), "latents of two test images differ from those at saving"),
        (put("probe", "scores", value=[[1e6], [None]]), "scores of two test images differ from those at saving"),
        (put("versions", value=7), "versions: expected dict, got int"),
    ],
)
def test_records_that_lie_are_found_out(saved: Path, change: Callable[[dict[str, Any]], None], text: str) -> None:
    reseal(saved, change)
    with pytest.raises(TrajOODError, match=text) as caught:
        Detector.load(saved, device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "key", "value", "text"),
    [
        ("calibration", "scores", torch.zeros(20), "tensor scores: expected .*float64.* got .*float32"),
        ("calibration", "scores", torch.full((20,), torch.nan).double(), "tensor scores has NaN or infinite values"),
        ("calibration", "scores", torch.zeros(3).double(), r"expected .*\[20\].* got .*\[3\]"),
        ("training", "digests", torch.zeros(30, 1).long(), r"expected .*\[30\].* got .*\[30, 1\]"),
        ("training", "more", torch.zeros(1), "tensor more: expected None, got"),
        ("attractors", "points", torch.full((30, 6), torch.nan), "non-finite points that are marked finite"),
    ],
)
def test_tensors_that_lie_are_found_out(saved: Path, file: str, key: str, value: Tensor, text: str) -> None:
    path = saved / f"{file}.safetensors"
    with safe_open(path, framework="pt") as opened:
        header = {k: v for k, v in opened.metadata().items() if k != DIGEST}  # as older versions wrote it
    save_file({**load_file(path), key: value}, path, metadata=header)
    reseal(saved)
    refused(saved, f"{file}.safetensors: .*{text}")


def test_a_scorer_of_another_width_does_not_fit(tmp_path: Path) -> None:
    detector = calibrated("conv", "mahalanobis")
    detector.save(tmp_path / "d")
    path = tmp_path / "d" / "scorer.safetensors"
    state = {key: value[..., :3].contiguous() for key, value in load_file(path).items()}
    other = detector.scorer.with_state(state)
    other.save(path)
    specs = {k: {"dtype": str(v.dtype), "shape": list(v.shape)} for k, v in state.items()}
    reseal(tmp_path / "d", put("tensors", "scorer.safetensors", value=specs))
    refused(tmp_path / "d", "the model and the scorer do not fit together")


def test_other_versions_are_a_warning(saved: Path) -> None:
    expected = Detector.load(saved, device="cpu").score(Normalised(images(tiny.conv(), 3, 3)))
    reseal(saved, put("versions", "torch", value="1.13.0"))
    with pytest.warns(UserWarning, match=r"saved with torch 1\.13\.0 \(here .*its results on two test images agree"):
        loaded = Detector.load(saved, device="cpu")
    assert torch.equal(loaded.score(Normalised(images(tiny.conv(), 3, 3))), expected)


# ---------------------------------------------------------------------------------------------- a model of one's own


def test_a_model_of_your_own_is_passed_and_compared(tmp_path: Path) -> None:
    calibrated("callable", "field").save(tmp_path / "d")
    refused(tmp_path / "d", "'toy' is defined by user code, which is not saved: .*pass it as autoencoder=")
    assert Detector.load(tmp_path / "d", autoencoder=tiny.toy()).autoencoder.name == "toy"
    # No weights, hence the same fingerprint: the probe tells them apart.
    other = CallableAutoencoder(
        lambda x: 2 * x.flatten(1), lambda z: z.reshape(-1, 1, 2, 2), (1, 2, 2), name="other", chunk=8
    )
    with pytest.raises(TrajOODError, match="of two test images differ from those at saving: the model or the scorer"):
        Detector.load(tmp_path / "d", autoencoder=other)
    with pytest.raises(TrajOODError, match=r"expected a model for images \(1, 2, 2\), got conv for \(1, 8, 8\)"):
        Detector.load(tmp_path / "d", autoencoder=tiny.conv())


def test_another_decoder_is_refused_where_latents_and_scores_hardly_move(tmp_path: Path) -> None:
    def model(factor: float) -> CallableAutoencoder:
        return CallableAutoencoder(
            lambda x: 100 + x.flatten(1), lambda z: factor * (z - 100).reshape(-1, 1, 2, 2), (1, 2, 2), name="own"
        )

    detector = Detector.fit(model(0.01), Normalised(images(model(0.01), 20, 1)), "reconstruction")
    detector.save(tmp_path / "d")
    assert Detector.load(tmp_path / "d", autoencoder=model(0.01)).autoencoder.name == "own"
    with pytest.raises(TrajOODError, match="decoded of two test images differ from those at saving"):
        Detector.load(tmp_path / "d", autoencoder=model(0.02))

    def older(record: dict[str, Any]) -> None:
        del record["probe"]["decoded"]

    reseal(tmp_path / "d", older)
    assert Detector.load(tmp_path / "d", autoencoder=model(0.01)).autoencoder.name == "own"


def test_a_model_with_other_weights_is_refused(saved: Path) -> None:
    assert Detector.load(saved, autoencoder=tiny.conv()).autoencoder.name == "conv"
    with pytest.raises(TrajOODError, match=r"expected the model 'conv' .*its weights differ"):
        Detector.load(saved, autoencoder=tiny.conv(seed=1))


def test_a_module_that_was_passed_is_known_by_its_weights(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            torch.manual_seed(seed)
            self.inner = nn.Linear(4, 4)

        def encode(self, x: Tensor) -> Tensor:
            return self.inner(x.flatten(1)).tanh()

        def decode(self, z: Tensor) -> Tensor:
            return z.reshape(-1, 1, 2, 2)

    models = [CallableAutoencoder.from_module(Net(seed), (1, 2, 2), chunk=4) for seed in (0, 0, 1)]
    Detector.fit(models[0], Normalised(tiny.images(TRAIN, (1, 2, 2))), "knn").save(tmp_path / "d")
    Detector.load(tmp_path / "d", autoencoder=models[1])
    with pytest.raises(TrajOODError, match="its weights differ"):
        Detector.load(tmp_path / "d", autoencoder=models[2])


# ---------------------------------------------------------------------------------------------- writing


def snapshot(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in all_files(folder)}


def test_a_detector_is_replaced_and_nothing_else_is(saved: Path, tmp_path: Path) -> None:
    detector = calibrated("conv", "knn")
    detector.save(saved)
    assert Detector.load(saved, device="cpu").scorer.name == "knn"
    assert not (saved / "attractors.safetensors").exists()
    (tmp_path / "empty").mkdir()
    detector.save(tmp_path / "empty")
    detector.save(tmp_path / "new" / "deep" / "d")
    assert not [p for p in tmp_path.rglob(".*")]
    (saved / "thesis.tex").write_text("years of work")
    before = snapshot(saved)
    with pytest.raises(TrajOODError, match=r"d: contains 'thesis\.tex', which would be deleted"):
        detector.save(saved)
    assert snapshot(saved) == before
    (tmp_path / "file").write_text("x")
    with pytest.raises(TrajOODError, match="file: expected a folder or nothing, found a file"):
        detector.save(tmp_path / "file")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("a name that detectors have, too")
    with pytest.raises(TrajOODError, match=r"mine: contains 'README\.md', which would be deleted"):
        detector.save(tmp_path / "mine")
    (tmp_path / "repository" / ".git").mkdir(parents=True)
    with pytest.raises(TrajOODError, match=r"contains '\.git', which would be deleted"):
        detector.save(tmp_path / "repository")


@pytest.mark.parametrize("place", ["pack", "seal", "card", "probe"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_in_the_middle_changes_nothing(
    saved: Path, place: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    before = snapshot(saved)
    monkeypatch.setattr(detector_folder, place, fail)
    with pytest.raises(TrajOODError if isinstance(error, OSError) else KeyboardInterrupt) as caught:
        _conv().save(saved)
    if isinstance(error, OSError):
        assert "expected a folder that can be written, got: No space left on device; free space" in str(caught.value)
    with pytest.raises((TrajOODError, KeyboardInterrupt)):
        _conv().save(saved.parent / "new")
    assert snapshot(saved) == before
    assert sorted(p.name for p in saved.parent.iterdir()) == ["d"]


def test_a_failing_rename_puts_the_old_one_back(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, rename, calls = snapshot(saved), os.rename, []

    def second_fails(a: Any, b: Any) -> None:
        calls.append(a)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        rename(a, b)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(TrajOODError, match="got: Input/output error"):
        _conv().save(saved)
    assert snapshot(saved) == before
    assert sorted(p.name for p in saved.parent.iterdir()) == ["d"]


def test_killed_between_the_two_renames_the_old_one_is_named(saved: Path) -> None:
    saved.rename(saved.with_name(".d.0123456789ab.old"))
    refused(saved, r"an interrupted save left the one before as '\.d\.0123456789ab\.old' beside it")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(TrajOODError, match="expected a folder that can be written, got: Permission denied"):
        _conv().save(tmp_path / "locked" / "d")


# ---------------------------------------------------------------------------------------------- devices, and the rest


def other_devices() -> list[str]:
    return ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()


@pytest.mark.skipif(not other_devices(), reason="no second device (CUDA or MPS) on this machine")
@pytest.mark.parametrize("spec", ["field", "trajectory:horizon=3", "mahalanobis", "knn"])
def test_another_device_gives_the_same_scores_to_rounding(spec: str, tmp_path: Path) -> None:
    detector = calibrated("vit", spec)
    detector.save(tmp_path / "d")
    new = images(detector.autoencoder, NEW, 3)
    for device in other_devices():
        torch.testing.assert_close(
            Detector.load(tmp_path / "d", device=device).score(Normalised(new)),
            detector.score(Normalised(new)),
            rtol=1e-4,
            atol=1e-4,
        )


def test_device_names_are_checked(saved: Path) -> None:
    with pytest.raises(TrajOODError, match="device 'tpu9' is not available here"):
        Detector.load(saved, device="tpu9")


def test_as_module_scores_pixels() -> None:
    detector = _conv()
    pixels = torch.rand(6, *detector.autoencoder.input_shape, generator=torch.Generator().manual_seed(0))
    module = detector.as_module(steps=3)
    torch.testing.assert_close(module(pixels), detector.score(pixels), rtol=1e-4, atol=0)
    torch.testing.assert_close(pickle.loads(pickle.dumps(module))(pixels), module(pixels), rtol=1e-6, atol=0)


def test_public_names() -> None:
    assert traj_ood.Detector is Detector
    assert traj_ood.Judgement is Judgement


@pytest.mark.parametrize("change", [put("calibration", value=None), lambda record: record.pop("calibration")])
def test_a_threshold_cannot_be_edited_away(saved: Path, change: Callable[[dict[str, Any]], object]) -> None:
    reseal(saved, change)
    with pytest.raises(TrajOODError, match=r"expected calibration, as calibration\.safetensors is there or not"):
        Detector.load(saved)


def test_a_threshold_of_many_equal_scores_is_told(tmp_path: Path) -> None:
    detector = Detector.fit(tiny.vit(), tiny.images(24).sigmoid(), "steps", max_steps=2)
    with pytest.warns(
        UserWarning, match=r"100.0% of the images have a score of at most the threshold 2, 90.0% were asked"
    ):
        detector.calibrate(tiny.images(60, seed=1).sigmoid(), tpr=0.9)


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
def test_models_are_loaded_whatever_the_default_type(tmp_path: Path, kind: torch.dtype) -> None:
    images = tiny.images(24).sigmoid()
    detector = Detector.fit(tiny.vit(), images, "knn:k=2")
    detector.save(tmp_path / "d")
    expected = detector.score(images)
    torch.set_default_dtype(kind)
    try:
        found = Detector.load(tmp_path / "d").score(images)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
