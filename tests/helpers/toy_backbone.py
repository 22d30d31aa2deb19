"""A library of backbones in one file, as somebody outside the package would write it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from traj_ood import Backbone, Features, Preprocessing, register_backbone
from traj_ood.io.checkpoints import read_weights
from traj_ood.io.tensor_file import write_tensors
from traj_ood.io.weights import put_weights


@register_backbone
class PixelBackbone(Backbone):
    """Features are random positive parts of the pixels of an 8 × 8 image."""

    library, summary = "pixels", "random features of pixels: pixels:<width>"

    def __init__(self, width: int, *, name: str, scale: float = 1.0) -> None:
        self.name, self.spec, self.scale = name, f"pixels:{width}", scale
        self.input_shape, self.feature_dim, self.chunk = (1, 8, 8), width, 6
        self.preprocessing = Preprocessing(self.input_shape)
        self.load_options = {"scale": scale}
        weight = torch.randn(width, 64, generator=torch.Generator().manual_seed(1)) / 8
        self.module = nn.Linear(64, width, bias=False).requires_grad_(False)
        self.module.weight.copy_(weight)

    @classmethod
    def load(cls, source: str, **options: Any) -> PixelBackbone:
        return cls(int(source), **{"name": f"pixels:{source}", **options})

    def pack(self, folder: Path) -> dict[str, Any]:
        write_tensors(folder / "pixels.safetensors", self.module.state_dict())
        return {"width": self.feature_dim}

    @classmethod
    def unpack(cls, described: Mapping[str, Any], folder: Path) -> PixelBackbone:
        made = cls(described["recipe"]["width"], name=described["name"], scale=described["options"]["scale"])
        put_weights(made.module, read_weights(folder / "pixels.safetensors"), str(folder))
        return made

    def options(self) -> dict[str, Any]:
        return {"scale": self.scale}

    def forward_batch(self, images: Tensor) -> Features:
        return Features(self.module(images.flatten(1)).relu() * self.scale, None)
