"""Vision encoders of transformers that return the patch tokens of an image, loaded without random weights."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from traj_ood.autoencoders.hub import DOWNLOAD
from traj_ood.errors import TrajOODError, foreign_errors
from traj_ood.io.pretrained import from_pretrained, use_safetensors, whole_network


class VisionTokens(nn.Module):
    """A transformers vision model that returns its patch tokens (B, N, d) of images of ``size`` pixels, without CLS and
    register tokens.

    ``plain_norm`` removes gain and bias of the last LayerNorm, as RAE does with every encoder.
    """

    def __init__(self, model: nn.Module, size: int, *, plain_norm: bool = True) -> None:
        super().__init__()
        config: Any = model.config
        self.model, self.size, self.plain_norm = model, size, plain_norm
        if plain_norm:
            inner = getattr(model, "vision_model", model)  # around which SigLIP of transformers 4 is a shell
            norm = next((getattr(inner, n) for n in ("layernorm", "post_layernorm") if hasattr(inner, n)), None)
            if norm is None:
                raise TrajOODError(
                    f"{type(model).__name__}: expected a final LayerNorm, found none: pass plain_norm=False"
                )
            with torch.no_grad():  # 1 and 0 have the same effect as removing them, and keep the architecture
                norm.weight.fill_(1.0)
                norm.bias.zero_()
        takes = inspect.signature(model.forward).parameters
        any_size = "interpolate_pos_encoding"  # allows images of another size than the config's
        self._options = {any_size: True} if any_size in takes else {}
        patches = (size // int(config.patch_size)) ** 2
        with torch.inference_mode():
            tokens = self._tokens(torch.zeros(1, int(config.num_channels), size, size)).shape[1]
        if size % int(config.patch_size) or not patches <= tokens <= patches + 64:
            raise TrajOODError(
                f"{type(model).__name__}: expected one token per patch of {config.patch_size} pixels, got {tokens} "
                f"tokens for images of {size}"
            )
        self._others = tokens - patches

    def _tokens(self, images: Tensor) -> Tensor:
        return self.model(pixel_values=images, **self._options).last_hidden_state

    def forward(self, images: Tensor) -> Tensor:
        return self._tokens(images)[:, self._others :]


def load_vision_model(source: str) -> Any:
    """Load a vision encoder of transformers by hub name or local folder; of a model of images and texts (SigLIP2), its
    vision tower."""
    from transformers import AutoConfig, AutoModel

    where = f"encoder {source!r}"
    with foreign_errors(f"{where}: neither a local folder nor loadable from the hub", f"; {DOWNLOAD}"):
        config = from_pretrained(AutoConfig, source)
        answer = from_pretrained(AutoModel, source, config=config, output_loading_info=True, **use_safetensors(source))
    model = whole_network(answer, where, optional=("pooler", "head."))
    return model.vision_model if hasattr(model, "text_model") else model


RAE_ENCODERS = {
    "dinov2": ("Dinov2WithRegistersConfig", "Dinov2WithRegistersModel", 518, "layernorm"),
    "siglip2": ("SiglipVisionConfig", "SiglipVisionModel", 256, "post_layernorm"),
}
"""Config class, model class, image size of the position embeddings, and name of the last LayerNorm, which the files
leave out. RAE's third encoder, ViT-MAE, is supported as an autoencoder of its own."""


def encoder_from_weights(kind: str, config: Mapping[str, Any], weights: dict[str, Tensor], where: str) -> nn.Module:
    """Build the encoder of a diffusers folder, a key of :data:`RAE_ENCODERS`, from its config and tensors; transformers
    translates the names of weights between its versions."""
    import transformers

    config_name, model_name, size, norm = RAE_ENCODERS[kind]
    width = int(config["encoder_hidden_size"])
    inner = (len(v) for k, v in weights.items() if k.endswith("mlp.fc1.bias") and ".head." not in k)
    geometry = getattr(transformers, config_name)(
        hidden_size=width,
        intermediate_size=4 * width if kind == "dinov2" else next(inner, 4 * width),
        patch_size=int(config["encoder_patch_size"]),
        image_size=size,
        num_attention_heads=max(1, width // 64),
        num_hidden_layers=int(config["encoder_num_hidden_layers"]),
    )
    gain = next((k for k in weights if k.endswith(f"{norm}.weight")), None)
    if gain is None:  # RAE removes gain and bias
        prefix = "vision_model." if any(k.startswith("vision_model.") for k in weights) else ""
        weights |= {f"{prefix}{norm}.weight": torch.ones(width), f"{prefix}{norm}.bias": torch.zeros(width)}
    with foreign_errors(f"{where}: its encoder cannot be read as {model_name}"):
        answer = getattr(transformers, model_name).from_pretrained(
            None, config=geometry, state_dict=weights, output_loading_info=True, trust_remote_code=False
        )
    return whole_network(answer, f"{where}: its encoder")
