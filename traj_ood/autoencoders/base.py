"""The Autoencoder protocol: what traj_ood needs of a model, and the parts every family shares."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
from PIL import Image
from torch import Tensor, nn

from traj_ood.autoencoders.own_modules import halves_of, module_behind, original, tensor_of
from traj_ood.data.preprocessing import Preprocessed, Preprocessing, declared_preprocessing, network_input
from traj_ood.dynamics.chunks import ROWS, apply_in_chunks
from traj_ood.dynamics.fixed_function import FixedFunction, check_function, float_type, takes, trial_rows
from traj_ood.errors import TrajOODError
from traj_ood.io.trees import field_of
from traj_ood.io.weights import fingerprint

View = Literal["tokens", "cls", "mean"]
VIEWS: tuple[View, ...] = get_args(View)
FeatureView = Literal["tokens", "cls", "mean", "backbone", "grid", "entry", "decoded"]
FEATURE_VIEWS: tuple[FeatureView, ...] = get_args(FeatureView)
GRID = 4
"""Most cells a side of the view ``grid``: a Gaussian per cell over [z0, z1 − z0] costs (2d)² numbers, at d = 768 300 MB
in all."""
ENTRY_PIXELS = 8
"""Most pixels a side that a cell of the view ``entry`` keeps: with 4 × 4 cells images of 32 × 32 are whole, and a
Gaussian per cell of a colour image has 192 dimensions."""


@dataclass(frozen=True)
class Encoding:
    """The result of one pass over B images: where their trajectories start, and what static scorers read.

    Attributes:
        latents: (B, *L) z0 = E(x), on the model's device.
        target: (B, *) what D(z0) is compared with: the images, or the features that a surrogate reconstructs.
        features: (B, n) penultimate features of the frozen backbone; None without one.
        logits: (B, classes) of the classifier; None without one.
    """

    latents: Tensor
    target: Tensor
    features: Tensor | None = None
    logits: Tensor | None = None

    def __len__(self) -> int:
        return len(self.latents)


@dataclass(frozen=True)
class ModelInfo:
    """A named model: where its weights are, as :func:`traj_ood.load_autoencoder` takes it, and what it is."""

    source: str
    summary: str


class Autoencoder(FixedFunction, Preprocessed, ABC):
    """An encoder E and a decoder D with one latent space, and hence a self-map f = E∘D.

    Subclasses implement :meth:`encode_batch` and :meth:`decode_batch` and set the attributes below. Users call
    :meth:`encode`, :meth:`decode` and :meth:`self_map`, which hand those two a constant number of rows.

    Both are fixed functions while traj_ood uses them: evaluation mode, no autocast, float32 or the model's own float64,
    one thread at a time; see :meth:`fixed`. The first :meth:`encode` tries E and f on two images of noise and refuses a
    model that draws random numbers or whose answer for an image depends on the images beside it.

    A class under :func:`traj_ood.autoencoders.register_autoencoder` is a family, described by the first five attributes
    below: :func:`traj_ood.load_autoencoder` then finds its models, and detectors keep them. It defines
    :meth:`from_pretrained` and :meth:`save_pretrained`; :meth:`load`, :meth:`pack` and :meth:`unpack` where these two
    are not enough.

    Attributes:
        family: the word before the colon of ``family:source``; ``custom`` for what is not registered.
        summary: of the family, in a line.
        marks: what ``config.json`` says in folders of this family, such as ``{"model_type": "vit_mae"}``; several
            values of one entry as a tuple.
        hub_slashes: fewest and most slashes in a name on the Hugging Face hub; 1 in ``owner/name``, more where a folder
            of the repository may follow.
        models: its published models by name.
        unsaved: options of :meth:`from_pretrained` that :meth:`options` tells and :meth:`save_pretrained` does not
            write, with their types.
        name: what tables call the model.
        module: the nn.Module(s) whose weights define the model, on :attr:`device`.
        input_shape: (C, H, W) that :meth:`encode` takes.
        preprocessing: what is done to a picture; None where :meth:`transform` is code of the user's own.
        chunk: rows per call of the network (see :func:`traj_ood.iterate`). It belongs to the model because it must
            not follow the batch size: floating-point rounding follows the shape of the call. Default 24. Choose 1 or a
            multiple of 6: of any other number, processors without AVX-512 round the last rows otherwise, so that a
            score then moves with the image's place in the batch, by 1e-7 to 1e-4.
        ladder: rows per call when a detector judges fewer images than ``chunk``, see
            :func:`traj_ood.dynamics.fixed_function.few_images`. Set it to () to have whole chunks always.
        has_cls: whether the first latent token summarises the image (a CLS token). Latents of shape (B, T, d) are T
            tokens; any other shape counts as one token, for which every view is the whole latent.
        feature_dim: width of the frozen backbone's features; 0 for models that encode the image themselves.
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

    @abstractmethod
    def encode_batch(self, images: Tensor) -> Tensor:
        """E: images (chunk, C, H, W) in the model's normalised units → latents (chunk, *L)."""

    @abstractmethod
    def decode_batch(self, latents: Tensor) -> Tensor:
        """D: latents (chunk, *L) → images (chunk, C, H, W)."""

    def options(self) -> dict[str, Any]:
        """The declared options that change f (masking, …); part of the fingerprint."""
        return {}

    def reconstruction_masks(self) -> int:
        """How many fixed masks :meth:`reconstruct_masked` averages over; 0 for models without masking."""
        return 0

    def reconstruct_masked(self, images: Tensor) -> Tensor:
        """(B,) float64 reconstruction error averaged over fixed masks.

        Raises:
            TrajOODError: the family has no masking.
        """
        raise TrajOODError(f"{self.name} ({self.family}) has no masked reconstruction: only masked autoencoders do")

    def reconstruct_corrupted(
        self, images: Tensor, input_noise: float, mask_ratio: float, generator: torch.Generator
    ) -> tuple[Tensor, Tensor | None]:
        """One training step's forward pass: D(E(x + noise)) with a fresh random mask, and which pixels were hidden.

        Returns:
            (B, C, H, W) reconstruction, and a (B, C, H, W) 0/1 tensor of hidden pixels (None without masking).
        Raises:
            TrajOODError: the family cannot be trained here, or has no masking and ``mask_ratio`` > 0.
        """
        raise TrajOODError(f"{self.name} ({self.family}) cannot be trained by traj_ood: train it where it comes from")

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters by name that training may change."""
        return dict(self.module.named_parameters())

    def encode(self, images: Tensor) -> Tensor:
        """E on any number of images (B, C, H, W) → latents (B, *L) on :attr:`device`.

        Raises:
            TrajOODError: the images are not float (B, C, H, W) of the model's shape, or not finite; or the model is no
                fixed function (see the class), or answers with another number of rows than it was given.
        """
        with self.fixed(), torch.inference_mode():
            images = self._input(images)
            self.try_once()
            latents = apply_in_chunks(self.encode_batch, images, self.rows, f"{self.name}: encode")
        _check_floats(f"{self.name}: encode", latents)
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        """D on any number of latents (B, *L) → images (B, C, H, W).

        Raises:
            TrajOODError: an answer of another number of rows, or that is not float32 or float64.
        """
        with self.fixed(), torch.inference_mode():
            latents = latents.to(self.device, float_type(self.module) or latents.dtype)
            images = apply_in_chunks(self.decode_batch, latents, self.rows, f"{self.name}: decode")
        _check_floats(f"{self.name}: decode", images)
        return images

    def self_map(self, latents: Tensor) -> Tensor:
        """f(z) = E(D(z)) on one chunk of latents; :func:`traj_ood.iterate` does the chunking."""
        return self.encode_batch(self.decode_batch(latents))

    def try_out(self) -> None:
        images = trial_rows(self.input_shape, self.module)
        latents = check_function(f"{self.name}: encode", self.encode_batch, images, self.chunk)
        if not (takes(self.encode_batch, images) and takes(self.decode_batch, latents)):
            self.ladder = ()
        try:
            check_function(f"{self.name}: encode(decode(z))", self.self_map, latents, self.chunk)
        except TrajOODError:
            raise
        except Exception:  # whoever uses f hears of it; scorers that read z0 alone need none
            return

    def examine(self, images: Tensor) -> Encoding:
        """E, and everything else that one pass through the model yields for images (B, C, H, W).

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
        """(B, d) view of latents (B, *L): ``tokens`` = all of them, flattened; ``cls`` = the first token; ``mean`` =
        the mean of the patch tokens, or over the places of a feature map (B, C, H, W). For a latent of a single token
        the three are the same.

        Raises:
            TrajOODError: unknown view, or ``cls`` of tokens that have no CLS token.
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
        """(B, cells, d) view ``grid`` of latents (B, *L): patch tokens, or a feature map (B, C, H, W), averaged over at
        most 4 × 4 cells of the image, so that statistics may differ from place to place; any other latent is one cell.

        Tokens whose number is no square have no known place: they are one cell, their mean.
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
        """(B, cells, d) what is compared of x and of D(z), in a space that no encoder has a part in: images
        (B, C, H, W) pooled to at most 8 × 8 pixels in each of at most 4 × 4 cells, or any other target as one cell."""
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
        """View of latents (B, *L) of any name but ``backbone`` and ``entry``, which no latent tells: as :meth:`view`,
        ``grid`` as :meth:`grid`, and ``decoded``, the :meth:`entry` of D(z)."""
        if name == "grid":
            return self.grid(latents)
        if name == "decoded":
            return self.entry(self.decode_batch(latents) if torch.compiler.is_compiling() else self.decode(latents))
        return self.view(latents, name)  # type: ignore[arg-type]

    def feature_view(self, encoding: Encoding, name: FeatureView) -> Tensor:
        """What a scorer reads of B images under the name of a view: of z0, of the backbone, or of x itself
        (``entry``).

        Raises:
            TrajOODError: ``backbone`` without one.
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
        """The model ``family:source``; by default :meth:`from_pretrained`."""
        return cls.from_pretrained(source, **options)

    @classmethod
    def from_pretrained(cls, source: str | Path, **options: Any) -> Autoencoder:
        """The model in a folder that :meth:`save_pretrained` wrote; ``options`` are ``name`` and others of the family.

        Raises:
            TrajOODError: files that are missing, damaged or of another architecture.
        """
        raise NotImplementedError(f"{cls.__name__} is of no registered family")

    def save_pretrained(self, folder: Path) -> None:
        """Write the model as safetensors and JSON."""
        raise NotImplementedError(f"{self.name} is of no registered family")

    def pack(self, folder: Path) -> dict[str, Any] | None:
        """Write what :meth:`unpack` needs without any download: by default :meth:`save_pretrained`.

        Returns:
            Entries for the description, JSON-able; None, and nothing is written, where a part's code is the user's own.
        """
        self.save_pretrained(folder)
        return {}

    @classmethod
    def unpack(cls, described: Mapping[str, Any], folder: Path) -> Autoencoder:
        """The model that :meth:`pack` wrote, from its ``name``, its ``options`` and what :meth:`pack` returned.

        Raises:
            TrajOODError: files or entries that are missing, damaged or of another architecture.
        """
        where, options = f"{folder}: description of the model", described["options"]
        unsaved: dict[str, Any] = {k: field_of(options, k, of, where) for k, of in cls.unsaved.items() if k in options}
        return cls.from_pretrained(folder, name=described["name"], **unsaved)

    def fingerprint(self) -> str:
        """sha256 over every weight and the declared options: equal exactly for equal models."""
        return fingerprint(self.module, [self.family, self.options()])

    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.module.parameters())


def _shape_of(given: Sequence[int]) -> tuple[int, int, int]:
    if len(given) != 3 or any(int(side) != side or side < 1 for side in given):
        raise TrajOODError(f"input_shape: expected (C, H, W), three positive numbers, got {given!r}")
    channels, height, width = (int(side) for side in given)
    return channels, height, width


def _check_floats(name: str, answer: Tensor) -> None:
    if answer.dtype not in (torch.float32, torch.float64):
        raise TrajOODError(
            f"{name}: expected float32 or float64, got {str(answer.dtype).removeprefix('torch.')}: convert the model "
            "with .float(), or its answer"
        )


class CallableAutoencoder(Autoencoder):
    """An autoencoder of your own: two callables, or an nn.Module with ``encode`` and ``decode``, or ``encoder`` and
    ``decoder``.

    Your module stays as it is: it is in evaluation mode while it is used, and in its own mode again afterwards.

    Args:
        encode, decode: E and D on batches; each row must depend on its own input row alone, and not on chance. They
            return a tensor, or what diffusers and transformers do: of a distribution the mode is taken.
        input_shape: (C, H, W) of the images.
        preprocessing: from a picture to what ``encode`` takes. Default: resize to ``input_shape``, pixels in [0, 1].
        transform: PIL image → (C, H, W) tensor, in the place of ``preprocessing``, for what that does not cover. A
            detector can be saved and loaded with it, but not exported.
        module: whose weights are fingerprinted, moved between devices and put into evaluation mode. Default: what the
            callables are methods of, close over or name; pass it where they reach their networks in another way.
        has_cls: see :class:`Autoencoder`.
        chunk: rows per call, 1 or a multiple of 6 (see :class:`Autoencoder`). Default 48: small models need many rows
            to fill a matrix product.
    Raises:
        TrajOODError: an ``input_shape`` of other than three positive numbers.
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
        self._encode, self._decode = encode, decode
        self._transform = transform
        self.input_shape = _shape_of(input_shape)
        self.preprocessing = declared_preprocessing(name, self.input_shape, preprocessing, transform)
        self.name, self.has_cls, self.chunk = name, has_cls, chunk
        self.module = module_behind(encode, decode) if module is None else original(module)

    @classmethod
    def from_module(cls, module: nn.Module, input_shape: Sequence[int], **options: Any) -> CallableAutoencoder:
        """Wrap a module that has ``encode`` and ``decode``, or ``encoder`` and ``decoder``; ``options`` as in the
        constructor. Of a module that ``torch.compile`` made, the one that it compiled.

        Raises:
            TrajOODError: it has neither; the message shows the five lines of a wrapper.
        """
        module = original(module)
        options.setdefault("name", type(module).__name__)
        return cls(*halves_of(module), input_shape, module=module, **options)

    def options(self) -> dict[str, Any]:
        known = self.preprocessing
        plain = known is None or known == Preprocessing(self.input_shape)
        return {} if plain or known is None else {"preprocessing": known.as_dict()}

    def encode_batch(self, images: Tensor) -> Tensor:
        return tensor_of(f"{self.name}: encode", self._encode(images))

    def decode_batch(self, latents: Tensor) -> Tensor:
        return tensor_of(f"{self.name}: decode", self._decode(latents))

    def fingerprint(self) -> str:
        """As :meth:`Autoencoder.fingerprint`; parts that ``torch.compile`` wrapped are the same parts."""
        return fingerprint(self.module, [self.family, self.options()], lambda key: key.replace("_orig_mod.", ""))

    def transform(self, image: Image.Image) -> Tensor:
        return self._transform(image) if self._transform is not None else super().transform(image)
