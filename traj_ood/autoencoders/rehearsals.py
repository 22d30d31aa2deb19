"""Small random models of families whose published weights need a download.

They show that the code runs, and how random weights behave; they say nothing about the trained models. Results measured
on them are labelled as rehearsals.
"""

from __future__ import annotations

from typing import Any

import torch

from traj_ood.autoencoders.language import LanguageModel
from traj_ood.autoencoders.pairs import PairAutoencoder
from traj_ood.autoencoders.rae_decoder import ViTDecoder
from traj_ood.autoencoders.vision_encoder import VisionTokens
from traj_ood.errors import unknown_name

PREFIX = "rehearsal-"
PAIRS = ("rehearsal-dinov2", "rehearsal-siglip2")
LANGUAGE = ("rehearsal-qwen3", "rehearsal-llama")
"""The architectures of Qwen3 and SmolLM2 (a Llama)."""
_WIDTH, _LAYERS, _HEADS = 64, 4, 4


def rehearsal_pair(name: str, seed: int = 0) -> PairAutoencoder:
    """A random encoder of 16 tokens with a random RAE decoder to RGB images of 32 × 32 pixels (0.4 M parameters)."""
    import transformers

    if name not in PAIRS:
        raise unknown_name("rehearsal", name, PAIRS)
    sizes: dict[str, Any] = {
        "hidden_size": _WIDTH,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": _HEADS,
        "image_size": 32,
        "patch_size": 8,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name == "rehearsal-dinov2":
            # Its images are resized from 32 to 28 pixels, in patches of 7, as in RAE.
            config = transformers.Dinov2WithRegistersConfig(**{**sizes, "image_size": 28, "patch_size": 7})
            encoder = VisionTokens(transformers.Dinov2WithRegistersModel(config).eval(), 28)
        else:
            config = transformers.SiglipVisionConfig(**sizes, intermediate_size=4 * _WIDTH)
            encoder = VisionTokens(transformers.SiglipVisionModel(config).eval(), 32)
        decoder = ViTDecoder(_WIDTH, 16, width=_WIDTH, layers=_LAYERS, heads=_HEADS, hidden=4 * _WIDTH, patch=8)
    return PairAutoencoder(encoder, decoder, (3, 32, 32), name=name, encoder_size=encoder.size)


def rehearsal_language_model(name: str, *, tokens: int = 64, seed: int = 0) -> LanguageModel:
    """A random causal model over bytes (0.2 M parameters)."""
    import transformers

    if name not in LANGUAGE:
        raise unknown_name("rehearsal", name, LANGUAGE)
    sizes: dict[str, Any] = {
        "hidden_size": _WIDTH,
        "intermediate_size": 3 * _WIDTH,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _HEADS // 2,
        "vocab_size": 256,
        "max_position_embeddings": max(tokens, 512),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any
        if name == "rehearsal-qwen3":
            model = transformers.Qwen3Model(transformers.Qwen3Config(**sizes, head_dim=_WIDTH // _HEADS))
        else:
            model = transformers.LlamaModel(transformers.LlamaConfig(**sizes))
    return LanguageModel(model, lambda text: list(text.encode()), tokens=tokens, name=name)
