"""A model as a folder that needs nothing else: safetensors and a JSON-able description, rebuilt without any download.

What decides a model is code and weights. The code of the families of traj_ood, and of the libraries behind its
backbones, is installed; the description says how to call it. A callable's code cannot be written down, so it stays with
its owner.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from traj_ood.autoencoders import (
    Autoencoder,
    ConvAutoencoder,
    DiffusersVAE,
    PairAutoencoder,
    SurrogateAutoencoder,
    SurrogateNetwork,
    ViTMAE,
)
from traj_ood.autoencoders.pairs import VisionTokens, ViTDecoder
from traj_ood.backbones import LIBRARIES, Backbone
from traj_ood.backbones.network import NetworkBackbone, trial_images
from traj_ood.data.preprocessing import preprocessing_differences, preprocessing_record
from traj_ood.errors import TrajOODError, unknown_name
from traj_ood.io.checkpoints import read_weights
from traj_ood.io.files import write_atomic
from traj_ood.io.tensor_file import write_tensors
from traj_ood.io.trees import MAX_CONFIG, read_json
from traj_ood.io.weights import put_weights
from traj_ood.text import brief

SURROGATE, CALLABLE = "surrogate", "callable"
# Families that write themselves into a folder, and the options that they do not write with them.
_Writable = ViTMAE | ConvAutoencoder | DiffusersVAE | PairAutoencoder
_FAMILIES: dict[str, tuple[type[_Writable], dict[str, type]]] = {
    "vit_mae": (ViTMAE, {"mask_ratio": float, "mask_seed": int}),
    "conv": (ConvAutoencoder, {}),
    "diffusers": (DiffusersVAE, {"image_size": int, "scaled": bool, "interpolation": str}),
    "pair": (PairAutoencoder, {}),
}
KINDS = (*_FAMILIES, SURROGATE, CALLABLE)
_WEIGHTS, _NETWORK, _TRANSFORMER = "backbone.safetensors", "network.safetensors", "backbone"
_MOST_ROWS = 2**20
# What timm's factory would follow to a file or the network, and what transformers would.
_TIMM_REFUSED = ("pretrained", "checkpoint", "cache_dir")
_ELSEWHERE = ("auto_map", "use_pretrained_backbone", "custom_pipelines")

_T = TypeVar("_T")


def pack(autoencoder: Autoencoder, folder: Path) -> dict[str, Any]:
    """Write everything needed to rebuild the model offline into ``folder`` (safetensors and JSON only).

    A backbone's recipe is found by trying: it counts when the network that is rebuilt from ``folder`` has the same
    fingerprint and the same answers. That takes the memory of a second copy for a moment.

    Args:
        autoencoder: any. Its code must be that of traj_ood and of the backbones' libraries; for a model of another
            class, or over a :class:`traj_ood.CallableBackbone`, nothing is written and the ``kind`` is ``callable``.
        folder: made when something is written.
    Returns:
        A JSON-able description: ``kind`` (one of :data:`KINDS`), ``family``, ``name``, ``options``, ``fingerprint``,
        ``input_shape``, ``preprocessing``, ``chunk`` (results follow it, by rounding) and what the kind needs.
    Raises:
        TrajOODError: the folder cannot be written, or a backbone cannot be rebuilt from its library.
    """
    described: dict[str, Any] = {
        "kind": _kind(autoencoder),
        "family": autoencoder.family,
        "name": autoencoder.name,
        "options": json.loads(json.dumps(autoencoder.options(), default=str)),
        "fingerprint": autoencoder.fingerprint(),
        "input_shape": list(autoencoder.input_shape),
        "preprocessing": preprocessing_record(autoencoder),
        "chunk": autoencoder.chunk,
    }
    if isinstance(autoencoder, SurrogateAutoencoder) and described["kind"] == SURROGATE:
        write_tensors(folder / _NETWORK, autoencoder.network.state_dict())
        backbone = autoencoder.backbone
        assert isinstance(backbone, NetworkBackbone)
        return {**described, "backbone": _pack_backbone(backbone, folder)}
    if isinstance(autoencoder, _Writable) and described["kind"] in _FAMILIES:
        autoencoder.save_pretrained(folder)
        _forget_paths(folder)
    return described


def unpack(description: dict[str, Any], folder: Path, device: torch.device | str | None = None) -> Autoencoder:
    """The model that :func:`pack` described, from the files it wrote into ``folder``.

    Args:
        description: as returned by :func:`pack`, or read back from JSON.
        device: where to move the model. Default: it stays on the CPU.
    Raises:
        TrajOODError: a description of the kind ``callable``; files or entries that are missing, damaged or of another
            architecture; weights or options with another fingerprint.
    """
    where = f"{folder}: description of the model"
    kind = field_of(description, "kind", str, where)
    if kind not in KINDS:
        raise unknown_name("kind of packed model", kind, KINDS)
    name = field_of(description, "name", str, where)
    if kind == CALLABLE:
        raise TrajOODError(
            f"{folder}: the model {name!r} is made of your own code, which no file holds: build it again and pass it "
            "as autoencoder="
        )
    options = field_of(description, "options", dict, where)
    model: Autoencoder
    _refuse_elsewhere(folder)
    try:
        if kind == SURROGATE:
            model = _surrogate(description, options, folder, where)
        else:
            model = _model(kind, name, options, folder, where)
    except TrajOODError:
        raise
    except Exception as error:  # transformers, timm and torch have error classes of their own
        raise TrajOODError(
            f"{folder}: the model {name!r} cannot be rebuilt ({type(error).__name__}: {brief(error)}): pack it "
            "again or pass it as autoencoder="
        ) from error
    model.chunk = _chunk(description, where)
    check_same(description, model, str(folder))
    return model if device is None else model.to(device)


def check_same(description: Mapping[str, Any], autoencoder: Autoencoder, where: str) -> None:
    """Refuse a model that is not the one described.

    Raises:
        TrajOODError: another input shape, preprocessing or fingerprint, and which options differ.
    """
    shape = field_of(description, "input_shape", list, where)
    if shape != list(autoencoder.input_shape):
        raise TrajOODError(
            f"{where}: expected a model for images {str(tuple(shape))[:60]}, got {autoencoder.name} for "
            f"{autoencoder.input_shape}"
        )
    if "preprocessing" in description:  # which older versions did not write
        other = preprocessing_differences(field_of(description, "preprocessing", dict, where), autoencoder)
        if other:
            raise TrajOODError(
                f"{where}: expected {autoencoder.name} with the preprocessing that it was saved with, got another "
                f"({', '.join(other)} differ): scores of the same pictures would be others; pass the model as it was"
            )
    expected = field_of(description, "fingerprint", str, where)
    found = autoencoder.fingerprint()
    if found != expected:
        own = json.loads(json.dumps(autoencoder.options(), default=str))
        packed = field_of(description, "options", dict, where)
        differing = sorted(k for k in own.keys() | packed.keys() if own.get(k) != packed.get(k))
        what = f"options {', '.join(differing)} differ" if differing else "its weights differ"
        raise TrajOODError(
            f"{where}: expected the model {description.get('name')!r} with fingerprint {expected[:12]}…, got "
            f"{autoencoder.name!r} with {found[:12]}… ({what}): use the very model that was saved"
        )


def field_of(tree: Mapping[str, Any], key: str, kind: type[_T], where: str) -> _T:
    """``tree[key]``, which must be a ``kind``; an int counts as a float, a bool never as a number.

    Raises:
        TrajOODError: missing, of another type, or not finite.
    """
    value = tree.get(key)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or (isinstance(value, float) and not math.isfinite(value)):
        got = "nothing" if key not in tree else f"{type(value).__name__} {str(value)[:40]!r}"
        raise TrajOODError(f"{where}: {key}: expected {kind.__name__}, got {got}: the file is damaged")
    return value


# ---------------------------------------------------------------------- autoencoders


def _kind(autoencoder: Autoencoder) -> str:
    """Exact types: a subclass may do anything, and its code is not ours to rebuild."""
    if type(autoencoder) is SurrogateAutoencoder:
        packable = isinstance(autoencoder.backbone, NetworkBackbone) and autoencoder.backbone.library in LIBRARIES
        return SURROGATE if packable else CALLABLE
    if isinstance(autoencoder, PairAutoencoder):
        parts: Any = autoencoder.module
        if not (type(parts.encoder) is VisionTokens and type(parts.decoder) is ViTDecoder):
            return CALLABLE
    return next((kind for kind, (family, _) in _FAMILIES.items() if type(autoencoder) is family), CALLABLE)


def _model(kind: str, name: str, options: dict[str, Any], folder: Path, where: str) -> Autoencoder:
    family, unwritten = _FAMILIES[kind]
    if kind == "diffusers":  # what is not said was bilinear in older versions, and is left out where it is
        options = {"interpolation": "bilinear", **options}
    own: dict[str, Any] = {key: field_of(options, key, of, where) for key, of in unwritten.items() if key in options}
    return family.from_pretrained(folder, name=name, **own)


def _refuse_elsewhere(folder: Path) -> None:
    """No library is asked to follow an entry of a packed JSON file to code or weights outside the folder."""
    for path in sorted(folder.rglob("*.json")):
        content = _json_of(path)
        asking = sorted(key for key in _ELSEWHERE if content.get(key))
        if asking:
            raise TrajOODError(f"{path}: {asking[0]!r} asks for code or files from elsewhere: nothing packed here does")


def _forget_paths(folder: Path) -> None:
    """transformers and diffusers note where a model came from: a path on this machine, and nobody else's business."""
    for path in sorted(folder.rglob("config.json")):
        config = _json_of(path)
        if config.pop("_name_or_path", None) is not None:
            write_atomic(path, (json.dumps(config, indent=2) + "\n").encode())


