"""Encoders with separately trained decoders: DINOv2 and SigLIP2 with the decoders of RAE, and pairs of your own.

Zheng et al. (2025), "Diffusion Transformers with Representation Autoencoders", train ViT decoders for frozen encoders;
App. B.8.1 of the paper iterates E∘D of these (Fig. 16). There are three ways to make one::

    load_autoencoder("diffusers:nyu-visionx/RAE-dinov2-wReg-base-ViTXL-n08")  # published for diffusers' AutoencoderRAE
    pair = PairAutoencoder.from_parts(  # the files that github.com/bytetriper/RAE publishes
        "facebook/dinov2-with-registers-base",
        "models/decoders/dinov2/wReg_base/ViTXL_n08/model.pt",
        "models/stats/dinov2/wReg_base/imagenet1k/stat.pt",
        encoder_size=224,
    )
    pair.save_pretrained("runs/rae-dinov2")  # then load_autoencoder("runs/rae-dinov2")
    PairAutoencoder(my_encoder, my_decoder, input_shape=(3, 64, 64))  # any two modules

They were never run on published weights, which this project could not download. File layouts follow bytetriper/RAE
(January 2026) and diffusers 0.42; tests compare the decoder with diffusers' own at equal small random weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from traj_ood.autoencoders.base import Autoencoder, ModelInfo, shape_of
from traj_ood.autoencoders.hub import PROCESSOR, local_copy, name_of, read_config
from traj_ood.autoencoders.rae_decoder import HEADS, ViTDecoder
from traj_ood.autoencoders.registry import register_autoencoder
from traj_ood.autoencoders.vision_encoder import RAE_ENCODERS, VisionTokens, encoder_from_weights, load_vision_model
from traj_ood.autoencoders.vit_mae import sine_cosine_table
from traj_ood.backbones.image_processor import from_processor
from traj_ood.data.preprocessing import Preprocessing, check_statistics
from traj_ood.dynamics.chunks import rows_per_call
from traj_ood.dynamics.fixed_function import trial_rows
from traj_ood.errors import TrajOODError, foreign_errors, unknown_name
from traj_ood.io.checkpoints import read_weights
from traj_ood.io.tensor_file import check_digest, write_tensors
from traj_ood.io.trees import write_json
from traj_ood.io.weights import below

MODEL_TYPE = "traj_ood_pair"
RAE_EPS = 1e-5
"""ε of the standardisation. RAE divides by √(variance + ε); its port to diffusers divides by deviation + ε."""
_TOKENS_PER_CALL = 4096
_CONFIG_BEYOND_WEIGHTS = ("model_type", "num_attention_heads", "hidden_act", "layer_norm_eps", "patch_size")
"""Entries of a vision encoder's config that change E but not the shapes of its weights. Not the whole config, which
changes between versions of transformers; a fingerprint must not."""


class _Pair(nn.Module):
    """Encoder and decoder, with the mean and spread that standardise the latents between them."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module, centre: Tensor, spread: Tensor) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.register_buffer("centre", centre)
        self.register_buffer("spread", spread)


