"""ViTDecoder: RAE's decoder from latent tokens to images, for the weights that RAE and diffusers publish."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from traj_ood.errors import TrajOODError
from traj_ood.io.weights import put_weights

HEADS = 16
"""Attention heads of RAE's published ViT-L and ViT-XL decoders; the only size that the weights do not determine."""
_NORM_EPS = 1e-12


class ViTDecoder(nn.Module):
    """A ViT over the latent tokens and a learned class token, followed by a linear layer to the RGB pixels of each
    patch.

    Latents (B, tokens, latent_width) → images (B, 3, √tokens · patch, √tokens · patch); ``hidden`` is the width of the
    MLPs. Parameters are named as in RAE's checkpoints (and ViT-MAE in transformers 4), so that these load directly.
    """

    def __init__(
        self,
        latent_width: int,
        tokens: int,
        *,
        width: int = 1152,
        layers: int = 28,
        heads: int = HEADS,
        hidden: int = 4096,
        patch: int = 16,
    ) -> None:
        super().__init__()
        if math.isqrt(tokens) ** 2 != tokens:
            raise TrajOODError(f"ViT decoder: expected a square number of tokens, got {tokens}")
        if width % heads:
            raise TrajOODError(f"ViT decoder: expected a width divisible by the {heads} heads, got {width}")
        self.patch, self.channels, self.heads = patch, 3, heads
        self.decoder_embed = nn.Linear(latent_width, width)
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, tokens + 1, width))
        self.trainable_cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_layers = nn.ModuleList(_Block(width, heads, hidden) for _ in range(layers))
        self.decoder_norm = nn.LayerNorm(width, eps=_NORM_EPS)
        self.decoder_pred = nn.Linear(width, patch**2 * self.channels)

    @classmethod
    def from_weights(cls, weights: Mapping[str, Tensor], heads: int, where: str) -> ViTDecoder:
        """Build the decoder from its weights, named as in RAE or in diffusers, which have its sizes; ``where`` is their
        source."""
        weights = {_rae_name(key): value for key, value in weights.items()}
        try:
            width, latent_width = weights["decoder_embed.weight"].shape
            hidden = len(weights["decoder_layers.0.intermediate.dense.bias"])
            pixels = len(weights["decoder_pred.bias"])
            tokens = weights["decoder_pos_embed"].shape[1] - 1
        except KeyError as error:
            raise TrajOODError(
                f"{where}: expected the weights of an RAE decoder, {error.args[0]} is missing"
            ) from error
        layers = 1 + max(int(key.split(".")[1]) for key in weights if key.startswith("decoder_layers."))
        patch = math.isqrt(pixels // 3)
        decoder = cls(latent_width, tokens, width=width, layers=layers, heads=heads, hidden=hidden, patch=patch)
        put_weights(decoder, weights, where)
        return decoder

    def forward(self, latents: Tensor) -> Tensor:
        tokens = self.decoder_embed(latents)
        first = self.trainable_cls_token.expand(len(tokens), -1, -1)
        tokens = torch.cat([first, tokens], dim=1) + self.decoder_pos_embed
        for layer in self.decoder_layers:
            tokens = layer(tokens)
        pixels = self.decoder_pred(self.decoder_norm(tokens))[:, 1:]
        side = math.isqrt(pixels.shape[1])
        squares = pixels.unflatten(1, (side, side)).unflatten(3, (self.patch, self.patch, self.channels))
        return squares.permute(0, 5, 1, 3, 2, 4).reshape(len(latents), self.channels, side * self.patch, -1)


class _Block(nn.Module):
    """A pre-norm transformer layer, nested as in the names of the checkpoints."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self._heads = heads
        products = {name: nn.Linear(width, width) for name in ("query", "key", "value")}
        self.attention = nn.ModuleDict(
            {"attention": nn.ModuleDict(products), "output": nn.ModuleDict({"dense": nn.Linear(width, width)})}
        )
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, hidden)})
        self.output = nn.ModuleDict({"dense": nn.Linear(hidden, width)})
        self.layernorm_before = nn.LayerNorm(width, eps=_NORM_EPS)
        self.layernorm_after = nn.LayerNorm(width, eps=_NORM_EPS)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self._attend(self.layernorm_before(tokens))
        hidden = functional.gelu(self.intermediate["dense"](self.layernorm_after(tokens)))
        return tokens + self.output["dense"](hidden)

    def _attend(self, tokens: Tensor) -> Tensor:
        products: Any = self.attention["attention"]
        q, k, v = (
            products[name](tokens).unflatten(2, (self._heads, -1)).transpose(1, 2) for name in ("query", "key", "value")
        )
        mixed = functional.scaled_dot_product_attention(q, k, v)
        return self.attention["output"]["dense"](mixed.transpose(1, 2).flatten(2))  # type: ignore[index]


def _rae_name(key: str) -> str:
    """RAE's name of a decoder weight; ``key`` is its name in RAE or diffusers."""
    names = {"to_q": "attention.query", "to_k": "attention.key", "to_v": "attention.value", "to_out.0": "output.dense"}
    found = re.fullmatch(r"(decoder_layers\.\d+\.attention)\.(to_q|to_k|to_v|to_out\.0)\.(weight|bias)", key)
    return f"{found[1]}.{names[found[2]]}.{found[3]}" if found else key
