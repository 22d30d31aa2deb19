"""Models and benchmarks small enough for tests: random weights, generated images, no downloads."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from traj_ood.autoencoders import CallableAutoencoder, ConvAutoencoder, ConvNetwork, ViTMAE
from traj_ood.autoencoders.vit_mae import build_model
from traj_ood.backbones import CallableBackbone, Features
from traj_ood.training import loop

PATIENCE = 3600  # seconds until a process is taken to hang: no machine is so busy that one of these tests needs them
VIT: dict[str, Any] = {
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 1,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 32,
}


def vit_model(seed: int = 0, gain: float = 4.0, **changes: Any) -> Any:
    """A ``ViTMAEForPreTraining``; ``gain`` scales the matrices, since std 0.02 makes f nearly constant."""
    torch.manual_seed(seed)
    model = build_model({**VIT, **changes})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter *= gain
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model


def vit(seed: int = 0, gain: float = 4.0, changes: Mapping[str, Any] | None = None, **options: Any) -> ViTMAE:
    model = ViTMAE(vit_model(seed, gain, **(changes or {})), **options)
    model.chunk = 6
    return model


def conv(seed: int = 0, **options: Any) -> ConvAutoencoder:
    torch.manual_seed(seed)
    model = ConvAutoencoder(ConvNetwork(channels=1, size=8, width=2, bottleneck=6), **options)
    model.chunk = 6
    return model


class Counting(CallableBackbone):
    """Counts its calls, to show when features come from the cache."""

    calls = 0

    def forward_batch(self, images: Tensor) -> Features:
        self.calls += 1
        return super().forward_batch(images)


def backbone(seed: int = 0, name: str = "custom:tiny") -> Counting:
    """16 features of (1, 8, 8) images, which counts its calls."""
    torch.manual_seed(seed)
    body = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU())
    return Counting(lambda x: Features(body(x), None), (1, 8, 8), 16, module=body, name=name, chunk=8)


def toy(chunk: int = 6) -> CallableAutoencoder:
    """E flattens (1, 2, 2) images, D moves towards ±1 coordinate by coordinate: f(z) = z + 0.3 (z − z³), clamped.

    Fixed points of f are {−1, 0, 1}⁴, the attractors {−1, 1}⁴ with rate 0.4; the clamp keeps far starts in range.
    """

    def decode(latents: Tensor) -> Tensor:
        bounded = latents.clamp(-1.5, 1.5)
        return (bounded + 0.3 * (bounded - bounded**3)).reshape(-1, 1, 2, 2)

    return CallableAutoencoder(lambda x: x.flatten(1), decode, (1, 2, 2), name="toy", chunk=chunk)


def interrupt_training(patch: pytest.MonkeyPatch, rounds: int) -> None:
    """Lets ``rounds`` rounds of a training pass, each with its checkpoint, and interrupts the one after."""
    original = loop.Trainer.train_round

    def train_round(trainer: loop.Trainer, bar: Any) -> None:
        if len(trainer.log) == rounds:
            raise KeyboardInterrupt
        original(trainer, bar)

    patch.setattr(loop.Trainer, "train_round", train_round)
    patch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)


def images(count: int, shape: tuple[int, int, int] = (1, 8, 8), seed: int = 0) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def png(seed: int, size: int = 8) -> bytes:
    """The content of a PNG file of dark noise."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 90, (size, size), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def write_images(folder: Path, count: int, seed: int, size: int = 8, mode: str = "L", high: int = 256) -> None:
    """``count`` different PNG files ``000.png`` …: each of one brightness below ``high``, with some noise."""
    folder.mkdir(parents=True, exist_ok=True)
    shape = (count, size, size) if mode == "L" else (count, size, size, 3)
    draw = np.random.default_rng(seed)
    brightness = draw.uniform(0, high, (count, *[1] * (len(shape) - 1)))
    pixels = (0.7 * brightness + 0.3 * draw.uniform(0, high, shape)).astype(np.uint8)
    for i, array in enumerate(pixels):
        Image.fromarray(array).save(folder / f"{i:03d}.png")


def write_benchmark(folder: Path, train: int = 12, val: int = 4, test: int = 10, ood: int = 9) -> Path:
    """Generated PNG folders and the YAML file that names them; ID images are darker than OOD ones."""
    for seed, (name, count, high) in enumerate(
        [("train", train, 90), ("val", val, 90), ("test", test, 90), ("near", ood, 140), ("far", ood, 256)]
    ):
        write_images(folder / "images" / name, count, seed, high=high)
    path = folder / "tiny.yaml"
    path.write_text(
        "name: tiny\nroot: ./images\ntrain: train\nval: val\ntest: test\nnear: {dim: near}\nfar: {bright: far}\n"
    )
    return path


def timm_from_folder(folder: Path) -> nn.Module:
    """The network that timm itself makes of a local folder, whose weights it takes for a pickle before 1.0.26."""
    import timm

    reads_safetensors = tuple(map(int, timm.__version__.split(".")[:3])) >= (1, 0, 26)
    network = timm.create_model(f"local-dir:{folder}", pretrained=reads_safetensors).eval()
    if not reads_safetensors:
        timm.models.load_checkpoint(network, str(folder / "model.safetensors"))
    return network