@register_autoencoder
class PairAutoencoder(Autoencoder):
    """An encoder and a decoder that were trained separately; f = E∘D passes through images.

    Args:
        encoder: images (B, C, s, s) in normalised units → latents (B, *L).
        decoder: latents (B, *L) → images (B, C, H, W) in the same units.
        input_shape: (C, H, W) of the decoder's images.
        name: the model's name in tables and messages.
        encoder_size: s. If it differs from H, images are resized between D and E (bicubic, as in RAE), as part of f.
            Default H.
        mean: mean per channel of the pixels in [0, 1], as the encoder expects it. Default 0.5.
        std: standard deviation per channel, likewise. Default 0.5.
        centre: latents are (E(x) − centre) / spread; a tensor that broadcasts to L. Default 0.
        spread: see ``centre``; positive. Default 1.
        has_cls: see :class:`Autoencoder`.
        chunk: rows per call. Default: as many as hold about 4,096 tokens, at most 64 rounded as in
            :func:`traj_ood.dynamics.chunks.rows_per_call`.
    Raises:
        TrajOODError: the decoder's images have another shape, or the encoder does not accept them.
    """

    family, summary = "pair", "an encoder of transformers with RAE's decoder: pair:<folder>"
    marks: ClassVar = {"model_type": MODEL_TYPE, "_class_name": "AutoencoderRAE"}
    models: ClassVar = {
        "rae-dinov2": ModelInfo(
            "diffusers:nyu-visionx/RAE-dinov2-wReg-base-ViTXL-n08",
            "DINOv2 base with RAE's ViT-XL decoder, from the hub",
        ),
        "rae-siglip2": ModelInfo(
            "diffusers:nyu-visionx/RAE-siglip2-base-p16-i256-ViTXL-n08",
            "SigLIP2 base with RAE's ViT-XL decoder, from the hub",
        ),
    }

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        input_shape: Sequence[int],
        *,
        name: str = "pair",
        encoder_size: int | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        centre: Tensor | None = None,
        spread: Tensor | None = None,
        has_cls: bool = False,
        chunk: int | None = None,
    ) -> None:
        channels = input_shape[0]
        self.name, self.input_shape, self.has_cls = name, shape_of(input_shape), has_cls
        self.encoder_size = encoder_size or input_shape[1]
        self.mean, self.std = tuple(mean or (0.5,) * channels), tuple(std or (0.5,) * channels)
        check_statistics(name, channels, self.mean, self.std)
        self.preprocessing = Preprocessing(self.input_shape, self.mean, self.std)
        centre = (torch.zeros(()) if centre is None else centre).float()
        spread = (torch.ones(()) if spread is None else spread).float()
        if not bool((spread > 0).all()):
            raise TrajOODError(f"{name}: expected a positive spread of every latent, got {float(spread.min()):g}")
        self.module = _Pair(encoder, decoder, centre, spread).eval().requires_grad_(False)
        self.chunk = 1
        self.chunk = chunk or self._default_chunk()

    def _default_chunk(self) -> int:
        """Rows per call, from the number of tokens of one image that is passed through both networks."""
        where = f"{self.name}: encoder and decoder do not fit images of shape {self.input_shape}"
        with foreign_errors(where), torch.inference_mode():
            latents = self.encode_batch(trial_rows(self.input_shape, self.module)[:1])
            images = self.decode_batch(latents)
        if tuple(images.shape[1:]) != self.input_shape:
            raise TrajOODError(
                f"{self.name}: expected a decoder of images {self.input_shape}, got {tuple(images.shape[1:])}"
            )
        tokens = latents.shape[1] if latents.ndim == 3 else 16
        return rows_per_call(min(64, _TOKENS_PER_CALL / tokens))

    @classmethod
    def from_parts(
        cls,
        encoder: str | Path,
        decoder: str | Path,
        statistics: str | Path | None = None,
        *,
        encoder_size: int | None = None,
        heads: int = HEADS,
        plain_norm: bool = True,
        **options: Any,
    ) -> PairAutoencoder:
        """Combine a transformers encoder with an RAE decoder, from their published files.

        Args:
            encoder: hub name or local folder, with its preprocessor_config.json.
            decoder: file of weights (``model.pt`` of RAE, or safetensors).
            statistics: file with ``mean`` and ``var`` of the latents, (d, √N, √N) or (d,); None does not standardise.
            encoder_size: side of the encoder's images. Default: its config's; RAE's DINOv2 decoders need 224.
            heads: number of the decoder's attention heads, which its weights do not determine. Default 16, RAE's.
            plain_norm: see :class:`VisionTokens`.
            options: of the constructor.
        """
        model = load_vision_model(str(encoder))
        size = encoder_size or model.config.image_size
        tokens = VisionTokens(model, int(size if isinstance(size, int) else size[0]), plain_norm=plain_norm)
        decoding = ViTDecoder.from_weights(read_weights(decoder), heads, str(decoder))
        if statistics is not None:
            stored = read_weights(statistics)
            if not {"mean", "var"} <= stored.keys():
                raise TrajOODError(f"{statistics}: expected the tensors mean and var, got {', '.join(sorted(stored))}")
            options |= {"centre": _as_tokens(stored["mean"]), "spread": _as_tokens((stored["var"] + RAE_EPS).sqrt())}
        folder = local_copy(str(encoder), (PROCESSOR,))
        mean, std = _statistics_of(folder, decoding.channels)
        options = {"mean": mean, "std": std, **options}
        options.setdefault("name", f"{Path(encoder).name}+{Path(decoder).parent.name or 'decoder'}")
        return cls._of(tokens, decoding, options)

    @classmethod
    def _of(cls, encoder: VisionTokens, decoder: ViTDecoder, options: dict[str, Any]) -> PairAutoencoder:
        side = math.isqrt(decoder.decoder_pos_embed.shape[1] - 1) * decoder.patch
        return cls(encoder, decoder, (decoder.channels, side, side), encoder_size=encoder.size, **options)

    @classmethod
    def from_pretrained(cls, source: str | Path, **options: Any) -> PairAutoencoder:
        """Load a folder that :meth:`save_pretrained` or diffusers' ``AutoencoderRAE`` wrote."""
        folder = local_copy(str(source), ("config.json", "diffusion_pytorch_model.safetensors"))
        config = read_config(folder)
        options.setdefault("name", name_of(source))
        if config.get("_class_name") == "AutoencoderRAE":
            return cls._from_diffusers(folder, config, options)
        if config.get("model_type") != MODEL_TYPE:
            raise TrajOODError(
                f"{folder}/config.json: expected model_type {MODEL_TYPE!r}, got {config.get('model_type')!r}"
            )
        with foreign_errors(f"{folder}/config.json: impossible or missing entry"):
            heads, size, plain = int(config["heads"]), int(config["encoder_size"]), bool(config["plain_norm"])
            statistics = {key: tuple(float(v) for v in config[key]) for key in ("mean", "std")}
        encoder = VisionTokens(load_vision_model(str(folder / "encoder")), size, plain_norm=plain)
        weights = read_weights(folder / "model.safetensors")
        check_digest(folder / "model.safetensors", weights, config)
        between = {key: weights.pop(key, None) for key in ("centre", "spread")}
        decoder = ViTDecoder.from_weights(weights, heads, str(folder / "model.safetensors"))
        return cls._of(encoder, decoder, {**statistics, **between, **options})

    @classmethod
    def _from_diffusers(cls, folder: Path, config: dict[str, Any], options: dict[str, Any]) -> PairAutoencoder:
        """Load without diffusers, whose ``AutoencoderRAE`` (0.42) builds the encoder from the installed transformers
        and expects the tensor names of that version, whereas the published files have those of transformers 4."""
        path = folder / "diffusion_pytorch_model.safetensors"
        weights = read_weights(path)
        kind = str(config.get("encoder_type"))
        if kind not in RAE_ENCODERS:
            raise unknown_name("RAE encoder", kind, RAE_ENCODERS)
        model = encoder_from_weights(kind, config, below("encoder.", weights), str(path))
        encoder = VisionTokens(model, int(config["encoder_input_size"]))
        parts = below("decoder.", weights)
        tokens = (encoder.size // int(config["encoder_patch_size"])) ** 2
        # At RAE's usual 16 × 16 tokens diffusers has the same table. For other grids diffusers scales positions to 16,
        # but RAE's decoders were trained with this table.
        parts.setdefault("decoder_pos_embed", sine_cosine_table(math.isqrt(tokens), int(config["decoder_hidden_size"])))
        decoder = ViTDecoder.from_weights(parts, int(config["decoder_num_attention_heads"]), str(path))
        scale = float(config.get("scaling_factor") or 1.0)
        centre, deviation = (_as_tokens(weights[f"_latents_{key}"]) for key in ("mean", "std"))
        options = {"centre": centre, "spread": (deviation + RAE_EPS) / scale, **options}
        for key in ("mean", "std"):
            options.setdefault(key, tuple(float(v) for v in weights[f"encoder_{key}"].flatten()))
        return cls._of(encoder, decoder, options)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``encoder/`` (transformers can read it), ``model.safetensors`` (the rest) and ``config.json``.

        Raises:
            TrajOODError: the pair consists of your own modules, which only your code can save.
        """
        parts: Any = self.module
        if not (isinstance(parts.encoder, VisionTokens) and isinstance(parts.decoder, ViTDecoder)):
            raise TrajOODError(
                f"{self.name}: expected a transformers encoder with a ViTDecoder, got modules of your own: save them "
                "with your own code"
            )
        folder = Path(folder)
        (folder / "encoder").mkdir(parents=True, exist_ok=True)
        encoder: Any = parts.encoder.model
        encoder.save_pretrained(folder / "encoder")
        config = {
            "model_type": MODEL_TYPE,
            "heads": parts.decoder.heads,
            "encoder_size": self.encoder_size,
            "plain_norm": parts.encoder.plain_norm,
            "mean": list(self.mean),
            "std": list(self.std),
        }
        weights = {**parts.decoder.state_dict(), "centre": parts.centre, "spread": parts.spread}
        write_tensors(folder / "model.safetensors", weights, beside=[config])
        write_json(folder / "config.json", config)

    def pack(self, folder: Path) -> dict[str, Any] | None:
        return super().pack(folder) if self._is_published else None

    def has_own_code(self) -> bool:
        return super().has_own_code() or not self._is_published

    @property
    def _is_published(self) -> bool:
        """Whether both parts are of published kinds, and not the user's."""
        parts: Any = self.module
        return type(parts.encoder) is VisionTokens and type(parts.decoder) is ViTDecoder

    def options(self) -> dict[str, Any]:
        """The options that change f and do not show in the weights; those inside your own modules are not known."""
        parts: Any = self.module
        found: dict[str, Any] = {"mean": list(self.mean), "std": list(self.std), "encoder_size": self.encoder_size}
        if isinstance(parts.decoder, ViTDecoder):
            found["heads"] = parts.decoder.heads
        if isinstance(parts.encoder, VisionTokens):
            config: Any = parts.encoder.model.config
            found["encoder"] = {key: getattr(config, key) for key in _CONFIG_BEYOND_WEIGHTS if hasattr(config, key)}
        return found

    def encode_batch(self, images: Tensor) -> Tensor:
        parts: Any = self.module
        if images.shape[-1] != self.encoder_size:
            images = functional.interpolate(images, (self.encoder_size,) * 2, mode="bicubic", align_corners=False)
        return (parts.encoder(images) - parts.centre) / parts.spread

    def decode_batch(self, latents: Tensor) -> Tensor:
        parts: Any = self.module
        return parts.decoder(latents * parts.spread + parts.centre)


def _as_tokens(statistic: Tensor) -> Tensor:
    """Reshape statistics (d, h, w), or (1, d, h, w), to (h · w, d); (d,) and scalars are kept."""
    statistic = statistic.float().squeeze()
    return statistic.flatten(1).T.contiguous() if statistic.ndim == 3 else statistic


def _statistics_of(folder: Path, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of pixels in [0, 1] from the encoder's image processor; its sizes are ignored,
    because D makes images of another size."""
    any_size = {"do_resize": True, "size": 1, "do_center_crop": False, "crop_pct": None}
    stored = {**read_config(folder, PROCESSOR, "the encoder's image processor"), **any_size}
    return from_processor(stored, (channels, 1, 1), str(folder / PROCESSOR)).affine
