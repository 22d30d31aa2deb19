"""How a network is called on this machine: timed once, kept, and nothing that depends on the batch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor, nn
from toy_backbone import PixelBackbone

from traj_ood.backbones import LIBRARIES, Backbone, CallableBackbone, Features, tuning
from traj_ood.backbones.feature_cache import FeatureCache
from traj_ood.backbones.packing import pack_backbone, unpack_backbone
from traj_ood.backbones.tuning import Calls, fastest, tuned
from traj_ood.data.images import ArrayImages
from traj_ood.data.preprocessing import Preprocessing

Timed = list[Calls]


def convolutions(seed: int = 0) -> Backbone:
    """A small convolutional network that passes for a library's; it notes how it is called."""
    torch.manual_seed(seed)
    layers = nn.Sequential(nn.Conv2d(3, 20, 3, stride=2), nn.ReLU(), nn.Conv2d(20, 30, 3, groups=10), nn.ReLU())

    def forward(images: Tensor) -> Features:
        made.count += 1
        made.seen.add((len(images), images.is_contiguous(memory_format=torch.channels_last)))
        return Features(layers(images).mean(dim=(2, 3)), None)

    made = CallableBackbone(forward, (3, 20, 20), 30, module=layers)
    made.seen, made.count = set(), 0
    made.library = "toy"  # else it would be the user's own, which is called as they say
    return made


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[tuple[int, bool], float]], Timed]:
    """Seconds an image by rows and order, 1 where none are given; the list fills with what is timed."""

    def say(seconds: dict[tuple[int, bool], float]) -> Timed:
        asked: Timed = []

        def clock(_: Backbone, way: Calls) -> float:
            asked.append(way)
            return seconds.get((way.rows, way.channels_last), 1.0)

        monkeypatch.setattr(tuning, "_seconds", clock)
        return asked

    return say


def test_the_fastest_way_is_taken_and_kept(times: Callable[..., Timed], tmp_path: Path) -> None:
    asked = times({(6, True): 0.2, (1, True): 0.3})
    backbone = tuned(convolutions(), tmp_path)
    assert (backbone.chunk, backbone.channels_last) == (6, True)
    assert asked[1:] == [Calls(1, False), Calls(6, False), Calls(1, True), Calls(6, True), Calls(24, True)]
    asked.clear()
    times({(1, False): 0.1})  # faster today: what was decided stays
    again = tuned(convolutions(), tmp_path)
    assert (again.chunk, again.channels_last) == (6, True)
    assert asked == []
    assert (tuned(convolutions(seed=1), tmp_path).chunk, len(list((tmp_path / "calls").iterdir()))) == (1, 2)


def test_what_is_not_timed(times: Callable[..., Timed], tmp_path: Path) -> None:
    asked = times({(1, True): 0.1})
    own, set_before, fixed = convolutions(), convolutions(), convolutions()
    own.library, set_before.chunk, fixed.ladder = "custom", 12, ()
    assert [tuned(b, tmp_path).chunk for b in (own, set_before, fixed)] == [24, 12, 24]
    assert asked == []
    times({(6, False): 1e-4})  # no image takes longer to compute than to read
    assert fastest(convolutions()) == Calls(24, False)


def test_where_nothing_can_be_kept_nothing_changes(times: Callable[..., Timed], tmp_path: Path) -> None:
    times({(1, True): 0.1})
    (tmp_path / "file").write_text("")
    assert tuned(convolutions(), tmp_path / "file").chunk == 24
    assert tuned(convolutions(), tmp_path).chunk == 1
    (path,) = (tmp_path / "calls").iterdir()
    for damage in ("{", json.dumps({"rows": 7, "channels_last": True}), json.dumps({"rows": 1})):
        path.write_text(damage)
        backbone = tuned(convolutions(), tmp_path)
        assert (backbone.chunk, backbone.channels_last) == (24, False)


