"""Checkpoints as other people's training scripts leave them, against the loaders of the libraries themselves."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from torch import Tensor, nn

from traj_ood.backbones import load_backbone
from traj_ood.backbones.timm_models import new_network
from traj_ood.cli import main
from traj_ood.detector.packing import pack, unpack
from traj_ood.errors import TrajOODError
from traj_ood.io.checkpoints import read_weights
from traj_ood.io.weights import put_weights

NAME = "test_resnet"


def network(seed: int = 0, classes: int = 5) -> nn.Module:
    torch.manual_seed(seed)
    return new_network(NAME, num_classes=classes)


def prefixed(prefix: str, seed: int = 0) -> dict[str, Tensor]:
    return {f"{prefix}{key}": value for key, value in network(seed).state_dict().items()}


def saver_file(path: Path) -> Path:
    """What timm's own training script leaves: optimizer, arguments and averaged weights beside the weights."""
    from timm.utils import CheckpointSaver, ModelEmaV3

    model = network(1)
    ema = ModelEmaV3(model, decay=0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    arguments = argparse.Namespace(model=NAME, lr=0.1, output=Path("runs"), betas=(0.9, 0.95))
    optimizer = torch.optim.AdamW(model.parameters())
    saver = CheckpointSaver(model, optimizer, arguments, ema, checkpoint_dir=str(path.parent))
    saver._save(str(path), 3, metric=np.float64(71.2))
    return path


TIMM_FILES: dict[str, Callable[[], Any]] = {
    "plain": lambda: prefixed(""),
    "parallel": lambda: {"state_dict": prefixed("module.")},
    "compiled": lambda: prefixed("_orig_mod."),
    "parallel of compiled": lambda: {"model": prefixed("module._orig_mod.")},
    "compiled parallel": lambda: {"model": prefixed("_orig_mod.module.")},
    "ema": lambda: {"state_dict": prefixed(""), "state_dict_ema": prefixed("module.", 7), "epoch": 3},
    "model ema": lambda: {"model": prefixed(""), "model_ema": prefixed("", 7), "args": argparse.Namespace(a=1)},
    "no ema": lambda: {"state_dict": prefixed("", 4), "state_dict_ema": None},
}


needs_safe_globals = pytest.mark.skipif(
    not hasattr(torch.serialization, "safe_globals"), reason="torch 2.4 cannot skip other objects in a checkpoint"
)


@needs_safe_globals
@pytest.mark.parametrize("kind", [*TIMM_FILES, "saver"])
def test_a_file_gives_the_weights_that_timms_own_loader_takes(tmp_path: Path, kind: str) -> None:
    from timm.models import load_checkpoint

    path = tmp_path / "w.pth.tar"
    if kind == "saver":
        saver_file(path)
    else:
        torch.save(TIMM_FILES[kind](), path)
    ours = load_backbone(f"timm:{NAME}:{path}", input_size=(3, 32, 32)).module.state_dict()
    theirs = network(9)
    if kind == "saver":  # the path among the arguments is one object more than timm's list knows
        read = torch.load(path, weights_only=False)["state_dict_ema"]
        theirs.load_state_dict(read)
    else:
        load_checkpoint(theirs, str(path))
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours[key], value), key


@needs_safe_globals
@pytest.mark.parametrize("prefix", ["model.", "net.", "encoder.", "model._orig_mod.", "student.backbone."])
def test_a_prefix_of_all_weights_is_taken_off(tmp_path: Path, prefix: str) -> None:
    others = {"loss.weight": torch.ones(5), "metric": torch.zeros(2)}
    lightning = {
        "state_dict": OrderedDict({**prefixed(prefix, 3), **others}),
        "pytorch-lightning_version": "2.4.0",
        "hyper_parameters": defaultdict(list, lr=[0.1]),
    }
    torch.save(lightning, tmp_path / "w.ckpt")
    backbone = load_backbone(f"timm:{NAME}:{tmp_path / 'w.ckpt'}", input_size=(3, 32, 32))
    for key, value in network(3).state_dict().items():
        assert torch.equal(backbone.module.state_dict()[key], value), key


def test_two_sets_of_weights_are_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {**prefixed("model."), **prefixed("ema_model.", 1)}}, tmp_path / "w.ckpt")
    with pytest.raises(
        TrajOODError, match=r"w\.ckpt: contains 2 sets of .* below 'ema_model\.' and 'model\.': save the"
    ):
        load_backbone(f"timm:{NAME}:{tmp_path / 'w.ckpt'}")


