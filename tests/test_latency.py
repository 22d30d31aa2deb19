"""What a program that starts for one image waits for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from PIL import Image
from torch import Tensor

from traj_ood import CallableAutoencoder, Detector, load_autoencoder
from traj_ood.backbones import CallableBackbone, Features, feature_cache
from traj_ood.backbones.feature_cache import FeatureCache
from traj_ood.data.images import ArrayImages
from traj_ood.data.preprocessing import as_picture
from traj_ood.dynamics.fixed_function import few_images
from traj_ood.stream import Entry, score_rows

# sympy and dynamo come with torch's compiler, in older versions with torch itself, as torch.distributed does.
NOT_IMPORTED = (
    *("pandas", "pyarrow", "scipy", "sklearn", "skimage", "matplotlib", "jinja2", "faiss"),
    *("transformers", "timm", "diffusers", "torchvision", "openood", "accelerate", "huggingface_hub"),
    *("sympy", "torch._dynamo", "torch._inductor", "torch.onnx", "onnx", "onnxruntime"),
    *("traj_ood.evaluation.evaluator", "traj_ood.analysis", "traj_ood.export", "traj_ood.report", "traj_ood.training"),
)
SCORE = """
import json, sys
from traj_ood.cli import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    assert not end.code, end.code
print(json.dumps(sorted(sys.modules)), file=sys.stderr)
"""


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the bundled model, fitted on noise."""
    folder = tmp_path_factory.mktemp("latency")
    images = torch.randint(0, 256, (40, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    made = Detector.fit(load_autoencoder("fashion-mae"), images[:20]).calibrate(images[20:])
    made.save(folder / "detector")
    Image.fromarray(images[0, 0].numpy()).save(folder / "one.png")
    return folder


def test_scoring_one_png_imports_nothing_that_it_does_not_need(detector: Path) -> None:
    command = [sys.executable, "-c", SCORE, "score", "detector", "one.png", "--quiet"]
    done = subprocess.run(command, cwd=detector, capture_output=True, text=True, env={**os.environ, "RANK": "0"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1].startswith("one.png,")
    loaded = json.loads(done.stderr.splitlines()[-1])
    assert "torch" in loaded
    torch_alone = [sys.executable, "-c", "import json, sys, torch; print(json.dumps(sorted(sys.modules)))"]
    from_torch = json.loads(subprocess.run(torch_alone, capture_output=True, text=True, check=True).stdout)
    lazily = {"sympy"} if torch.__version__ < "2.5" else set()
    assert [name for name in NOT_IMPORTED if name in loaded and name not in {*from_torch, *lazily}] == []


# ---------------------------------------------------------------------------------------------- calls of few rows


class Counting(CallableAutoencoder):
    """A linear autoencoder that notes the rows of each call."""

    def __init__(self, only: int | None = None) -> None:
        weight = torch.linalg.qr(torch.randn(64, 16, generator=torch.Generator().manual_seed(0)))[0]
        self.calls: list[int] = []

        def encode(images: Tensor) -> Tensor:
            self.calls.append(len(images))
            assert only in (None, len(images))
            return (images.flatten(1) @ weight).tanh()

        super().__init__(encode, lambda z: (z @ weight.T).view(-1, 1, 8, 8), (1, 8, 8), chunk=48)


def pixels(count: int) -> Tensor:
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("count", "rows"), [(1, 1), (2, 6), (6, 6), (7, 12), (25, 48), (47, 48), (48, 48), (60, 48)])
def test_calls_are_as_small_as_the_images_need(count: int, rows: int) -> None:
    model = Counting()
    detector = Detector.fit(model, pixels(60), "field")
    assert set(model.calls[-2:]) == {48}
    model.calls.clear()
    whole = detector.score(pixels(count), whole_chunks=True)
    assert set(model.calls) == {48}
    model.calls.clear()
    few = detector.score(pixels(count))
    assert set(model.calls) == {rows}
    torch.testing.assert_close(few, whole, rtol=1e-5, atol=0)
    model.calls.clear()
    detector.judge(pixels(count), whole_chunks=True)
    assert set(model.calls) == {48}
    model.encode(pixels(count))
    assert set(model.calls) == {48}  # only a detector's own calls


def test_streams_and_calibration_keep_whole_chunks(tmp_path: Path) -> None:
    model = Counting()
    detector = Detector.fit(model, pixels(40), "field")
    model.calls.clear()
    detector.calibrate(pixels(70)[40:])
    as_picture(pixels(1)[0]).save(tmp_path / "one.png")
    (rows,) = score_rows(detector, [Entry(str(tmp_path / "one.png"))], linger=0)
    assert rows[0].error is None
    assert set(model.calls) == {48}


def test_a_network_of_one_number_of_rows_keeps_it() -> None:
    model = Counting(only=48)
    detector = Detector.fit(model, pixels(20), "field")
    assert model.ladder == ()
    assert len(detector.score(pixels(1))) == 1
    free = Counting()
    free.ladder = ()
    detector = Detector.fit(free, pixels(20), "field")
    free.calls.clear()
    detector.score(pixels(1))
    assert set(free.calls) == {48}


def test_few_images_are_of_one_thread_and_end_with_an_error() -> None:
    model = Counting()
    with few_images(3):
        with suppress(ZeroDivisionError), few_images(10):
            assert model.rows == 12
            raise ZeroDivisionError
        assert model.rows == 6
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(lambda: model.rows).result() == 48
    assert model.rows == 48


def test_scorers_that_read_rounding_keep_whole_chunks() -> None:
    model = Counting()
    detector = Detector.fit(model, pixels(40), "end-distance", max_steps=5)
    model.calls.clear()
    detector.score(pixels(1))
    assert set(model.calls) == {48}


# ---------------------------------------------------------------------------------------------- reading ahead


def test_the_next_images_are_read_while_a_batch_is_judged(tmp_path: Path) -> None:
    """A judge that waits for an image of the next batch: it would wait for ever if that were read afterwards."""
    detector = Detector.fit(Counting(), pixels(20), "field")
    places = [tmp_path / f"{number}.png" for number in range(9)]
    for place, image in zip(places, pixels(9), strict=True):
        as_picture(image).save(place)
    read, waited = [threading.Event() for _ in places], []

    def transform(picture: Image.Image) -> Tensor:
        read[len([event for event in read if event.is_set()])].set()
        return detector.autoencoder.transform(picture)

    def judge(images: Any, **options: Any) -> Any:
        last = 3 * (len(waited) + 1)
        waited.append(last >= len(read) or read[last].wait(tiny.PATIENCE))
        return detector.judge(images, **options)

    slow = SimpleNamespace(autoencoder=SimpleNamespace(transform=transform), reading=detector.reading, judge=judge)
    rows = [row for batch in score_rows(slow, map(Entry, map(str, places)), batch_size=3, workers=1) for row in batch]
    assert [row.path for row in rows] == list(map(str, places))
    assert waited == [True] * 3


def test_the_next_images_are_read_while_features_are_extracted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_cache, "_READ_IMAGES", 3)
    read, waited = [threading.Event() for _ in range(9)], []
    values = (pixels(9)[:, 0] * 255).to(torch.uint8).numpy()

    class Source(ArrayImages):
        def load(self, index: int) -> Image.Image:
            read[index].set()
            return super().load(index)

    def forward(images: Tensor) -> Features:
        return Features(images.flatten(1), None)

    backbone = CallableBackbone(forward, (1, 8, 8), 64, module=torch.nn.Linear(1, 1), chunk=3)
    extract = backbone.extract

    def waiting(images: Tensor) -> Features:
        if any(event.is_set() for event in read):  # not what the cache asks first, to know the network again
            last = 3 * (len(waited) + 1)
            waited.append(last >= len(read) or read[last].wait(tiny.PATIENCE))
        return extract(images)

    monkeypatch.setattr(backbone, "extract", waiting)
    source = Source(tuple(map(str, range(9))), values)
    ids, features, _ = FeatureCache(tmp_path).extract(backbone, source, range(9), workers=1)
    assert ids == source.ids
    assert waited == [True] * 3
    assert features is not None
    torch.testing.assert_close(features.features, torch.from_numpy(values).flatten(1) / 255)