def test_the_first_decision_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process decides while this one is timing."""

    def meanwhile(_: Backbone, way: Calls) -> float:
        tuning.write_atomic(place, json.dumps({"rows": 6, "channels_last": False}).encode())
        return 0.1 if way == Calls(1, True) else 1.0

    monkeypatch.setattr(tuning, "_seconds", lambda *_: 1.0)
    tuned(convolutions(), tmp_path)
    (place,) = (tmp_path / "calls").iterdir()
    place.unlink()
    monkeypatch.setattr(tuning, "_seconds", meanwhile)
    assert tuned(convolutions(), tmp_path).chunk == 6


@pytest.mark.parametrize("rows", [1, 6, 24])
@pytest.mark.parametrize("last", [False, True])
def test_in_each_way_features_do_not_depend_on_the_batch(rows: int, last: bool) -> None:
    backbone, images = convolutions(), tiny.images(31, (3, 20, 20))
    plain = backbone.extract(images).features
    backbone.seen.clear()
    backbone.chunk, backbone.channels_last = rows, last
    whole = backbone.extract(images).features
    assert backbone.seen == {(rows, last)}
    torch.testing.assert_close(whole, plain, rtol=1e-5, atol=1e-6)
    parts = torch.cat([backbone.extract(part).features for part in images.split(7)])
    turned = backbone.extract(images.flip(0)).features.flip(0)
    for other in (parts, turned):
        torch.testing.assert_close(other, whole, rtol=1e-9, atol=0)


def test_a_detector_keeps_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LIBRARIES, "pixels", PixelBackbone)
    backbone = PixelBackbone(4, name="toy")
    backbone.chunk, backbone.channels_last = 6, True
    described = pack_backbone(backbone, tmp_path)
    rebuilt = unpack_backbone(described, tmp_path)
    assert (rebuilt.chunk, rebuilt.channels_last) == (6, True)
    del described["channels_last"]  # as an older version wrote it
    assert not unpack_backbone(described, tmp_path).channels_last


def test_cached_features_are_those_of_one_way(tmp_path: Path) -> None:
    pixels = torch.randint(0, 256, (9, 20, 20, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8).numpy()
    images = ArrayImages(tuple(map(str, range(9))), pixels)
    backbone, cache = convolutions(), FeatureCache(tmp_path)
    backbone.extract(torch.zeros(1, 3, 20, 20))  # the trial
    for rows, last, calls in ((6, True, 2), (6, True, 0), (6, False, 2), (1, True, 9), (6, True, 0)):
        backbone.chunk, backbone.channels_last = rows, last
        fresh = FeatureCache(tmp_path)
        backbone.count = 0
        fresh.extract(backbone, images, range(9))
        assert backbone.count == calls, (rows, last)
    assert len(list(tmp_path.iterdir())) == 3
    assert cache.extract(backbone, images, range(9))[0] == images.ids


class Narrow(Backbone):
    """Rounds every row but the first differently, as a processor may do in narrow products."""

    library = "narrow"

    def __init__(self) -> None:
        self.name = self.spec = "narrow:5"
        self.input_shape, self.feature_dim = (1, 8, 8), 5
        self.preprocessing, self.module = Preprocessing(self.input_shape), nn.Linear(64, 5)

    def forward_batch(self, images: Tensor) -> Features:
        features = self.module(images.flatten(1))
        return Features(features * (1 + 1e-5 * (torch.arange(len(features)) > 0).float()[:, None]), None)


def test_a_network_that_rounds_by_place_is_called_row_by_row_in_every_way(tmp_path: Path) -> None:
    backbone = tuned(Narrow(), tmp_path)
    images = torch.randn(24, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    rolled, found = backbone.extract(images.roll(1, 0)).features, backbone.extract(images).features.roll(1, 0)
    torch.testing.assert_close(found, rolled, rtol=1e-6, atol=1e-6 * float(found.abs().max()))
    assert backbone.chunk == 1
