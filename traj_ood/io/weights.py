"""Check, load and fingerprint the weights of a module."""

from __future__ import annotations

import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from traj_ood.errors import TrajOODError
from traj_ood.io.tensor_file import digest_of
from traj_ood.text import brief

_N = TypeVar("_N", bound=nn.Module)
_COUNTER = "num_batches_tracked"


def parts_of(module: nn.Module) -> list[nn.Module]:
    """All modules inside ``module``, itself included, in a fifth of the time of ``module.modules()``, which builds the
    name of each; this runs at every call."""
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
    """The parameters and buffers of the modules that :func:`parts_of` returns, each once."""
    held = (t for part in parts for own in (part._parameters, part._buffers) for t in own.values())
    return list({id(t): t for t in held if t is not None}.values())


def float_types(parts: Sequence[nn.Module]) -> set[torch.dtype]:
    """The dtypes of the floating-point parameters of the modules that :func:`parts_of` returns."""
    held = (p for part in parts for p in part._parameters.values() if p is not None)
    return {p.dtype for p in held if p.is_floating_point()}


def all_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite. Only the minimum and maximum are tested: a mask would double the memory."""
    if not values.numel():
        return True
    return all(bool(extreme.isfinite()) for extreme in values.aminmax())  # both are NaN where any value is


def fingerprint(module: nn.Module, declared: Any, own_name: Callable[[str], str] = str) -> str:
    """sha256 over the JSON of ``declared`` and every name, shape, dtype and byte of the module's state.

    ``own_name`` maps a library's name of a tensor to one that is the same in every version of the library.
    """
    return digest_of({own_name(key): value for key, value in module.state_dict().items()}, declared)


def refuse_larger(config: Mapping[str, Any], weights: Mapping[str, Tensor], where: str) -> None:
    """Refuse a configuration in which any number exceeds that of the weights, or that has more layers than tensors.
    Building such a network could exhaust the memory or never end."""
    values = sum(value.numel() for value in weights.values())
    for key, count in config.items():
        most = len(weights) if key.endswith("layers") else values
        if isinstance(count, int | float) and count > max(most, 1):
            raise TrajOODError(
                f"{where}: {key}: expected at most {most}, as there are {len(weights)} tensors of {values} weights, "
                f"got {float(min(count, 1e300)):.6g}: weights of another architecture, or damaged"
            )


def check_weights(weights: Mapping[str, Tensor], module: nn.Module, where: str) -> None:
    """Check, before loading, that weights fit ``module`` in names and shapes, and are finite."""
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


def with_weights(make: Callable[..., _N], sizes: Mapping[str, Any], weights: Mapping[str, Tensor], path: Path) -> _N:
    """The network ``make(**sizes)``, by the config beside the file ``path``, with the weights of that file. Shapes are
    checked first, on the meta device, because a damaged config could request any amount of memory."""
    refuse_larger(sizes, weights, f"{path.parent}/config.json")
    with torch.device("meta"):
        check_weights(weights, make(**sizes), str(path))
    network = make(**sizes)
    network.load_state_dict(weights)
    return network


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
    """Load ``weights`` into a newly created ``module``; every weight of the module must be given.

    All names can share one prefix, such as Lightning's ``model.`` or ``encoder.``; tensors outside it are then ignored.
    ``num_batches_tracked`` of batch norms may be missing: it is used in training only, and older checkpoints lack it.
    """
    expected = module.state_dict()
    prefix = _prefix(weights, [key for key in expected if not key.endswith(_COUNTER)], where)
    own = below(prefix, weights)
    where = f"{where}, below {prefix!r}" if prefix else where
    _check_finite(own, where)
    try:
        report = module.load_state_dict(own, strict=False)
    except Exception as error:  # wrong shapes, or a version that the module's own loader refuses
        check_weights({**{k: v for k, v in expected.items() if k.endswith(_COUNTER)}, **own}, module, where)
        raise TrajOODError(f"{where}: weights of another architecture or version ({brief(error)})") from error
    _refuse_names([key for key in report.missing_keys if not key.endswith(_COUNTER)], report.unexpected_keys, where)


def prefix_of(weights: Mapping[str, Tensor], name: str) -> str:
    """The prefix before ``name`` in the shortest key that ends with it; empty if there is none."""
    found = [key for key in weights if key == name or key.endswith(f".{name}")]
    return min(found, key=len).removesuffix(name) if found else ""


def _prefix(weights: Mapping[str, Tensor], names: Sequence[str], where: str) -> str:
    """The prefix under which most of ``names`` are found, and at least half of them; else empty. Several with all names
    are an error."""
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
            f"{where}: contains {len(best)} sets of weights of this architecture, below {best[0]!r} and {best[1]!r}: "
            "save the one to use as a separate file"
        )
    return best[0]


def below(prefix: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names start with ``prefix``, with the prefix removed; module versions are kept."""
    own = OrderedDict((key.removeprefix(prefix), value) for key, value in weights.items() if key.startswith(prefix))
    versions = getattr(weights, "_metadata", None)
    if versions is not None:
        dotted = ((f"{key}.", value) for key, value in versions.items())
        inner = {key.removeprefix(prefix).removesuffix("."): v for key, v in dotted if key.startswith(prefix)}
        own._metadata = inner  # type: ignore[attr-defined]
    return own
