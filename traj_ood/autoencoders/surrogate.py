"""SurrogateAutoencoder: an autoencoder of a frozen backbone's features, which provides the self-map f.

A classifier has no decoder, so E∘D does not exist for it. The paper (§6.1) proposes a surrogate autoencoder in the
latent space of the model of interest, whatever that model was trained for. :mod:`traj_ood.training.surrogate` trains
it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from PIL import Image
from torch import Tensor, nn

from traj_ood.autoencoders.base import Autoencoder, Encoding
from traj_ood.autoencoders.hub import read_config
from traj_ood.autoencoders.registry import register_autoencoder
from traj_ood.backbones import LIBRARIES, Backbone, Features, is_backbone_spec, load_backbone
from traj_ood.backbones.packing import pack_backbone, unpack_backbone
from traj_ood.data import ImageSource, Split
from traj_ood.data.benchmark import at_most
from traj_ood.dynamics.chunks import apply_in_chunks, rows_per_call
from traj_ood.errors import TrajOODError, check_word, foreign_errors
from traj_ood.io.checkpoints import read_weights
from traj_ood.io.extensions import origin_of
from traj_ood.io.tensor_file import check_digest, read_tensors, write_tensors
from traj_ood.io.trees import field_of, read_json, write_json
from traj_ood.io.weights import put_weights, with_weights

MODEL_TYPE = "traj_ood_surrogate"
Activation = Literal["gelu", "relu", "identity"]
_ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU, "identity": nn.Identity}
_PACKED_WEIGHTS = "network.safetensors"
_STD_FLOOR = 0.1  # smallest standard deviation, relative to the median
_BLOCK_ROWS = 4096  # features converted to float64 at a time
_SAMPLE_SEED = 0  # fixed, so that surrogates of several seeds share the same sample of features


class SurrogateNetwork(nn.Module):
    """An MLP autoencoder of standardised features (B, n), with latents (B, k).

    E is n → hidden → k and ends in a LayerNorm without parameters; D is the mirror image of E with a linear output. The
    LayerNorm fixes ‖z‖² = k, so that the tolerance on the squared residual (1e-5) means the same for every backbone,
    and training cannot reach it by shrinking the latents. There is no other normalisation, so no row depends on
    another.

    Args:
        features: n.
        hidden: widths between n and k. Default: one layer of 2n units, clamped to 256 … 512. More layers or units do
            not improve the contraction, see docs/choices.md.
        bottleneck: k. Default: n/2, clamped to 16 … 128. Half of that does worse, see docs/choices.md.
        activation: between the layers: ``gelu`` (default, because f should be smooth), ``relu``, or ``identity``, which
            makes f linear up to the LayerNorm.
        latent_norm: whether the encoder ends in the LayerNorm. Default true; see above.

    Attributes:
        mean: (n,) buffer, mean of the training features; see :meth:`set_statistics`.
        std: (n,) buffer, standard deviation of the training features.
    Raises:
        TrajOODError: a width below 1, or an unknown activation.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        features: int,
        hidden: Sequence[int] | None = None,
        bottleneck: int | None = None,
        *,
        activation: Activation = "gelu",
        latent_norm: bool = True,
    ) -> None:
        super().__init__()
        self.features = features
        self.hidden = tuple(hidden) if hidden is not None else (min(512, max(256, 2 * features)),)
        self.bottleneck = bottleneck if bottleneck is not None else min(128, max(16, features // 2))
        self.activation, self.latent_norm = activation, latent_norm
        widths = (self.features, *self.hidden, self.bottleneck)
        if min(widths) < 1:
            raise TrajOODError(f"surrogate: widths must be at least 1, got {' → '.join(map(str, widths))}")
        check_word("surrogate activation", activation, Activation)
        self.encoder = _mlp(widths, _ACTIVATIONS[activation])
        self.decoder = _mlp(widths[::-1], _ACTIVATIONS[activation])
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("std", torch.ones(features))

    def geometry(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {
            "features": self.features,
            "hidden": list(self.hidden),
            "bottleneck": self.bottleneck,
            "activation": self.activation,
            "latent_norm": self.latent_norm,
        }

    def set_statistics(self, features: Tensor) -> None:
        """Set mean and standard deviation per dimension from training features (N, n), summed in float64.

        The standard deviation is at least a tenth of the median one: otherwise a unit that is almost constant in
        training would be divided by almost zero, and dominate for samples that activate it.

        Raises:
            TrajOODError: no dimension varies.
        """
        blocks = features.split(_BLOCK_ROWS)
        mean = torch.stack([b.double().sum(dim=0) for b in blocks]).sum(dim=0) / len(features)
        squares = torch.stack([(b.double() - mean).square().sum(dim=0) for b in blocks]).sum(dim=0)
        std = (squares / len(features)).sqrt()
        alive = std > 1e-6 * mean.abs()  # smaller deviations are float32 rounding of a constant
        if not bool(alive.any()):
            raise TrajOODError(
                f"surrogate: no dimension of the {len(features)} features varies: every image looks the same to the "
                "backbone; check its weights and the images"
            )
        self.mean.copy_(mean)
        self.std.copy_(std.clamp(min=_STD_FLOOR * float(std[alive].median())))

    def standardise(self, features: Tensor) -> Tensor:
        """Features (B, n) in the backbone's units → (B, n) in standard deviations from the training mean."""
        return (features - self.mean) / self.std

    def encode(self, features: Tensor) -> Tensor:
        """E: standardised features (B, n) → latents (B, k)."""
        latents = self.encoder(features)
        return nn.functional.layer_norm(latents, (self.bottleneck,)) if self.latent_norm else latents

    def decode(self, latents: Tensor) -> Tensor:
        """D: latents (B, k) → standardised features (B, n)."""
        return self.decoder(latents)


@register_autoencoder
class SurrogateAutoencoder(Autoencoder):
    """A frozen backbone with a :class:`SurrogateNetwork` on its features.

    E(image) is the network's encoder applied to the backbone's standardised features. D returns features, so f = E∘D
    iterates the small network alone, and the backbone processes every image once.

    Args:
        backbone: see :class:`traj_ood.backbones.Backbone`.
        network: a network for features of the backbone's width.
        name: the model's name in tables and messages. Default: the backbone's name.
        mean: (n,) to standardise with. Default: the network's.
        std: (n,) to standardise with, positive. Default: the network's.

    Attributes:
        record: the contents of ``training.json`` (recipe, log, ``health`` of the attractors, versions); empty if there
            is none.
    Raises:
        TrajOODError: a network for another width, or standard deviations that are not positive.
    """

    family, summary = "surrogate", "an autoencoder of a frozen backbone's features: surrogate:<folder>"
    marks: ClassVar = {"model_type": MODEL_TYPE}

    def __init__(
        self,
        backbone: Backbone,
        network: SurrogateNetwork,
        *,
        name: str | None = None,
        mean: Tensor | None = None,
        std: Tensor | None = None,
    ) -> None:
        self.backbone, self.network = backbone, network.eval().requires_grad_(False)
        self.name, self.module = name or backbone.name, self.network
        self.input_shape, self.preprocessing = backbone.input_shape, backbone.preprocessing
        self.feature_dim, self.classes = backbone.feature_dim, backbone.classes
        # Calls of about 128 rows are as fast per row as calls of 1,024 (benchmarks/surrogate_training.py), and larger
        # chunks would compute more idle rows beside the last trajectories to converge.
        self.chunk = rows_per_call(128)
        self.record: Mapping[str, Any] = {}
        if network.features != backbone.feature_dim:
            raise TrajOODError(
                f"{self.name}: expected a network for the {backbone.feature_dim} features of {backbone.name}, got one "
                f"for {network.features}: train a surrogate of this backbone"
            )
        for key, values in (("mean", mean), ("std", std)):
            if values is not None and tuple(values.shape) != (network.features,):
                raise TrajOODError(
                    f"{self.name}: {key}: expected shape ({network.features},), got {tuple(values.shape)}"
                )
            if values is not None:
                getattr(network, key).copy_(values)
        if not bool((network.std > 0).all()):
            raise TrajOODError(
                f"{self.name}: expected positive deviations of the features, got some that are not: the network is "
                "damaged; load it again or train a new one"
            )

    def modules_used(self) -> tuple[nn.Module, ...]:
        return self.backbone.module, self.network

    def has_own_code(self) -> bool:
        backbone = self.backbone
        return super().has_own_code() or backbone.library == "custom" or origin_of(type(backbone)) is not None

    # ------------------------------------------------------------------ self-map

    def examine(self, images: Tensor) -> Encoding:
        """One pass through the backbone: the latents, the features and the logits of the images."""
        return self.examine_features(self.backbone.extract(images))

    def examine_features(self, features: Features) -> Encoding:
        """As :meth:`examine`, from features that are already known."""
        values = features.features
        check_features(self.name, values, self.feature_dim)
        with self.fixed(), torch.inference_mode():
            target = self.network.standardise(values.to(self.device, self.network.mean.dtype))
            latents = apply_in_chunks(self.network.encode, target, self.rows, f"{self.name}: encode")
        return Encoding(latents=latents, target=target, features=values, logits=features.logits)

    def encode(self, images: Tensor) -> Tensor:
        return self.examine(images).latents

    def encode_batch(self, images: Tensor) -> Tensor:
        features = self.backbone.extract(images).features.to(self.device, self.network.mean.dtype)
        return self.network.encode(self.network.standardise(features))

    def decode_batch(self, latents: Tensor) -> Tensor:
        return self.network.decode(latents)

    def self_map(self, latents: Tensor) -> Tensor:
        """f(z) = E(D(z)), through features; the backbone is not used."""
        return self.network.encode(self.network.decode(latents))

    def entry(self, target: Tensor) -> Tensor:
        """Standardised features (B, n) converted to the backbone's units, (B, 1, n)."""
        return (target * self.network.std + self.network.mean)[:, None]

    # ------------------------------------------------------------------ backbone and options

    def transform(self, image: Image.Image) -> Tensor:
        return self.backbone.transform(image)

    def head(self) -> tuple[Tensor, Tensor] | None:
        return self.backbone.head()

    def options(self) -> dict[str, Any]:
        return {"backbone": self.backbone_fingerprint, "network": self.network.geometry()}

    @cached_property
    def backbone_fingerprint(self) -> str:
        """The backbone's fingerprint; computed once, because the backbone is frozen and hashing takes seconds."""
        return self.backbone.fingerprint()

    def learnt_from(self, train: Split) -> ImageSource | None:
        """The images of a training split that the network was trained on; None if :attr:`record` names none, or if
        they are not of this split or have changed since."""
        data = self.record.get("data", {})
        if not {"count", "sha256"} <= data.keys():
            return None
        images = training_images(train, data["count"])
        return images if images.digest() == data["sha256"] else None

    def to(self, device: torch.device | str) -> SurrogateAutoencoder:
        self.backbone.to(device)
        self.network.to(device)
        return self

    # ------------------------------------------------------------------ files

    @classmethod
    def from_pretrained(
        cls, source: str | Path, backbone: Backbone | None = None, **options: Any
    ) -> SurrogateAutoencoder:
        """Load a folder that :meth:`save_pretrained` wrote.

        Args:
            source: folder with config.json and model.safetensors; training.json is read if present.
            backbone: the backbone it was trained on. Default: loaded by the spec in config.json.
            options: of the constructor, such as ``name``.
        Raises:
            TrajOODError: unreadable or damaged files, weights of another architecture or with NaN, or a backbone with
                other weights or options than the one it was trained on.
        """
        folder = Path(source).expanduser()
        path = folder / "model.safetensors"
        with foreign_errors(f"{folder}: expected config.json and model.safetensors of a surrogate"):
            config = read_config(folder)
            if config["model_type"] != MODEL_TYPE:
                raise TrajOODError(
                    f"{folder}/config.json: expected model_type {MODEL_TYPE!r}, got {config['model_type']!r}"
                )
            trained_on = {key: str(config["backbone"][key]) for key in ("spec", "name", "fingerprint")}
            asked = dict(config["backbone"].get("options") or {})
            weights = read_tensors(path)
            network = with_weights(SurrogateNetwork, config["network"], weights, path)
            record = folder / "training.json"
            known = read_json(record, "the record of a training", "delete the folder") if record.is_file() else {}
        model = cls(backbone or _backbone_of(folder, trained_on, asked), network, **options)
        if model.backbone_fingerprint != trained_on["fingerprint"]:
            raise TrajOODError(
                f"{folder}: trained on the features of {trained_on['name']} (fingerprint "
                f"{trained_on['fingerprint'][:12]}…), got {model.backbone.name} ({model.backbone_fingerprint[:12]}…): "
                "pass the backbone it was trained on, or train a new surrogate"
            )
        check_digest(path, weights, config)
        model.record = known
        return model

    def save_pretrained(self, folder: str | Path, recipe: Mapping[str, Any] | None = None) -> None:
        """Write model.safetensors with the network, and config.json with the backbone's spec, name and fingerprint."""
        folder = Path(folder)
        config = {
            "model_type": MODEL_TYPE,
            "backbone": {
                "spec": self.backbone.spec,
                "name": self.backbone.name,
                "fingerprint": self.backbone_fingerprint,
                **({"options": dict(self.backbone.load_options)} if self.backbone.load_options else {}),
            },
            "network": self.network.geometry(),
            "recipe": dict(recipe or {}),
        }
        write_tensors(folder / "model.safetensors", self.network.state_dict(), beside=[config])
        write_json(folder / "config.json", config)

    def pack(self, folder: Path) -> dict[str, Any] | None:
        if not isinstance(self.backbone, LIBRARIES.get(self.backbone.library, ())):
            return None
        write_tensors(folder / _PACKED_WEIGHTS, self.network.state_dict())
        return {"backbone": pack_backbone(self.backbone, folder)}

    @classmethod
    def unpack(cls, described: Mapping[str, Any], folder: Path) -> SurrogateAutoencoder:
        where, path = f"{folder}: description of the model", folder / _PACKED_WEIGHTS
        network = SurrogateNetwork(**field_of(described["options"], "network", dict, where))
        put_weights(network, read_weights(path), str(path))
        backbone = unpack_backbone(field_of(described, "backbone", dict, where), folder)
        return cls(backbone, network, name=described["name"])


def training_images(train: Split, most: int) -> ImageSource:
    """The at most ``most`` images of a training split that surrogates are trained on, whatever their seeds."""
    return at_most(train.images, most, _SAMPLE_SEED, f"surrogate/{train.name}")


def check_features(name: str, features: Tensor, width: int) -> None:
    """Check that features are finite floats (B, ``width``)."""
    if features.ndim != 2 or features.shape[1] != width or not features.is_floating_point():
        raise TrajOODError(
            f"{name}: expected float features (B, {width}), got {features.dtype} of shape {tuple(features.shape)}"
        )
    for start in range(0, len(features), _BLOCK_ROWS):  # in blocks: a mask over all rows would double the memory
        bad = (~features[start : start + _BLOCK_ROWS].isfinite().all(dim=1)).nonzero()[:, 0]
        if len(bad):
            raise TrajOODError(
                f"{name}: {len(bad)} row(s) of features hold NaN or infinite values, first at row "
                f"{start + int(bad[0])}: check the backbone and its images"
            )


def _backbone_of(folder: Path, trained_on: Mapping[str, str], options: Mapping[str, Any]) -> Backbone:
    if not is_backbone_spec(trained_on["spec"]):
        raise TrajOODError(
            f"{folder}: trained on the features of {trained_on['name']!r}, a backbone of your own: pass it as backbone="
        )
    return load_backbone(trained_on["spec"], **options)


def _mlp(widths: Sequence[int], activation: type[nn.Module]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), activation()]
    return nn.Sequential(*layers[:-1])
