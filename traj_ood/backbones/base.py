"""The Backbone protocol: a frozen network that turns images into penultimate features and, maybe, logits."""

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

from traj_ood.data.preprocessing import Preprocessed, Preprocessing, declared_preprocessing, network_input
from traj_ood.dynamics.chunks import ROWS, apply_in_chunks
from traj_ood.dynamics.fixed_function import FixedFunction, check_function, takes, trial_rows
from traj_ood.errors import TrajOODError
from traj_ood.io.weights import fingerprint


@dataclass(frozen=True)
class Features:
    """What a frozen backbone says of B images.

    Attributes:
        features: (B, n) float32 or the network's own float64, the input of the classifier (penultimate features).
        logits: (B, c) of the same type; None without a classifier.
    """

    features: Tensor
    logits: Tensor | None

    def __len__(self) -> int:
        return len(self.features)


class Backbone(FixedFunction, Preprocessed, ABC):
    """A frozen network with the image transform it was trained with.

    Subclasses implement :meth:`forward_batch` and :meth:`transform` and set the attributes below. Users call
    :meth:`extract`, which hands the network a constant number of rows: features must not depend on batch-mates.

    A class under :func:`traj_ood.backbones.register_backbone` stands for a library of networks: ``library:source`` is
    then its ``load(source, **options)``, and detectors keep its networks by :meth:`pack` and :meth:`unpack`.

    Attributes:
        library: whose network it is: ``timm``, ``torchvision``, … or ``custom``; the word before the colon of a spec.
        summary: of a registered library, in a line: the specs it understands.
        any_size: whether its ``load`` takes ``input_size``, the side of the images.
        load: class method of a registered library: source, options → the backbone, on the CPU.
        name: what tables call it, such as ``timm:resnet18``; never a machine's path.
        spec: what :func:`traj_ood.backbones.load_backbone` takes to make it again; may hold a path.
        module: the network, on :attr:`device`.
        input_shape: (C, H, W) that :meth:`extract` takes.
        preprocessing: what is done to a picture; None where :meth:`transform` is code of the user's own.
        feature_dim: n, width of the features.
        classes: c, number of logits; 0 without a classifier.
        load_options: options of :func:`traj_ood.backbones.load_backbone` that go with ``spec``, JSON-able.
        chunk, ladder: rows per call of the network (see :class:`traj_ood.Autoencoder`).
        channels_last: whether the network gets images whose channels come last in memory, which many convolutions take
            faster and round otherwise. Default false; see :func:`traj_ood.backbones.tuning.tuned`.
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
        """Images (chunk, C, H, W) in the network's normalised units → what it says of them."""

    def options(self) -> dict[str, Any]:
        """Everything besides the weights that decides the features (transform, pooling), JSON-able; fingerprinted."""
        return {}

    def head(self) -> tuple[Tensor, Tensor] | None:
        """Weight (c, n) and bias (c,) when the logits are a linear function of the features, else None."""
        return None

    def extract(self, images: Tensor) -> Features:
        """Features and logits of any number of images (B, C, H, W), on :attr:`device`.

        A row never depends on its batch: the network is only called on exactly :attr:`chunk` rows, in evaluation mode
        and under :meth:`fixed`.

        Raises:
            TrajOODError: the images are not finite floats (B, C, H, W) of :attr:`input_shape`, or the network answers
                with other shapes than it declared or with NaN, draws random numbers, or looks at other images of the
                batch.
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
        # Clones, made outside inference mode: a surrogate trains on these, and a view would keep both parts alive.
        features, logits = joint[:, : self.feature_dim].clone(), joint[:, self.feature_dim :].clone()
        return Features(features, logits if self.classes else None)

    def try_out(self) -> None:
        images = trial_rows(self.input_shape, self.module)
        check_function(self.name, self._joint, images, self.chunk)
        if not takes(self._joint, images):
            self.ladder = ()

    def _joint(self, images: Tensor) -> Tensor:
        """(chunk, n + c): one tensor, because chunks are put together row by row."""
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        answer = self.forward_batch(images)
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
        """Write the weights into ``folder``, as safetensors; returns the JSON-able recipe that :meth:`unpack` needs."""
        raise NotImplementedError(f"{self.name} is of no registered library")

    @classmethod
    def unpack(cls, described: Mapping[str, Any], folder: Path) -> Backbone:
        """The backbone of a ``name``, ``options`` and ``recipe``, of the weights in ``folder``, without any download.

        Raises:
            TrajOODError: files or entries that are missing, damaged or of another architecture.
        """
        raise NotImplementedError(f"{cls.__name__} is of no registered library")

    def fingerprint(self) -> str:
        """sha256 over every weight and the options: two backbones agree exactly when this does."""
        return fingerprint(self.module, [self.library, self.options()])

    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.module.parameters())


class CallableBackbone(Backbone):
    """Bring your own: a callable on batches, and the module whose weights it uses.

    Args:
        forward: images (chunk, C, H, W) → :class:`Features`; each row must depend on its own image alone.
        input_shape: (C, H, W). feature_dim, classes: see :class:`Backbone`.
        module: fingerprinted, moved between devices, and in evaluation mode while it is used.
        preprocessing: from a picture to what ``forward`` takes. Default: resize to ``input_shape``, pixels in [0, 1].
        transform: PIL image → (C, H, W) tensor, in the place of ``preprocessing``, for what that does not cover. It is
            not part of the fingerprint; caches know it by what it makes of fixed pictures.
        head: weight (c, n) and bias (c,) when the logits are linear in the features; default None.
        chunk: rows per call. Default 24.
    """

    def __init__(
        self,
        forward: Callable[[Tensor], Features],
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
        self._forward, self._transform, self._head = forward, transform, head
        self.input_shape, self.feature_dim, self.classes, self.chunk = input_shape, feature_dim, classes, chunk
        self.preprocessing = declared_preprocessing(name, input_shape, preprocessing, transform)
        self.name = self.spec = name
        self.module = module

    def forward_batch(self, images: Tensor) -> Features:
        return self._forward(images)

    def transform(self, image: Image.Image) -> Tensor:
        return self._transform(image) if self._transform is not None else super().transform(image)

    def options(self) -> dict[str, Any]:
        known = self.preprocessing
        plain = known is None or known == Preprocessing(self.input_shape)
        return {"name": self.name} | ({} if plain or known is None else {"preprocessing": known.as_dict()})

    def head(self) -> tuple[Tensor, Tensor] | None:
        return self._head
