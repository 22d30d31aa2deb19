"""ViTMAE: masked autoencoders (He et al. 2022) as autoencoders with deterministic latent dynamics."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from traj_ood.autoencoders.base import GRID, Autoencoder, ModelInfo
from traj_ood.autoencoders.hub import DOWNLOAD, OPTIONS, PROCESSOR, name_of, read_config, stored_options
from traj_ood.autoencoders.mae_network import DEFAULTS, MAENetwork, is_plain
from traj_ood.autoencoders.registry import register_autoencoder
from traj_ood.backbones.image_processor import from_processor, to_processor
from traj_ood.data.preprocessing import Preprocessing, check_statistics, fitting_preprocessing
from traj_ood.dynamics.chunks import apply_in_chunks, rows_per_call
from traj_ood.errors import TrajOODError, check_whole, foreign_errors, warn
from traj_ood.io.checkpoints import read_weights
from traj_ood.io.files import write_atomic
from traj_ood.io.pretrained import from_pretrained, is_local, use_safetensors, whole_network
from traj_ood.io.provenance import PACKAGE
from traj_ood.io.tensor_file import check_digest, write_tensors
from traj_ood.io.trees import write_json
from traj_ood.io.weights import check_weights, fingerprint, refuse_larger

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RECONSTRUCTION_MASKS = 4
RECONSTRUCTION_RATIO = 0.75


@register_autoencoder
class ViTMAE(Autoencoder):
    """A transformers ViT-MAE with its decoder.

    The latent is the sequence of all output tokens of the encoder, (B, 1 + visible patches, d), because the decoder
    needs all of them, so that E∘D is a self-map. Nothing is random: transformers' own ``model(pixel_values)`` shuffles
    the patches at every call, even at mask ratio 0; here their order is fixed.

    Args:
        model: a ``transformers.ViTMAEForPreTraining``, or a :class:`MAENetwork`, the same network in plain torch, which
            is used for local folders.
        name: the model's name in tables and messages.
        mask_ratio: share of hidden patches. 0.0 (default) shows the encoder all patches: the paper does not specify it,
            and without masking f sees the whole image and the score depends on no choice of mask. Above 0 the same
            patches are hidden at every step and for every image.
        mask_seed: seed of the fixed mask, used if ``mask_ratio`` > 0.
        mean: mean per channel of the rescaled pixels. Default: that of ``preprocessing``, else ImageNet's (0.5 unless
            there are 3 channels), as in all public checkpoints.
        std: standard deviation per channel, likewise.
        preprocessing: how an image file becomes an input. Default: bilinear direct resize, pixels in [0, 1].
    Raises:
        TrajOODError: a mask ratio outside [0, 1) or that hides all patches, or position embeddings that are zero.
    """

    family, summary = "vit_mae", "ViT-MAE of transformers, with its decoder: vit_mae:<hub name or folder>"
    marks: ClassVar = {"model_type": "vit_mae"}
    models: ClassVar = {
        "fashion-mae": ModelInfo(
            str(PACKAGE / "models" / "fashion-mae"),
            "bundled small ViT-MAE, trained on the ID classes of the benchmark fashion",
        ),
        "vit-mae-base": ModelInfo(
            "facebook/vit-mae-base", "the paper's model, 112 M parameters, from the Hugging Face hub"
        ),
        "vit-mae-large": ModelInfo("facebook/vit-mae-large", "ViT-MAE large, from the Hugging Face hub"),
        "vit-mae-huge": ModelInfo("facebook/vit-mae-huge", "ViT-MAE huge, from the Hugging Face hub"),
    }
    unsaved: ClassVar = {"mask_ratio": float, "mask_seed": int}
    preprocessing: Preprocessing
    has_cls = True

    def __init__(
        self,
        model: Any,
        *,
        name: str = "vit-mae",
        mask_ratio: float = 0.0,
        mask_seed: int = 0,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        preprocessing: Preprocessing | None = None,
    ) -> None:
        config = model.config if isinstance(model.config, dict) else model.config.to_dict()
        if not 0 <= mask_ratio < 1:
            raise TrajOODError(f"mask_ratio: expected 0 <= ratio < 1, got {mask_ratio}")
        check_whole("mask_seed", mask_seed, 0, 2**32 - 1)
        if config["norm_pix_loss"]:
            warn(
                f"{name} was trained with norm_pix_loss: its decoder predicts per-patch normalised pixels, so D(z) is "
                "not an image and E∘D iterates on distorted input; prefer a checkpoint without it",
                stacklevel=2,
            )
        assert_position_embeddings(model, name)
        channels, side = config["num_channels"], config["image_size"]
        half = (0.5,) * channels
        defaults = (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else (half, half)
        if preprocessing is not None:
            defaults = preprocessing.mean, preprocessing.std
        self.name, self.module = name, model.eval().requires_grad_(False)
        self.input_shape = (channels, side, side)
        self.mask_ratio, self.mask_seed = float(mask_ratio), mask_seed
        self.mean, self.std = tuple(mean or defaults[0]), tuple(std or defaults[1])
        check_statistics(name, channels, self.mean, self.std)
        given = fitting_preprocessing(name, self.input_shape, preprocessing)
        self.preprocessing = replace(given, mean=self.mean, std=self.std)
        self.patches = model.vit.embeddings.patch_embeddings.num_patches
        visible = int(self.patches * (1 - self.mask_ratio))  # as transformers counts them
        if not visible:
            raise TrajOODError(
                f"mask_ratio: expected one that leaves at least one of {self.patches} patches visible, got {mask_ratio}"
            )
        # About 1,000 tokens per call fill the matrix products of a CPU; larger calls compute more idle rows beside the
        # last samples (the bundled model on two cores: 155 µs per row in calls of 48 rows, 189 µs in calls of 96).
        self.chunk = rows_per_call(1024 / (self.patches + 1))
        self.side_by_side = isinstance(model, MAENetwork) and self.is_small
        self.noise = _fixed_order(self.patches, self.mask_ratio, mask_seed)
        self._restore = self.noise.argsort().argsort()
        self._cells = _cells_of(self.noise, visible) if self.mask_ratio else None

    @classmethod
    def from_pretrained(cls, source: str | Path, **options: Any) -> ViTMAE:
        """Load a checkpoint by hub name, such as ``facebook/vit-mae-base``, or local folder."""
        folder = Path(source).expanduser()
        options.setdefault("name", name_of(source))
        if any((folder / name).is_file() for name in _WEIGHTS):
            return cls._from_folder(folder, options)
        if folder.is_dir() or is_local(str(source)):
            raise TrajOODError(f"{source}: expected a folder with config.json and model.safetensors of a ViT-MAE")
        return cls._from_hub(str(source), options)

    @classmethod
    def _from_folder(cls, folder: Path, options: dict[str, Any]) -> ViTMAE:
        raw = read_config(folder)
        if raw.get("model_type") != "vit_mae":
            raise TrajOODError(f"{folder}/config.json: expected model_type 'vit_mae', got {raw.get('model_type')!r}")
        path = next(folder / name for name in _WEIGHTS if (folder / name).is_file())
        written = read_weights(path)
        with foreign_errors(f"{folder}/config.json: impossible geometry"):
            model = _built(raw, written, folder / "config.json", path)
        stored: dict[str, Any] = {}
        if (folder / PROCESSOR).is_file():
            stored = read_config(folder, PROCESSOR)
            options.setdefault("preprocessing", _preprocessing(stored, {**DEFAULTS, **raw}, str(folder / PROCESSOR)))
        autoencoder = cls(model, **{**stored_options(folder, cls.unsaved), **options})
        check_digest(path, written, raw, stored)  # last: the other errors are more specific
        return autoencoder

    @classmethod
    def _from_hub(cls, source: str, options: dict[str, Any]) -> ViTMAE:
        from transformers import ViTMAEForPreTraining

        where = f"model {source!r}"
        with foreign_errors(f"{where}: neither a local folder nor loadable from the hub", f"; {DOWNLOAD}"):
            answer = from_pretrained(ViTMAEForPreTraining, source, output_loading_info=True, **use_safetensors(source))
        model = whole_network(answer, where, then=f", and would stay random; {_NEED_DECODER}")
        processor = _preprocessing(_fetched_processor(source), model.config.to_dict(), f"{where}: {PROCESSOR}")
        options.setdefault("preprocessing", processor)
        return cls(model, **options)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json, model.safetensors and preprocessor_config.json, which transformers can read, too; with the
        names of published files, the only ones that version 4 knows. A mask is written beside them, and read from
        folders, not from the hub."""
        folder = Path(folder)
        # First, so that an interrupted call leaves no folder that loads without its mask.
        if self.mask_ratio:
            write_json(folder / OPTIONS, {"mask_ratio": self.mask_ratio, "mask_seed": self.mask_seed})
        else:
            (folder / OPTIONS).unlink(missing_ok=True)
        network: Any = self.module
        if isinstance(network, MAENetwork):
            text = json.dumps(network.given, indent=2, sort_keys=True) + "\n"  # as transformers writes it
        else:
            text = network.config.to_json_string()
        write_atomic(folder / "config.json", text.encode())
        stored = to_processor(self.preprocessing)
        weights = {published_name(key): value for key, value in self.module.state_dict().items()}
        write_tensors(folder / "model.safetensors", weights, beside=[json.loads(text), stored])
        write_json(folder / PROCESSOR, stored)

    def fingerprint(self) -> str:
        return fingerprint(self.module, [self.family, self.options()], own_name)

    def options(self) -> dict[str, Any]:
        mask = {"mask_ratio": self.mask_ratio} | ({"mask_seed": self.mask_seed} if self.mask_ratio else {})
        own = {} if self.preprocessing.is_plain else {"preprocessing": self.preprocessing.as_dict()}
        return {**mask, "mean": list(self.mean), "std": list(self.std), **own}

    def encode_batch(self, images: Tensor) -> Tensor:
        if isinstance(self.module, MAENetwork) and not self.mask_ratio:
            return self.module.encode(images)
        return self._encode(images, self.noise, self.mask_ratio)[0]

    def decode_batch(self, latents: Tensor) -> Tensor:
        if isinstance(self.module, MAENetwork) and not self.mask_ratio:
            return self.module.decode(latents)
        return self._decode(latents, self._restore.to(latents.device))

    def grid(self, latents: Tensor) -> Tensor:
        """As :meth:`Autoencoder.grid`. With a mask, the mean of the visible patches of each cell, without cells that
        have none; the mask is the same for all images."""
        if self._cells is None:
            return super().grid(latents)
        patches = latents[:, 1:]
        return torch.stack([patches[:, tokens].mean(dim=1) for tokens in self._cells], dim=1)

    def reconstruction_masks(self) -> int:
        return RECONSTRUCTION_MASKS

    def reconstruct_masked(self, images: Tensor) -> Tensor:
        """Mean squared error on hidden patches, the training task of an MAE, averaged over fixed masks, (B,) float64.

        There are four masks of ratio 0.75 (He et al.'s) with seeds 0 … 3, the same for every image.
        """
        images = self._input(images)
        errors = torch.zeros(len(images), dtype=torch.float64)
        for seed in range(RECONSTRUCTION_MASKS):
            noise = _fixed_order(self.patches, RECONSTRUCTION_RATIO, seed)
            errors += self._masked_error(images, noise)
        return errors / RECONSTRUCTION_MASKS

    def reconstruct_corrupted(
        self, images: Tensor, input_noise: float, mask_ratio: float, generator: torch.Generator
    ) -> tuple[Tensor, Tensor | None]:
        corrupted = images + input_noise * torch.randn(images.shape, generator=generator).to(images.device)
        order = torch.rand(len(images), self.patches, generator=generator)
        latents, hidden, restore = self._encode(corrupted, order, mask_ratio)
        patch_pixels = self._patchify(images).shape[-1]
        return self._decode(latents, restore), self.module.unpatchify(hidden[..., None].expand(-1, -1, patch_pixels))  # type: ignore[operator]

    def trainable_parameters(self) -> dict[str, torch.nn.Parameter]:
        """All parameters except the position embeddings, which stay sine-cosine tables, as in the original."""
        fixed = ("position_embeddings", "decoder_pos_embed")
        return {k: p for k, p in self.module.named_parameters() if not k.endswith(fixed)}

    def _masked_error(self, images: Tensor, noise: Tensor) -> Tensor:
        def error(batch: Tensor) -> Tensor:
            latents, hidden, restore = self._encode(batch, noise, RECONSTRUCTION_RATIO)
            patch_error = self._patchify(self._decode(latents, restore) - batch).square().mean(dim=-1)
            return (patch_error * hidden).sum(dim=1) / hidden.sum(dim=1)

        with self.fixed(), torch.inference_mode():
            return apply_in_chunks(error, images, self.rows).cpu().double()  # MPS has no float64

    def _patchify(self, images: Tensor) -> Tensor:
        return self.module.patchify(images)  # type: ignore[operator]

    def _encode(self, images: Tensor, noise: Tensor, ratio: float) -> tuple[Tensor, Tensor, Tensor]:
        """Encode with the patch order of ``noise``: latents, 0/1 mask of hidden patches (B, patches), inverse order."""
        if isinstance(self.module, MAENetwork):
            order = noise.to(images.device).argsort(dim=-1)
            restore = order.argsort(dim=-1)
            visible = int(self.patches * (1 - ratio))
            hidden = (restore >= visible).to(images.dtype).expand(len(images), -1)
            return self.module.encode(images, order, visible), hidden, restore
        vit: Any = self.module.vit
        # transformers reads the ratio from the model's config, which other users of the same model share: restore it.
        config = vit.embeddings.config
        before, config.mask_ratio = config.mask_ratio, float(ratio)  # transformers rejects the int 0
        try:
            out = vit(images, noise=noise.to(images.device).expand(images.shape[0], -1))
        finally:
            config.mask_ratio = before
        return out.last_hidden_state, out.mask, out.ids_restore

    def _decode(self, latents: Tensor, restore: Tensor) -> Tensor:
        if isinstance(self.module, MAENetwork):
            return self.module.decode(latents, restore)
        decoder: Any = self.module.decoder
        return self.module.unpatchify(decoder(latents, restore.expand(latents.shape[0], -1)).logits)  # type: ignore[operator]