def test_the_message_names_prefix_and_first_tensors(tmp_path: Path) -> None:
    weights = prefixed("model.")
    del weights["model.fc.bias"]
    torch.save({**weights, "model.more": torch.ones(1)}, tmp_path / "w.pth")
    text = r"w\.pth, below 'model\.': .*: 1 tensors missing \(first: fc\.bias\), 1 unexpected \(first: more\)"
    with pytest.raises(TrajOODError, match=text):
        load_backbone(f"timm:{NAME}:{tmp_path / 'w.pth'}")


def test_what_a_file_is_decides_and_not_its_suffix(tmp_path: Path) -> None:
    weights = prefixed("")
    save_file(weights, tmp_path / "w.pth")
    torch.save(weights, tmp_path / "w.safetensors")
    torch.save(weights, tmp_path / "w.bin", _use_new_zipfile_serialization=False)
    for name in ("w.pth", "w.safetensors", "w.bin"):
        found = read_weights(tmp_path / name)
        assert found.keys() == weights.keys()
        assert all(torch.equal(found[key], weights[key]) for key in weights)


def test_shards_are_put_together(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "1.safetensors")
    torch.save({"b": torch.zeros(3)}, tmp_path / "2.bin")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.bin"}}))
    assert {k: v.tolist() for k, v in read_weights(index).items()} == {"a": [1, 1], "b": [0, 0, 0]}
    index.write_text(json.dumps({"weight_map": {"a": "../1.safetensors"}}))
    with pytest.raises(TrajOODError, match=r"index\.json: expected the weight_map .*a shard that is not in the same"):
        read_weights(index)


def test_what_is_no_tensor_is_passed_over(tmp_path: Path) -> None:
    torch.save({**prefixed(""), "epoch": 3, "fc._extra_state": {"scale": [1.0]}}, tmp_path / "w.pth")
    assert read_weights(tmp_path / "w.pth").keys() == prefixed("").keys()


def test_a_file_that_contains_itself_ends(tmp_path: Path) -> None:
    endless: dict[str, Any] = prefixed("")
    endless["model"] = endless
    torch.save(endless, tmp_path / "w.pth")
    assert read_weights(tmp_path / "w.pth").keys() == prefixed("").keys()


