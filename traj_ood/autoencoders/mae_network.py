"""MAENetwork: a ViT-MAE in plain torch, with the operations and tensor names of transformers.

It exists for speed: importing transformers takes longer than scoring an image, and its classes slow down small networks
(one f of the bundled model takes 3.6 ms in transformers and 1.3 ms here; one row, one core). Outputs equal those of
transformers up to the last bits; see tests/autoencoders/test_mae_network.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "image_size": 224,
    "patch_size": 16,
    "num_channels": 3,
    "decoder_hidden_size": 512,
    "decoder_num_hidden_layers": 8,
    "decoder_num_attention_heads": 16,
    "decoder_intermediate_size": 2048,
    "qkv_bias": True,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
    "norm_pix_loss": False,
}
"""Defaults of ``ViTMAEConfig``, for entries that a ``config.json`` leaves out."""
_IRRELEVANT = {  # entries that transformers writes and that do not change the network in evaluation mode
    *("model_type", "architectures", "transformers_version", "torch_dtype", "dtype", "_name_or_path"),
    *("attention_probs_dropout_prob", "hidden_dropout_prob", "initializer_range", "mask_ratio"),
    "_attn_implementation_autoset",  # by transformers 4.48 to 4.5x; given back to them, it turns SDPA off
}


def is_plain(config: Mapping[str, Any]) -> bool:
    """Whether :class:`MAENetwork` supports this config: only known entries, of the usual types, with sizes that divide.
    Any other config is left to transformers."""
    known = {**DEFAULTS, **{key: value for key, value in config.items() if key not in _IRRELEVANT}}
    if known.keys() != DEFAULTS.keys() or known["hidden_act"] != "gelu":
        return False
    if any(type(known[key]) is not type(value) for key, value in DEFAULTS.items()):
        return False
    counts = [value for value in known.values() if type(value) is int]
    pairs = [("image_size", "patch_size"), ("hidden_size", "num_attention_heads")]
    pairs.append(("decoder_hidden_size", "decoder_num_attention_heads"))
    return min(counts) >= 1 and not any(known[whole] % known[part] for whole, part in pairs)


class MAENetwork(nn.Module):
    """Encoder and decoder of He et al. (2022), with the tensor names of transformers' ``ViTMAEForPreTraining``.

    ``config`` are the entries of ``config.json``, for which :func:`is_plain` holds, completed by :data:`DEFAULTS`;
    ``given`` are those that were given.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.given, self.config = dict(config), {**DEFAULTS, **config}
        self.vit, self.decoder = _Encoder(self.config), _Decoder(self.config)

    def encode(self, images: Tensor, order: Tensor | None = None, visible: int | None = None) -> Tensor:
        """Images (B, C, H, W) → tokens (B, 1 + visible, d).

        ``order``, (patches,) or (B, patches) int64, is a permutation of the patches, by default their natural order;
        the first ``visible`` of it, by default all, are encoded.
        """
        vit = self.vit
        table = vit.embeddings.position_embeddings
        tokens = vit.embeddings.patch_embeddings.projection(images).flatten(2).transpose(1, 2) + table[:, 1:]
        if order is not None:
            tokens = _take(tokens, order[..., :visible])
        first = (vit.embeddings.cls_token + table[:, :1]).expand(tokens.shape[0], -1, -1)
        tokens = torch.cat([first, tokens], dim=1)
        for layer in vit.layers:
            tokens = layer(tokens)
        return vit.layernorm(tokens)

    def decode(self, latents: Tensor, restore: Tensor | None = None) -> Tensor:
        """Tokens (B, 1 + visible, d) → images (B, C, H, W).

        ``restore``, (patches,) or (B, patches) int64, is the inverse of ``order``; by default tokens are all patches in
        their natural order.
        """
        decoder = self.decoder
        tokens = decoder.decoder_embed(latents)
        if restore is not None:
            hidden = decoder.mask_token.expand(tokens.shape[0], restore.shape[-1] + 1 - tokens.shape[1], -1)
            tokens = torch.cat([tokens[:, :1], _take(torch.cat([tokens[:, 1:], hidden], dim=1), restore)], dim=1)
        tokens = tokens + decoder.decoder_pos_embed
        for layer in decoder.decoder_layers:
            tokens = layer(tokens)
        return self.unpatchify(decoder.decoder_pred(decoder.decoder_norm(tokens))[:, 1:])

    def patchify(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) → patches (B, patches, p² C) in the decoder's order: by pixel, then by channel."""
        patch, channels, side = self._sizes()
        planes = images.reshape(-1, channels, side, patch, side, patch)
        return planes.permute(0, 2, 4, 3, 5, 1).reshape(-1, side * side, patch * patch * channels)

    def unpatchify(self, patches: Tensor) -> Tensor:
        """The inverse of :meth:`patchify`."""
        patch, channels, side = self._sizes()
        planes = patches.reshape(-1, side, side, patch, patch, channels)
        return planes.permute(0, 5, 1, 3, 2, 4).reshape(-1, channels, side * patch, side * patch)

    def _sizes(self) -> tuple[int, int, int]:
        """Pixels per side of a patch, channels, and patches per side of the image."""
        patch = self.config["patch_size"]
        return patch, self.config["num_channels"], self.config["image_size"] // patch


