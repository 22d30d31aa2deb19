"""TimmBackbone: any timm model, with timm's weights, a local file, or a folder in timm's local-directory format."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from traj_ood.backbones.base import Features
from traj_ood.backbones.image_processor import check_agreement, interpolation_of
from traj_ood.backbones.network import PACKED_WEIGHTS, NetworkBackbone
from traj_ood.backbones.registry import register_backbone
from traj_ood.data.preprocessing import Preprocessing
from traj_ood.errors import TrajOODError, foreign_errors, unknown_name
from traj_ood.io.checkpoints import read_weights
from traj_ood.io.tensor_file import write_tensors
from traj_ood.io.trees import MAX_CONFIG, as_json, field_of, read_json, write_json
from traj_ood.io.weights import check_weights, prefix_of, put_weights

DEFAULT_CROP = 0.875  # timm's default crop_pct
CONFIG, WEIGHTS = "config.json", "model.safetensors"
_OPTIONS = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
_NOT_PACKED = ("pretrained", "checkpoint", "cache_dir")
_LOCAL_WEIGHTS = (WEIGHTS, "pytorch_model.bin", "model.pth")


@register_backbone
class TimmBackbone(NetworkBackbone):
    """A timm model, whose features are ``forward_head(forward_features(x), pre_logits=True)``: timm's own pooling.

    ``data`` are changes to the transform that timm declares for the model: ``input_size`` (a side, or (C, H, W)),
    ``mean``, ``std``, ``interpolation``, ``crop_pct``, ``crop_mode``.
    """

    library = "timm"
    summary = "any of timm's models: timm:<name>[:<weights file>], timm:<folder> or timm:hf-hub:<repository>"
    any_size = True

    def __init__(self, network: nn.Module, *, name: str, spec: str, data: Mapping[str, Any] | None = None) -> None:
        from timm.data.config import resolve_model_data_config
        from timm.data.transforms_factory import create_transform

        for method in ("forward_features", "forward_head", "get_classifier"):
            if not callable(getattr(network, method, None)):
                raise TrajOODError(
                    f"{name}: expected a timm model with {method}, which penultimate features require, found none: use "
                    "another model"
                )
        settings = resolve_model_data_config(network)
        channels = int(settings["input_size"][0])
        self.load_options = {key: value for key, value in (data or {}).items() if key in _OPTIONS}
        settings.update(data or {})
        if isinstance(settings["input_size"], int):
            settings["input_size"] = (channels, settings["input_size"], settings["input_size"])
        channels = int(settings["input_size"][0])
        if len(settings["mean"]) != channels or len(settings["std"]) != channels:
            raise TrajOODError(
                f"{name}: expected a mean and a std for each of {channels} input channel(s), got mean "
                f"{list(settings['mean'])}: set them in the timm folder's config.json or by the options mean= and std="
            )
        preprocessing = _preprocessing(settings, name)
        transform: Any = create_transform(**settings, is_training=False)
        check_agreement(preprocessing, transform, f"{name}: transform {_short(settings)}")
        classifier = network.get_classifier()  # type: ignore[operator]  # checked above
        super().__init__(
            network,
            name=name,
            spec=spec,
            preprocessing=preprocessing,
            options={"transform": as_json(settings), "pooling": "pre_logits"},
            classifier=classifier if isinstance(classifier, nn.Linear) else None,
        )

    def forward_batch(self, images: Tensor) -> Features:
        network: Any = self.module
        maps = network.forward_features(images)
        features = network.forward_head(maps, pre_logits=True).flatten(1)
        return Features(features, network.forward_head(maps) if network.num_classes > 0 else None)

    @classmethod
    def load(cls, source: str, *, name: str | None = None, **data: Any) -> TimmBackbone:
        """Load a timm model.

        Args:
            source: ``<name>`` (timm's weights, downloaded once), ``<name>:<weights file>``, ``<folder>`` or
                ``hf-hub:<name>``. A weights file determines the number of classes and of input channels.
            name: the backbone's name. Default: from the source.
            data: as in :class:`TimmBackbone`; networks of a fixed image size, such as ViTs, are built for
                ``input_size``.
        """
        for key in data:
            if key not in _OPTIONS:
                raise TypeError(f"timm.load() got an unexpected keyword argument '{key}'")
        spec, size = f"timm:{source}", data.get("input_size")
        folder = Path(source).expanduser()
        if folder.is_dir():
            return cls(_from_folder(folder, size), name=name or f"timm:{folder.resolve().name}", spec=spec, data=data)
        architecture, _, weights = source.partition(":")
        if architecture == "hf-hub":
            return cls(_from_hub(source, size), name=name or spec, spec=spec, data=data)
        if "/" in architecture or architecture.startswith((".", "~")):
            raise TrajOODError(
                f"{spec}: no such folder; expected a folder with {CONFIG} and {WEIGHTS}, or <timm name>:<weights file>"
            )
        _assert_known(architecture)
        if not weights:
            return cls(_from_hub(architecture, size), name=name or spec, spec=spec, data=data)
        network = _from_file(architecture, Path(weights).expanduser(), size)
        return cls(network, name=name or f"timm:{architecture}:{Path(weights).stem}", spec=spec, data=data)

    def pack(self, folder: Path) -> dict[str, Any]:
        write_tensors(folder / PACKED_WEIGHTS, self.module.state_dict())
        network: Any = self.module
        given = getattr(network, "_model_args", None) or _folder_arguments(self.spec)
        arguments = {k: v for k, v in given.items() if _may_be_packed(k, v)}
        arguments["num_classes"] = network.num_classes
        channels = self.input_shape[0]
        if channels != 3:  # not every architecture accepts the argument
            arguments["in_chans"] = channels
        return {"architecture": str(network.pretrained_cfg.get("architecture", "")), "arguments": arguments}

    @classmethod
    def unpack(cls, described: Mapping[str, Any], folder: Path) -> TimmBackbone:
        where, path = f"{folder}: recipe of the backbone", folder / PACKED_WEIGHTS
        architecture = field_of(described["recipe"], "architecture", str, where)
        arguments = field_of(described["recipe"], "arguments", dict, where)
        for key, value in arguments.items():
            if not _may_be_packed(key, value):
                raise TrajOODError(
                    f"{where}: argument {key!r} is not allowed for a packed network: the file is damaged"
                )
        network = new_network(architecture, **arguments)
        put_weights(network, read_weights(path), str(path))
        data = {k: tuple(v) if isinstance(v, list) else v for k, v in described["options"]["transform"].items()}
        return cls(network, name=described["name"], spec=f"timm:{architecture}:{path}", data=data)


def _preprocessing(settings: Mapping[str, Any], name: str) -> Preprocessing:
    """The preprocessing of timm's data config in evaluation: the shorter side is resized to size / crop_pct, followed
    by a centre crop; or the image is squashed."""
    channels, height, width = (int(n) for n in settings["input_size"])
    squashed = settings.get("crop_mode") == "squash"
    short = math.floor(height / float(settings.get("crop_pct") or DEFAULT_CROP))
    if not squashed and height != width:
        raise TrajOODError(f"{name}: expected square images, got {height} x {width}: use crop_mode='squash'")
    if squashed and short != height:
        raise TrajOODError(f"{name}: crop_mode 'squash': expected crop_pct 1, got {settings.get('crop_pct')}")
    try:
        return Preprocessing(
            shape=(channels, height, width),
            mean=tuple(settings["mean"]),
            std=tuple(settings["std"]),
            resize="direct" if squashed else "crop",
            interpolation=interpolation_of(settings["interpolation"]),
            short_side=None if squashed else short,
        )
    except TrajOODError as error:
        raise TrajOODError(f"{name}: {error}") from error


def _short(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {settings[key]}" for key in ("interpolation", "crop_pct", "crop_mode") if key in settings)


def new_network(architecture: str, **arguments: Any) -> nn.Module:
    """Build an untrained timm model."""
    from timm import create_model

    _assert_known(architecture)
    with foreign_errors(f"timm:{architecture}: cannot be built with {arguments}"):
        network = create_model(architecture, pretrained=False, **arguments)
    vars(network).setdefault("_model_args", arguments)  # newer versions of timm keep them there themselves
    return network


def save_folder(
    network: nn.Module, folder: Path, architecture: str, arguments: Mapping[str, Any], data: Mapping[str, Any]
) -> None:
    """Write a network in timm's local-directory format, which ``timm:<folder>`` and timm's ``local-dir:<folder>`` read.

    ``arguments`` are those it was built with by :func:`new_network`, including ``num_classes``; ``data`` are
    ``input_size`` (C, H, W), ``mean``, ``std``, ``interpolation``, ``crop_pct`` and ``crop_mode``.
    """
    own: Any = network
    classes = int(arguments["num_classes"])
    traits = {key: own.pretrained_cfg[key] for key in ("first_conv", "classifier") if key in own.pretrained_cfg}
    config = {
        "architecture": architecture,
        "num_classes": classes,
        "num_features": own.num_features,
        "model_args": {k: v for k, v in arguments.items() if k != "num_classes"},
        "pretrained_cfg": {"num_classes": classes, **traits, **data},
    }
    write_tensors(folder / WEIGHTS, network.state_dict())
    write_json(folder / CONFIG, config)


def _from_folder(folder: Path, size: Any) -> nn.Module:
    from timm import create_model

    path = folder / CONFIG
    with foreign_errors(f"{path}: expected timm's config.json with an architecture"):
        architecture = read_json(path, "timm's config", "correct the folder", limit=MAX_CONFIG)["architecture"]
    _assert_known(str(architecture).split(".")[0])
    weights = next((folder / file for file in _LOCAL_WEIGHTS if (folder / file).is_file()), None)
    if weights is None:
        raise TrajOODError(f"{folder}: expected weights in {' or '.join(_LOCAL_WEIGHTS)}, found none")
    with foreign_errors(f"{path}: timm cannot build this model"):
        network = create_model(f"local-dir:{folder}", pretrained=False, **_sized(str(architecture), size))
    put_weights(network, read_weights(weights), str(weights))  # strict, unlike timm, which adapts or drops weights
    return network


def _from_hub(model: str, size: Any) -> nn.Module:
    from timm import create_model

    with foreign_errors(
        f"timm:{model}: its weights are not on this machine and cannot be downloaded",
        "; give local ones: timm:<name>:<file.safetensors or .pth>, or timm:<folder>",
    ):
        network = create_model(model, pretrained=True, **_sized(model, size))
    check_weights(network.state_dict(), network, f"timm:{model}")
    return network


def _from_file(architecture: str, path: Path, size: Any) -> nn.Module:
    weights = read_weights(path)
    network: Any = new_network(architecture, **_shapes_from(weights, architecture), **_sized(architecture, size))
    try:
        put_weights(network, weights, str(path))
    except TrajOODError as error:
        if "pos_embed" not in str(error):
            raise
        raise TrajOODError(
            f"{error}: if it was trained at another image size, pass that: --input-size (in Python: input_size=)"
        ) from error
    settings = network.pretrained_cfg
    settings["input_size"] = (_channels(network, settings), *settings["input_size"][1:])
    return network


def _sized(architecture: str, size: Any) -> dict[str, Any]:
    """Arguments that build a network for images of ``size`` (a side, or (C, H, W)), if it takes a fixed size only."""
    from timm.models import get_pretrained_cfg, is_model

    cfg = get_pretrained_cfg(architecture) if is_model(architecture.split(".")[0]) else None
    if size is None or not getattr(cfg, "fixed_input_size", False):
        return {}
    return {"img_size": (size, size) if isinstance(size, int) else tuple(size[1:])}


def _channels(network: nn.Module, settings: Mapping[str, Any]) -> int:
    first = network.get_submodule(_layer(settings["first_conv"])) if settings.get("first_conv") else None
    return int(first.in_channels) if isinstance(first, nn.Conv2d) else int(settings["input_size"][0])


def _shapes_from(weights: Mapping[str, Tensor], architecture: str) -> dict[str, int]:
    """Number of classes and of input channels, from the first and last layers of the weights."""
    from timm.models import get_pretrained_cfg

    cfg = get_pretrained_cfg(architecture)
    last, first = (_layer(getattr(cfg, key, None)) for key in ("classifier", "first_conv"))
    prefix = prefix_of(weights, f"{first}.weight")
    classifier, convolution = (weights.get(f"{prefix}{layer}.weight") for layer in (last, first))
    shapes = {"num_classes": 0 if classifier is None else len(classifier)}
    if convolution is not None:
        shapes["in_chans"] = convolution.shape[1]
    return shapes


def _folder_arguments(spec: str) -> dict[str, Any]:
    """Arguments of a network that was read from a folder, which older versions of timm do not keep."""
    path = Path(spec.partition(":")[2]).expanduser() / CONFIG
    try:
        return dict(read_json(path, "timm's config", "", limit=MAX_CONFIG).get("model_args") or {})
    except (ValueError, TypeError):
        return {}


def _may_be_packed(key: str, value: Any) -> bool:
    """Whether an argument is plain data and does not make timm's factory load other weights."""
    return not key.startswith(_NOT_PACKED) and _is_plain(value)


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(part) for part in value)
    return value is None or isinstance(value, str | int | float | bool)


def _layer(names: Any) -> str:
    return names[0] if isinstance(names, (tuple, list)) and names else str(names)


def _assert_known(architecture: str) -> None:
    from timm.models import is_model, list_models

    if not is_model(architecture.split(".")[0]):
        raise unknown_name("timm model", architecture, list_models())