def _json_of(path: Path) -> dict[str, Any]:
    return read_json(path, "a description of a model", "copy the folder again", limit=MAX_CONFIG)


def _surrogate(description: dict[str, Any], options: dict[str, Any], folder: Path, where: str) -> SurrogateAutoencoder:
    network = SurrogateNetwork(**field_of(options, "network", dict, where))
    put_weights(network, read_weights(folder / _NETWORK), str(folder / _NETWORK))
    backbone = _unpack_backbone(field_of(description, "backbone", dict, where), folder)
    return SurrogateAutoencoder(backbone, network, name=field_of(description, "name", str, where))


def _chunk(description: Mapping[str, Any], where: str) -> int:
    rows = field_of(description, "chunk", int, where)
    if not 1 <= rows <= _MOST_ROWS:
        raise TrajOODError(f"{where}: chunk: expected 1 to {_MOST_ROWS} rows, got {rows}: the file is damaged")
    return rows


# ---------------------------------------------------------------------- backbones


def _pack_backbone(backbone: NetworkBackbone, folder: Path) -> dict[str, Any]:
    """Write the weights; find the recipe that makes the same network of them."""
    if backbone.library == "transformers":
        _write_transformer(backbone, folder / _TRANSFORMER)
    else:
        write_tensors(folder / _WEIGHTS, backbone.module.state_dict())
    described = {
        "library": backbone.library,
        "name": backbone.name,
        "options": json.loads(json.dumps(backbone.options(), default=str)),
        "fingerprint": backbone.fingerprint(),
        "chunk": backbone.chunk,
    }
    reason = "its library knows no such network"
    for recipe in _recipes(backbone):
        attempt = {**described, "recipe": recipe}
        try:
            if _same_answers(backbone, _unpack_backbone(attempt, folder)):
                return attempt
            reason = "the network rebuilt from its weights gives other features"
        except TrajOODError as error:
            reason = str(error)
    raise TrajOODError(
        f"{backbone.name}: cannot be rebuilt offline from its weights ({reason}); wrap the network in a "
        "traj_ood.CallableBackbone, which is passed again at loading"
    )


