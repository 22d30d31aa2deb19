"""One model, detector or index used from eight threads says what it says to one."""

from __future__ import annotations

import functools
import io
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import tiny
import torch
from PIL import Image
from torch import Tensor, nn

from traj_ood import CallableAutoencoder, Detector, NeighborIndex
from traj_ood.autoencoders import ViTMAE, load_autoencoder
from traj_ood.backbones.network import ClassifierInputBackbone
from traj_ood.data.preprocessing import Preprocessing
from traj_ood.dynamics.device import standard_settings
from traj_ood.index import search

THREADS = 8


def together(*calls: Callable[[], Any], rounds: int = 2) -> list[Any]:
    """What the calls give when eight threads make them at once, in the order of ``rounds`` times the calls."""
    ready = threading.Barrier(THREADS)

    def start(call: Callable[[], Any]) -> Any:
        return call()

    with ThreadPoolExecutor(THREADS, initializer=ready.wait) as pool:
        return list(pool.map(start, [call for _ in range(rounds) for call in calls]))


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Threads change places as often as Python lets them."""
    import sys

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("hasty")
def test_the_bundled_models_detector() -> None:
    model = load_autoencoder("fashion-mae")
    images = torch.rand(24, *model.input_shape, generator=torch.Generator().manual_seed(0))
    detector = Detector.fit(model, images, "field")
    slices = [images[i : i + 3] for i in range(0, 24, 3)]
    expected = [detector.score(part) for part in slices]
    model.module.train()
    found = together(*(lambda part=part: detector.score(part) for part in slices), rounds=1)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(part.training for part in model.module.modules())


@pytest.mark.usefixtures("hasty")
def test_masks_of_one_vit_mae() -> None:
    """Each ratio is read from one config, at every call."""
    shared, images = tiny.vit_model(image_size=16), tiny.images(8, (1, 16, 16))
    owner = shared.vit.embeddings.config.mask_ratio
    models = [ViTMAE(shared, mask_ratio=ratio) for ratio in (0.0, 0.25, 0.5, 0.75)]
    alone = [ViTMAE(tiny.vit_model(image_size=16), mask_ratio=m.mask_ratio) for m in models]
    expected = [m.encode(images) for m in alone] + [m.reconstruct_masked(images) for m in alone]
    calls = [lambda m=m: m.encode(images) for m in models] + [lambda m=m: m.reconstruct_masked(images) for m in models]
    found = together(*calls, rounds=3)
    for value, right in zip(found, 3 * expected, strict=True):
        torch.testing.assert_close(value, right)
    assert shared.vit.embeddings.config.mask_ratio == owner
    assert shared.config.mask_ratio == owner


@pytest.mark.usefixtures("hasty")
def test_a_layer_watched_by_a_hook() -> None:
    """Whoever catches a layer's input must not catch that of another thread."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Flatten(), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    backbone = ClassifierInputBackbone(
        network,
        network,
        network[3],  # type: ignore[arg-type]
        name="net",
        spec="net",
        preprocessing=Preprocessing((1, 2, 2)),
        options={},
    )
    batches = [tiny.images(5, (1, 2, 2), seed) for seed in range(THREADS)]
    found = together(*(lambda x=x: backbone.extract(x).features for x in batches), rounds=6)
    for value, images in zip(found, 6 * batches, strict=True):
        torch.testing.assert_close(value, network[:3](images))


@pytest.mark.usefixtures("hasty")
def test_default_types_come_back_when_the_last_thread_leaves() -> None:
    model = CallableAutoencoder(lambda x: x.flatten(1) * torch.ones(1), lambda z: z.view(-1, 1, 2, 2), (1, 2, 2))
    images = tiny.images(3, (1, 2, 2))
    inside: list[torch.dtype] = []

    def call() -> Tensor:
        with standard_settings():
            inside.append(torch.get_default_dtype())
        return model.encode(images)

    torch.set_default_dtype(torch.float64)
    try:
        found = together(*[call] * THREADS, rounds=10)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert set(inside) == {torch.float32}
    assert all(torch.equal(latents, images.flatten(1)) for latents in found)


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("approximate", ["none", "ivf", "hnsw"])
def test_an_index_that_is_built_at_the_first_question(approximate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("faiss")
    monkeypatch.setattr(search, "APPROXIMATE_FROM", 100)
    points = tiny.images(600, (1, 1, 8)).flatten(1)
    queries = [tiny.images(7, (1, 1, 8), seed).flatten(1) for seed in range(1, THREADS + 1)]
    index, serial = (NeighborIndex(points, approximate=approximate) for _ in range(2))
    expected = [serial.nearest(q) for q in queries] + [serial.search(q, 3) for q in queries]
    calls: list[Callable[[], Any]] = [lambda q=q: index.nearest(q) for q in queries]  # type: ignore[misc]
    calls += [lambda q=q: index.search(q, 3) for q in queries]  # type: ignore[misc]
    for value, right in zip(together(*calls), 2 * expected, strict=True):
        assert torch.equal(value.indices, right.indices)
        assert torch.equal(value.distances, right.distances)
    for q, value in zip(queries, expected[THREADS:], strict=True):
        true = torch.cdist(q.double(), points.double()).topk(3, largest=False)
        torch.testing.assert_close(value.distances, true.values)


@pytest.mark.usefixtures("hasty")
def test_one_opened_picture_many_times_in_a_list() -> None:
    """Pillow decodes it at the first question, from one file with one position."""
    model = tiny.conv()
    detector = Detector.fit(model, tiny.images(12).sigmoid(), "field", workers=8)
    pixels = torch.randint(0, 256, (64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)).numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    score = functools.partial(detector.score, whole_chunks=True)
    expected = score([Image.fromarray(pixels)])

    def opened() -> Image.Image:
        return Image.open(io.BytesIO(file.getvalue()))

    picture = opened()
    for _ in range(3):
        twice = opened()
        torch.testing.assert_close(score([twice] * 16), expected.expand(16), rtol=1e-9, atol=0)
    found = together(*(lambda: score([picture, picture]) for _ in range(THREADS)))
    for scores in found:
        torch.testing.assert_close(scores, expected.expand(2), rtol=1e-9, atol=0)
