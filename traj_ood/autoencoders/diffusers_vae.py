"""Image autoencoders of diffusers: those of Stable Diffusion and SDXL (§4.1, Figs 4, 7–9, 15, 18), and tiny,
deep-compression and vector-quantised ones.

Of published weights, the tiny autoencoders of Stable Diffusion 1 and 3 (taesd, taesd3) were run; the paper's could not
be downloaded. Tests build small random models of every kind and compare them with diffusers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from traj_ood.autoencoders.base import Autoencoder, ModelInfo
from traj_ood.autoencoders.hub import OPTIONS, local_copy, name_of, read_config, stored_options
from traj_ood.autoencoders.own_modules import tensor_of
from traj_ood.autoencoders.registry import family_of, register_autoencoder
from traj_ood.data.preprocessing import Interpolation, Preprocessing
from traj_ood.dynamics.chunks import rows_per_call
from traj_ood.errors import TrajOODError, foreign_errors
from traj_ood.io.pretrained import from_pretrained, use_safetensors, whole_network
from traj_ood.io.trees import write_json

FILES = ("config.json", "diffusion_pytorch_model.safetensors", OPTIONS)
PAPER_SIZE = 256
"""Side of the paper's images (Table 2)."""
_PIXELS_PER_CALL = 2**18
"""Four images of 256 × 256, rounded to calls of six; a call of these networks takes about 1 GB per image."""
KINDS = (
    "AutoencoderKL",
    "AutoencoderTiny",
    "AutoencoderDC",
    "VQModel",
    "AsymmetricAutoencoderKL",
    "AutoencoderKLFlux2",
    "AutoencoderKLHunyuanImage",
)
"""diffusers' classes for images, with latents (B, channels, h, w); those for video and audio are not supported."""