def _recipes(backbone: NetworkBackbone) -> Iterator[dict[str, Any]]:
    """Calls of the backbone's library that may make its network, the likeliest first."""
    architecture = backbone.spec.split(":")[1] if backbone.spec.count(":") else ""
    if backbone.library == "timm":
        yield from _timm_recipes(backbone)
    elif backbone.library == "torchvision":
        from torchvision import models

        for entry in models.get_model_weights(architecture).__members__:
            yield {"architecture": architecture, "weights": entry}
    elif backbone.library == "openood":
        declared = backbone.options()["transform"]
        yield {"network": architecture, **{key: declared[key] for key in ("data", "size", "pre_size", "mean", "std")}}
    else:
        yield {}


def _timm_recipes(backbone: NetworkBackbone) -> Iterator[dict[str, Any]]:
    network: Any = backbone.module
    config = dict(network.pretrained_cfg)
    given = getattr(network, "_model_args", None) or _timm_folder_arguments(backbone.spec)
    arguments = {k: v for k, v in given.items() if _plain(v) and not k.startswith(_TIMM_REFUSED)}
    arguments["num_classes"] = network.num_classes
    channels = backbone.input_shape[0]
    if channels != 3:  # not every architecture takes the argument
        arguments["in_chans"] = channels
    architecture, tag = str(config.get("architecture", "")), config.get("tag")
    for name in ([f"{architecture}.{tag}"] if tag else []) + [architecture]:
        yield {"architecture": name, "arguments": json.loads(json.dumps(arguments))}


def _timm_folder_arguments(spec: str) -> dict[str, Any]:
    """What older versions of timm do not keep of a network that was read from a folder."""
    path = Path(spec.partition(":")[2]).expanduser() / "config.json"
    try:
        return dict(_json_of(path).get("model_args") or {})
    except (ValueError, TypeError):
        return {}


def _plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_plain(v) for v in value)
    return value is None or isinstance(value, str | int | float | bool)