_PROCESSORS = ("ViTImageProcessor", "ViTFeatureExtractor")  # with or without the suffix "Fast"
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # in order of precedence


def _preprocessing(stored: dict[str, Any], config: dict[str, Any], where: str) -> Preprocessing:
    """The preprocessing that the checkpoint's image processor describes."""
    kind = str(stored.get("image_processor_type") or stored.get("feature_extractor_type") or _PROCESSORS[0])
    if kind.removesuffix("Fast").removesuffix("Pil") not in _PROCESSORS:
        raise TrajOODError(
            f"{where}: expected a {_PROCESSORS[0]}, got {kind!r}, which is not supported: wrap the model in a "
            "traj_ood.CallableAutoencoder with a transform of your own"
        )
    side = config["image_size"]
    return from_processor(stored, (config["num_channels"], side, side), where)


def _fetched_processor(source: str) -> dict[str, Any]:
    """Download ``preprocessor_config.json`` of a hub repository."""
    from huggingface_hub import hf_hub_download

    where = f"model {source!r}: its {PROCESSOR}, which says how images are prepared, is not available"
    with foreign_errors(where, "; download the repository and pass the folder"):
        return read_config(Path(hf_hub_download(source, PROCESSOR)).parent, PROCESSOR)


# transformers 5 renamed the tensors of ViT-MAE; published files have the names of transformers 4.
_RENAMED = (
    (r"^vit\.encoder\.layer\.", "vit.layers."),
    (r"^decoder\.decoder_encoder\.layer\.", "decoder.decoder_layers."),  # what transformers 5 itself writes
    (r"\.attention\.attention\.([qkv])(uery|ey|alue)\.", r".attention.\1_proj."),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"(\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
)


