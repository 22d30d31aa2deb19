"""A model whose attractors are known, and images that it has memorised."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from traj_ood.autoencoders import ConvAutoencoder, ConvNetwork


class Known(ConvAutoencoder):
    """E flattens 2 × 2 images, D pulls each coordinate to ±1 (rate 0.4): the attractors are the sign patterns."""

    def __init__(self, decode: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__(ConvNetwork(1, 2, 1, 4))
        self._decode = decode or (lambda z: z + 0.3 * (z - z**3))

    def encode_batch(self, images: Tensor) -> Tensor:
        return images.flatten(1)

    def decode_batch(self, latents: Tensor) -> Tensor:
        return self._decode(latents.clamp(-1.5, 1.5)).reshape(-1, 1, 2, 2)


def patterns() -> Tensor:
    """(8, 1, 2, 2) pixels: every image of black and white with a white first pixel."""
    rest = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3)
    return torch.cat([torch.ones(8, 1), rest], dim=1).reshape(8, 1, 2, 2)
