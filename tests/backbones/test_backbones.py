"""Frozen backbones: the same features and logits as the libraries themselves, batch-free, and clear refusals."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from traj_ood.autoencoders import SurrogateAutoencoder, SurrogateNetwork
from traj_ood.backbones import Backbone, CallableBackbone, Features, is_backbone_spec, load_backbone
from traj_ood.backbones.timm_models import TimmBackbone, new_network, save_folder
from traj_ood.errors import TrajOODError
from traj_ood.io.checkpoints import read_weights
from traj_ood.io.weights import fingerprint, put_weights

DATA = {"interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "squash"}


def picture(seed: int, size: tuple[int, int] = (40, 50), mode: str = "RGB") -> Image.Image:
    shape = (*size, 3) if mode == "RGB" else size
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8))


def pictures(backbone: Backbone, count: int) -> Tensor:
    return torch.stack([backbone.transform(picture(i)) for i in range(count)])


def timm_folder(folder: Path, architecture: str = "test_resnet", channels: int = 3, **arguments: Any) -> nn.Module:
    torch.manual_seed(0)
    own = {"num_classes": 5, "in_chans": channels, **arguments}
    network = new_network(architecture, **own).eval()
    data = {**DATA, "input_size": [channels, 32, 32], "mean": [0.4] * channels, "std": [0.3] * channels}
    save_folder(network, folder, architecture, own, data)
    return network


def toy(**options: Any) -> CallableBackbone:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 3))

    def forward(images: Tensor) -> Features:
        features = module[:3](images)
        return Features(features, module[3](features))

    settings: dict[str, Any] = {"classes": 3, "module": module, "chunk": 4, **options}
    return CallableBackbone(settings.pop("forward", forward), (3, 2, 2), 6, **settings)


# ---------------------------------------------------------------------------------------------- the protocol


def test_extract_gives_the_networks_features_and_logits() -> None:
    backbone = toy()
    images = torch.randn(11, 3, 2, 2)
    answer = backbone.extract(images)
    hidden = backbone.module[:3](images)  # type: ignore[index]
    torch.testing.assert_close(answer.features, hidden)
    torch.testing.assert_close(answer.logits, backbone.module[3](hidden))  # type: ignore[index]
    assert len(answer) == 11
    assert answer.features.dtype == torch.float32
    assert len(backbone.extract(images[:0])) == 0


def test_features_can_be_trained_on() -> None:
    features = toy().extract(torch.randn(3, 3, 2, 2)).features
    assert not features.is_inference()
    layer = nn.Linear(6, 1)
    layer(features).sum().backward()
    assert layer.weight.grad is not None


def test_without_a_classifier() -> None:
    backbone = toy(classes=0, forward=lambda x: Features(x.flatten(1)[:, :6], None))
    answer = backbone.extract(torch.randn(5, 3, 2, 2))
    assert answer.logits is None
    assert backbone.head() is None
    assert backbone.transform(picture(0)).shape == (3, 2, 2)


@pytest.mark.parametrize(
    ("images", "text"),
    [
        (torch.zeros(2, 3, 2, 3), r"custom: expected float images \(B, 3, 2, 2\), got .*\(2, 3, 2, 3\): prepare them"),
        (torch.zeros(2, 3, 2, 2, dtype=torch.uint8), r"got torch\.uint8 of shape"),
        (torch.full((2, 3, 2, 2), torch.nan), r"2 image\(s\) have NaN or infinite pixels, first at row 0"),
    ],
)
def test_bad_images(images: Tensor, text: str) -> None:
    with pytest.raises(TrajOODError, match=text):
        toy().extract(images)


def test_answers_of_another_shape_or_nan() -> None:
    with pytest.raises(TrajOODError, match=r"expected features \(2, 6\) and logits \(2, 3\) of 2 images, got .*None"):
        toy(forward=lambda x: Features(x.flatten(1)[:, :6], None)).extract(torch.randn(2, 3, 2, 2))
    wrong = toy(classes=0, forward=lambda x: Features(torch.log(x.flatten(1)[:, :6]), None))
    images = torch.ones(3, 3, 2, 2)
    images[1] = -1
    with pytest.raises(TrajOODError, match=r"features of 1 image\(s\) are NaN or infinite, first at row 1"):
        wrong.extract(images)


def test_a_head_that_makes_other_logits_is_refused() -> None:
    body, norm, layer = nn.Linear(16, 6), nn.BatchNorm1d(6).eval(), nn.Linear(6, 6)
    norm.running_mean = torch.ones(6)

    def forward(images: Tensor) -> Features:
        hidden = norm(body(images.flatten(1)))
        return Features(hidden, layer(hidden))

    def extract(*head: Any) -> Features:
        module = nn.ModuleList([body, norm, layer])
        options = {"module": module, "classes": 6, "name": "mine", "chunk": 6, "head": head}
        return CallableBackbone(forward, (1, 4, 4), 6, **options).extract(torch.rand(2, 1, 4, 4))

    weight, bias = layer.weight, layer.bias
    assert extract(weight, bias).logits is not None
    for head in ((weight.T, bias), (weight, bias + 1), (weight[:5], bias[:5]), (weight, bias[:1]), (body.weight, bias)):
        with pytest.raises(TrajOODError, match=r"mine: head: expected weight \(6, 6\) and bias \(6,\) of the layer"):
            extract(*head)
    other: list[tuple[Any, str]] = [((weight, None), r"\(6, 6\) and NoneType"), ((layer,), "Linear")]
    for given, got in (*other, ((weight.detach().numpy(), bias), r"ndarray and \(6,\)")):
        with pytest.raises(TrajOODError, match=f"mine: head: expected weight .*, got {got} that make others: correct"):
            extract(*given)
    with torch.no_grad():
        body.weight.fill_(torch.nan)
    with pytest.raises(TrajOODError, match=r"mine: features of 2 image\(s\) are NaN or infinite"):
        extract(weight, bias)


def test_features_alone_are_enough_without_a_classifier() -> None:
    images = torch.rand(5, 3, 2, 2)
    found = toy(classes=0, forward=lambda x: x.flatten(1)[:, :6]).extract(images)
    assert torch.equal(found.features, images.flatten(1)[:, :6])
    assert found.logits is None
    with pytest.raises(TrajOODError, match=r"custom: expected traj_ood.Features\(features, logits\), got dict: return"):
        toy(forward=lambda x: {"features": x}).extract(images)


def test_fingerprint_follows_weights_and_options() -> None:
    one, two, named = toy(), toy(), toy(name="other")
    assert one.fingerprint() == two.fingerprint() != named.fingerprint()
    with torch.no_grad():
        two.module[1].bias[0] += 1  # type: ignore[index]
    assert one.fingerprint() != two.fingerprint()
    assert one.fingerprint() == fingerprint(one.module, ["custom", {"name": "custom"}])


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("timm:resnet18", True),
        ("openood:resnet50:a.ckpt", True),
        ("transformers:facebook/dinov2-small", True),
        ("fashion-mae", False),
        ("facebook/vit-mae-base", False),
        ("C:/models/x", False),
    ],
)
def test_specs(model: str, expected: bool) -> None:
    assert is_backbone_spec(model) is expected


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("timn:resnet18", "unknown backbone library 'timn': did you mean 'timm'"),
        ("timm:", r"'timm:': expected a name after timm:"),
        ("timm:resnet81", r"unknown timm model 'resnet81': did you mean .*'resnet18'.*\d+ names are known"),
        ("timm:./nowhere", r"timm:\./nowhere: no such folder; expected a folder with config\.json"),
        ("timm:test_resnet:nowhere.pth", r"nowhere\.pth: expected a file of weights .*found nothing"),
        ("torchvision:resnet81", "unknown torchvision model 'resnet81': did you mean"),
        ("torchvision:resnet18:nowhere.pth", r"nowhere\.pth: expected a file of weights"),
        ("transformers:./nowhere", r"transformers:\./nowhere: no such folder"),
        ("openood:resnet18", "unknown OpenOOD network 'resnet18': did you mean"),
        ("openood:resnet50", r"openood:resnet50: expected a checkpoint: openood:resnet50:<file\.ckpt>"),
    ],
)
def test_bad_specs(spec: str, text: str) -> None:
    with pytest.raises(TrajOODError, match=text):
        load_backbone(spec)


def test_unknown_option(tmp_path: Path) -> None:
    timm_folder(tmp_path)
    with pytest.raises(TrajOODError, match="colour"):
        load_backbone(f"timm:{tmp_path}", colour=3)


# ---------------------------------------------------------------------------------------------- timm


@pytest.mark.parametrize(
    ("architecture", "arguments"),
    [("test_resnet", {}), ("test_vit", {"img_size": 32}), ("test_convnext", {}), ("test_efficientnet", {})],
)
def test_timm_folder_gives_timms_own_numbers(tmp_path: Path, architecture: str, arguments: dict[str, Any]) -> None:
    network = timm_folder(tmp_path / "net", architecture, **arguments)
    backbone = load_backbone(f"timm:{tmp_path / 'net'}")
    assert backbone.name == "timm:net"
    assert str(tmp_path) not in json.dumps([backbone.name, backbone.options()])
    assert (backbone.input_shape, backbone.classes) == ((3, 32, 32), 5)
    images = pictures(backbone, 5)
    theirs = tiny.timm_from_folder(tmp_path / "net")
    answer = backbone.extract(images)
    with torch.no_grad():
        for other in (network, theirs):
            torch.testing.assert_close(answer.logits, other(images), rtol=1e-4, atol=1e-5)
    weight, bias = backbone.head() or pytest.fail("no head")
    torch.testing.assert_close(answer.features @ weight.T + bias, answer.logits, rtol=1e-4, atol=1e-5)
    assert backbone.feature_dim == weight.shape[1]


def test_timm_network_of_double_precision() -> None:
    network = new_network("test_resnet", num_classes=3).double()
    backbone = TimmBackbone(network, name="double", spec="timm:test_resnet")
    images = pictures(backbone, 2)
    answer = backbone.extract(images)
    assert answer.features.dtype == torch.float64
    with torch.no_grad():
        torch.testing.assert_close(answer.logits, network(images.double()), rtol=1e-9, atol=1e-9)
    weight, bias = backbone.head() or pytest.fail("no head")
    torch.testing.assert_close(answer.features @ weight.T + bias, answer.logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("architecture", "arguments"), [("test_resnet", {}), ("test_vit", {"img_size": 32})])
def test_rows_never_depend_on_the_batch(tmp_path: Path, architecture: str, arguments: dict[str, Any]) -> None:
    timm_folder(tmp_path, architecture, **arguments)
    backbone = load_backbone(f"timm:{tmp_path}")
    images = pictures(backbone, 37)
    whole = backbone.extract(images)
    for sizes in ([1, 36], [5] * 7 + [2], [33, 4]):
        parts = [backbone.extract(part) for part in images.split(sizes)]
        torch.testing.assert_close(torch.cat([p.features for p in parts]), whole.features, rtol=1e-5, atol=1e-6)
        logits = torch.cat([p.logits for p in parts if p.logits is not None])
        torch.testing.assert_close(logits, whole.logits, rtol=1e-5, atol=1e-6)


def test_timm_transform_is_timms_own(tmp_path: Path) -> None:
    import timm
    from timm.data import create_transform, resolve_model_data_config

    timm_folder(tmp_path)
    backbone = load_backbone(f"timm:{tmp_path}")
    config = resolve_model_data_config(timm.create_model(f"local-dir:{tmp_path}"))
    assert torch.equal(backbone.transform(picture(3)), create_transform(**config, is_training=False)(picture(3)))
    assert backbone.options()["transform"]["mean"] == [0.4] * 3
    other = load_backbone(f"timm:{tmp_path}", mean=(0.5,) * 3)
    assert other.fingerprint() != backbone.fingerprint()
    assert other.options()["transform"]["mean"] == [0.5] * 3


def test_timm_with_one_channel(tmp_path: Path) -> None:
    timm_folder(tmp_path, channels=1)
    backbone = load_backbone(f"timm:{tmp_path}")
    assert backbone.input_shape == (1, 32, 32)
    colour = picture(0, (32, 32))
    expected = (torch.from_numpy(np.array(colour.convert("L"))).float() / 255 - 0.4) / 0.3
    torch.testing.assert_close(backbone.transform(colour)[0], expected)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(("classes", "channels"), [(5, 3), (0, 3), (4, 1)])
def test_timm_weights_file_decides_classes_and_channels(
    tmp_path: Path, suffix: str, classes: int, channels: int
) -> None:
    network = new_network("test_resnet", num_classes=classes, in_chans=channels)
    path = tmp_path / f"mine{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": {f"module.{k}": v for k, v in network.state_dict().items()}}, path)
    else:
        save_file({k: v.contiguous() for k, v in network.state_dict().items()}, path)
    spec = f"timm:test_resnet:{path}"
    if channels == 1:
        with pytest.raises(TrajOODError, match=r"expected a mean and a std for each of 1 input channel"):
            load_backbone(spec)
    backbone = load_backbone(spec, **({"mean": (0.5,), "std": (0.5,)} if channels == 1 else {}))
    assert isinstance(backbone, TimmBackbone)
    assert (backbone.name, backbone.spec) == ("timm:test_resnet:mine", spec)
    assert (backbone.classes, backbone.input_shape[0]) == (classes, channels)
    assert (backbone.head() is None) == (classes == 0)
    assert len(backbone.extract(pictures(backbone, 1))) == 1


def test_damaged_timm_weights(tmp_path: Path) -> None:
    weights = dict(new_network("test_resnet", num_classes=5).state_dict())

    def refuse(changed: dict[str, Any], text: str) -> None:
        torch.save(changed, tmp_path / "w.pth")
        with pytest.raises(TrajOODError, match=text):
            load_backbone(f"timm:test_resnet:{tmp_path / 'w.pth'}")

    first = "conv1.0.weight"
    refuse({k: v for k, v in weights.items() if k != "bn1.bias"}, r"w\.pth: .*1 tensors missing \(first: bn1\.bias\)")
    refuse({**weights, "extra": torch.zeros(2)}, r"1 unexpected \(first: extra\)")
    refuse({**weights, "bn1.bias": torch.zeros(3)}, r"bn1\.bias expected \(\d+,\), got \(3,\)")
    refuse({**weights, first: torch.full_like(weights[first], torch.nan)}, rf"{first} holds NaN")
    refuse({"epoch": 3}, r"expected a state dict .* a mapping whose 'epoch' is a int")
    (tmp_path / "w.pth").write_bytes(b"rubbish")
    with pytest.raises(TrajOODError, match=r"w\.pth: cannot be read as plain weights"):
        load_backbone(f"timm:test_resnet:{tmp_path / 'w.pth'}")


def test_pickled_code_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"w": Evil()}, tmp_path / "w.pth")
    with pytest.raises(TrajOODError, match="cannot be read as plain weights"):
        read_weights(tmp_path / "w.pth")
    assert not (tmp_path / "ran").exists()


def test_damaged_timm_folder(tmp_path: Path) -> None:
    timm_folder(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({k: v for k, v in weights.items() if k != "bn1.bias"}, tmp_path / "model.safetensors")
    with pytest.raises(TrajOODError, match=r"model\.safetensors: .*1 tensors missing \(first: bn1\.bias\)"):
        load_backbone(f"timm:{tmp_path}")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(TrajOODError, match=r"expected weights in model\.safetensors or .*found none"):
        load_backbone(f"timm:{tmp_path}")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(TrajOODError, match=r"config\.json: expected timm's config\.json with an architecture"):
        load_backbone(f"timm:{tmp_path}")


def test_no_network_and_no_local_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    import timm
    from torchvision import models

    def offline(*_: Any, **__: Any) -> Any:
        raise OSError("cannot reach the hub\nmany more lines")

    monkeypatch.setattr(timm, "create_model", offline)
    monkeypatch.setattr(models, "get_model", offline)
    text = r"cannot be downloaded \(cannot reach the hub\); give local ones: "
    with pytest.raises(TrajOODError, match=rf"timm:resnet18: its weights.*{text}timm:<name>:<file") as caught:
        load_backbone("timm:resnet18")
    assert "\n" not in str(caught.value)
    with pytest.raises(TrajOODError, match=rf"torchvision:resnet18: its weights.*{text}torchvision:resnet18:<file"):
        load_backbone("torchvision:resnet18")


def test_a_layer_between_features_and_logits_is_no_linear_head() -> None:
    network = new_network("test_resnet", num_classes=5)
    original = network.forward_head
    network.forward_head = lambda x, pre_logits=False: (  # type: ignore[method-assign, assignment]
        original(x, pre_logits=True) if pre_logits else original(x).tanh() * 3  # type: ignore[operator]
    )
    with torch.no_grad():
        network.fc.weight.normal_()  # type: ignore[union-attr, operator]
    backbone = TimmBackbone(network, name="bent", spec="bent", data={"input_size": (3, 32, 32)})
    assert backbone.classes == 5
    assert backbone.head() is None


def test_a_network_that_draws_random_numbers_is_refused() -> None:
    network = new_network("test_resnet", num_classes=5)
    original = network.forward_features
    network.forward_features = lambda x: original(x) + torch.rand(1)  # type: ignore[method-assign, assignment, operator]
    with pytest.raises(TrajOODError, match="dice draws random numbers: two calls on the same images differ"):
        TimmBackbone(network, name="dice", spec="dice", data={"input_size": (3, 32, 32)})


def test_older_checkpoints_without_batch_counters() -> None:
    source, target = new_network("test_resnet", num_classes=2), new_network("test_resnet", num_classes=2)
    put_weights(target, {k: v for k, v in source.state_dict().items() if "num_batches" not in k}, "old.pth")
    assert fingerprint(source, 0) == fingerprint(target, 0)


# ---------------------------------------------------------------------------------------------- torchvision


MANY = 20  # classes: of fewer, a whole chunk of 224-pixel images is tried for the place of a row


@pytest.mark.parametrize(
    ("name", "feature_dim"),
    [
        ("mobilenet_v3_small", 1024),
        ("shufflenet_v2_x0_5", 1024),
        pytest.param("efficientnet_b0", 1280, marks=pytest.mark.slow),
    ],
)
def test_torchvision_features_are_what_the_last_layer_reads(tmp_path: Path, name: str, feature_dim: int) -> None:
    from torchvision import models

    torch.manual_seed(0)
    network = models.get_model(name, weights=None, num_classes=MANY).eval()
    torch.save(network.state_dict(), tmp_path / "w.pth")
    backbone = load_backbone(f"torchvision:{name}:{tmp_path / 'w.pth'}")
    assert (backbone.name, backbone.classes, backbone.feature_dim) == (f"torchvision:{name}:w", MANY, feature_dim)
    image = backbone.transform(picture(0))
    transform = models.get_model_weights(name)["DEFAULT"].transforms()
    assert torch.equal(image, transform(picture(0)))
    backbone.chunk = 2
    answer = backbone.extract(image[None])
    with torch.no_grad():
        torch.testing.assert_close(answer.logits, network(image[None]), rtol=1e-4, atol=1e-5)
    weight, bias = backbone.head() or pytest.fail("no head")
    torch.testing.assert_close(answer.features @ weight.T + bias, answer.logits, rtol=1e-4, atol=1e-5)
    assert backbone.options()["transform"]["crop_size"] == transform.crop_size


def test_a_surrogate_remembers_which_torchvision_weights_declare_the_transform(tmp_path: Path) -> None:
    from torchvision import models

    torch.manual_seed(0)
    torch.save(models.get_model("mobilenet_v2", weights=None, num_classes=MANY).state_dict(), tmp_path / "w.pth")
    spec = f"torchvision:mobilenet_v2:{tmp_path / 'w.pth'}"
    for options in ({}, {"weights": "IMAGENET1K_V1"}):
        backbone = load_backbone(spec, **options)
        assert backbone.load_options == options
        made = SurrogateAutoencoder(backbone, SurrogateNetwork(backbone.feature_dim, hidden=(8,), bottleneck=4))
        made.save_pretrained(tmp_path / "surrogate")
        again = SurrogateAutoencoder.from_pretrained(tmp_path / "surrogate")
        assert again.fingerprint() == made.fingerprint()
        assert torch.equal(again.transform(picture(0)), made.transform(picture(0)))


def test_torchvision_refusals(tmp_path: Path) -> None:
    from torchvision import models

    torch.save(models.squeezenet1_1(num_classes=3).state_dict(), tmp_path / "w.pth")
    with pytest.raises(TrajOODError, match="its logits are not the output of one linear layer"):
        load_backbone(f"torchvision:squeezenet1_1:{tmp_path / 'w.pth'}")
    with pytest.raises(TrajOODError, match="weights of another architecture"):
        load_backbone(f"torchvision:shufflenet_v2_x0_5:{tmp_path / 'w.pth'}")
    with pytest.raises(TrajOODError, match="unknown torchvision weights of resnet18 'IMAGENET1K_V9'"):
        load_backbone(f"torchvision:resnet18:{tmp_path / 'w.pth'}", weights="IMAGENET1K_V9")


# ---------------------------------------------------------------------------------------------- transformers


def save_transformer(folder: Path, kind: str, classifier: bool = True) -> Any:
    import transformers as tf

    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    config: Any = {
        "vit": lambda: tf.ViTConfig(**small, intermediate_size=32, num_labels=4),
        "dinov2": lambda: tf.Dinov2Config(**small, num_labels=4),
        "resnet": lambda: tf.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=4
        ),
    }[kind]()
    auto: Any = tf.AutoModelForImageClassification if classifier else tf.AutoModel
    model = auto.from_config(config).eval()
    model.save_pretrained(folder)
    tf.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return model


@pytest.mark.parametrize(("kind", "feature_dim"), [("vit", 16), ("dinov2", 32), ("resnet", 16)])
def test_transformers_classifiers(tmp_path: Path, kind: str, feature_dim: int) -> None:
    from transformers import AutoImageProcessor

    model = save_transformer(tmp_path / "net", kind)
    backbone = load_backbone(f"transformers:{tmp_path / 'net'}")
    assert (backbone.name, backbone.classes) == ("transformers:net", 4)
    assert (backbone.feature_dim, backbone.input_shape) == (feature_dim, (3, 16, 16))
    image = backbone.transform(picture(0))
    processor = AutoImageProcessor.from_pretrained(tmp_path / "net", trust_remote_code=False)
    theirs = processor(images=picture(0), return_tensors="pt")["pixel_values"][0]
    assert float((image - theirs).abs().max()) <= 1.001 / 255 / 0.5  # a byte that was rounded the other way
    answer = backbone.extract(image[None])
    with torch.no_grad():
        torch.testing.assert_close(answer.logits, model(pixel_values=image[None]).logits, rtol=1e-4, atol=1e-5)
    weight, bias = backbone.head() or pytest.fail("no head")
    torch.testing.assert_close(answer.features @ weight.T + bias, answer.logits, rtol=1e-4, atol=1e-5)
    assert str(tmp_path) not in json.dumps(backbone.options())


@pytest.mark.parametrize("kind", ["vit", "dinov2", "resnet"])
def test_transformers_encoders(tmp_path: Path, kind: str) -> None:
    model = save_transformer(tmp_path, kind, classifier=False)
    backbone = load_backbone(f"transformers:{tmp_path}")
    assert backbone.classes == 0
    assert backbone.head() is None
    images = pictures(backbone, 2)
    with torch.no_grad():
        expected = model(pixel_values=images).pooler_output.flatten(1)
    torch.testing.assert_close(backbone.extract(images).features, expected, rtol=1e-4, atol=1e-5)


def test_an_untrained_pooler_is_not_used(tmp_path: Path) -> None:
    model = save_transformer(tmp_path, "vit", classifier=False)
    weights = {k: v for k, v in load_file(tmp_path / "model.safetensors").items() if not k.startswith("pooler.")}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    backbone = load_backbone(f"transformers:{tmp_path}")
    images = pictures(backbone, 2)
    with torch.no_grad():
        expected = model(pixel_values=images).last_hidden_state[:, 0]
    torch.testing.assert_close(backbone.extract(images).features, expected, rtol=1e-4, atol=1e-5)


def test_transformers_refusals(tmp_path: Path) -> None:
    save_transformer(tmp_path, "vit")
    # Older safetensors read from the file as it is when they are asked.
    weights = {key: value.clone() for key, value in load_file(tmp_path / "model.safetensors").items()}

    def refuse(text: str, changed: dict[str, Tensor] | None = None) -> None:
        if changed is not None:
            save_file(changed, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(TrajOODError, match=text):
            load_backbone(f"transformers:{tmp_path}")

    refuse(
        r"weights of another architecture: 1 tensors missing .*first: classifier\.bias",
        {k: v for k, v in weights.items() if k != "classifier.bias"},
    )
    refuse("classifier.bias holds NaN", {**weights, "classifier.bias": torch.full((4,), torch.nan)})
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "preprocessor_config.json").unlink()
    refuse(r"preprocessor_config\.json can be neither read nor downloaded .*transformers:<folder>")


def test_transformers_pickled_weights_are_plain_tensors_or_refused(tmp_path: Path) -> None:
    save_transformer(tmp_path, "vit")
    expected = load_backbone(f"transformers:{tmp_path}").fingerprint()
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    assert load_backbone(f"transformers:{tmp_path}").fingerprint() == expected
    torch.save({**weights, "more": Path("x")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(TrajOODError, match=r"pickled weights cannot be read \(it requires the Python object pathlib"):
        load_backbone(f"transformers:{tmp_path}")


def test_vit_mae_is_no_backbone(tmp_path: Path) -> None:
    import tiny

    tiny.vit().save_pretrained(tmp_path)
    with pytest.raises(TrajOODError, match="got a ViT-MAE, which is itself an autoencoder"):
        load_backbone(f"transformers:{tmp_path}")


# ---------------------------------------------------------------------------------------------- OpenOOD


class FakeNet(nn.Module):
    """The contract of OpenOOD's networks, with a fault to choose."""

    fault = ""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, num_classes)

    def forward(self, x: Tensor, return_feature: bool = False) -> Any:
        features = self.conv(x).mean(dim=(2, 3))
        if self.fault == "tensor":
            return self.fc(features)
        if self.fault == "list":
            return self.fc(features), [features, x]
        return (self.fc(features), features) if return_feature else self.fc(features)


