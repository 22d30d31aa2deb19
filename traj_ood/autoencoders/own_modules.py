"""Finds the parts of a user's network: encoder and decoder, and the tensor in an output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from traj_ood.errors import TrajOODError

_HALVES = (("encode", "decode"), ("encoder", "decoder"))
_TENSORS = ("latents", "latent", "sample", "last_hidden_state")
"""Attributes that hold the main tensor in outputs of diffusers and transformers."""
WRAPPER = """
class Fixed(torch.nn.Module):
    def __init__(self, net): super().__init__(); self.net = net
    def encode(self, x): return {encode}  # one tensor: the latents; the mean, where there is (mu, logvar)
    def decode(self, z): return {decode}  # one tensor: the images
model = traj_ood.CallableAutoencoder.from_module(Fixed(net), (3, 32, 32))  # (C, H, W) of your images"""


class WrapperError(TrajOODError):
    """An ambiguity that only the network's author can resolve; the message ends with five lines of code to write, with
    the calls that stand for ``encode`` and ``decode``."""

    def __init__(self, message: str, encode: str, decode: str) -> None:
        super().__init__(message)
        self.code = WRAPPER.format(encode=encode, decode=decode)

    def __str__(self) -> str:
        return f"{super().__str__()}:{self.code}"


def halves_of(module: nn.Module) -> tuple[Callable[[Tensor], Any], Callable[[Tensor], Any]]:
    """The encoder and decoder of a module: its methods ``encode`` and ``decode``, or its parts ``encoder`` and
    ``decoder``."""
    for names in _HALVES:
        encode, decode = (getattr(module, name, None) for name in names)
        if callable(encode) and callable(decode):
            return encode, decode
    found = [name for names in _HALVES for name in names if hasattr(module, name)]
    inner = getattr(module, "module", None)
    if isinstance(inner, nn.Module) and not found:
        raise TrajOODError(
            f"{type(module).__name__}: expected methods encode and decode, or modules encoder and decoder, found a "
            f"wrapper around a {type(inner).__name__}: give its .module"
        )
    raise WrapperError(
        f"{type(module).__name__}: expected methods encode and decode, or modules encoder and decoder, found "
        f"{', '.join(found) or 'none of them'}: wrap it",
        *("self.net.YOUR_ENCODER(x)", "self.net.YOUR_DECODER(z)"),
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
    told = f"{name}: expected one tensor, got {kind}{parts}: choose the right one and wrap it"
    raise WrapperError(told, "self.net.encode(x)[0]", "self.net.decode(z)")