class _Embeddings(nn.Module):
    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        width, patch = config["hidden_size"], config["patch_size"]
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.patch_embeddings = _Patches(config["num_channels"], width, patch, config["image_size"])
        table = torch.zeros(1, self.patch_embeddings.num_patches + 1, width)
        self.position_embeddings = nn.Parameter(table, requires_grad=False)


class _Patches(nn.Module):
    def __init__(self, channels: int, width: int, patch: int, side: int) -> None:
        super().__init__()
        self.num_patches = (side // patch) ** 2
        self.projection = nn.Conv2d(channels, width, kernel_size=patch, stride=patch)


class _Encoder(nn.Module):
    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        width, heads, inner = (config[key] for key in ("hidden_size", "num_attention_heads", "intermediate_size"))
        self.embeddings = _Embeddings(config)
        self.layers = nn.ModuleList(_Layer(width, heads, inner, config) for _ in range(config["num_hidden_layers"]))
        self.layernorm = nn.LayerNorm(width, eps=config["layer_norm_eps"])


class _Decoder(nn.Module):
    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        names = ("hidden_size", "num_attention_heads", "intermediate_size", "num_hidden_layers")
        width, heads, inner, depth = (config[f"decoder_{name}"] for name in names)
        patch, patches = config["patch_size"], (config["image_size"] // config["patch_size"]) ** 2
        self.decoder_embed = nn.Linear(config["hidden_size"], width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, patches + 1, width), requires_grad=False)
        self.decoder_layers = nn.ModuleList(_Layer(width, heads, inner, config) for _ in range(depth))
        self.decoder_norm = nn.LayerNorm(width, eps=config["layer_norm_eps"])
        self.decoder_pred = nn.Linear(width, patch**2 * config["num_channels"])


class _Layer(nn.Module):
    """A pre-norm transformer layer: y = x + attention(norm(x)), then y + mlp(norm(y))."""

    def __init__(self, width: int, heads: int, inner: int, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.attention = _Attention(width, heads, config["qkv_bias"])
        self.layernorm_before = nn.LayerNorm(width, eps=config["layer_norm_eps"])
        self.layernorm_after = nn.LayerNorm(width, eps=config["layer_norm_eps"])
        self.mlp = _MLP(width, inner)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = self.attention(self.layernorm_before(tokens)) + tokens
        return self.mlp(self.layernorm_after(tokens)) + tokens


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width, bias=bias)
        self.k_proj = nn.Linear(width, width, bias=bias)
        self.v_proj = nn.Linear(width, width, bias=bias)
        self.o_proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        # One matrix product instead of three takes two thirds of the time for one image. The weights are concatenated
        # at every call, because they may change between calls.
        three = self.q_proj, self.k_proj, self.v_proj
        bias = None if self.q_proj.bias is None else torch.cat([layer.bias for layer in three])
        mixed = functional.linear(tokens, torch.cat([layer.weight for layer in three]), bias)
        query, key, value = mixed.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, scale=query.shape[-1] ** -0.5)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class _MLP(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc2(functional.gelu(self.fc1(tokens)))


def _take(tokens: Tensor, indices: Tensor) -> Tensor:
    """The tokens (B, n, d) at ``indices``, (n,) or (B, n) int64, of tokens (B, N, d)."""
    if indices.ndim == 1:
        return tokens[:, indices]
    return tokens.gather(1, indices[..., None].expand(-1, -1, tokens.shape[2]))
