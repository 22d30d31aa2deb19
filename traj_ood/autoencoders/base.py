"""Autoencoder, the base class of all models, and CallableAutoencoder, a wrapper for models of your own."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
from PIL import Image
from torch import Tensor, nn

from traj_ood.autoencoders.own_modules import halves_of, tensor_of
from traj_ood.data.preprocessing import Preprocessed, Preprocessing, declared_preprocessing, network_input
from traj_ood.dynamics.chunks import ROWS, apply_in_chunks
from traj_ood.dynamics.fixed_function import FixedFunction, errors_around, float_type, trial_rows
from traj_ood.dynamics.function_checks import check_floats, check_forgets, check_function, takes_one
from traj_ood.dynamics.own_functions import OwnFunctions, is_of_library, module_behind, original
from traj_ood.errors import TrajOODError, check_whole
from traj_ood.io.extensions import origin_of
from traj_ood.io.trees import field_of
from traj_ood.io.weights import fingerprint

View = Literal["tokens", "cls", "mean"]
VIEWS: tuple[View, ...] = get_args(View)
FeatureView = Literal["tokens", "cls", "mean", "backbone", "grid", "entry", "decoded"]
GRID = 4
"""Maximum number of cells per side in the view ``grid``. A Gaussian per cell over [z0, z1 − z0] takes (2d)² numbers:
300 MB for all cells at d = 768."""
ENTRY_PIXELS = 8
"""Maximum number of pixels per side of a cell in the view ``entry``. With 4 × 4 cells, images of 32 × 32 keep all
pixels, and the Gaussian of a cell of a colour image has 192 dimensions."""


@dataclass(frozen=True)
class Encoding:
    """The result of one pass of B images through a model.

    Attributes:
        latents: (B, *L) z0 = E(x), on the model's device.
        target: (B, *) that D(z0) is compared with: the images, or for a surrogate the features it reconstructs.
        features: (B, n) penultimate features of the frozen backbone; None without a backbone.
        logits: (B, classes) of the classifier; None without a classifier.
    """

    latents: Tensor
    target: Tensor
    features: Tensor | None = None
    logits: Tensor | None = None

    def __len__(self) -> int:
        return len(self.latents)


@dataclass(frozen=True)
class ModelInfo:
    """A named model: its source, in the form that :func:`traj_ood.load_autoencoder` takes, and a one-line summary."""

    source: str
    summary: str


class Autoencoder(FixedFunction, Preprocessed, ABC):
    """An encoder E and a decoder D with a common latent space, and hence a self-map f = E∘D.

    Subclasses implement :meth:`encode_batch` and :meth:`decode_batch` and set the attributes below. Users call
    :meth:`encode`, :meth:`decode` and :meth:`self_map`, which call these two with a constant number of rows.

    While in use E and D are fixed functions: evaluation mode, no autocast, float32 or the model's own float64, one
    thread at a time; see :meth:`fixed`. The first :meth:`encode` tests E and f on two images of noise and refuses a
    model that draws random numbers, whose output for an image depends on other images in the batch, or whose decoder
    reads more than the latent, such as a U-Net's.

    A class decorated with :func:`traj_ood.autoencoders.register_autoencoder` is a family, described by the first six
    attributes below: :func:`traj_ood.load_autoencoder` then finds its models, and detectors can be saved with them. It
    must define :meth:`from_pretrained` and :meth:`save_pretrained`, and may override :meth:`load`, :meth:`pack` and
    :meth:`unpack`.

    Attributes:
        family: the word before the colon in ``family:source``; ``custom`` for classes that are not registered.
        summary: one-line description of the family.
        marks: entries of ``config.json`` that identify folders of this family, such as ``{"model_type": "vit_mae"}``;
            a tuple lists alternative values.
        hub_slashes: minimum and maximum number of slashes in a Hugging Face hub name; 1 for ``owner/name``, more if a
            folder of the repository may follow.
        models: published models by name.
        unsaved: options of :meth:`from_pretrained`, with their types, that the files of the family's library do not
            have; :meth:`save_pretrained` may write them to ``traj_ood.json``.
        name: the model's name in tables and messages.
        module: the nn.Module whose weights define the model, on :attr:`device`.
        input_shape: (C, H, W) of the images that :meth:`encode` takes.
        preprocessing: how an image file becomes an input; None if :meth:`transform` is the user's own code.
        chunk: rows per call of the network (see :func:`traj_ood.iterate`). It is a property of the model and must not
            depend on the batch size, because floating-point rounding depends on the shape of the call. Default 24. Use
            1 or a multiple of 6: for other numbers, processors without AVX-512 round the last rows differently, so that
            a score changes with the image's position in the batch, by 1e-7 to 1e-4.
        ladder: allowed numbers of rows per call when a detector scores fewer images than ``chunk``, see
            :func:`traj_ood.dynamics.fixed_function.few_images`. Set it to () to always use whole chunks.
        has_cls: whether the first latent token is a CLS token, which summarises the image. Latents of shape (B, T, d)
            are T tokens; any other shape counts as one token, for which every view is the whole latent.
        feature_dim: width of the frozen backbone's features; 0 for models without a backbone.
        classes: number of classes of the backbone's classifier; 0 without one.
    """

    family: ClassVar[str] = "custom"
    summary: ClassVar[str] = ""
    marks: ClassVar[Mapping[str, str | tuple[str, ...]]] = {}
    hub_slashes: ClassVar[tuple[int, int]] = (1, 1)
    models: ClassVar[Mapping[str, ModelInfo]] = {}
    unsaved: ClassVar[Mapping[str, type]] = {}
    name: str
    module: nn.Module
    input_shape: tuple[int, int, int]
    chunk: int = ROWS
    has_cls: bool = False
    feature_dim: int = 0
    classes: int = 0

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, input_shape={self.input_shape})"

    @abstractmethod
    def encode_batch(self, images: Tensor) -> Tensor:
        """E: images (chunk, C, H, W) in the model's normalised units → latents (chunk, *L)."""

    @abstractmethod
    def decode_batch(self, latents: Tensor) -> Tensor:
        """D: latents (chunk, *L) → images (chunk, C, H, W)."""

    def options(self) -> dict[str, Any]:
        """The options that change f, such as masking; part of the fingerprint."""
        return {}

    def has_own_code(self) -> bool:
        """Whether callables, classes or networks of the user's are part of the model, which weights and options do not
        identify."""
        kinds = {type(part) for module in self.modules_used() for part in module.modules()}
        return self.family == "custom" or origin_of(type(self)) is not None or not all(map(is_of_library, kinds))

    def reconstruction_masks(self) -> int:
        """Number of fixed masks that :meth:`reconstruct_masked` averages over; 0 for models without masking."""
        return 0

    def reconstruct_masked(self, images: Tensor) -> Tensor:
        """Reconstruction error on hidden patches, averaged over fixed masks, (B,) float64; families without masking
        raise."""
        raise TrajOODError(f"{self.name} ({self.family}) has no masked reconstruction: only masked autoencoders do")

    def reconstruct_corrupted(
        self, images: Tensor, input_noise: float, mask_ratio: float, generator: torch.Generator
    ) -> tuple[Tensor, Tensor | None]:
        """Forward pass of a training step: D(E(x + noise)) with a new random mask.

        Args:
            images: (B, C, H, W) x, in normalised units.
            input_noise: standard deviation of the Gaussian noise.
            mask_ratio: share of the patches that are hidden.
            generator: draws noise and mask.
        Returns:
            The reconstruction (B, C, H, W), and a 0/1 tensor (B, C, H, W) of hidden pixels (None without masking).
        Raises:
            TrajOODError: the family cannot be trained here, or has no masking and ``mask_ratio`` > 0.
        """
        raise TrajOODError(
            f"{self.name} ({self.family}) cannot be trained by traj_ood: train it in the library it comes from"
        )

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that training may change, by name."""
        return dict(self.module.named_parameters())

    def encode(self, images: Tensor) -> Tensor:
        """Encode any number of images (B, C, H, W) → latents (B, *L) on :attr:`device`.

        Raises:
            TrajOODError: the images are not float (B, C, H, W) of the model's shape, or not finite; the model is not a
                fixed function (see the class); or it returns another number of rows than it was given.
        """
        with self.fixed(), torch.inference_mode():
            images = self._input(images)
            self.try_once()
            latents = apply_in_chunks(self.encode_batch, images, self.rows, f"{self.name}: encode")
        check_floats(f"{self.name}: encode", latents)
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        """Decode any number of latents (B, *L) → images (B, C, H, W).

        Raises:
            TrajOODError: the model returns another number of rows, or neither float32 nor float64.
        """
        with self.fixed(), torch.inference_mode():
            latents = latents.to(self.device, float_type(self.module) or latents.dtype)
            images = apply_in_chunks(self.decode_batch, latents, self.rows, f"{self.name}: decode")
        check_floats(f"{self.name}: decode", images)
        return images

    def self_map(self, latents: Tensor) -> Tensor:
        """f(z) = E(D(z)) on one chunk of latents; :func:`traj_ood.iterate` does the chunking."""
        return self.encode_batch(self.decode_batch(latents))

    def try_out(self) -> None:
        images = trial_rows(self.input_shape, self.module)
        with errors_around(self.encode_batch, f"{self.name}: encode of images {tuple(images.shape)}"):
            latents = check_function(f"{self.name}: encode", self.encode_batch, images, self.chunk)
        takes = takes_one(f"{self.name}: encode", self.encode_batch, images)
        if not (takes and takes_one(f"{self.name}: decode", self.decode_batch, latents)):
            self.ladder = ()
        self.try_places(self.encode_batch, images)
        rows = len(images) if self.ladder else self.chunk
        try:
            decoded = check_forgets(self.name, self.encode_batch, self.decode_batch, images, latents, rows)
            self.check_images(decoded)
            check_function(f"{self.name}: encode(decode(z))", self.self_map, latents, self.chunk)
            self.try_places(self.self_map, latents)
            self.try_rows({self.encode_batch: images, self.self_map: latents})
        except TrajOODError:
            raise
        except Exception:  # raised again when f is used; scorers that read only z0 do not use it
            return

    def check_images(self, decoded: Tensor) -> Tensor:
        """Return ``decoded``, the output of :meth:`decode_batch`, after checking that :meth:`encode_batch` takes it.

        Raises:
            TrajOODError: it has another shape than the images.
        """
        if decoded.shape[1:] != tuple(self.input_shape):
            raise TrajOODError(
                f"{self.name}: decode: expected images (B, {', '.join(map(str, self.input_shape))}) as encode takes "
                f"them, got {tuple(decoded.shape)}: reshape or crop them, or correct input_shape"
            )
        return decoded

    def examine(self, images: Tensor) -> Encoding:
        """Encode images (B, C, H, W), and return everything else that the pass computes, such as features and logits.

        Raises:
            TrajOODError: as :meth:`encode`.
        """
        images = self._input(images)
        return Encoding(latents=self.encode(images), target=images)

    def _input(self, images: Tensor) -> Tensor:
        return network_input(self.name, images, self.input_shape, "autoencoder.transform", self.module)

    def head(self) -> tuple[Tensor, Tensor] | None:
        """Weight (classes, feature_dim) and bias (classes,) of a linear classifier over the features, or None."""
        return None

    def view(self, latents: Tensor, name: View) -> Tensor:
        """One vector per image, (B, d), from latents (B, *L).

        Args:
            latents: (B, *L).
            name: ``tokens`` is the whole latent, flattened; ``cls`` the first token; ``mean`` the mean of the patch
                tokens, or over the positions of a feature map (B, C, H, W). For a latent of a single token all three
                are equal.
        Raises:
            TrajOODError: unknown view, or ``cls`` of tokens without a CLS token.
        """
        if name not in VIEWS:
            raise TrajOODError(f"latent view: expected one of {', '.join(VIEWS)}, got {name!r}")
        if name == "mean" and latents.ndim == 4:
            return latents.flatten(2).mean(dim=2)
        if name == "tokens" or latents.ndim != 3:
            return latents.flatten(1)
        if name == "cls":
            if not self.has_cls:
                raise TrajOODError(f"{self.name} has no CLS token: use view=mean or view=tokens")
            return latents[:, 0]
        return latents[:, int(self.has_cls) :].mean(dim=1)

    def grid(self, latents: Tensor) -> Tensor:
        """The view ``grid``, (B, cells, d): latents (B, *L) averaged over at most 4 × 4 cells of the image.

        Patch tokens and feature maps (B, C, H, W) are pooled, so that statistics may differ between positions; any
        other latent is one cell. Patch tokens whose number is not a square have no known position and form one cell,
        their mean.
        """
        if latents.ndim == 4:
            cells = (min(GRID, latents.shape[2]), min(GRID, latents.shape[3]))
            return nn.functional.adaptive_avg_pool2d(latents, cells).flatten(2).transpose(1, 2)
        if latents.ndim != 3:
            return latents.flatten(1)[:, None]
        patches = latents[:, int(self.has_cls) :]
        side = math.isqrt(patches.shape[1])
        if side**2 != patches.shape[1]:
            return patches.mean(dim=1, keepdim=True)
        if side <= GRID:
            return patches
        planes = patches.transpose(1, 2).unflatten(2, (side, side))
        return nn.functional.adaptive_avg_pool2d(planes, GRID).flatten(2).transpose(1, 2)

    def entry(self, target: Tensor) -> Tensor:
        """The view ``entry``, (B, cells, d): x, or D(z), in a space that does not depend on the encoder.

        Images (B, C, H, W) are pooled to at most 8 × 8 pixels in each of at most 4 × 4 cells; any other target is one
        cell.
        """
        if target.ndim != 4:
            return target.flatten(1)[:, None]
        cells = [min(GRID, side) for side in target.shape[2:]]
        pixels = [min(ENTRY_PIXELS, side // count) for side, count in zip(target.shape[2:], cells, strict=True)]
        sides = (cells[0] * pixels[0], cells[1] * pixels[1])
        pooled = target if sides == tuple(target.shape[2:]) else nn.functional.adaptive_avg_pool2d(target, sides)
        channels, (rows, columns), (height, width) = target.shape[1], cells, pixels
        parts = pooled.reshape(-1, channels, rows, height, columns, width).permute(0, 2, 4, 1, 3, 5)
        return parts.reshape(-1, rows * columns, channels * height * width)

    def latent_view(self, latents: Tensor, name: FeatureView) -> Tensor:
        """A view of latents (B, *L): those of :meth:`view`, ``grid`` (:meth:`grid`) or ``decoded``, the :meth:`entry`
        of D(z). ``backbone`` and ``entry`` are not functions of the latent; see :meth:`feature_view`."""
        if name == "grid":
            return self.grid(latents)
        if name == "decoded":
            return self.entry(self.decode_batch(latents) if torch.compiler.is_compiling() else self.decode(latents))
        return self.view(latents, name)  # type: ignore[arg-type]

    def feature_view(self, encoding: Encoding, name: FeatureView) -> Tensor:
        """The features that scorers read under the name of a view: of z0, of the backbone, or of x (``entry``).

        Raises:
            TrajOODError: ``backbone`` for a model without one.
        """
        if name == "entry":
            return self.entry(encoding.target)
        if name != "backbone":
            return self.latent_view(encoding.latents, name)
        if encoding.features is None:
            raise TrajOODError(f"{self.name} ({self.family}) has no frozen backbone: use another view")
        return encoding.features

    @classmethod
    def load(cls, source: str, **options: Any) -> Autoencoder:
        """Load the model ``family:source``; by default :meth:`from_pretrained`."""
        return cls.from_pretrained(source, **options)

    @classmethod
    def from_pretrained(cls, source: str | Path, **options: Any) -> Autoencoder:
        """Load the model from a folder that :meth:`save_pretrained` wrote; ``options`` are ``name`` and others of the
        family.

        Raises:
            TrajOODError: files that are missing, damaged or of another architecture.
        """
        raise NotImplementedError(f"{cls.__name__} does not belong to a registered family")

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model to a folder as safetensors and JSON."""
        raise NotImplementedError(f"{self.name} does not belong to a registered family")

    def pack(self, folder: Path) -> dict[str, Any] | None:
        """Write all that :meth:`unpack` needs, so that it downloads nothing; by default :meth:`save_pretrained`.

        Returns:
            JSON-serialisable entries for the description. None, and nothing is written, if part of the model is the
            user's own code.
        """
        self.save_pretrained(folder)
        return {}

    @classmethod
    def unpack(cls, described: Mapping[str, Any], folder: Path) -> Autoencoder:
        """Restore the model that :meth:`pack` wrote.

        Args:
            described: the model's ``name``, its ``options``, and the entries that :meth:`pack` returned.
            folder: where :meth:`pack` wrote.
        Raises:
            TrajOODError: files or entries that are missing, damaged or of another architecture.
        """
        where, options = f"{folder}: description of the model", described["options"]
        unsaved: dict[str, Any] = {k: field_of(options, k, of, where) for k, of in cls.unsaved.items() if k in options}
        return cls.from_pretrained(folder, name=described["name"], **unsaved)

    def fingerprint(self) -> str:
        """SHA-256 (hex) over all weights and :meth:`options`; equal models have equal fingerprints."""
        return fingerprint(self.module, [self.family, self.options()])


