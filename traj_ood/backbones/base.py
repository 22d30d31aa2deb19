"""Backbone, the base class of frozen networks, and CallableBackbone, a wrapper for networks of your own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from traj_ood.data.preprocessing import Preprocessed, Preprocessing, declared_preprocessing, network_input
from traj_ood.dynamics.chunks import ROWS, apply_in_chunks
from traj_ood.dynamics.fixed_function import FixedFunction, errors_around, trial_rows
from traj_ood.dynamics.function_checks import check_function, takes_one
from traj_ood.dynamics.own_functions import OwnFunctions
from traj_ood.errors import TrajOODError
from traj_ood.io.weights import fingerprint


@dataclass(frozen=True)
class Features:
    """The output of a frozen backbone for B images.

    Attributes:
        features: (B, n) penultimate features, the input of the classifier; float32, or float64 if the network is.
        logits: (B, c) of the same type; None without a classifier.
    """

    features: Tensor
    logits: Tensor | None

    def __len__(self) -> int:
        return len(self.features)


class Backbone(FixedFunction, Preprocessed, ABC):
    """A frozen network with its image preprocessing, which returns penultimate features and, if it classifies, logits.

    Subclasses implement :meth:`forward_batch` and set the attributes below. Users call :meth:`extract`, which calls the
    network with a constant number of rows, so that features do not depend on the batch.

    A class decorated with :func:`traj_ood.backbones.register_backbone` represents a library of networks: the spec
    ``library:source`` is loaded by its ``load(source, **options)``, and detectors save its networks by :meth:`pack` and
    :meth:`unpack`.

    Attributes:
        library: name of the library (``timm``, ``torchvision``, …), the word before the colon in a spec; ``custom`` for
            your own networks.
        summary: one-line description of a registered library, with the form of its specs.
        any_size: whether ``load`` takes ``input_size``, the side of the images.
        load: class method of a registered library that loads a backbone, on the CPU, from a source and options.
        name: the backbone's name in tables and messages, such as ``timm:resnet18``; never a path.
        spec: the text from which :func:`traj_ood.backbones.load_backbone` loads it again; may contain a path.
        module: the network, on :attr:`device`.
        input_shape: (C, H, W) of the images that :meth:`extract` takes.
        preprocessing: how an image file becomes an input; None if :meth:`transform` is the user's own code.
        feature_dim: n, width of the features.
        classes: c, number of logits; 0 without a classifier.
        load_options: options of :func:`traj_ood.backbones.load_backbone` that belong to ``spec``, JSON-serialisable.
        chunk: rows per call of the network (see :class:`traj_ood.Autoencoder`).
        ladder: allowed numbers of rows for few images (see :class:`traj_ood.Autoencoder`).
        channels_last: whether images are passed in channels-last memory order, which makes many convolutions faster and
            changes their rounding. Default false; see :func:`traj_ood.backbones.tuning.tuned`.
    """

    library: ClassVar[str] = "custom"
    summary: ClassVar[str] = ""
    any_size: ClassVar[bool] = False
    load: ClassVar[Callable[..., Backbone]]
    name: str
    spec: str
    module: nn.Module
    input_shape: tuple[int, int, int]
    feature_dim: int
    classes: int = 0
    load_options: Mapping[str, Any] = MappingProxyType({})
    chunk: int = ROWS
    channels_last: bool = False

    @abstractmethod
    def forward_batch(self, images: Tensor) -> Features:
        """Features and logits of images (chunk, C, H, W) in the network's normalised units."""

    def options(self) -> dict[str, Any]:
        """The settings that decide the features in addition to the weights (transform, pooling), JSON-serialisable;
        part of the fingerprint."""
        return {}

    def head(self) -> tuple[Tensor, Tensor] | None:
        """Weight (c, n) and bias (c,) if the logits are a linear function of the features, else None."""
        return None

    def extract(self, images: Tensor) -> Features:
        """Features and logits of any number of images (B, C, H, W), on :attr:`device`.

        No row depends on the batch: the network is always called on exactly :attr:`chunk` rows, in evaluation mode and
        under :meth:`fixed`.

        Raises:
            TrajOODError: the images are not finite floats (B, C, H, W) of :attr:`input_shape`; or the network returns
                other shapes than it declared or NaN, draws random numbers, its output for an image depends on the
                batch, or its logits are not those of :meth:`head`.
        """
        images = network_input(self.name, images, self.input_shape, "backbone.transform", self.module)
        with self.fixed(), torch.inference_mode():
            self.try_once()
            joint = apply_in_chunks(self._joint, images, self.rows, self.name)
        bad = (~joint.isfinite().all(dim=1)).nonzero()[:, 0]
        if len(bad):
            raise TrajOODError(
                f"{self.name}: features of {len(bad)} image(s) are NaN or infinite, first at row {int(bad[0])}: check "
                "the weights"
            )
        # Cloned outside inference mode, since a surrogate trains on them; views would keep both parts in memory.
        features, logits = (part.clone() for part in joint.split([self.feature_dim, self.classes], dim=1))
        return Features(features, logits if self.classes else None)

    def try_out(self) -> None:
        images = trial_rows(self.input_shape, self.module)
        with errors_around(self._joint, f"{self.name}: features of images {tuple(images.shape)}"):
            joint = check_function(self.name, self._joint, images, self.chunk)
        answer, head = Features(*joint.split([self.feature_dim, self.classes], dim=1)), self.head()
        if head is not None and not fits_head(answer, head, tolerance=1e-2):  # TF32 may round the logits otherwise
            raise TrajOODError(
                f"{self.name}: head: expected weight {(self.classes, self.feature_dim)} and bias {(self.classes,)} of "
                f"the layer that makes the logits of the features, got {_shapes(head)} that make others: correct it, "
                "or leave it out if a norm or an activation lies between"
            )
        if not takes_one(f"{self.name}: features", self._joint, images):
            self.ladder = ()
        self.try_places(self._joint, images)

    def _joint(self, images: Tensor) -> Tensor:
        """Features and logits side by side, (chunk, n + c), because :func:`apply_in_chunks` returns one tensor."""
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        answer = self.forward_batch(images)
        if not isinstance(answer, Features):
            raise TrajOODError(
                f"{self.name}: expected traj_ood.Features(features, logits), got {type(answer).__name__}: return that, "
                "with logits=None where there is no classifier"
            )
        got = (tuple(answer.features.shape), tuple(answer.logits.shape) if answer.logits is not None else None)
        rows = len(images)
        expected = ((rows, self.feature_dim), (rows, self.classes) if self.classes else None)
        if got != expected:
            raise TrajOODError(
                f"{self.name}: expected features {expected[0]} and logits {expected[1]} of {rows} images, got features "
                f"{got[0]} and logits {got[1]}"
            )
        parts = [answer.features] if answer.logits is None else [answer.features, answer.logits]
        return torch.cat(parts, dim=1)

    def pack(self, folder: Path) -> dict[str, Any]:
        """Write the weights to ``folder`` as safetensors; returns a JSON-serialisable recipe for :meth:`unpack`."""
        raise NotImplementedError(f"{self.name} does not belong to a registered library")

    @classmethod
    def unpack(cls, described: Mapping[str, Any], folder: Path) -> Backbone:
        """Restore the backbone that :meth:`pack` wrote, without any download.

        Args:
            described: the backbone's ``name``, ``options`` and ``recipe``.
            folder: where :meth:`pack` wrote.
        Raises:
            TrajOODError: files or entries that are missing, damaged or of another architecture.
        """
        raise NotImplementedError(f"{cls.__name__} does not belong to a registered library")

    def fingerprint(self) -> str:
        """SHA-256 (hex) over all weights and :meth:`options`; equal backbones have equal fingerprints."""
        return fingerprint(self.module, [self.library, self.options()])