_PUBLISHED = (
    ("vit.layers.", "vit.encoder.layer."),
    (".attention.q_proj.", ".attention.attention.query."),
    (".attention.k_proj.", ".attention.attention.key."),
    (".attention.v_proj.", ".attention.attention.value."),
    (".attention.o_proj.", ".attention.output.dense."),
    (".mlp.fc1.", ".intermediate.dense."),
    (".mlp.fc2.", ".output.dense."),
)


def own_name(key: str) -> str:
    """The name of a ViT-MAE's tensor in transformers 5, from its name in any version."""
    for pattern, name in _RENAMED:
        key = re.sub(pattern, name, key)
    return key


def published_name(key: str) -> str:
    """The name of a ViT-MAE's tensor in published files, from its name in any version of transformers."""
    key = own_name(key)
    for own, published in _PUBLISHED:
        key = key.replace(own, published)
    return key


_NEED_DECODER = "use a ViTMAEForPreTraining checkpoint such as facebook/vit-mae-base"


def _built(config: dict[str, Any], written: dict[str, Tensor], config_path: Path, path: Path) -> Any:
    """Build the model of a config and load the weights ``written``. Shapes are checked first, on the meta device,
    because a damaged config could request any amount of memory."""
    refuse_larger(config, written, str(config_path))
    with torch.device("meta"):
        shapes = MAENetwork(config) if is_plain(config) else _transformers_network(config)
    names = {own_name(key): key for key in shapes.state_dict()}
    weights = {names.get(own_name(key), key): value for key, value in written.items()}
    if not any(key.startswith("decoder.") for key in weights):
        raise TrajOODError(f"{path}: holds an encoder without a decoder, so E∘D does not exist; {_NEED_DECODER}")
    check_weights(weights, shapes, str(path))
    if not isinstance(shapes, MAENetwork):
        model = build_model(config)
        model.load_state_dict(weights)
        return model
    # Copied to freshly allocated memory, because the rounding of kernels depends on the alignment of their inputs.
    shapes.load_state_dict({key: value.float().clone() for key, value in weights.items()}, assign=True)
    return shapes


