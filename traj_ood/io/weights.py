"""Weights as facts: what a module must be given, and the hash that says which weights it has."""

from __future__ import annotations

import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from traj_ood.errors import TrajOODError
from traj_ood.io.tensor_file import digest_of
from traj_ood.text import brief

_COUNTER = "num_batches_tracked"


def parts_of(module: nn.Module) -> list[nn.Module]:
    """As ``module.modules()``, in a fifth of its time: that makes the name of each, and this is asked at every call."""
    found, seen, waiting = [], {id(module)}, [module]
    while waiting:
        part = waiting.pop()
        found.append(part)
        for child in part._modules.values():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                waiting.append(child)
    return found


def tensors_of(parts: Sequence[nn.Module]) -> list[Tensor]:
    """Parameters and buffers of :func:`parts_of`, each once."""
    held = (t for part in parts for own in (part._parameters, part._buffers) for t in own.values())
    return list({id(t): t for t in held if t is not None}.values())


def float_types(parts: Sequence[nn.Module]) -> set[torch.dtype]:
    """Of the floating-point parameters of :func:`parts_of`."""
    held = (p for part in parts for p in part._parameters.values() if p is not None)
    return {p.dtype for p in held if p.is_floating_point()}


def all_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite, by the smallest and the largest: a mask of all doubles the memory."""
    if not values.numel():
        return True
    return all(bool(extreme.isfinite()) for extreme in values.aminmax())  # both are NaN where any value is


def fingerprint(module: nn.Module, declared: Any, own_name: Callable[[str], str] = str) -> str:
    """sha256 over the JSON of ``declared`` and every name, shape, dtype and byte of the module's state.

    ``own_name`` turns a library's name of a tensor into one that no version of the library changes.
    """
    return digest_of({own_name(key): value for key, value in module.state_dict().items()}, declared)


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
    _refuse_names(missing, extra, where)
    for key, value in weights.items():
        if value.shape != expected[key].shape:
            raise TrajOODError(
                f"{where}: weights of another architecture: {key} expected {tuple(expected[key].shape)}, "
                f"got {tuple(value.shape)}"
            )
    _check_finite(weights, where)


def _refuse_names(missing: Sequence[str], extra: Sequence[str], where: str) -> None:
    if missing or extra:
        raise TrajOODError(
            f"{where}: weights of another architecture: {len(missing)} tensors missing (first: "
            f"{missing[0] if missing else '-'}), {len(extra)} unexpected (first: {extra[0] if extra else '-'})"
        )


def _check_finite(weights: Mapping[str, Tensor], where: str) -> None:
    for key, value in weights.items():
        if value.is_floating_point() and not all_finite(value):
            raise TrajOODError(
                f"{where}: {key} holds NaN or infinite weights: the file is damaged or training diverged"
            )


def put_weights(module: nn.Module, weights: Mapping[str, Tensor], where: str) -> None:
    """Load ``weights`` into ``module``, every one that it has, by the module's own loader.

    They may stand under one prefix, such as ``model.`` of Lightning or ``encoder.``: what the file holds beside it is
    left out then. Batch norms' ``num_batches_tracked`` may be missing: it is for training only, and older checkpoints
    lack it.

    Args:
        module: new; after an error its weights are undefined.
        weights: as :func:`traj_ood.io.checkpoints.read_weights` returns them.
    Raises:
        TrajOODError: as :func:`check_weights`; also two sets of weights under different prefixes.
    """
    expected = module.state_dict()
    prefix = _prefix(weights, [key for key in expected if not key.endswith(_COUNTER)], where)
    own = _below(prefix, weights)
    where = f"{where}, below {prefix!r}" if prefix else where
    _check_finite(own, where)
    try:
        report = module.load_state_dict(own, strict=False)
    except Exception as error:  # shapes, and versions that a module's own loader does not take
        check_weights({**{k: v for k, v in expected.items() if k.endswith(_COUNTER)}, **own}, module, where)
        raise TrajOODError(f"{where}: weights of another architecture or version ({brief(error)})") from error
    _refuse_names([key for key in report.missing_keys if not key.endswith(_COUNTER)], report.unexpected_keys, where)


def prefix_of(weights: Mapping[str, Tensor], name: str) -> str:
    """What stands before ``name`` in the shortest key that ends with it; empty where none does."""
    found = [key for key in weights if key == name or key.endswith(f".{name}")]
    return min(found, key=len).removesuffix(name) if found else ""


def _prefix(weights: Mapping[str, Tensor], names: Sequence[str], where: str) -> str:
    """The prefix under which at least half of ``names`` are found, more than under any other.

    Raises:
        TrajOODError: all of them are found under several.
    """
    known = set(names)
    counts: Counter[str] = Counter()
    for key in weights:
        places = [0, *(place.end() for place in re.finditer(r"\.", key))]
        counts.update(key[:place] for place in places if key[place:] in known)
    most = max(counts.values(), default=0)
    if counts[""] == most or 2 * most < len(known):
        return ""
    best = sorted(prefix for prefix, count in counts.items() if count == most)
    if len(best) > 1 and most == len(known):
        raise TrajOODError(
            f"{where}: holds {len(best)} sets of weights of this architecture, below {best[0]!r} and {best[1]!r}: save "
            "the one that is meant as a file of its own"
        )
    return best[0]


def _below(prefix: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names start with ``prefix``, without it, and with the versions of their modules."""
    own = OrderedDict((key.removeprefix(prefix), value) for key, value in weights.items() if key.startswith(prefix))
    versions = getattr(weights, "_metadata", None)
    if versions is not None:
        below = {
            f"{key}.".removeprefix(prefix).removesuffix("."): v
            for key, v in versions.items()
            if f"{key}.".startswith(prefix)
        }
        own._metadata = below  # type: ignore[attr-defined]
    return own
