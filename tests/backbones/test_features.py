"""The feature cache: one extraction whatever the batches, and no numbers from files of something else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from traj_ood.backbones import CallableBackbone, Features
from traj_ood.backbones import feature_cache as features_module
from traj_ood.backbones.feature_cache import FeatureCache
from traj_ood.data.images import ArrayImages
from traj_ood.errors import TrajOODError

COUNT, BLOCK = 23, 8


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features_module, "BLOCK", BLOCK)
    monkeypatch.setattr(features_module, "_READ_IMAGES", 3)


def network(seed: int = 0, name: str = "toy", classes: int = 2) -> CallableBackbone:
    torch.manual_seed(seed)
    module = nn.ModuleList([nn.Linear(16, 5), nn.Linear(5, 2)])

    def forward(images: Tensor) -> Features:
        hidden = module[0](images.flatten(1)).relu()
        return Features(hidden, module[1](hidden) if classes else None)

    return CallableBackbone(forward, (1, 4, 4), 5, classes=classes, module=module, name=name, chunk=4)


def source(seed: int = 0, count: int = COUNT) -> ArrayImages:
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 4, 4)).astype(np.uint8)
    return ArrayImages(tuple(f"image/{i:02d}" for i in range(count)), pixels)


class Watched:
    """A source that remembers which images were read, and fails where told."""

    def __init__(self, images: ArrayImages, broken: tuple[int, ...] = ()) -> None:
        self.images, self.broken = images, broken
        self.asked: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.images, name)

    def __len__(self) -> int:
        return len(self.images)

    def load(self, index: int) -> Any:
        self.asked.append(index)
        if index in self.broken:
            raise TrajOODError(f"{self.images.ids[index]}: truncated")
        return self.images.load(index)


def direct(backbone: CallableBackbone, images: ArrayImages) -> Features:
    return backbone.extract(torch.stack([backbone.transform(images.load(i)) for i in range(len(images))]))


@pytest.mark.parametrize("batch", [1, 5, 8, 10, 23])
def test_any_batches_give_what_extract_gives_and_read_once(tmp_path: Path, batch: int) -> None:
    backbone, images = network(), source()
    watched, cache = Watched(images), FeatureCache(tmp_path)
    expected = direct(backbone, images)
    for _ in range(2):
        rows = 0
        for start in range(0, COUNT, batch):
            indices = range(start, min(start + batch, COUNT))
            ids, found, failures = cache.extract(backbone, watched, indices)
            assert found is not None
            assert found.logits is not None
            assert ids == images.ids[start : indices.stop]
            assert not failures
            torch.testing.assert_close(found.features, expected.features[start : indices.stop], rtol=1e-5, atol=1e-6)
            assert expected.logits is not None
            torch.testing.assert_close(found.logits, expected.logits[start : indices.stop], rtol=1e-5, atol=1e-6)
            rows += len(ids)
        assert rows == COUNT
        assert sorted(watched.asked) == list(range(COUNT))


def test_another_process_and_other_batches_hit(tmp_path: Path) -> None:
    images = source()
    FeatureCache(tmp_path).extract(network(), images, range(COUNT))
    again = Watched(source())
    ids, found, _ = FeatureCache(tmp_path).extract(network(name="toy"), again, range(6, 19))
    assert again.asked == []
    assert found is not None
    torch.testing.assert_close(found.features, direct(network(), images).features[6:19], rtol=1e-5, atol=1e-6)
    assert ids == images.ids[6:19]
    (folder,) = tmp_path.iterdir()
    names = sorted(p.name for p in folder.iterdir())
    assert names == ["00000000.safetensors", "00000008.safetensors", "00000016.safetensors", "cache.json"]


def test_a_backbone_that_was_trained_meanwhile_is_another(tmp_path: Path) -> None:
    backbone, images, cache = network(), source(), FeatureCache(tmp_path)
    cache.extract(backbone, images, range(COUNT))
    weight = backbone.module[0].weight
    for changed in (weight.detach(), weight.data):  # the latter does not count as a change in torch
        changed.mul_(3)
        found = cache.extract(backbone, images, range(COUNT))[1]
        assert found is not None
        torch.testing.assert_close(found.features, direct(backbone, images).features)


def test_blocks_are_kept_under_the_way_in_which_they_were_called(tmp_path: Path) -> None:
    module = nn.Linear(16, 5)

    def forward(images: Tensor) -> Features:
        features = module(images.flatten(1))  # and the rows after the first are rounded differently
        return Features(features * (1 + 2e-7 * (torch.arange(len(features)) > 0).float()[:, None]), None)

    backbone, watched = CallableBackbone(forward, (1, 4, 4), 5, module=module, chunk=24), Watched(source())
    cache = FeatureCache(tmp_path)
    for _ in range(2):
        cache.extract(backbone, watched, range(COUNT))
    assert len(watched.asked) == COUNT
    assert [json.loads(p.read_text())["calls"] for p in tmp_path.glob("*/cache.json")] == [str(backbone.chunk)] == ["1"]


def test_blocks_do_not_depend_on_the_callers_settings(tmp_path: Path) -> None:
    backbone, images = network(), source()
    FeatureCache(tmp_path / "a").extract(backbone, images, range(COUNT))
    try:
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        found = FeatureCache(tmp_path / "b").extract(backbone, images, range(COUNT))[1]
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert found is not None
    assert found.features.dtype == torch.float32
    one, other = ([p.read_bytes() for p in sorted((tmp_path / side).rglob("*.*"))] for side in "ab")
    assert one == other


def test_only_touched_blocks_are_read(tmp_path: Path) -> None:
    watched = Watched(source())
    FeatureCache(tmp_path).extract(network(), watched, range(9, 11))
    assert sorted(watched.asked) == list(range(8, 16))


def test_other_weights_options_and_images_stay_apart(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path)
    for backbone, images in (
        (network(), source()),
        (network(1), source()),
        (network(name="b"), source()),
        (network(), source(1)),
    ):
        _, found, _ = cache.extract(backbone, images, range(COUNT))
        assert found is not None
        torch.testing.assert_close(found.features, direct(backbone, images).features, rtol=1e-5, atol=1e-6)
    assert len(list(tmp_path.iterdir())) == 4


def test_without_a_classifier(tmp_path: Path) -> None:
    backbone, images = network(classes=0), source()
    for _ in range(2):
        _, found, _ = FeatureCache(tmp_path).extract(backbone, images, range(COUNT))
        assert found is not None
        assert found.logits is None
        torch.testing.assert_close(found.features, direct(backbone, images).features, rtol=1e-5, atol=1e-6)


def test_unreadable_images_are_tried_again(tmp_path: Path) -> None:
    backbone, images, cache = network(), source(), FeatureCache(tmp_path)
    watched = Watched(images, broken=(9, 10))
    ids, found, failures = cache.extract(backbone, watched, range(8, 12), on_error="skip")
    assert ids == ("image/08", "image/11")
    assert found is not None
    torch.testing.assert_close(found.features, direct(backbone, images).features[[8, 11]], rtol=1e-5, atol=1e-6)
    assert failures == [{"id": f"image/{i:02d}", "error": f"image/{i:02d}: truncated"} for i in (9, 10)]
    assert cache.extract(backbone, watched, range(9, 11), on_error="skip")[:2] == ((), None)
    assert cache.extract(backbone, watched, range(8, 9), on_error="skip")[2] == []  # not asked for, not reported
    watched.broken, watched.asked = (), []
    assert len(cache.extract(backbone, watched, range(8, 12))[0]) == 4
    assert sorted(watched.asked) == list(range(8, 16))


def test_an_unreadable_image_leaves_no_block(tmp_path: Path) -> None:
    with pytest.raises(TrajOODError, match="image/03: truncated"):
        FeatureCache(tmp_path).extract(network(), Watched(source(), broken=(3,)), range(4))
    assert not list(tmp_path.rglob("*.safetensors"))


def test_empty_and_impossible_ranges(tmp_path: Path) -> None:
    backbone, images = network(), source()
    cache = FeatureCache(tmp_path)
    assert cache.extract(backbone, images, range(3, 3)) == ((), None, [])
    for indices in (range(COUNT + 1), range(-1, 3), range(0, 6, 2)):
        with pytest.raises(TrajOODError, match=r"expected consecutive indices within 23 images, got range"):
            cache.extract(backbone, images, indices)


# ---------------------------------------------------------------------------------------------- damage


def filled(tmp_path: Path) -> Path:
    backbone, images = network(), source()
    FeatureCache(tmp_path).extract(backbone, images, range(COUNT))
    (folder,) = tmp_path.iterdir()
    return folder


def ask(tmp_path: Path, backbone: CallableBackbone | None = None) -> None:
    backbone, images = backbone or network(), source()
    FeatureCache(tmp_path).extract(backbone, images, range(COUNT))


@pytest.mark.parametrize("damage", ["cut", "bit", "other block", "rubbish"])
def test_damaged_blocks(tmp_path: Path, damage: str) -> None:
    block = filled(tmp_path) / "00000008.safetensors"
    content = bytearray(block.read_bytes())
    if damage == "cut":
        content = content[:-20]
    elif damage == "bit":
        content[-3] ^= 1
    elif damage == "rubbish":
        content = bytearray(b"no tensors")
    else:
        content = bytearray((block.parent / "00000000.safetensors").read_bytes())
    block.write_bytes(content)
    with pytest.raises(
        TrajOODError, match=r"00000008\.safetensors: not a readable block of features .*delete this file to extract its"
    ):
        ask(tmp_path)
    block.unlink()
    ask(tmp_path)


def test_a_cache_of_another_backbone_is_named(tmp_path: Path) -> None:
    folder = filled(tmp_path)
    stored = json.loads((folder / "cache.json").read_text())
    other = {**stored, "backbone": "timm:other", "fingerprint": "f" * 64}
    (folder / "cache.json").write_text(json.dumps(other))
    with pytest.raises(
        TrajOODError,
        match=r"cache\.json: holds features of backbone timm:other \(ffffffffffff\) over .*, expected those of toy "
        r"\([0-9a-f]{12}\) over .* \(other fingerprint\): choose another cache folder, or delete ",
    ):
        ask(tmp_path)
    (folder / "cache.json").write_text(json.dumps({**stored, "block": 4}))
    with pytest.raises(TrajOODError, match=r"\(other block\)"):
        ask(tmp_path)
    (folder / "cache.json").write_text("{")
    with pytest.raises(
        TrajOODError, match=r"cache\.json: expected JSON, got .*; delete its folder to extract its features again"
    ):
        ask(tmp_path)
    (folder / "cache.json").unlink()
    with pytest.raises(TrajOODError, match=r"expected cache\.json beside it, found nothing: delete its folder"):
        ask(tmp_path)


def test_unwritable_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrajOODError, match="expected a folder that can be written"):
        ask(tmp_path / "file")