_NOT_CONFIG = ("model_type", "_attn_implementation_autoset")


def _transformers_network(config: dict[str, Any]) -> Any:
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    return ViTMAEForPreTraining(ViTMAEConfig(**{k: v for k, v in config.items() if k not in _NOT_CONFIG}))


def build_model(config: dict[str, Any]) -> Any:
    """Build a ``ViTMAEForPreTraining`` of a transformers config with correct initial weights.

    When a model is built from a config, transformers leaves the decoder's position embeddings (and in some versions the
    encoder's) at zero, and training silently learns nothing. Here they are set to the 2-D sine-cosine table of the
    original implementation; class and mask token are drawn with standard deviation 0.02.
    """
    model = _transformers_network(config)
    grid = int(model.vit.embeddings.patch_embeddings.num_patches**0.5)
    with torch.no_grad():
        for table in (model.vit.embeddings.position_embeddings, model.decoder.decoder_pos_embed):
            table.copy_(sine_cosine_table(grid, table.shape[-1]))
        model.vit.embeddings.cls_token.normal_(std=0.02)
        model.decoder.mask_token.normal_(std=0.02)
    return model


def geometry_keys() -> tuple[str, ...]:
    """The config keys that :func:`build_model` accepts; transformers itself silently ignores unknown ones."""
    from transformers import ViTMAEConfig

    return tuple(ViTMAEConfig().to_dict())


