"""A family of autoencoders in one file, as somebody outside the package would write it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from traj_ood import Autoencoder, Preprocessing, register_autoencoder
from traj_ood.io.checkpoints import read_weights
from traj_ood.io.tensor_file import write_tensors
from traj_ood.io.weights import put_weights


@register_autoencoder
class LinearAutoencoder(Autoencoder):
    """E(x) = W x, D(z) = Wᵀ z for W with orthonormal rows, on grey images of 8 × 8 pixels."""

    family, summary = "linear", "a random projection and its transpose: linear:<latent width> or linear:<folder>"
    marks: ClassVar = {"model_type": "toy_linear"}

    def __init__(self, width: int, gain: float = 1.0, *, name: str = "linear") -> None:
        self.name, self.input_shape, self.gain = name, (1, 8, 8), gain
        self.preprocessing = Preprocessing(self.input_shape)
        weight = torch.linalg.qr(torch.randn(64, width, generator=torch.Generator().manual_seed(0)))[0].T
        self.module = nn.Linear(64, width, bias=False).requires_grad_(False)
        self.module.weight.copy_(weight)

    @classmethod
    def load(cls, source: str, **options: Any) -> LinearAutoencoder:
        return cls(int(source), **options) if source.isdigit() else cls.from_pretrained(source, **options)

    @classmethod
    def from_pretrained(cls, source: str | Path, **options: Any) -> LinearAutoencoder:
        config = json.loads((Path(source) / "config.json").read_text())
        model = cls(config["width"], config["gain"], **options)
        put_weights(model.module, read_weights(Path(source) / "model.safetensors"), str(source))
        return model

    def save_pretrained(self, folder: Path) -> None:
        write_tensors(folder / "model.safetensors", self.module.state_dict())
        config = {**self.marks, "width": len(self.module.weight), "gain": self.gain}  # type: ignore[arg-type]
        (folder / "config.json").write_text(json.dumps(config))

    def options(self) -> dict[str, Any]:
        return {"gain": self.gain}

    def encode_batch(self, images: Tensor) -> Tensor:
        return self.module(images.flatten(1)) * self.gain

    def decode_batch(self, latents: Tensor) -> Tensor:
        return (latents @ self.module.weight).reshape(-1, *self.input_shape)
