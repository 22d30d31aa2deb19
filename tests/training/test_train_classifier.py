"""Training a classifier: what it learns, what it writes, and resuming to exactly the same weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import yaml
from PIL import Image

from traj_ood.backbones import Backbone, load_backbone
from traj_ood.backbones.timm_models import new_network
from traj_ood.data import load_benchmark
from traj_ood.data.preprocessing import Preprocessing
from traj_ood.errors import TrajOODError
from traj_ood.training.autoencoder import train_model
from traj_ood.training.classifier import check_classifier
from traj_ood.training.config import TrainConfig

SIZE = 16
MODEL = {"architecture": "test_resnet"}
RECIPE = {"epochs": 2, "batch_size": 16, "learning_rate": 0.01}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Labelled lists: class 10 is bright on the left, class 9 on the right, class 2 nowhere."""
    draw = np.random.default_rng(0)
    for split, count in (("train", 48), ("val", 9), ("test", 12), ("ood", 4)):
        lines = []
        for i in range(count):
            label = (10, 9, 2)[i % 3]
            pixels = draw.integers(0, 80, (SIZE, SIZE))
            if label != 2:
                half = slice(0, SIZE // 2) if label == 10 else slice(SIZE // 2, None)
                pixels[:, half] += 150
            name = f"{split}/{i:03d}.png"
            (tmp_path / split).mkdir(exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / name)
            lines.append(f"{name} {label}")
        (tmp_path / f"{split}.txt").write_text("\n".join(lines))
    tree = {key: {"list": f"{key}.txt"} for key in ("train", "val", "test")}
    (tmp_path / "bars.yaml").write_text(yaml.safe_dump({**tree, "near": {"ood": {"list": "ood.txt"}}}))
    return tmp_path


def config(place: Path, model: dict[str, Any] | None = None, **changes: Any) -> TrainConfig:
    recipe = {**RECIPE, **changes.pop("recipe", {})}
    tree = {
        "name": "bars-net",
        "benchmark": str(place / "bars.yaml"),
        "family": "classifier",
        "image_size": SIZE,
        "channels": 1,
        "model": MODEL if model is None else model,
        "recipe": recipe,
        **changes,
    }
    path = place / "train.yaml"
    path.write_text(yaml.safe_dump(tree))
    return TrainConfig.load(str(path))


def train(place: Path, out: str, *, fresh: bool = False, **changes: Any) -> Backbone:
    backbone = train_model(config(place, **changes), place / out, fresh=fresh, quiet=True)
    assert isinstance(backbone, Backbone)
    return backbone


def test_it_learns_and_writes_what_timm_and_we_load(place: Path) -> None:
    backbone = train(place, "net", recipe={"epochs": 6})
    out = place / "net"
    record = json.loads((out / "training.json").read_text())
    assert record["classes"] == ["2", "9", "10"]  # by number, not by text
    assert record["log"][-1]["loss"] < 0.5 * record["log"][0]["loss"]
    assert record["accuracy"]["test"] == {"accuracy": pytest.approx(1, abs=0.1), "count": 12}
    assert record["accuracy"]["val"]["count"] == 9
    assert record["fingerprint"] == backbone.fingerprint()
    assert record["data"]["train"]["count"] == 48
    assert sorted(p.name for p in out.iterdir()) == [
        "README.md", "config.json", "log.jsonl", "model.safetensors", "training.json"
    ]  # fmt: skip
    loaded = load_backbone(f"timm:{out}")
    assert (loaded.name, backbone.name) == ("timm:net", "timm:bars-net")
    assert loaded.fingerprint() == backbone.fingerprint()
    assert (loaded.classes, loaded.input_shape) == (3, (1, SIZE, SIZE))
    test = load_benchmark(str(place / "bars.yaml")).test.images
    images = torch.stack([loaded.transform(test.load(i)) for i in range(len(test))])
    answer = loaded.extract(images)
    theirs = tiny.timm_from_folder(out)
    with torch.no_grad():
        torch.testing.assert_close(answer.logits, theirs(images), rtol=1e-4, atol=1e-5)
    assert answer.logits is not None
    names = [record["classes"][k] for k in answer.logits.argmax(dim=1)]
    right = float(np.mean([a == b for a, b in zip(names, test.labels, strict=True)]))
    assert right == record["accuracy"]["test"]["accuracy"]
    card = (out / "README.md").read_text()
    for text in ("# bars-net", "3 classes", "Classes: 2, 9, 10.", f"- test: {right:.2%} of 12 images", "local-dir:"):
        assert text in card
    assert str(place) not in (out / "config.json").read_text()


def test_the_declared_transform_is_that_of_training(place: Path) -> None:
    backbone = train(place, "net", recipe={"epochs": 1})
    declared = backbone.options()["transform"]
    odd = Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 23)).astype(np.uint8))
    expected = Preprocessing((1, SIZE, SIZE), tuple(declared["mean"]), tuple(declared["std"]))(odd)
    torch.testing.assert_close(backbone.transform(odd), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{}, {"recipe": {"flip": True, "input_noise": 0.1}}, {"model": {**MODEL, "drop_rate": 0.3}}]
)
def test_resume_ends_with_the_same_weights(place: Path, changes: dict[str, Any]) -> None:
    whole = train(place, "whole", **changes)
    with pytest.MonkeyPatch.context() as patch:
        tiny.interrupt_training(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            train(place, "parts", **changes)
    assert (place / "parts" / "checkpoint.pt").is_file()
    torch.manual_seed(999)
    if not changes:
        with pytest.raises(TrajOODError, match="checkpoint of a run with another config"):
            train(place, "parts", seed=3)
    assert train(place, "parts", **changes).fingerprint() == whole.fingerprint()
    assert train(place, "other", seed=1, **changes).fingerprint() != whole.fingerprint()


def test_without_labels(place: Path) -> None:
    tree = yaml.safe_load((place / "bars.yaml").read_text())
    (place / "bars.yaml").write_text(yaml.safe_dump({**tree, "test": "test"}))
    backbone = train(place, "net")
    record = json.loads((place / "net" / "training.json").read_text())
    assert list(record["accuracy"]) == ["val"]
    assert backbone.classes == 3
    (place / "bars.yaml").write_text(yaml.safe_dump({**tree, "train": "train"}))
    with pytest.raises(
        TrajOODError, match=r"'bars': expected .* of at least 2 classes for a classifier, got no labels"
    ):
        train(place, "other")


def test_labels_nobody_trained_on(place: Path) -> None:
    (place / "test.txt").write_text("test/000.png 10\ntest/001.png 7\n")
    with pytest.raises(TrajOODError, match=r"unknown class in split 'test' '7'.*Known: 10, 2, 9"):
        train(place, "net")
    assert not (place / "net").exists()
    (place / "train.txt").write_text("train/000.png 10\ntrain/001.png 10\n")
    with pytest.raises(TrajOODError, match="got only class '10'"):
        train(place, "net")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"model": {}}, "bars-net: expected architecture in a classifier's model, a timm name such as resnet18"),
        ({"model": {"architecture": "resnet81"}}, "unknown timm model 'resnet81': did you mean"),
        ({"model": {**MODEL, "in_chans": 3}}, "'in_chans' follows from channels: leave it out"),
        ({"model": {**MODEL, "widht": 3}}, r"timm:test_resnet: cannot be built with .*widht"),
        ({"recipe": {"mask_ratios": [0.5]}}, "a classifier has no masking: leave out mask_ratios and loss"),
        ({"recipe": {"learning_rate": 1e30, "warmup": 0.0}}, "bars-net: the loss is (nan|inf)"),
    ],
)
def test_bad_configs(place: Path, changes: dict[str, Any], text: str) -> None:
    with pytest.raises(TrajOODError, match=text):
        train(place, "net", **changes)
    assert not (place / "net" / "model.safetensors").exists()


def test_the_bundled_config() -> None:
    bundled = TrainConfig.load("fashion-classifier")
    assert (bundled.family, bundled.benchmark, bundled.image_size, bundled.channels) == ("classifier", "fashion", 28, 1)
    arguments = {k: v for k, v in bundled.model.items() if k != "architecture"}
    network = new_network(bundled.model["architecture"], num_classes=7, in_chans=1, **arguments)
    assert sum(p.numel() for p in network.parameters()) < 3_000_000
    check_classifier(bundled)
