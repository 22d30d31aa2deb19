"""Wrap an Autoencoder as a network for OpenOOD, and OpenOOD's classifiers as backbones."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from traj_ood.autoencoders import Autoencoder, Encoding
from traj_ood.backbones import Backbone, CallableBackbone, Features
from traj_ood.backbones.base import fits_head
from traj_ood.backbones.openood_networks import logits_and_features
from traj_ood.data.preprocessing import Preprocessing
from traj_ood.dynamics.fixed_function import trial_rows
from traj_ood.errors import TrajOODError


class AutoencoderNet(nn.Module):
    """An Autoencoder as a ``net`` of OpenOOD, whose weights and mode follow those of this module.

    The forward pass returns (B, classes) logits, or, for a model without a classifier, predictions that make OpenOOD's
    accuracy NaN.
    """

    def __init__(self, autoencoder: Autoencoder) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.weights = nn.ModuleList([autoencoder.module])
        backbone = getattr(autoencoder, "backbone", None)
        if backbone is not None:
            self.weights.append(backbone.module)

    def forward(self, images: Tensor) -> Tensor:
        logits = self.autoencoder.examine(images).logits
        if logits is not None:
            return logits
        return torch.full((len(images), 1), -1, device=images.device).as_subclass(NoClasses)


class NoClasses(Tensor):
    """(B, 1) output of a model without classes: ``argmax(1)`` is −1, and comparing it with labels gives NaN.

    OpenOOD's accuracy is the mean of ``net(x).argmax(1) == labels``, which would be a misleading 0 %.
    """

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.argmax:
            return args[0][:, 0]
        result: Any = super().__torch_function__(func, types, args, kwargs or {})
        if func in (Tensor.eq, Tensor.__eq__):
            return torch.full(result.shape, torch.nan, dtype=torch.float64)
        return result


def preprocessor(net: AutoencoderNet | Autoencoder) -> Any:
    """The preprocessing of an autoencoder for ``Evaluator(preprocessor=…)``.

    Returns a ``torchvision.transforms.Compose`` whose last member has ``mean`` and ``std``, where OpenOOD's ImageNet
    benchmarks look for them (for ImageNet-C, which they normalise but do not resize).
    """
    from torchvision.transforms import Compose

    return Compose([_Transform(net.autoencoder if isinstance(net, AutoencoderNet) else net)])


class _Transform:
    """The autoencoder's transform, with attributes ``mean`` and ``std`` for OpenOOD."""

    def __init__(self, autoencoder: Autoencoder) -> None:
        self._transform = autoencoder.transform
        known = autoencoder.preprocessing or Preprocessing(autoencoder.input_shape)
        self.mean, self.std = map(list, known.affine)

    def __call__(self, image: Any) -> Tensor:
        return self._transform(image)


def backbone_of(net: nn.Module, shape: tuple[int, ...]) -> Backbone:
    """An OpenOOD classifier, in evaluation mode, as a frozen backbone; ``net(x, return_feature=True)`` returns logits
    and features.

    The head is taken from ``net.get_fc`` if the logits are that linear function of the features. The network is not
    changed. ``shape`` is the (C, H, W) of its images.
    """

    def forward(images: Tensor) -> Features:
        logits, features = _features_of(net, images)
        return Features(features, logits)

    probe = trial_rows(shape, net)
    with torch.inference_mode():
        logits, features = _features_of(net, probe)
        head = _head_of(net, features, logits)
    return CallableBackbone(
        forward,
        (shape[0], shape[1], shape[2]),
        features.shape[1],
        classes=logits.shape[1],
        module=net,
        name=type(net).__name__,
        head=head,
    )


def _features_of(net: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """(B, classes) logits and (B, n) features."""
    name, advice = f"net {type(net).__name__}", "use a network of openood.networks that does, or an AutoencoderNet"
    pair = logits_and_features(net, images, name, advice)
    if not all(t.ndim == 2 and len(t) == len(images) for t in pair):
        raise TrajOODError(
            f"{name}: expected return_feature=True to give logits (B, classes) and features (B, n) for B = "
            f"{len(images)}, got {', '.join(str(tuple(t.shape)) for t in pair)}: {advice}"
        )
    return pair


def _head_of(net: nn.Module, features: Tensor, logits: Tensor) -> tuple[Tensor, Tensor] | None:
    """Weight (c, n) and bias (c,) from ``net.get_fc`` if they map these features to these logits, else None."""
    if not callable(getattr(net, "get_fc", None)):
        return None
    with contextlib.suppress(Exception):  # networks without such a layer raise various errors
        weight, bias = (torch.as_tensor(part).to(features) for part in net.get_fc())  # type: ignore[operator]
        if fits_head(Features(features, logits), (weight, bias)):
            return weight, bias
    return None


class FeatureModel(Autoencoder):
    """A classifier as an encoder without a decoder, for scorers that read only features and logits."""

    family: ClassVar[str] = "openood"

    def __init__(self, backbone: Backbone) -> None:
        self.backbone, self.name, self.module = backbone, backbone.name, backbone.module
        self.input_shape, self.chunk = backbone.input_shape, backbone.chunk
        self.preprocessing = backbone.preprocessing
        self.feature_dim, self.classes = backbone.feature_dim, backbone.classes

    def encode_batch(self, images: Tensor) -> Tensor:
        return self.backbone.forward_batch(images).features

    def decode_batch(self, latents: Tensor) -> Tensor:
        raise TrajOODError(f"{self.name}: a classifier without a surrogate cannot decode")

    def transform(self, image: Any) -> Tensor:
        return self.backbone.transform(image)

    def head(self) -> tuple[Tensor, Tensor] | None:
        return self.backbone.head()

    def examine(self, images: Tensor) -> Encoding:
        seen = self.backbone.extract(images)
        return Encoding(seen.features, target=seen.features, features=seen.features, logits=seen.logits)


def device_of(net: nn.Module) -> torch.device:
    return next((p.device for p in net.parameters()), torch.device("cpu"))