def assert_position_embeddings(model: Any, name: str) -> None:
    """Refuse a model whose position embeddings are zero, since it cannot distinguish patches."""
    tables = {
        "encoder": model.vit.embeddings.position_embeddings,
        "decoder": model.decoder.decoder_pos_embed,
    }
    for part, table in tables.items():
        if not bool(table.any()):
            raise TrajOODError(
                f"{name}: the {part}'s position embeddings are all zero: build new models with "
                "traj_ood.autoencoders.vit_mae.build_model, or load trained weights"
            )


def sine_cosine_table(grid: int, width: int) -> Tensor:
    """The 2-D sine-cosine position table, (1, 1 + grid², width), of ``grid`` × ``grid`` patches.

    Rows are [sin x, cos x, sin y, cos y] per patch in row-major order, after zeros for the class token. The original
    implementation swaps x and y relative to its variable names; published weights depend on this order.
    """
    if width % 4:
        raise TrajOODError(f"hidden size: the 2-D sine-cosine table needs a multiple of 4, got {width}")
    frequency = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    y, x = torch.meshgrid(torch.arange(grid).double(), torch.arange(grid).double(), indexing="ij")
    angles = [axis.flatten()[:, None] * frequency for axis in (x, y)]
    table = torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)
    return torch.cat([torch.zeros(1, width, dtype=torch.float64), table])[None].float()


def _fixed_order(patches: int, ratio: float, seed: int) -> Tensor:
    """The noise (patches,) by which transformers sorts patches: in natural order, with hidden patches at the end."""
    if ratio == 0:
        return torch.arange(patches, dtype=torch.float32)
    drawn = torch.randperm(patches, generator=torch.Generator().manual_seed(seed))
    hidden = drawn[int(patches * (1 - ratio)) :]  # transformers keeps int(patches · (1 − ratio)) patches
    # Visible patches keep their natural order, hidden ones go to the end.
    order = torch.arange(patches, dtype=torch.float32)
    order[hidden] += patches
    return order.argsort().argsort().float()


def _cells_of(noise: Tensor, visible: int) -> list[list[int]]:
    """Indices of the visible patch tokens in each cell of ``GRID`` × ``GRID``, without empty cells."""
    side = math.isqrt(len(noise))
    cells: dict[tuple[int, int], list[int]] = {}
    for token, patch in enumerate(noise.argsort()[:visible].tolist()):
        row, column = divmod(patch, side)
        place = (row * GRID // side, column * GRID // side) if side > GRID else (row, column)
        cells.setdefault(place, []).append(token)
    return [cells[place] for place in sorted(cells)]