class OldNet(FakeNet):
    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        return self.fc(self.conv(x).mean(dim=(2, 3)))


def fake_openood(monkeypatch: pytest.MonkeyPatch, cls: Any) -> None:
    names = ("openood", "openood.networks", "openood.networks.resnet18_32x32", "openood.networks.resnet50")
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for name, attribute in ((names[2], "ResNet18_32x32"), (names[3], "ResNet50")):
        if cls is not None:
            setattr(sys.modules[name], attribute, cls)


def checkpoint(tmp_path: Path, classes: int = 10) -> Path:
    torch.manual_seed(0)
    torch.save({f"module.{k}": v for k, v in FakeNet(classes).state_dict().items()}, tmp_path / "best.ckpt")
    return tmp_path / "best.ckpt"


@pytest.mark.parametrize(("classes", "mean"), [(10, 0.4914), (100, 0.5071)])
def test_openood_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, classes: int, mean: float) -> None:
    fake_openood(monkeypatch, FakeNet)
    path = checkpoint(tmp_path, classes)
    backbone = load_backbone(f"openood:resnet18_32x32:{path}")
    assert backbone.name == "openood:resnet18_32x32:best"
    assert (backbone.input_shape, backbone.feature_dim, backbone.classes) == ((3, 32, 32), 4, classes)
    assert backbone.options()["transform"]["mean"][0] == mean
    net = FakeNet(classes)
    net.load_state_dict({k.removeprefix("module."): v for k, v in torch.load(path, weights_only=True).items()})
    images = pictures(backbone, 3)
    logits, features = net(images, return_feature=True)
    answer = backbone.extract(images)
    torch.testing.assert_close((answer.features, answer.logits), (features, logits), rtol=1e-4, atol=1e-5)
    assert torch.equal((backbone.head() or pytest.fail("no head"))[0], net.fc.weight)