def _unpack_backbone(described: dict[str, Any], folder: Path) -> Backbone:
    where = f"{folder}: description of the backbone"
    library = field_of(described, "library", str, where)
    if library not in LIBRARIES:
        raise unknown_name("backbone library", library, LIBRARIES)
    name, recipe = field_of(described, "name", str, where), field_of(described, "recipe", dict, where)
    try:
        build = {
            "timm": _timm_backbone,
            "torchvision": _torchvision_backbone,
            "openood": _openood_backbone,
            "transformers": _transformers_backbone,
        }[library]
        backbone = build(name, recipe, field_of(described, "options", dict, where), folder)
    except TrajOODError:
        raise
    except Exception as error:  # any library's code, any error
        raise TrajOODError(
            f"{folder}: {library} cannot rebuild the backbone {name!r} ({type(error).__name__}: {brief(error)})"
        ) from error
    expected = field_of(described, "fingerprint", str, where)
    if backbone.fingerprint() != expected:
        raise TrajOODError(
            f"{folder}: the backbone {name!r} has another fingerprint than when it was packed: other weights, or a "
            f"version of {library} with another transform"
        )
    backbone.chunk = _chunk(described, where)
    return backbone


def _timm_backbone(name: str, recipe: dict[str, Any], options: dict[str, Any], folder: Path) -> Backbone:
    from traj_ood.backbones.timm_models import TimmBackbone, new_network

    where = f"{folder}: recipe of the backbone"
    architecture = field_of(recipe, "architecture", str, where)
    arguments = field_of(recipe, "arguments", dict, where)
    for key, value in arguments.items():
        if key.startswith(_TIMM_REFUSED) or not _plain(value):
            raise TrajOODError(f"{where}: argument {key!r} is not one that a packed network may have")
    network = new_network(architecture, **arguments)
    put_weights(network, read_weights(folder / _WEIGHTS), str(folder / _WEIGHTS))
    data = {k: tuple(v) if isinstance(v, list) else v for k, v in options["transform"].items()}
    return TimmBackbone(network, name=name, spec=f"timm:{architecture}:{folder / _WEIGHTS}", data=data)


def _torchvision_backbone(name: str, recipe: dict[str, Any], options: dict[str, Any], folder: Path) -> Backbone:
    from traj_ood.backbones.torchvision_models import load

    where = f"{folder}: recipe of the backbone"
    architecture, entry = (field_of(recipe, key, str, where) for key in ("architecture", "weights"))
    return load(f"{architecture}:{folder / _WEIGHTS}", name=name, weights=entry)


def _openood_backbone(name: str, recipe: dict[str, Any], options: dict[str, Any], folder: Path) -> Backbone:
    from traj_ood.backbones.openood_networks import load

    where = f"{folder}: recipe of the backbone"
    network, data = (field_of(recipe, key, str, where) for key in ("network", "data"))
    size, pre_size = (field_of(recipe, key, int, where) for key in ("size", "pre_size"))
    mean, std = (tuple(field_of(recipe, key, list, where)) for key in ("mean", "std"))
    weights = f"{network}:{folder / _WEIGHTS}"
    return load(weights, name=name, data=data, size=size, pre_size=pre_size, mean=mean, std=std)


def _transformers_backbone(name: str, recipe: dict[str, Any], options: dict[str, Any], folder: Path) -> Backbone:
    from traj_ood.backbones.transformers_models import load

    return load(str(folder / _TRANSFORMER), name=name)


def _write_transformer(backbone: NetworkBackbone, folder: Path) -> None:
    network: Any = backbone.module
    folder.mkdir(parents=True, exist_ok=True)
    network.save_pretrained(folder, max_shard_size="1000GB")  # one file, which is what is read back
    _forget_paths(folder)
    processor = json.dumps(backbone.options()["transform"], indent=2, sort_keys=True)
    write_atomic(folder / "preprocessor_config.json", processor.encode())


def _same_answers(packed: Backbone, rebuilt: Backbone) -> bool:
    """Arguments such as the kind of activation leave no trace in weights. Devices may round differently, no more."""
    if (packed.feature_dim, packed.classes, packed.input_shape) != (
        rebuilt.feature_dim,
        rebuilt.classes,
        rebuilt.input_shape,
    ):
        return False
    images = trial_images(packed.input_shape)
    expected, found = packed.extract(images), rebuilt.extract(images)
    pairs = [(expected.features, found.features)]
    if expected.logits is not None and found.logits is not None:
        pairs.append((expected.logits, found.logits))
    return all(bool(((a.cpu() - b.cpu()).abs() <= 1e-3 * max(1e-6, float(a.abs().max()))).all()) for a, b in pairs)
