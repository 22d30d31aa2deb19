"""Packing: every kind of model comes back from its folder alone, or says in one line why it does not."""

from __future__ import annotations

import json
import shutil
import socket
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from traj_ood.autoencoders import (
    Autoencoder,
    ConvAutoencoder,
    ConvNetwork,
    PairAutoencoder,
    SurrogateAutoencoder,
    SurrogateNetwork,
)
from traj_ood.autoencoders.rehearsals import rehearsal_pair
from traj_ood.backbones import Backbone, CallableBackbone, Features, load_backbone
from traj_ood.backbones.timm_models import TimmBackbone, new_network, save_folder
from traj_ood.detector.packing import pack, unpack
from traj_ood.errors import TrajOODError


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Anything that reaches for the network fails, whatever library it is in."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError("this test has no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def surrogate(backbone: Backbone, name: str | None = None) -> SurrogateAutoencoder:
    torch.manual_seed(0)
    backbone.chunk = 2
    network = SurrogateNetwork(backbone.feature_dim, hidden=(8,), bottleneck=4)
    network.set_statistics(backbone.extract(images_of(backbone, 6)).features)
    return SurrogateAutoencoder(backbone, network, name=name)


def images_of(model: Autoencoder | Backbone, count: int = 3) -> Tensor:
    return tiny.images(count, model.input_shape, seed=3)


def timm_folder(folder: Path, architecture: str = "test_resnet", channels: int = 3, **arguments: Any) -> Backbone:
    torch.manual_seed(0)
    own = {"num_classes": 5, "in_chans": channels, **arguments}
    statistics = {"mean": [0.4] * channels, "std": [0.3] * channels, "input_size": [channels, 32, 32]}
    data = {"interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "squash", **statistics}
    save_folder(new_network(architecture, **own).eval(), folder, architecture, own, data)
    return load_backbone(f"timm:{folder}")


def timm_file(folder: Path) -> Backbone:
    torch.manual_seed(0)
    torch.save(new_network("test_vit", num_classes=3).state_dict(), folder / "w.pth")
    return load_backbone(f"timm:test_vit:{folder / 'w.pth'}", crop_pct=1.0)


def timm_without_classifier(folder: Path) -> Backbone:
    torch.manual_seed(0)
    return TimmBackbone(new_network("test_efficientnet", num_classes=0), name="timm:mine", spec="timm:mine")


def torchvision_file(folder: Path, entry: str = "DEFAULT") -> Backbone:
    from torchvision import models

    torch.manual_seed(0)
    network = models.get_model("shufflenet_v2_x0_5", weights=None, num_classes=4)
    torch.save(network.state_dict(), folder / "w.pth")
    return load_backbone(f"torchvision:shufflenet_v2_x0_5:{folder / 'w.pth'}", weights=entry)


def transformers_folder(folder: Path, kind: str = "vit", classifier: bool = True) -> Backbone:
    import transformers as tf

    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    config: Any = {
        "vit": lambda: tf.ViTConfig(**small, intermediate_size=32, num_labels=4),
        "resnet": lambda: tf.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=4
        ),
    }[kind]()
    auto: Any = tf.AutoModelForImageClassification if classifier else tf.AutoModel
    auto.from_config(config).save_pretrained(folder)
    tf.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return load_backbone(f"transformers:{folder}")


