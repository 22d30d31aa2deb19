"""OpenOODBackbone: OpenOOD's networks with a checkpoint."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from traj_ood.backbones.base import Features
from traj_ood.backbones.network import PACKED_WEIGHTS, NetworkBackbone
from traj_ood.backbones.registry import register_backbone
from traj_ood.data.preprocessing import Preprocessing
from traj_ood.errors import TrajOODError, foreign_errors, unknown_name
from traj_ood.io.checkpoints import read_weights
from traj_ood.io.tensor_file import write_tensors
from traj_ood.io.trees import field_of
from traj_ood.io.weights import prefix_of, put_weights
from traj_ood.text import brief

INSTALL = "pip install git+https://github.com/Jingkang50/OpenOOD"
_RECIPE: dict[str, type] = {"data": str, "size": int, "pre_size": int, "mean": list, "std": list}
_HEADS = ("fc", "heads.head", "head")  # names of the classifier in OpenOOD's networks


def _prepared(pre_size: int, size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Preprocessing:
    """OpenOOD's test transform: RGB, shorter side to ``pre_size`` (bilinear), centre crop, (x − mean)/std."""
    return Preprocessing((3, size, size), tuple(mean), tuple(std), "crop", short_side=pre_size)


_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# By dataset, as in openood.evaluation_api.preprocessor (OpenOOD 1.5).
PREPARATIONS = {
    "cifar10": _prepared(32, 32, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": _prepared(32, 32, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "imagenet": _prepared(256, 224, *_IMAGENET),
    "imagenet200": _prepared(256, 224, *_IMAGENET),
    "aircraft": _prepared(512, 448, (0.5,) * 3, (0.5,) * 3),
    "cub": _prepared(512, 448, (0.5,) * 3, (0.5,) * 3),
}


@dataclass(frozen=True)
class Network:
    """How to build one of OpenOOD's networks."""

    module: str  # below openood.networks
    cls: str
    small: bool  # whether it takes images of 32 x 32
    arguments: Mapping[str, Any] = field(default_factory=dict)  # of the constructor
    any_classes: bool = True  # whether the constructor takes num_classes


NETWORKS = {
    "resnet18_32x32": Network("resnet18_32x32", "ResNet18_32x32", True),
    "resnet18_224x224": Network("resnet18_224x224", "ResNet18_224x224", False),
    "resnet50": Network("resnet50", "ResNet50", False),
    "vit_b_16": Network("vit_b_16", "ViT_B_16", False),
    "swin_t": Network("swin_t", "Swin_T", False),
    "regnet_y_16gf": Network("regnet_y_16gf", "RegNet_Y_16GF", False, any_classes=False),
    "wrn": Network("wrn", "WideResNet", True, {"depth": 28, "widen_factor": 10, "dropRate": 0.0}),
    "densenet": Network("densenet", "DenseNet3", True),
}


@register_backbone
class OpenOODBackbone(NetworkBackbone):
    """A network of OpenOOD, whose features come from ``net(x, return_feature=True)`` → (logits, features)."""

    library = "openood"
    summary = "OpenOOD's networks: openood:<network>:<checkpoint>"

    def forward_batch(self, images: Tensor) -> Features:
        advice = f"use another network ({', '.join(NETWORKS)}) or update OpenOOD: {INSTALL}"
        logits, features = logits_and_features(self.module, images, self.name, advice)
        return Features(features.flatten(1), logits)

    @classmethod
    def load(
        cls,
        source: str,
        *,
        name: str | None = None,
        data: str | None = None,
        size: int | None = None,
        pre_size: int | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
    ) -> OpenOODBackbone:
        """Load ``<network>:<checkpoint>``; the checkpoint determines the number of classes.

        Args:
            source: for instance ``resnet18_32x32:cifar10_res18/best.ckpt``; only plain tensors are unpickled.
            name: the backbone's name. Default: the spec, with the checkpoint's file name without folder and extension.
            data: dataset whose test transform is used, see :data:`PREPARATIONS`. Default: imagenet; for 32 x 32
                networks cifar100 if the checkpoint has 100 classes, else cifar10.
            size: side of the images. Default: that of the transform.
            pre_size: shorter side before the crop. Default: ``size`` if given, else that of the transform.
            mean, std: per channel. Default: those of the transform.
        """
        network, _, checkpoint = source.partition(":")
        if network not in NETWORKS:
            raise unknown_name("OpenOOD network", network, NETWORKS)
        if not checkpoint:
            raise TrajOODError(f"openood:{network}: expected a checkpoint: openood:{network}:<file.ckpt>")
        kind = NETWORKS[network]
        build = getattr(import_openood(f"openood.networks.{kind.module}", kind.cls), kind.cls)
        weights = read_weights(checkpoint)
        heads = [f"{prefix_of(weights, f'{head}.weight')}{head}.weight" for head in _HEADS]
        classes = next((len(weights[head]) for head in heads if head in weights), None)
        arguments = dict(kind.arguments)
        if kind.any_classes and classes is not None:
            arguments["num_classes"] = classes
        with foreign_errors(f"openood:{network}: cannot be built with {arguments}", f": {INSTALL}"):
            module = build(**arguments)
        put_weights(module, weights, checkpoint)
        chosen = data or (("cifar100" if classes == 100 else "cifar10") if kind.small else "imagenet")
        if chosen not in PREPARATIONS:
            raise unknown_name("OpenOOD data set", chosen, PREPARATIONS)
        base = PREPARATIONS[chosen]
        side = size or base.shape[1]
        short = pre_size or size or base.short_side or side
        preprocessing = _prepared(short, side, mean or base.mean, std or base.std)
        told = {"pre_size": short, "size": side, "mean": list(preprocessing.mean), "std": list(preprocessing.std)}
        return cls(
            module,
            name=name or f"openood:{network}:{Path(checkpoint).stem}",
            spec=f"openood:{source}",
            preprocessing=preprocessing,
            options={"transform": {"data": chosen, **told}, "pooling": "return_feature"},
            classifier=_classifier(module),
        )

    def pack(self, folder: Path) -> dict[str, Any]:
        write_tensors(folder / PACKED_WEIGHTS, self.module.state_dict())
        declared = self.options()["transform"]
        return {"network": self.spec.partition(":")[2].partition(":")[0], **{key: declared[key] for key in _RECIPE}}

    @classmethod
    def unpack(cls, described: Mapping[str, Any], folder: Path) -> OpenOODBackbone:
        where = f"{folder}: recipe of the backbone"
        network = field_of(described["recipe"], "network", str, where)
        transform: dict[str, Any] = {key: field_of(described["recipe"], key, of, where) for key, of in _RECIPE.items()}
        return cls.load(f"{network}:{folder / PACKED_WEIGHTS}", name=described["name"], **transform)


def logits_and_features(net: nn.Module, images: Tensor, name: str, advice: str) -> tuple[Tensor, Tensor]:
    """What OpenOOD's network ``name`` returns for images; ``advice`` is what to do if that is something else."""

    def refused(what: str) -> TrajOODError:
        wanted = f"{name}: expected (logits, features) from net(x, return_feature=True), but this network"
        return TrajOODError(f"{wanted} {what}: {advice}")

    try:
        answer = net(images, return_feature=True)
    except TypeError as error:
        if "return_feature" not in str(error):
            raise
        raise refused("does not take return_feature; it is older, or returns no features") from error
    if not (isinstance(answer, (tuple, list)) and len(answer) == 2):
        raise refused(f"returns {_describe(answer)} with return_feature=True")
    if not isinstance(answer[1], Tensor):
        raise refused(f"returns {_describe(answer[1])} as features")
    return answer[0], answer[1]


def import_openood(name: str, *attributes: str) -> ModuleType:
    """Import a module of openood and check that it has ``attributes``."""
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if missing == "openood":
            raise TrajOODError(f"openood is not installed, and it is not on PyPI: {INSTALL}") from error
        if missing.split(".")[0] == "openood":
            raise older_openood(missing) from error
        raise TrajOODError(
            f"openood is installed, but {name} needs {missing!r}, which is not: install it (OpenOOD's own list of "
            "dependencies is incomplete)"
        ) from error
    except Exception as error:  # undeclared dependencies fail with errors of any kind, such as imgaug with NumPy 2
        raise TrajOODError(
            f"openood is installed, but importing {name} fails ({brief(error)}): repair that first"
        ) from error
    for attribute in attributes:
        if not hasattr(module, attribute):
            raise older_openood(f"{name}.{attribute}")
    return module


def older_openood(missing: str) -> TrajOODError:
    """The error for an older version of openood, which lacks ``missing``."""
    return TrajOODError(f"openood: expected v1.5 (main of December 2025), got a version without {missing}: {INSTALL}")


def _classifier(module: nn.Module) -> nn.Linear | None:
    named = dict(module.named_modules())
    heads = (named.get(name) for name in _HEADS)
    return next((layer for layer in heads if isinstance(layer, nn.Linear)), None)


def _describe(answer: Any) -> str:
    if isinstance(answer, (tuple, list)):
        return f"a {type(answer).__name__} of {len(answer)}"
    return f"one tensor {tuple(answer.shape)}" if isinstance(answer, torch.Tensor) else f"a {type(answer).__name__}"