@register_autoencoder
class DiffusersVAE(Autoencoder):
    """An image autoencoder of diffusers, of one of the classes in ``KINDS``.

    E(x) is the latent, or the mean of the posterior where there is one, so that f = E∘D is deterministic. D of a
    ``VQModel`` quantises first, as in diffusers, so that f maps code words. Latents are (B, channels, h, w), which
    counts as one token. Images are in [−1, 1], as in these models' training, and resized as by diffusers'
    ``VaeImageProcessor``.

    Args:
        model: the diffusers model.
        name: the model's name in tables and messages.
        image_size: side of the images. Default: the config's ``sample_size``, but at most 256, the paper's size (SDXL's
            1024 costs 16 times as much); 256 if the config has none. A folder that :meth:`save_pretrained` wrote has
            its own defaults of this and the next two.
        scaled: False (default) uses latents as E returns them, the literal reading of the paper's f = E∘D. True
            converts them to the units of the diffusion model, (z − shift) · scaling_factor, in which the latents of
            images, like starts from N(0, I), have about unit variance. The dynamics are the same; starts and tolerance
            are not.
        interpolation: of the direct resize. Default ``lanczos``, ``VaeImageProcessor``'s.
    Raises:
        TrajOODError: an image size that the strides do not divide, or ``scaled`` without a scaling factor.
    """

    family, summary = "diffusers", "autoencoders in diffusers' layout: diffusers:<hub name or folder>"
    marks: ClassVar = {"_class_name": KINDS}
    hub_slashes: ClassVar = (1, 2)
    models: ClassVar = {
        "sd-vae": ModelInfo(
            "diffusers:CompVis/stable-diffusion-v1-4/vae",
            "the paper's Stable Diffusion autoencoder, 84 M, from the hub",
        ),
        "sdxl-vae": ModelInfo("diffusers:stabilityai/sdxl-vae", "SDXL's autoencoder, 84 M parameters, from the hub"),
    }
    preprocessing: Preprocessing
    unsaved: ClassVar = {"image_size": int, "scaled": bool, "interpolation": str}

    def __init__(
        self,
        model: Any,
        *,
        name: str = "diffusers-vae",
        image_size: int | None = None,
        scaled: bool = False,
        interpolation: Interpolation = "lanczos",
    ) -> None:
        config = model.config
        own_size = min(int(config.get("sample_size") or PAPER_SIZE), PAPER_SIZE)
        side = own_size if image_size is None else int(image_size)
        stride = _stride(model)
        if side < stride or side % stride:
            raise TrajOODError(f"{name}: image_size: expected a multiple of {stride}, got {side}")
        if scaled and not config.get("scaling_factor"):
            raise TrajOODError(f"{name}: scaled: expected a scaling_factor in its config, found none: use scaled=False")
        self.name, self.module = name, model.eval().requires_grad_(False)
        self.input_shape = (int(config.in_channels), side, side)
        half = (0.5,) * self.input_shape[0]
        self.preprocessing = Preprocessing(self.input_shape, half, half, interpolation=interpolation)
        self.scaled = bool(scaled)
        self._factor = float(config.scaling_factor) if scaled else 1.0
        self._shift = float(getattr(config, "shift_factor", None) or 0.0) if scaled else 0.0
        self.chunk = rows_per_call(min(64, _PIXELS_PER_CALL / side**2))

    @classmethod
    def load(cls, source: str, **options: Any) -> Autoencoder:
        """Load a folder or hub repository in diffusers' layout, of any family; of a pipeline on disk its ``vae``."""
        folder = local_copy(source, FILES)
        if (folder / "model_index.json").is_file() and (folder / "vae").is_dir():
            folder = folder / "vae"
        options.setdefault("name", name_of(source))
        family = family_of(folder, "_class_name")
        return family.from_pretrained(folder, **options)

    @classmethod
    def unpack(cls, described: Mapping[str, Any], folder: Path) -> Autoencoder:
        # Older versions used bilinear interpolation and did not record it.
        options = {"interpolation": "bilinear", **described["options"]}
        return super().unpack({**described, "options": options}, folder)

    @classmethod
    def from_pretrained(cls, source: str | Path, **options: Any) -> DiffusersVAE:
        """Load ``config.json`` and the weights of a source, as for :func:`local_copy`; from a folder also a ``.bin``
        file, read as plain tensors."""
        try:
            import diffusers
        except ImportError as error:
            raise TrajOODError(
                f"model {source}: diffusers is not installed: pip install 'traj_ood[diffusers]'"
            ) from error

        folder = local_copy(str(source), FILES)
        kind = read_config(folder).get("_class_name")
        if kind not in KINDS:
            raise TrajOODError(f"{folder}/config.json: expected _class_name of {', '.join(KINDS)}, got {kind!r}")
        network = getattr(diffusers, kind, None)
        if network is None:
            raise TrajOODError(f"{folder}: diffusers {diffusers.__version__} has no {kind}: install a newer one")
        if not any(folder.glob("diffusion_pytorch_model.*")):
            raise TrajOODError(f"{folder / FILES[1]}: expected the weights, found nothing; download them, too")
        with foreign_errors(f"{folder}: cannot be read as an {kind}"):
            # Not on the meta device: missing weights would stay there, and fail only when they are used.
            answer = from_pretrained(
                network, folder, output_loading_info=True, low_cpu_mem_usage=False, **use_safetensors(folder)
            )
        extra = sorted(map(str, answer[1]["unexpected_keys"]))
        if extra:
            raise TrajOODError(
                f"{folder}: weights of another architecture: {len(extra)} tensors unexpected (first: {extra[0]})"
            )
        model = whole_network(answer, str(folder))
        options.setdefault("name", name_of(source))
        return cls(model, **{**stored_options(folder, cls.unsaved), **options})

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model in diffusers' layout, with ``image_size``, ``scaled`` and ``interpolation`` beside it."""
        own = {"scaled": self.scaled, "interpolation": self.preprocessing.interpolation}
        # First, so that an interrupted call leaves no folder that loads with other options.
        write_json(Path(folder) / OPTIONS, {"image_size": self.input_shape[1], **own})
        self.module.save_pretrained(folder)  # type: ignore[operator]

    def options(self) -> dict[str, Any]:
        """The options that change f and do not show in the weights; factor and shift are 1 and 0 unless ``scaled``."""
        own = {} if self.preprocessing.is_plain else {"interpolation": self.preprocessing.interpolation}
        return own | {
            "image_size": self.input_shape[1],
            "scaled": self.scaled,
            "factor": self._factor,
            "shift": self._shift,
            **_config_beyond_weights(self.module),
        }

    def encode_batch(self, images: Tensor) -> Tensor:
        latents = tensor_of(f"{self.name}: encode", self.module.encode(images))  # type: ignore[operator]
        return (latents - self._shift) * self._factor

    def decode_batch(self, latents: Tensor) -> Tensor:
        decoded = self.module.decode(latents / self._factor + self._shift)  # type: ignore[operator]
        return tensor_of(f"{self.name}: decode", decoded)


def _stride(model: Any) -> int:
    """Image pixels per latent position, along a side."""
    known = getattr(model, "spatial_compression_ratio", None)
    config = model.config
    blocks = ("block_out_channels", "encoder_block_out_channels", "down_block_out_channels")  # by class
    return int(known or 2 ** (len(next(config[key] for key in blocks if config.get(key))) - 1))


def _config_beyond_weights(model: Any) -> dict[str, Any]:
    """The entries of the config that change f but not the names and shapes of the weights."""
    kind, config = type(model).__name__, model.config
    if kind == KINDS[0]:
        return {"norm_num_groups": config.norm_num_groups, "act_fn": config.act_fn}
    other = {"sample_size", "scaling_factor", "shift_factor", "force_upcast"}
    return {
        "class": kind,
        "config": {key: value for key, value in config.items() if key[0] != "_" and key not in other},
    }
