"""The convolutional autoencoder of the paper's Table 4, for any channels, size, width d and bottleneck k."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from traj_ood.autoencoders.base import Autoencoder
from traj_ood.autoencoders.hub import name_of, read_config
from traj_ood.autoencoders.registry import register_autoencoder
from traj_ood.data.preprocessing import Preprocessing, check_statistics
from traj_ood.dynamics.chunks import rows_per_call
from traj_ood.errors import TrajOODError, foreign_errors
from traj_ood.io.tensor_file import check_digest, read_tensors, write_tensors
from traj_ood.io.trees import write_json
from traj_ood.io.weights import with_weights

STRIDES = 4


class ConvNetwork(nn.Module):
    """Convolutional autoencoder of Table 4: four stride-2 3×3 convolutions of widths d, 2d, 4d, 8d, a linear bottleneck
    of k units, and a decoder that mirrors them.

    Sides are divided by 16, rounded up (28 → 2), and the decoder's output is cropped to the input's size. Table 4 names
    no activation. Here there is a ReLU between layers and a linear output, because images are standardised and a
    bounded output could not reach all values.

    Args:
        channels: number of image channels.
        size: side of the square images.
        width: d of Table 4. Default 32.
        bottleneck: k. Default 128, the paper's for Figs 3 and 14.
    Raises:
        TrajOODError: an argument below 1.
    """

    def __init__(self, channels: int = 1, size: int = 28, width: int = 32, bottleneck: int = 128) -> None:
        super().__init__()
        for key, value in {"channels": channels, "size": size, "width": width, "bottleneck": bottleneck}.items():
            if value < 1:
                raise TrajOODError(f"conv autoencoder: {key} must be at least 1, got {value}")
        self.size = size
        widths = [channels] + [width * 2**i for i in range(STRIDES)]
        side = -(-size // 2**STRIDES)
        self.folded = (widths[-1], side, side)
        flat = widths[-1] * side * side
        down: list[nn.Module] = []
        for a, b in pairwise(widths):
            down += [nn.Conv2d(a, b, 3, stride=2, padding=1), nn.ReLU()]
        up: list[nn.Module] = []
        for a, b in pairwise(reversed(widths)):
            up += [nn.ReLU(), nn.ConvTranspose2d(a, b, 3, stride=2, padding=1, output_padding=1)]
        self.down = nn.Sequential(*down, nn.Flatten())
        self.to_latent = nn.Linear(flat, bottleneck)
        self.from_latent = nn.Linear(bottleneck, flat)
        self.up = nn.Sequential(*up)

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) → latents (B, k)."""
        return self.to_latent(self.down(images))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, k) → images (B, C, H, W)."""
        images = self.up(self.from_latent(latents).view(-1, *self.folded))
        return images[..., : self.size, : self.size]


@register_autoencoder
class ConvAutoencoder(Autoencoder):
    """A :class:`ConvNetwork` with its image preprocessing. Latents are (B, k), one token.

    Args:
        network: the network.
        name: the model's name in tables and messages.
        mean: mean per channel of the pixels in [0, 1]. Default 0.5.
        std: standard deviation per channel. Default 0.5.
    """

    family, summary = "conv", "the convolutional autoencoder of the paper's Table 4: conv:<folder>"
    marks: ClassVar = {"model_type": "traj_ood_conv"}

    def __init__(
        self, network: ConvNetwork, *, name: str = "conv", mean: tuple[float, ...] = (), std: tuple[float, ...] = ()
    ) -> None:
        channels = int(network.down[0].in_channels)  # type: ignore[arg-type]
        self.name, self.module = name, network.eval().requires_grad_(False)
        self.input_shape = (channels, network.size, network.size)
        self.mean, self.std = tuple(mean) or (0.5,) * channels, tuple(std) or (0.5,) * channels
        check_statistics(name, channels, self.mean, self.std)
        self.preprocessing = Preprocessing(self.input_shape, self.mean, self.std)
        self.chunk = rows_per_call(128)

    @classmethod
    def from_pretrained(cls, source: str | Path, **options: Any) -> ConvAutoencoder:
        folder = Path(source).expanduser()
        path = folder / "model.safetensors"
        with foreign_errors(f"{folder}: expected config.json and model.safetensors of a conv model"):
            config = read_config(folder)
            weights = read_tensors(path)
            network = with_weights(ConvNetwork, config["network"], weights, path)
            mean, std = (tuple(float(v) for v in config[key]) for key in ("mean", "std"))
        check_digest(path, weights, config)
        return cls(network, **({"name": name_of(folder), "mean": mean, "std": std} | options))

    def save_pretrained(self, folder: str | Path) -> None:
        folder = Path(folder)
        net: Any = self.module
        channels, size, _ = self.input_shape
        network = {
            "channels": channels,
            "size": size,
            "width": net.down[0].out_channels,
            "bottleneck": net.to_latent.out_features,
        }
        config = {**self.marks, "network": network, "mean": list(self.mean), "std": list(self.std)}
        write_json(folder / "config.json", config)
        write_tensors(folder / "model.safetensors", net.state_dict(), beside=[config])

    def options(self) -> dict[str, Any]:
        return {"mean": list(self.mean), "std": list(self.std)}

    def encode_batch(self, images: Tensor) -> Tensor:
        return self.module.encode(images)  # type: ignore[operator]

    def decode_batch(self, latents: Tensor) -> Tensor:
        return self.module.decode(latents)  # type: ignore[operator]

    def reconstruct_corrupted(
        self, images: Tensor, input_noise: float, mask_ratio: float, generator: torch.Generator
    ) -> tuple[Tensor, Tensor | None]:
        if mask_ratio:
            raise TrajOODError(
                f"{self.name}: a conv autoencoder has no masking, got mask ratio {mask_ratio}: use [0.0]"
            )
        corrupted = images + input_noise * torch.randn(images.shape, generator=generator).to(images.device)
        return self.decode_batch(self.encode_batch(corrupted)), None