def fits_head(answer: Features, head: Any, tolerance: float = 1e-4) -> bool:
    """Whether W h + b, for a ``head`` W and b, equals the logits up to ``tolerance`` of the largest one (of 1, if that
    is larger), so that no norm or activation lies between. What is NaN is not compared; what is no pair of tensors does
    not fit."""
    if not isinstance(head, tuple | list) or [isinstance(part, Tensor) for part in head] != [True, True]:
        return False
    (weight, bias), logits = (part.to(answer.features) for part in head), answer.logits
    if logits is None or weight.shape != (logits.shape[1], answer.features.shape[1]) or bias.shape != weight.shape[:1]:
        return False
    scale = max(1.0, float(logits.abs().max()))
    return not bool(((functional.linear(answer.features, weight, bias) - logits).abs() > tolerance * scale).any())


def _shapes(head: Any) -> str:
    parts = head if isinstance(head, tuple | list) else [head]
    return " and ".join(str(tuple(p.shape)) if isinstance(p, Tensor) else type(p).__name__ for p in parts)


class CallableBackbone(OwnFunctions, Backbone):
    """Wraps your own function on batches of images as a backbone.

    Args:
        forward: images (chunk, C, H, W) → :class:`Features`, or without a classifier the (chunk, n) features alone;
            each row must depend on its own image alone.
        input_shape: (C, H, W) of the images.
        feature_dim: n, width of the features.
        classes: c, number of logits. Default 0: no classifier.
        module: the network whose weights ``forward`` uses; it is fingerprinted, moved between devices, and in
            evaluation mode while it is used.
        name: the backbone's name in tables and messages.
        preprocessing: how an image file becomes an input of ``forward``. Default: resize to ``input_shape``, pixels in
            [0, 1].
        transform: PIL image → (C, H, W) tensor, instead of ``preprocessing``, for transforms that it does not cover. It
            is not part of the fingerprint; caches identify it by its output for fixed images.
        head: weight (c, n) and bias (c,) if the logits are linear in the features. Default None.
        chunk: rows per call. Default 24.
    """

    def __init__(
        self,
        forward: Callable[[Tensor], Features | Tensor],
        input_shape: tuple[int, int, int],
        feature_dim: int,
        *,
        classes: int = 0,
        module: nn.Module,
        name: str = "custom",
        preprocessing: Preprocessing | None = None,
        transform: Callable[[Image.Image], Tensor] | None = None,
        head: tuple[Tensor, Tensor] | None = None,
        chunk: int = ROWS,
    ) -> None:
        self._forward, self._own_transform, self._head = forward, transform, head
        self.input_shape, self.feature_dim, self.classes, self.chunk = input_shape, feature_dim, classes, chunk
        self.preprocessing = declared_preprocessing(name, input_shape, preprocessing, transform)
        self.name = self.spec = name
        self.module = module

    def functions(self) -> tuple[Callable[..., Any], ...]:
        return (self._forward,)

    def forward_batch(self, images: Tensor) -> Features:
        answer = self._forward(images)
        return Features(answer, None) if isinstance(answer, Tensor) else answer

    def options(self) -> dict[str, Any]:
        return {"name": self.name} | self.declared_options()

    def head(self) -> tuple[Tensor, Tensor] | None:
        return self._head