def test_openood_transform_is_openoods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import transforms

    fake_openood(monkeypatch, FakeNet)
    backbone = load_backbone(f"openood:resnet50:{checkpoint(tmp_path)}")
    steps = [transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor()]
    steps.append(transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    assert torch.equal(backbone.transform(picture(1)), transforms.Compose(steps)(picture(1)))
    changed = load_backbone(f"openood:resnet50:{checkpoint(tmp_path)}", size=64, mean=(0.1, 0.2, 0.3))
    assert changed.input_shape == (3, 64, 64)
    assert changed.options()["transform"]["mean"] == [0.1, 0.2, 0.3]
    with pytest.raises(TrajOODError, match="unknown OpenOOD data set 'cifar': did you mean"):
        load_backbone(f"openood:resnet50:{checkpoint(tmp_path)}", data="cifar")


@pytest.mark.parametrize(
    ("cls", "text"),
    [
        (type("N", (FakeNet,), {"fault": "tensor"}), r"returns one tensor \(2, 10\) with return_feature=True"),
        (type("N", (FakeNet,), {"fault": "list"}), "returns a list of 2 as features"),
        (OldNet, "does not take return_feature; it is older, or returns no features"),
        (None, r"expected v1\.5 .* without openood\.networks\.resnet18_32x32\.ResNet18_32x32: pip install git"),
    ],
)
def test_openood_networks_that_tell_no_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cls: Any, text: str
) -> None:
    fake_openood(monkeypatch, cls)
    with pytest.raises(TrajOODError, match=text):
        load_backbone(f"openood:resnet18_32x32:{checkpoint(tmp_path)}")