class Ask:
    """Pickled as a call of ``what``."""

    def __init__(self, what: Any, *arguments: Any) -> None:
        self.call = (what, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize(
    ("what", "named"),
    [(os.system, "system"), (eval, "eval"), (Path.touch, "touch|getattr"), (shutil.rmtree, "shutil.rmtree")],
)
def test_the_object_that_a_pickle_asks_for_is_named_and_not_called(tmp_path: Path, what: Any, named: str) -> None:
    mark = tmp_path / "ran"
    texts = {os.system: f"touch {mark}", eval: f"open({str(mark)!r}, 'w')"}
    torch.save({"state_dict": prefixed(""), "extra": Ask(what, texts.get(what, mark))}, tmp_path / "w.pth")
    with pytest.raises(TrajOODError, match=rf"\(it requires the Python object .*({named}).*, and no code"):
        read_weights(tmp_path / "w.pth")
    assert not mark.exists()


def test_a_whole_pickled_model_is_refused_by_its_class(tmp_path: Path) -> None:
    torch.save(nn.Sequential(nn.Linear(2, 2)), tmp_path / "w.pth")
    with pytest.raises(TrajOODError, match=r"requires the Python object torch\.nn\.modules\.container\.Sequential"):
        read_weights(tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "it is a Git LFS pointer .*: run git lfs pull"),
        (b"\n<!DOCTYPE html><html>", "it is a web page: download the file itself"),
        (b"\x1f\x8b\x08\x00", "it is compressed: unpack it first"),
        (b"\x93NUMPY\x01\x00", "it is a NumPy archive"),
        (b"\x89HDF\r\n\x1a\n", "it is an HDF5 file"),
    ],
)
def test_what_a_file_is_instead(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(TrajOODError, match=rf"w\.pth: cannot be read as plain weights \({reason}"):
        read_weights(tmp_path / "w.pth")


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_a_file_that_is_cut_off(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    save_file(prefixed(""), path) if name.endswith("safetensors") else torch.save(prefixed(""), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(TrajOODError, match=r"\(it is cut off: copy or download it again\)"):
        read_weights(path)


def test_a_torchscript_program_is_named(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), tmp_path / "w.pt")
    with pytest.raises(TrajOODError, match="it is a TorchScript program"):
        read_weights(tmp_path / "w.pt")


def test_the_modules_own_loader_reads_older_names() -> None:
    """torchvision's own ViT files call their layers linear_1 and linear_2; its loader renames them."""
    from torchvision.models.vision_transformer import MLPBlock

    torch.manual_seed(0)
    source, target = MLPBlock(4, 6, 0.0), MLPBlock(4, 6, 0.0)
    old = {"0": "linear_1", "3": "linear_2"}
    weights = {f"{old[key[0]]}{key[1:]}": value for key, value in source.state_dict().items()}
    put_weights(target, weights, "old.pth")
    assert all(torch.equal(target.state_dict()[key], value) for key, value in source.state_dict().items())


@pytest.mark.parametrize("prefix", ["", "module.", "model."])
def test_the_versions_of_modules_reach_their_loader(tmp_path: Path, prefix: str) -> None:
    """torchvision's MNASNet takes no weights without a version."""
    from torchvision import models

    source = models.mnasnet0_5(num_classes=3)
    wrapped: nn.Module = source
    if prefix:
        wrapped = nn.Module()
        wrapped.add_module(prefix.rstrip("."), source)
    torch.save(wrapped.state_dict(), tmp_path / "w.pth")
    target = models.mnasnet0_5(num_classes=3)
    put_weights(target, read_weights(tmp_path / "w.pth"), "w.pth")
    assert all(torch.equal(target.state_dict()[key], value) for key, value in source.state_dict().items())
    with pytest.raises(TrajOODError, match=r"w: weights of another architecture or version \(.*version"):
        put_weights(target, dict(source.state_dict()), "w")


# ---------------------------------------------------------------------------------------------- the size of images


def vit_file(folder: Path, side: int) -> Path:
    torch.manual_seed(0)
    torch.save(new_network("test_vit", num_classes=5, img_size=side).state_dict(), folder / "vit.pth")
    return folder / "vit.pth"


def test_a_vit_of_another_image_size_is_the_one_that_timm_builds(tmp_path: Path) -> None:
    from timm import create_model

    path = vit_file(tmp_path, 96)
    with pytest.raises(
        TrajOODError, match=r"pos_embed expected .* if it was trained at another image size, .*--input-size"
    ):
        load_backbone(f"timm:test_vit:{path}")
    backbone = load_backbone(f"timm:test_vit:{path}", input_size=96)
    assert backbone.input_shape == (3, 96, 96)
    theirs = create_model("test_vit", num_classes=5, img_size=96, checkpoint_path=str(path)).eval()
    images = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        expected = theirs.forward_head(theirs.forward_features(images), pre_logits=True)
    torch.testing.assert_close(backbone.extract(images).features, expected, rtol=1e-4, atol=1e-5)


def test_a_surrogate_finds_its_backbone_of_another_image_size_again(tmp_path: Path) -> None:
    from traj_ood.autoencoders import SurrogateAutoencoder, SurrogateNetwork

    backbone = load_backbone(f"timm:test_vit:{vit_file(tmp_path, 96)}", input_size=96)
    made = SurrogateAutoencoder(backbone, SurrogateNetwork(backbone.feature_dim))
    made.save_pretrained(tmp_path / "s")
    found = SurrogateAutoencoder.from_pretrained(tmp_path / "s")
    assert found.fingerprint() == made.fingerprint()
    described = pack(made, tmp_path / "packed")
    assert unpack(described, tmp_path / "packed").input_shape == (3, 96, 96)


def test_an_image_size_belongs_to_models_that_take_one(tmp_path: Path) -> None:
    yaml = tiny.write_benchmark(tmp_path)
    for model in ("fashion-mae", "torchvision:resnet18"):
        result = CliRunner().invoke(main, ["bench", str(yaml), "--model", model, "--input-size", "96"])
        assert result.exit_code == 2
        assert (
            f"--input-size applies to timm:, diffusers: models, not to {model}, whose size is fixed: leave it out\n"
            in (result.stderr)
        )
    (tmp_path / "vae").mkdir()
    result = CliRunner().invoke(main, ["bench", str(yaml), "--model", str(tmp_path / "vae"), "--input-size", "96"])
    assert (
        f"leave it out, or give timm:{tmp_path}/vae if the folder is one of timm, or give diffusers:" in result.stderr
    )
