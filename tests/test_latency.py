"""What a program that starts for one image waits for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from traj_ood import CallableAutoencoder, Detector, load_autoencoder
from traj_ood.data.preprocessing import as_picture
from traj_ood.dynamics.fixed_function import few_images
from traj_ood.stream import Entry, score_rows

# sympy and dynamo come with torch's compiler; torch.distributed comes with torch itself.
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
    assert [name for name in NOT_IMPORTED if name in loaded] == []


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
    as_picture("", pixels(1)[0]).save(tmp_path / "one.png")
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