def test_openood_is_missing_older_or_lacks_a_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = f"openood:resnet18_32x32:{checkpoint(tmp_path)}"
    monkeypatch.setitem(sys.modules, "openood", types.ModuleType("openood"))  # a module that is no package
    monkeypatch.delitem(sys.modules, "openood.networks", raising=False)
    monkeypatch.delitem(sys.modules, "openood.networks.resnet18_32x32", raising=False)
    with pytest.raises(TrajOODError, match=r"expected v1\.5 .* without openood\.networks: pip install git"):
        load_backbone(spec)

    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name=lacking)

    monkeypatch.setattr("importlib.import_module", missing)
    lacking = "openood"
    with pytest.raises(
        TrajOODError, match=r"not installed, .*: pip install git\+https://github.com/Jingkang50/OpenOOD"
    ):
        load_backbone(spec)
    lacking = "cv2"
    with pytest.raises(TrajOODError, match="needs 'cv2', which is not: install it"):
        load_backbone(spec)


def test_openood_bad_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_openood(monkeypatch, FakeNet)
    with pytest.raises(TrajOODError, match=r"none\.ckpt: expected a file of weights"):
        load_backbone("openood:resnet18_32x32:none.ckpt")
    torch.save({"a": torch.zeros(1)}, tmp_path / "a.ckpt")
    with pytest.raises(TrajOODError, match=r"a\.ckpt: weights of another architecture"):
        load_backbone(f"openood:resnet18_32x32:{tmp_path / 'a.ckpt'}")


def test_the_real_openood(tmp_path: Path) -> None:
    networks = pytest.importorskip("openood.networks", reason="openood is not installed")
    torch.manual_seed(0)
    net = networks.ResNet18_32x32(num_classes=7).eval()
    torch.save(net.state_dict(), tmp_path / "best.ckpt")
    backbone = load_backbone(f"openood:resnet18_32x32:{tmp_path / 'best.ckpt'}")
    backbone.chunk = 4
    images = pictures(backbone, 3)
    with torch.no_grad():
        logits, features = net(images, return_feature=True)
    answer = backbone.extract(images)
    torch.testing.assert_close((answer.features, answer.logits), (features, logits), rtol=1e-4, atol=1e-5)
    weight, bias = net.get_fc()
    own = backbone.head() or pytest.fail("no head")
    assert np.array_equal(own[0].numpy(), weight)
    assert np.array_equal(own[1].numpy(), bias)
    preprocessor = pytest.importorskip("openood.evaluation_api.preprocessor", reason="openood is not complete")
    theirs = preprocessor.get_default_preprocessor("cifar10").transform(picture(2))
    assert torch.equal(backbone.transform(picture(2)), theirs)