class FakeNet(nn.Module):
    """The contract of OpenOOD's networks."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, num_classes)

    def forward(self, x: Tensor, return_feature: bool = False) -> Any:
        features = self.conv(x).mean(dim=(2, 3))
        return (self.fc(features), features) if return_feature else self.fc(features)


def openood_checkpoint(folder: Path) -> Backbone:
    torch.manual_seed(0)
    torch.save(FakeNet(7).state_dict(), folder / "best.ckpt")
    return load_backbone(f"openood:resnet18_32x32:{folder / 'best.ckpt'}", mean=(0.1, 0.2, 0.3))


def diffusers_vae() -> Autoencoder:
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    from traj_ood.autoencoders import DiffusersVAE

    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    model = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=2, layers_per_block=1, **blocks
    )
    return DiffusersVAE(model, name="vae", image_size=16, scaled=True)


BACKBONES: dict[str, Callable[[Path], Backbone]] = {
    "timm folder": timm_folder,
    "timm grey": lambda folder: timm_folder(folder, channels=1),
    "timm arguments": lambda folder: timm_folder(folder, "test_vit", embed_dim=32, num_heads=2, img_size=32),
    "timm activation": lambda folder: timm_folder(folder, "test_resnet", act_layer="gelu"),
    "timm file": timm_file,
    "timm without classifier": timm_without_classifier,
    "torchvision": torchvision_file,
    "transformers vit": transformers_folder,
    "transformers resnet": lambda folder: transformers_folder(folder, "resnet"),
    "transformers encoder": lambda folder: transformers_folder(folder, classifier=False),
    "openood": openood_checkpoint,
}


@pytest.fixture
def _openood(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("openood", "openood.networks", "openood.networks.resnet18_32x32"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setattr(sys.modules["openood.networks.resnet18_32x32"], "ResNet18_32x32", FakeNet, raising=False)


def assert_same(a: Autoencoder, b: Autoencoder) -> None:
    assert type(a) is type(b)
    assert (a.name, a.family, a.input_shape, a.chunk, a.has_cls) == (
        b.name,
        b.family,
        b.input_shape,
        b.chunk,
        b.has_cls,
    )
    assert (a.feature_dim, a.classes) == (b.feature_dim, b.classes)
    assert a.fingerprint() == b.fingerprint()
    x = images_of(a)
    one, two = a.examine(x), b.examine(x)
    assert torch.equal(one.latents, two.latents)
    assert torch.equal(a.decode(one.latents), b.decode(two.latents))
    for left, right in ((one.features, two.features), (one.logits, two.logits)):
        assert (left is None) is (right is None)
        assert left is None or right is None or torch.equal(left, right)
    heads = a.head(), b.head()
    assert (heads[0] is None) is (heads[1] is None)


def through_json(description: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(description))


@pytest.mark.parametrize(
    "make",
    [
        tiny.vit,
        lambda: tiny.vit(mask_ratio=0.5, mask_seed=3, mean=(0.2,), std=(0.7,), name="masked"),
        tiny.conv,
        lambda: tiny.conv(mean=(0.1,), std=(0.9,), name="mine"),
        lambda: rehearsal_pair("rehearsal-dinov2"),
        lambda: rehearsal_pair("rehearsal-siglip2"),
        lambda: diffusers_vae(),
    ],
)
def test_families_come_back(make: Callable[[], Autoencoder], tmp_path: Path) -> None:
    model = make()
    described = through_json(pack(model, tmp_path / "a"))
    assert described["kind"] == model.family
    again = unpack(described, tmp_path / "a")
    assert_same(model, again)
    assert described["input_shape"] == list(model.input_shape)
    assert pack(again, tmp_path / "b") == described
    for file in (path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file()):
        content = (tmp_path / "b" / file).read_bytes()
        assert content == (tmp_path / "a" / file).read_bytes()
        assert str(tmp_path).encode() not in content


@pytest.mark.parametrize("kind", BACKBONES)
@pytest.mark.usefixtures("_openood")
def test_surrogates_come_back_from_their_folder_alone(kind: str, tmp_path: Path) -> None:
    (tmp_path / "origin").mkdir()
    model = surrogate(BACKBONES[kind](tmp_path / "origin"), name="mine")
    model.chunk, model.backbone.chunk = 16, 4
    described = through_json(pack(model, tmp_path / "a"))
    shutil.rmtree(tmp_path / "origin")
    again = unpack(described, tmp_path / "a")
    assert_same(model, again)
    assert isinstance(again, SurrogateAutoencoder)
    assert again.backbone.chunk == 4
    assert again.backbone.name == model.backbone.name
    shutil.move(tmp_path / "a", tmp_path / "moved")  # and once more, from what was unpacked
    assert_same(model, unpack(through_json(pack(again, tmp_path / "b")), tmp_path / "b"))


@pytest.mark.parametrize("kind", ["timm folder", "torchvision", "transformers vit", "openood"])
@pytest.mark.usefixtures("_openood")
def test_no_pickle_and_no_path_of_this_machine_is_written(kind: str, tmp_path: Path) -> None:
    (tmp_path / "origin").mkdir()
    described = pack(surrogate(BACKBONES[kind](tmp_path / "origin")), tmp_path / "a")
    files = [file for file in (tmp_path / "a").rglob("*") if file.is_file()]
    assert {file.suffix for file in files} <= {".json", ".safetensors"}
    assert str(tmp_path) not in json.dumps(described)
    for file in files:
        assert str(tmp_path).encode() not in file.read_bytes()


def test_the_transform_of_other_torchvision_weights_is_kept(tmp_path: Path) -> None:
    from torchvision import models

    torch.save(models.get_model("mobilenet_v2", weights=None).state_dict(), tmp_path / "w.pth")
    older = load_backbone(f"torchvision:mobilenet_v2:{tmp_path / 'w.pth'}", weights="IMAGENET1K_V1")
    again = unpack(pack(surrogate(older), tmp_path / "a"), tmp_path / "a")
    assert isinstance(again, SurrogateAutoencoder)
    assert again.backbone.options()["transform"]["resize_size"] == [256]  # [232] by default


def test_arguments_that_an_older_timm_does_not_keep_are_read_from_its_folder(tmp_path: Path) -> None:
    model = surrogate(timm_folder(tmp_path / "origin", "test_vit", embed_dim=32, num_heads=2, img_size=32))
    vars(model.backbone.module).pop("_model_args", None)
    assert_same(model, unpack(pack(model, tmp_path / "a"), tmp_path / "a"))


class Strange(TimmBackbone):
    def forward_batch(self, images: Tensor) -> Features:
        answer = super().forward_batch(images)
        return Features(answer.features + 1, answer.logits)


def test_a_backbone_that_its_library_does_not_rebuild_is_refused_at_packing(tmp_path: Path) -> None:
    network = new_network("test_resnet", num_classes=5).eval()
    odd = surrogate(Strange(network, name="timm:odd", spec="timm:odd"))
    text = "timm:odd: cannot be rebuilt offline from its weights .*gives other features.*CallableBackbone"
    with pytest.raises(TrajOODError, match=text):
        pack(odd, tmp_path / "a")
    network.pretrained_cfg["architecture"] = "resnet_of_tomorrow"
    with pytest.raises(TrajOODError, match=r"timm:odd: cannot be rebuilt .*unknown timm model"):
        pack(odd, tmp_path / "b")


# ---------------------------------------------------------------------------------------------- code of one's own


class Own(ConvAutoencoder):
    def decode_batch(self, latents: Tensor) -> Tensor:
        return -super().decode_batch(latents)


def own_backbone() -> CallableBackbone:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 6))
    return CallableBackbone(lambda x: Features(module(x), None), (1, 8, 8), 6, module=module, name="mine")


@pytest.mark.parametrize(
    "make",
    [
        tiny.toy,
        lambda: Own(ConvNetwork(channels=1, size=8, width=2, bottleneck=6)),
        lambda: surrogate(own_backbone()),
        lambda: PairAutoencoder(nn.Flatten(), nn.Unflatten(1, (1, 8, 8)), (1, 8, 8)),
    ],
)
def test_code_of_your_own_is_described_and_not_written(make: Callable[[], Autoencoder], tmp_path: Path) -> None:
    model = make()
    described = through_json(pack(model, tmp_path / "a"))
    assert described["kind"] == "callable"
    assert described["fingerprint"] == model.fingerprint()
    assert not (tmp_path / "a").exists()
    text = f"the model '{model.name}' is defined by user code, which is not saved: .*pass it as autoencoder="
    with pytest.raises(TrajOODError, match=text):
        unpack(described, tmp_path / "a")


# ---------------------------------------------------------------------------------------------- damage


def edited(description: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """``path`` as a/b/c; the value None takes the entry out."""
    tree = through_json(description)
    *inner, last = path.split("/")
    spot = tree
    for key in inner:
        spot = spot[key]
    if value is None:
        del spot[last]
    else:
        spot[last] = value
    return tree


@pytest.mark.parametrize(
    ("path", "value", "text"),
    [
        ("kind", "resnet", "unknown autoencoder family 'resnet'"),
        ("kind", None, "kind: expected str, got nothing"),
        ("kind", ["conv"], "kind: expected str, got list"),
        ("name", 3, "name: expected str, got int '3'"),
        ("fingerprint", "0" * 64, "expected the model 'conv' with fingerprint 000000000000….*its weights differ"),
        ("options/mean", [0.25], r"\(options mean differ\): use the model that was saved"),
        ("input_shape", [3, 8, 8], r"expected a model for images \(3, 8, 8\), got conv for \(1, 8, 8\)"),
        ("chunk", 0, "chunk: expected 1 to 1048576 rows, got 0"),
        ("chunk", True, "chunk: expected int, got bool"),
        ("chunk", 8.0, "chunk: expected int, got float"),
        ("options", None, "options: expected dict, got nothing"),
    ],
)
def test_descriptions_that_do_not_fit(path: str, value: Any, text: str, tmp_path: Path) -> None:
    described = pack(tiny.conv(), tmp_path)
    if path == "options/mean":
        described["fingerprint"] = "1" * 64
    with pytest.raises(TrajOODError, match=text):
        unpack(edited(described, path, value), tmp_path)


@pytest.mark.parametrize(
    ("path", "value", "text"),
    [
        ("backbone/library", "keras", "unknown backbone library 'keras'"),
        ("backbone/recipe/architecture", "hf-hub:owner/net", "unknown timm model"),
        ("backbone/recipe/architecture", "local-dir:/etc", "unknown timm model"),
        (
            "backbone/recipe/arguments/checkpoint_path",
            "x.pth",
            "'checkpoint_path' is not allowed for a packed network",
        ),
        ("backbone/recipe/arguments/pretrained", True, "'pretrained' is not allowed for a packed network"),
        ("backbone/recipe/arguments/pretrained_cfg", {"url": "http://x"}, "'pretrained_cfg' is not allowed"),
        ("backbone/recipe/arguments/num_classes", 9, "weights of another architecture"),
        ("backbone/recipe/arguments/colour", 9, "cannot be built with"),
        ("backbone/options/transform/interpolation", "bicubic", "with fingerprint .*, with the same libraries"),
        ("backbone/options", {}, "the backbone 'timm:origin' cannot be rebuilt .*transform"),
        ("backbone/fingerprint", "0" * 64, "expected the model 'timm:origin' with fingerprint 000000000000…"),
        ("backbone", None, "backbone: expected dict, got nothing"),
        ("options/network/features", 3, "weights of another architecture"),
        ("options/network/hidden", "wide", "cannot be rebuilt"),
    ],
)
def test_surrogates_that_do_not_fit(path: str, value: Any, text: str, tmp_path: Path) -> None:
    described = pack(surrogate(timm_folder(tmp_path / "origin")), tmp_path / "a")
    with pytest.raises(TrajOODError, match=text):
        unpack(edited(described, path, value), tmp_path / "a")


@pytest.mark.parametrize("file", ["network.safetensors", "backbone.safetensors"])
def test_damaged_weights_name_their_file(file: str, tmp_path: Path) -> None:
    described = pack(surrogate(timm_folder(tmp_path / "origin")), tmp_path / "a")
    path = tmp_path / "a" / file
    content = bytearray(path.read_bytes())
    content[-2] ^= 0x20
    path.write_bytes(content)
    with pytest.raises(TrajOODError, match="fingerprint"):
        unpack(described, tmp_path / "a")
    path.write_bytes(content[:-5])
    with pytest.raises(TrajOODError, match=f"{file}: cannot be read as plain weights"):
        unpack(described, tmp_path / "a")
    path.unlink()
    with pytest.raises(TrajOODError, match=f"{file}: expected a file of weights"):
        unpack(described, tmp_path / "a")


@pytest.mark.parametrize("key", ["auto_map", "use_pretrained_backbone"])
def test_a_transformers_config_that_asks_for_more_is_refused(key: str, tmp_path: Path) -> None:
    described = pack(surrogate(transformers_folder(tmp_path / "origin")), tmp_path / "a")
    path = tmp_path / "a" / "backbone" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: {"AutoConfig": "evil.Config"}}))
    with pytest.raises(TrajOODError, match=f"config.json: '{key}' asks for code or files from elsewhere"):
        unpack(described, tmp_path / "a")


def test_folders_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrajOODError, match="expected a folder that can be written"):
        pack(tiny.conv(), tmp_path / "file" / "a")


def test_device_is_followed(tmp_path: Path) -> None:
    described = pack(tiny.conv(), tmp_path)
    assert unpack(described, tmp_path, "cpu").device.type == "cpu"
    assert unpack(described, tmp_path, torch.device("meta")).device.type == "meta"