def shape_of(given: Sequence[int]) -> tuple[int, int, int]:
    if not isinstance(given, Iterable) or len(given) != 3 or any(int(side) != side or side < 1 for side in given):
        raise TrajOODError(f"input_shape: expected (C, H, W), three positive numbers, got {given!r}")
    channels, height, width = (int(side) for side in given)
    return channels, height, width


class CallableAutoencoder(OwnFunctions, Autoencoder):
    """Wraps your own encoder and decoder functions as an autoencoder.

    The module behind them is put into evaluation mode while it is used, and back into its own mode afterwards.

    Args:
        encode: E on a batch: images (n, C, H, W) → latents (n, *L). Each output row must depend on its own input row
            alone and must not be random. It returns a tensor, or an output object of diffusers or transformers, of
            which the main tensor, or the mode of a distribution, is taken.
        decode: D on a batch: latents (n, *L) → images (n, C, H, W), likewise.
        input_shape: (C, H, W) of the images.
        name: the model's name in tables and messages.
        preprocessing: how an image file becomes an input of ``encode``. Default: resize to ``input_shape``, pixels in
            [0, 1].
        transform: PIL image → (C, H, W) tensor, instead of ``preprocessing``, for transforms that it does not cover. A
            detector can be saved and loaded with it, but not exported.
        module: the network whose weights are fingerprinted, moved between devices and put into evaluation mode.
            Default: found through the callables (their owner, closure or globals); pass it if they reach their network
            in another way.
        has_cls: see :class:`Autoencoder`.
        chunk: rows per call, 1 or a multiple of 6 (see :class:`Autoencoder`). Default 48: small models need many rows
            to fill a matrix product.
    Raises:
        TrajOODError: ``input_shape`` is not three positive numbers, or ``chunk`` is below 1.
    """

    def __init__(
        self,
        encode: Callable[[Tensor], Any],
        decode: Callable[[Tensor], Any],
        input_shape: Sequence[int],
        *,
        name: str = "custom",
        preprocessing: Preprocessing | None = None,
        transform: Callable[[Image.Image], Tensor] | None = None,
        module: nn.Module | None = None,
        has_cls: bool = False,
        chunk: int = 48,
    ) -> None:
        self._encode, self._decode, self._own_transform = encode, decode, transform
        self.input_shape = shape_of(input_shape)
        self.preprocessing = declared_preprocessing(name, self.input_shape, preprocessing, transform)
        check_whole(f"{name}: chunk", chunk, unit="row")
        self.name, self.has_cls, self.chunk = name, has_cls, chunk
        self.module = module_behind(encode, decode) if module is None else original(module)

    @classmethod
    def from_module(cls, module: nn.Module, input_shape: Sequence[int], **options: Any) -> CallableAutoencoder:
        """Wrap a module that has ``encode`` and ``decode``, or ``encoder`` and ``decoder``.

        Args:
            module: the network; a module that ``torch.compile`` returned is replaced by the original one.
            input_shape: (C, H, W) of the images.
            options: as in the constructor.
        Raises:
            TrajOODError: the module has neither pair; the message shows the five lines of a wrapper.
        """
        module = original(module)
        options.setdefault("name", type(module).__name__)
        return cls(*halves_of(module), input_shape, module=module, **options)

    def functions(self) -> tuple[Callable[..., Any], ...]:
        return self._encode, self._decode

    def options(self) -> dict[str, Any]:
        return self.declared_options()

    def encode_batch(self, images: Tensor) -> Tensor:
        return tensor_of(f"{self.name}: encode", self._encode(images))

    def decode_batch(self, latents: Tensor) -> Tensor:
        return self.check_images(tensor_of(f"{self.name}: decode", self._decode(latents)))

    def fingerprint(self) -> str:
        """As :meth:`Autoencoder.fingerprint`; wrapping parts in ``torch.compile`` does not change it."""
        return fingerprint(self.module, [self.family, self.options()], lambda key: key.replace("_orig_mod.", ""))
