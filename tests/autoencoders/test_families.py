"""The registry of model families: one file adds a family, and everything that takes a model takes it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import tiny
import torch
from click.testing import CliRunner
from toy_autoencoder import LinearAutoencoder
from toy_backbone import PixelBackbone

import traj_ood
from traj_ood import Autoencoder, Detector, TrajOODError, load_autoencoder, load_backbone
from traj_ood.autoencoders import FAMILIES, MODELS, ModelInfo, SurrogateAutoencoder, SurrogateNetwork
from traj_ood.backbones import LIBRARIES, is_backbone_spec
from traj_ood.cli import main


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    """The two toys, for one test."""
    known = dict(FAMILIES), dict(LIBRARIES), dict(MODELS)
    traj_ood.register_autoencoder(LinearAutoencoder)
    traj_ood.register_backbone(PixelBackbone)
    yield
    for registry, before in zip((FAMILIES, LIBRARIES, MODELS), known, strict=True):
        registry.clear()
        registry.update(before)  # type: ignore[arg-type]


def test_an_autoencoder_family_is_one_file(tmp_path: Path) -> None:
    model = load_autoencoder("linear:5", gain=0.5, name="mine")
    assert (type(model), model.name) == (LinearAutoencoder, "mine")
    images = torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    detector = Detector.fit(model, images, "knn:k=2")
    detector.save(tmp_path / "detector")
    loaded = Detector.load(tmp_path / "detector", device="cpu")
    assert type(loaded.autoencoder) is LinearAutoencoder
    assert torch.equal(loaded.score(images), detector.score(images))
    model.save_pretrained(tmp_path)
    assert load_autoencoder(tmp_path).fingerprint() == load_autoencoder(f"linear:{tmp_path}").fingerprint()
    assert load_autoencoder(tmp_path).fingerprint() == model.fingerprint()


def test_a_backbone_library_is_one_file(tmp_path: Path) -> None:
    assert is_backbone_spec("pixels:12")
    backbone = load_backbone("pixels:12", scale=2.0)
    torch.manual_seed(0)
    network = SurrogateNetwork(12, hidden=(8,), bottleneck=4)
    images = torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    network.set_statistics(backbone.extract(images).features)
    model = SurrogateAutoencoder(backbone, network)
    detector = Detector.fit(model, images, "knn:k=2")
    detector.save(tmp_path / "detector")
    loaded = Detector.load(tmp_path / "detector", device="cpu")
    assert isinstance(loaded.autoencoder, SurrogateAutoencoder)
    assert type(loaded.autoencoder.backbone) is PixelBackbone
    assert torch.equal(loaded.score(images), detector.score(images))
    model.save_pretrained(tmp_path / "surrogate")
    assert load_autoencoder(tmp_path / "surrogate").fingerprint() == model.fingerprint()


@pytest.mark.slow
def test_the_command_line_takes_a_registered_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAJ_OOD_DATA", str(tmp_path / "cache"))
    yaml = tiny.write_benchmark(tmp_path, train=40)
    for model in ("linear:5", "pixels:12"):
        arguments = ["bench", str(yaml), "--model", model, "--out", str(tmp_path / "out"), "--scorers", "knn:k=2"]
        result = CliRunner().invoke(main, [*arguments, "--no-plots", "-q", "--device", "cpu", "--bootstrap", "0"])
        assert result.exit_code == 0, result.output
    listed = CliRunner().invoke(main, ["list", "models"]).stdout
    assert LinearAutoencoder.summary in listed
    assert PixelBackbone.summary in listed


@pytest.mark.parametrize("name", ["linear", "pixels"])
def test_a_family_without_a_source_is_told_what_follows(name: str) -> None:
    with pytest.raises(TrajOODError, match=rf"'{name}': expected a source after it \(.*{name}:<"):
        load_autoencoder(name)


def test_published_models_of_a_family_have_names() -> None:
    class Named(LinearAutoencoder):
        family = "named"
        marks: ClassVar = {"model_type": "toy_named"}
        models: ClassVar = {"five": ModelInfo("named:5", "of five numbers")}

    traj_ood.register_autoencoder(Named)
    model = load_autoencoder("five")
    assert (type(model), model.name) == (Named, "five")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"family": "custom"}, "expected family to be one word other than 'custom', got 'custom'"),
        ({"family": "a:b"}, "expected family to be one word other than 'custom', got 'a:b'"),
        ({"family": "conv"}, "family 'conv' is taken by ConvAutoencoder: choose another"),
        ({"summary": ""}, "expected a summary in the class"),
    ],
)
def test_families_that_cannot_be_registered(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(TrajOODError, match=rf"autoencoder family Mine: {text}"):
        traj_ood.register_autoencoder(type("Mine", (LinearAutoencoder,), {"family": "mine", **changes}))


def test_a_family_needs_its_methods() -> None:
    half = type("Half", (Autoencoder,), {"family": "half", "summary": "x", "encode_batch": lambda self, x: x})
    text = r"autoencoder family Half: expected decode_batch, from_pretrained, save_pretrained in the class"
    with pytest.raises(TrajOODError, match=text):
        traj_ood.register_autoencoder(half)
    library = type("Half", (traj_ood.Backbone,), {"library": "half", "summary": "x"})
    with pytest.raises(TrajOODError, match="backbone library Half: expected forward_batch, load, pack, unpack in the"):
        traj_ood.register_backbone(library)


@pytest.mark.parametrize(
    ("load", "spec", "text"),
    [
        (load_autoencoder, "linear:", r"model 'linear:': expected a name after linear: \(a random projection"),
        (load_autoencoder, "liner", "unknown model 'liner'"),
        (load_backbone, "pixels:", r"backbone 'pixels:': expected a name after pixels: \(random features"),
        (load_backbone, "pixel:3", "unknown backbone library 'pixel': did you mean 'pixels'"),
    ],
)
def test_specs_that_name_nothing(load: Any, spec: str, text: str) -> None:
    with pytest.raises(TrajOODError, match=text):
        load(spec)


def test_an_option_that_the_family_does_not_know() -> None:
    with pytest.raises(TrajOODError, match=r"model 'linear:3': got an unexpected keyword argument 'gian'"):
        load_autoencoder("linear:3", gian=1.0)
    with pytest.raises(TrajOODError, match=r"backbone 'pixels:3': got an unexpected keyword argument 'size'"):
        load_backbone("pixels:3", size=1)


def test_what_a_subclass_of_a_family_does_is_its_own_code(tmp_path: Path) -> None:
    class Mine(LinearAutoencoder):
        pass

    from traj_ood.detector.packing import pack

    assert pack(Mine(3), tmp_path / "model")["kind"] == "callable"
    assert not (tmp_path / "model").exists()


# ------------------------------------------------------------------------------------------ folders of older versions

CONV = {"channels": 1, "size": 8, "width": 2, "bottleneck": 6}


def test_a_model_that_the_first_versions_packed_is_rebuilt(tmp_path: Path) -> None:
    """The files and the description as written before families were registered, literally."""
    from safetensors.torch import save_file

    from traj_ood.detector.packing import unpack

    model = tiny.conv(mean=(0.1,), std=(0.9,), name="mine")
    save_file(model.module.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = {"model_type": "traj_ood_conv", "network": CONV, "mean": [0.1], "std": [0.9]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    described = {
        "kind": "conv",
        "family": "conv",
        "name": "mine",
        "options": {"mean": [0.1], "std": [0.9]},
        "fingerprint": model.fingerprint(),
        "input_shape": [1, 8, 8],
        "chunk": 6,
    }
    assert unpack(described, tmp_path).fingerprint() == model.fingerprint()


def test_a_surrogate_that_the_first_versions_packed_is_rebuilt(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from traj_ood.backbones.timm_models import TimmBackbone, new_network
    from traj_ood.detector.packing import unpack

    torch.manual_seed(0)
    data = {"input_size": (3, 160, 160), "interpolation": "bicubic", "mean": (0.5,) * 3, "std": (0.5,) * 3}
    vit = new_network("test_vit", num_classes=3)
    backbone = TimmBackbone(vit, name="timm:w", spec="timm:w", data={**data, "crop_pct": 1.0, "crop_mode": "center"})
    model = SurrogateAutoencoder(backbone, SurrogateNetwork(64, hidden=(8,), bottleneck=4), name="mine")
    for file, module in (("network", model.network), ("backbone", vit)):
        tensors = {key: value.contiguous() for key, value in module.state_dict().items()}
        save_file(tensors, tmp_path / f"{file}.safetensors", metadata={"format": "pt"})
    transform = {**{k: list(v) if isinstance(v, tuple) else v for k, v in data.items()}, "crop_pct": 1.0}
    described = {
        "kind": "surrogate",
        "family": "surrogate",
        "name": "mine",
        "options": {
            "backbone": backbone.fingerprint(),
            "network": {"features": 64, "hidden": [8], "bottleneck": 4, "activation": "gelu", "latent_norm": True},
        },
        "fingerprint": model.fingerprint(),
        "input_shape": [3, 160, 160],
        "chunk": 96,
        "backbone": {
            "library": "timm",
            "name": "timm:w",
            "options": {"transform": {**transform, "crop_mode": "center"}, "pooling": "pre_logits"},
            "fingerprint": backbone.fingerprint(),
            "chunk": 2,
            "recipe": {"architecture": "test_vit.r160_in1k", "arguments": {"num_classes": 3, "in_chans": 3}},
        },
    }
    loaded = unpack(described, tmp_path)
    assert isinstance(loaded, SurrogateAutoencoder)
    assert (loaded.chunk, loaded.backbone.chunk, loaded.backbone.name) == (96, 2, "timm:w")


# ---------------------------------------------------------------------------------------------- slips in a family


class _PairInDecode(LinearAutoencoder):
    def decode_batch(self, latents: torch.Tensor) -> Any:
        return super().decode_batch(latents), latents


class _FlatImages(LinearAutoencoder):
    def decode_batch(self, latents: torch.Tensor) -> torch.Tensor:
        return super().decode_batch(latents).flatten(1)


class _OtherOrder(LinearAutoencoder):
    """Its encoder takes what its decoder returns, in another order of the axes."""

    def decode_batch(self, latents: torch.Tensor) -> torch.Tensor:
        return super().decode_batch(latents).permute(0, 2, 3, 1)


@pytest.mark.parametrize(
    ("family", "text"),
    [
        (_PairInDecode, "linear: decode: expected one tensor, got tuple: return the tensor alone"),
        (_FlatImages, r"linear: decode: expected images \(B, 1, 8, 8\) as encode takes them, got \(2, 64\): reshape"),
        (_OtherOrder, r"linear: decode: expected images \(B, 1, 8, 8\) as encode takes them, got \(2, 8, 8, 1\)"),
    ],
)
def test_a_decoder_that_returns_no_images_is_refused(family: type[LinearAutoencoder], text: str) -> None:
    with pytest.raises(TrajOODError, match=text):
        Detector.fit(family(5), torch.rand(8, 1, 8, 8), "knn:k=2")


class _NoName(LinearAutoencoder):
    family, summary = "no-name", "a family whose models lack an attribute"
    marks: ClassVar = {}

    def __init__(self, width: int, **options: Any) -> None:
        super().__init__(width, **options)
        del self.name


class _NoReturn(LinearAutoencoder):
    family, summary = "no-return", "a family that loads nothing"
    marks: ClassVar = {}

    @classmethod
    def load(cls, source: str, **options: Any) -> Any:
        cls(int(source), **options)


class _Forgets(LinearAutoencoder):
    """``gain`` decides the latents, but is neither written nor among the options."""

    family, summary = "forgets", "a family that saves half of a model"
    marks: ClassVar = {}

    def save_pretrained(self, folder: Path) -> None:
        gain, self.gain = self.gain, 1.0
        super().save_pretrained(folder)
        self.gain = gain

    def options(self) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize(
    ("family", "text"),
    [
        (_NoName, "autoencoder family _NoName: expected the attributes name: set them in __init__"),
        (
            _NoReturn,
            "expected an instance of Autoencoder from the method that loads it, got NoneType: return the model",
        ),
    ],
)
def test_a_model_without_an_attribute_is_refused_by_name(family: type[LinearAutoencoder], text: str) -> None:
    traj_ood.register_autoencoder(family)
    with pytest.raises(TrajOODError, match=text):
        load_autoencoder(f"{family.family}:5")


def test_a_detector_whose_model_cannot_be_rebuilt_is_not_written(tmp_path: Path) -> None:
    traj_ood.register_autoencoder(_Forgets)
    images = torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    Detector.fit(load_autoencoder("forgets:5"), images, "knn:k=2").save(tmp_path / "good")
    detector = Detector.fit(load_autoencoder("forgets:5", gain=2.0), images, "knn:k=2")
    text = r"linear: expected that _Forgets\.from_pretrained rebuilds .*, got: the rebuilt one gives other latents"
    with pytest.raises(TrajOODError, match=text):
        detector.save(tmp_path / "detector")
    assert [path.name for path in tmp_path.iterdir()] == ["good"]
