"""Finds the parts of a user's network: encoder and decoder, the module behind a function, the tensor in an output."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import FunctionType
from typing import Any

from torch import Tensor, nn

from traj_ood.errors import TrajOODError

_HALVES = (("encode", "decode"), ("encoder", "decoder"))
_TENSORS = ("latents", "latent", "sample", "last_hidden_state")
"""Attributes that hold the main tensor in outputs of diffusers and transformers."""
WRAPPER = """
class Fixed(torch.nn.Module):
    def __init__(self, net): super().__init__(); self.net = net
    def encode(self, x): return self.net.encode(x)[0]  # one tensor: the mean, where it is (mu, logvar)
    def decode(self, z): return self.net.decode(z)  # one tensor: the images
model = traj_ood.CallableAutoencoder.from_module(Fixed(net), (3, 32, 32))"""


class WrapperError(TrajOODError):
    """An ambiguity that only the network's author can resolve; the message ends with five lines of code to write."""

    def __str__(self) -> str:
        return f"{super().__str__()}:{WRAPPER}"


def halves_of(module: nn.Module) -> tuple[Callable[[Tensor], Any], Callable[[Tensor], Any]]:
    """The encoder and decoder of a module: its methods ``encode`` and ``decode``, or its parts ``encoder`` and
    ``decoder``."""
    for names in _HALVES:
        encode, decode = (getattr(module, name, None) for name in names)
        if callable(encode) and callable(decode):
            return encode, decode
    found = [name for names in _HALVES for name in names if hasattr(module, name)]
    raise WrapperError(
        f"{type(module).__name__}: expected methods encode and decode, or modules encoder and decoder, found "
        f"{', '.join(found) or 'none of them'}: wrap it"
    )


def tensor_of(name: str, answer: Any) -> Tensor:
    """The tensor in a network's output: the mode of a distribution, or the main tensor of a library's output object."""
    if isinstance(answer, Tensor):
        return answer
    if isinstance(answer, Sequence) and len(answer) == 1:
        return tensor_of(name, answer[0])
    distribution = getattr(answer, "latent_dist", answer)  # diffusers' VAEs; torch's and diffusers' have a mode
    mode = getattr(distribution, "mode", None)
    found = [mode() if callable(mode) else mode, *(getattr(answer, key, None) for key in _TENSORS)]
    for value in found:
        if isinstance(value, Tensor):
            return value
    kind = type(answer).__name__
    parts = f" of {len(answer)}" if isinstance(answer, Sequence) else ""
    raise WrapperError(f"{name}: expected one tensor, got {kind}{parts}: choose the right one and wrap it")


def module_behind(*functions: Callable[..., Any]) -> nn.Module:
    """The module whose weights the functions use: the function itself, its owner, or modules in its closure or globals.

    Modules that are part of another one are left out. Several are returned as a ModuleList; none, as an empty module.
    """
    found = list({id(m): m for function in functions for m in _reached(function, set())}.values())
    outer = [m for m in found if not any(m is part for other in found if other is not m for part in other.modules())]
    return outer[0] if len(outer) == 1 else nn.ModuleList(outer) if outer else nn.Module()


def original(module: nn.Module) -> nn.Module:
    """The module that ``torch.compile`` wrapped, or the module itself."""
    return getattr(module, "_orig_mod", module)


def _reached(value: Any, seen: set[int]) -> Iterator[nn.Module]:
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, nn.Module):
        yield original(value)
    elif isinstance(value, partial):
        for part in (value.func, *value.args, *value.keywords.values()):
            yield from _reached(part, seen)
    elif inspect.ismethod(value):
        yield from _reached(value.__self__, seen)
    elif isinstance(value, FunctionType):
        names = inspect.getclosurevars(value)
        for part in (*names.nonlocals.values(), *names.globals.values()):
            if not isinstance(part, FunctionType) or part.__module__ == value.__module__:  # not into libraries
                yield from _reached(part, seen)
    elif hasattr(value, "__dict__") and not isinstance(value, type) and not inspect.ismodule(value):
        yield from (original(part) for part in vars(value).values() if isinstance(part, nn.Module))
