"""Weights as files and as facts: what a module must be given, and the hash that says which weights it has."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from traj_ood.errors import TrajOODError

_WRAPPERS = ("state_dict", "model", "model_state_dict", "net")
_SEAL = "traj_ood_sha256"
# What libraries write into a config of their own accord, and what decides nothing.
_UNSEALED = ("_name_or_path", "transformers_version")


def fingerprint(module: nn.Module, declared: Any, own_name: Callable[[str], str] = str) -> str:
    """sha256 over the JSON of ``declared`` and every name, shape, dtype and byte of the module's state.

    ``own_name`` turns a library's name of a tensor into one that no version of the library changes.
    """
    return digest_of({own_name(key): value for key, value in module.state_dict().items()}, declared)


def digest_of(tensors: Mapping[str, Tensor], declared: Any) -> str:
    """sha256 (hex) over the JSON of ``declared`` and every name, shape, dtype and byte of the tensors."""
    digest = hashlib.sha256(json.dumps(declared, sort_keys=True, default=str).encode())
    for key, value in sorted(tensors.items()):
        digest.update(f"{key}{tuple(value.shape)}{value.dtype}".encode())
        # Cloned: one element of any stride counts as contiguous, and yet cannot be viewed as bytes.
        values = value.detach().cpu().flatten().clone(memory_format=torch.contiguous_format)
        digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def sealed(weights: Mapping[str, Tensor], *configs: Mapping[str, Any]) -> bytes:
    """A safetensors file that carries a hash of its tensors and of the JSON objects that are written beside it.

    safetensors itself has none: a flipped bit in it, or in a configuration, is just another model.
    """
    from safetensors.torch import save

    content = save(dict(weights), metadata={"format": "pt"})
    # Of several metadata safetensors makes a header of random order, and the same model must be the same bytes.
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"][_SEAL] = _seal(weights, configs)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # safetensors aligns the tensors, too
    return len(text).to_bytes(8, "little") + text + content[end:]


def check_seal(path: Path, weights: Mapping[str, Tensor], *configs: Mapping[str, Any]) -> None:
    """Refuse what differs from what :func:`sealed` wrote; a file without a hash, as others write it, is taken as it is.

    Args:
        path: a weights file. weights: its tensors, by their names in it. configs: the JSON objects read beside it.
    Raises:
        TrajOODError: damaged or edited.
    """
    from safetensors import safe_open

    if path.suffix != ".safetensors":
        return
    with safe_open(path, framework="pt") as file:
        expected = (file.metadata() or {}).get(_SEAL)
    if expected is not None and expected != _seal(weights, configs):
        raise TrajOODError(
            f"{path}: damaged or edited: it or the JSON files beside it have changed since they were saved: copy or "
            "save the model again"
        )


def _seal(weights: Mapping[str, Tensor], configs: Sequence[Mapping[str, Any]]) -> str:
    kept = [{key: value for key, value in config.items() if key not in _UNSEALED} for config in configs]
    return digest_of(weights, kept)


def refuse_larger(config: Mapping[str, Any], weights: Mapping[str, Tensor], where: str) -> None:
    """Refuse a configuration that counts more of anything than there are weights, or more layers than tensors.

    Building what it describes could take all the memory, or go on for ever.

    Raises:
        TrajOODError: names the key.
    """
    values = sum(value.numel() for value in weights.values())
    for key, count in config.items():
        most = len(weights) if key.endswith("layers") else values
        if isinstance(count, int | float) and count > max(most, 1):
            raise TrajOODError(
                f"{where}: {key}: expected at most {most}, as there are {len(weights)} tensors of {values} weights, "
                f"got {float(min(count, 1e300)):.6g}: weights of another architecture, or damaged"
            )


def check_weights(weights: Mapping[str, Tensor], module: nn.Module, where: str) -> None:
    """Refuse weights of another architecture or with NaN, by name, before they are loaded.

    Raises:
        TrajOODError: names ``where`` and the first offending tensor.
    """
    expected = module.state_dict()
    missing, extra = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    if missing or extra:
        raise TrajOODError(
            f"{where}: weights of another architecture: {len(missing)} tensors missing (first: "
            f"{missing[0] if missing else '-'}), {len(extra)} unexpected (first: {extra[0] if extra else '-'})"
        )
    for key, value in weights.items():
        if value.shape != expected[key].shape:
            raise TrajOODError(
                f"{where}: weights of another architecture: {key} expected {tuple(expected[key].shape)}, "
                f"got {tuple(value.shape)}"
            )
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise TrajOODError(
                f"{where}: {key} holds NaN or infinite weights: the file is damaged or training diverged"
            )


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` file or of a PyTorch checkpoint, without running any code in it.

    A checkpoint may keep its tensors under ``state_dict``, ``model``, ``model_state_dict`` or ``net``; the prefix
    ``module.`` that nn.DataParallel leaves on every name is taken off.

    Raises:
        TrajOODError: missing, damaged, or holding something else than named tensors.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        found = "a folder" if path.is_dir() else "nothing"
        raise TrajOODError(
            f"{path}: expected a file of weights (.safetensors or .pth), found {found}; correct the path"
        )
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        tree = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors, zipfile, pickle and torch each have error classes of their own
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise TrajOODError(
            f"{path}: cannot be read as plain weights ({reason}); expected a whole .safetensors file or a state dict "
            "saved by torch.save"
        ) from error
    return _tensors(tree, path)


def _tensors(tree: Any, path: Path) -> dict[str, Tensor]:
    for key in _WRAPPERS:
        if isinstance(tree, Mapping) and isinstance(tree.get(key), Mapping):
            tree = tree[key]
    if not isinstance(tree, Mapping) or not tree or not all(isinstance(v, Tensor) for v in tree.values()):
        raise TrajOODError(f"{path}: expected a state dict (names to tensors), got {_describe(tree)}")
    weights = {str(key): value for key, value in tree.items()}
    if all(key.startswith("module.") for key in weights):
        weights = {key.removeprefix("module."): value for key, value in weights.items()}
    return weights


def _describe(tree: Any) -> str:
    if isinstance(tree, Mapping):
        odd = next((k for k, v in tree.items() if not isinstance(v, Tensor)), None)
        return f"a mapping whose {odd!r} is a {type(tree[odd]).__name__}" if tree else "an empty one"
    return f"a {type(tree).__name__}"


def put_weights(module: nn.Module, weights: Mapping[str, Tensor], where: str) -> None:
    """Load ``weights`` into ``module``, all of them or none.

    Batch norms' ``num_batches_tracked`` may be missing: it is for training only, and older checkpoints lack it.

    Raises:
        TrajOODError: as :func:`check_weights`.
    """
    counters = {k: v for k, v in module.state_dict().items() if k.endswith("num_batches_tracked")}
    whole = {**counters, **weights}
    check_weights(whole, module, where)
    module.load_state_dict(whole)


def load_weights(module: nn.Module, path: str | Path) -> None:
    """:func:`read_weights` into ``module``; see :func:`put_weights`."""
    put_weights(module, read_weights(path), str(path))
