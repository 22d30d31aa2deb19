"""TorchvisionBackbone: torchvision's classifiers, with torchvision's weights or a local file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from traj_ood.backbones.image_processor import check_agreement, interpolation_of
from traj_ood.backbones.network import PACKED_WEIGHTS, ClassifierInputBackbone, find_classifier, name_of
from traj_ood.backbones.registry import register_backbone
from traj_ood.data.preprocessing import Preprocessing
from traj_ood.errors import foreign_errors, unknown_name
from traj_ood.io.checkpoints import read_weights
from traj_ood.io.tensor_file import write_tensors
from traj_ood.io.trees import field_of
from traj_ood.io.weights import check_weights, prefix_of, put_weights


@register_backbone
class TorchvisionBackbone(ClassifierInputBackbone):
    """A torchvision classifier. Features are the input of its last linear layer, so the logits are linear in them."""

    library = "torchvision"
    summary = "torchvision's classifiers: torchvision:<name>[:<weights file>]"

    @classmethod
    def load(cls, source: str, *, name: str | None = None, weights: str = "DEFAULT") -> TorchvisionBackbone:
        """Load a torchvision classifier.

        Args:
            source: ``<name>`` of a classification model such as ``resnet50``, whose weights are downloaded once, or
                ``<name>:<weights file>``.
            name: the backbone's name. Default: the spec, with a file's name without folder and extension.
            weights: entry of the model's weights enum, which also defines the transform, even for a local file. Default
                DEFAULT, torchvision's best.
        """
        from torchvision import models

        architecture, _, file = source.partition(":")
        known = models.list_models(module=models)
        if architecture not in known:
            raise unknown_name("torchvision model", architecture, known)
        entries = models.get_model_weights(architecture)
        if weights not in entries.__members__:
            raise unknown_name(f"torchvision weights of {architecture}", weights, entries.__members__)
        transform = entries[weights].transforms()
        preprocessing = _preprocessing(transform)
        check_agreement(preprocessing, transform, f"torchvision weights of {architecture} {weights}")
        shape = preprocessing.shape
        if file:
            network = _from_file(architecture, Path(file).expanduser(), shape)
        else:
            network = _download(architecture, entries[weights])
        spec = f"torchvision:{source}"
        shown = name or (f"torchvision:{architecture}" + (f":{Path(file).stem}" if file else ""))
        made = cls(
            network,
            network,
            find_classifier(shown, network, network, shape),
            name=shown,
            spec=spec,
            preprocessing=preprocessing,
            options={"transform": _declared(transform), "pooling": "input of the last linear layer"},
        )
        made.load_options = {} if weights == "DEFAULT" else {"weights": weights}
        return made

    def pack(self, folder: Path) -> dict[str, Any]:
        from torchvision import models

        write_tensors(folder / PACKED_WEIGHTS, self.module.state_dict())
        architecture = self.spec.partition(":")[2].partition(":")[0]
        entries, declared = models.get_model_weights(architecture), self.options()["transform"]
        weights = next((e.name for e in entries if _declared(e.transforms()) == declared), "DEFAULT")
        return {"architecture": architecture, "weights": weights}

    @classmethod
    def unpack(cls, described: Mapping[str, Any], folder: Path) -> TorchvisionBackbone:
        where = f"{folder}: recipe of the backbone"
        architecture, entry = (field_of(described["recipe"], key, str, where) for key in ("architecture", "weights"))
        return cls.load(f"{architecture}:{folder / PACKED_WEIGHTS}", name=described["name"], weights=entry)


def _declared(transform: Any) -> dict[str, Any]:
    """The arguments of torchvision's ImageClassification preset, JSON-serialisable."""
    keys = ("resize_size", "crop_size", "mean", "std", "antialias")
    return {**{key: getattr(transform, key) for key in keys}, "interpolation": transform.interpolation.value}


def _preprocessing(transform: Any) -> Preprocessing:
    """The preprocessing of torchvision's ImageClassification preset."""
    side = int(transform.crop_size[0])
    return Preprocessing(
        shape=(3, side, side),
        mean=tuple(transform.mean),
        std=tuple(transform.std),
        resize="crop",
        interpolation=interpolation_of(transform.interpolation.value),
        short_side=int(transform.resize_size[0]),
    )


def _download(architecture: str, entry: Any) -> nn.Module:
    from torchvision import models

    with foreign_errors(
        f"torchvision:{architecture}: its weights are not on this machine and cannot be downloaded",
        f"; give local ones: torchvision:{architecture}:<file.pth or .safetensors>",
    ):
        network = models.get_model(architecture, weights=entry)
    check_weights(network.state_dict(), network, f"torchvision:{architecture}")
    return network


def _from_file(architecture: str, path: Path, shape: tuple[int, int, int]) -> nn.Module:
    """Build the architecture with the number of classes of the weights file, and load the weights."""
    weights = _renamed(read_weights(path))
    network = _build(architecture)
    prefix = prefix_of(weights, next(iter(network.state_dict())))
    last = name_of(network, find_classifier(f"torchvision:{architecture}", network, network, shape))
    rows = len(weights[f"{prefix}{last}.weight"]) if f"{prefix}{last}.weight" in weights else 1000
    if rows != 1000:
        network = _build(architecture, num_classes=rows)
    put_weights(network, weights, str(path))
    return network


def _renamed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename tensors of torchvision's DenseNet files, such as ``denselayer1.norm.1.weight``, as its loader does."""
    old = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)")
    if not any(map(old.search, weights)):
        return weights
    return {old.sub(r"\1\2", key): value for key, value in weights.items()}


def _build(architecture: str, **arguments: Any) -> nn.Module:
    """Build an untrained network as torchvision builds it for its own weights."""
    from torchvision import models

    if architecture in ("googlenet", "inception_v3"):  # with torchvision's weights they renormalise their input
        arguments |= {"transform_input": True, "init_weights": False}
    return models.get_model(architecture, weights=None, **arguments)
