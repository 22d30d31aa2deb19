"""Where to compute, and how exactly."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor

from traj_ood.errors import TrajOODError
from traj_ood.text import brief

_AUTOCAST = ("cpu", "cuda", "mps", "xpu")


def resolve_device(name: str = "auto", *, tf32: bool = False) -> torch.device:
    """``auto`` takes CUDA, then MPS, then the CPU; any other name must be a device that is there.

    Args:
        name: auto, cpu, cuda, cuda:1, mps.
        tf32: whether CUDA may round the factors of fp32 products to TF32; see :func:`set_tf32`, which is called for
            CUDA devices only.
    Raises:
        TrajOODError: unknown device name, or one this machine lacks.
    """
    device = _find(name)
    if device.type == "cuda":
        set_tf32(tf32)
    return device


def _find(name: str) -> torch.device:
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps", "xpu"):
            raise RuntimeError("it computes nothing")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise TrajOODError(
            f"device {name!r} is not available here ({brief(error)}): use auto, cpu, cuda or mps"
        ) from error
    return device


def set_tf32(allowed: bool) -> None:
    """Allow or forbid TF32 in matrix products and convolutions, for the whole process.

    Off is traj_ood's default and not torch's, which lets cuDNN's convolutions use it (a ViT's patch embedding is
    one): TF32 keeps 10 bits of a factor's mantissa, and steps as short as the paper's tolerance need more.

    :func:`standard_settings` keeps to what was said here last, whatever the caller sets meanwhile.
    """
    _PROCESS.tf32 = allowed
    _round_products(allowed)


def _round_products(tf32: bool) -> None:
    """Torch 2.9 brought a second way to say so (``fp32_precision``), and raises in the older getters once the two
    disagree. Setting both, the older first, leaves them agreed whatever was set before."""
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    for operation in _operations(torch.backends.cuda, torch.backends.cudnn):
        operation.fp32_precision = "tf32" if tf32 else "ieee"
    for operation in _operations(torch.backends.mkldnn):
        operation.fp32_precision = "ieee"


def _operations(*backends: Any) -> list[Any]:
    """What of these backends has a precision of its own; nothing before torch 2.9."""
    found = [getattr(backend, name, None) for backend in backends for name in ("matmul", "conv", "rnn")]
    return [operation for operation in found if hasattr(operation, "fp32_precision")]


@contextmanager
def exact_products() -> Iterator[None]:
    """Without TF32, also where :func:`set_tf32` allows it: for what relies on a bound on float32's rounding. Other
    threads compute more exactly meanwhile, not less."""
    if not _PROCESS.tf32:
        yield
        return
    _round_products(False)
    try:
        yield
    finally:
        _round_products(True)


class _ProcessSettings:
    """What torch keeps for the whole process: the first thread to enter sets it, the last to leave puts back what the
    caller had. Other threads of the caller see ours meanwhile; torch has no other way."""

    def __init__(self) -> None:
        self.tf32 = False
        self._lock, self._inside = threading.Lock(), 0
        self._restore: list[Callable[[], None]] = []

    def enter(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._restore = self._set()

    def leave(self) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                for restore in self._restore:
                    restore()

    def _set(self) -> list[Callable[[], None]]:
        """Set what differs; returns what undoes it."""
        undo: list[Callable[[], None]] = []
        dtype = torch.get_default_dtype()
        if dtype != torch.float32:
            torch.set_default_dtype(torch.float32)
            undo.append(partial(torch.set_default_dtype, dtype))
        return undo if self._is_exact() else undo + self._set_precision()

    def _is_exact(self) -> bool:
        """Where CUDA was never used, only the CPU's products count."""
        if self.tf32 or torch.cuda.is_initialized():
            return False
        return all(o.fp32_precision in ("ieee", "none") for o in _operations(torch.backends.mkldnn)) and (
            torch.get_float32_matmul_precision() == "highest"
        )

    def _set_precision(self) -> list[Callable[[], None]]:
        backends = torch.backends
        operations = _operations(backends.cuda, backends.cudnn, backends.mkldnn)
        undo: list[Callable[[], None]] = [partial(setattr, o, "fp32_precision", o.fp32_precision) for o in operations]
        # Where the two ways disagree, what the older one says is lost already.
        with suppress(RuntimeError):
            undo.insert(0, partial(setattr, backends.cudnn, "allow_tf32", backends.cudnn.allow_tf32))
        with suppress(RuntimeError):
            undo.insert(0, partial(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision()))
        _round_products(self.tf32)
        return undo


_PROCESS = _ProcessSettings()


@contextmanager
def standard_settings() -> Iterator[None]:
    """torch's default settings, whatever the caller has set: no autocast, float32 as default type, the CPU as default
    device, and float32 products that are not rounded (see :func:`set_tf32`).

    The caller's settings come back at the end, also after an error. Re-entrant, and for many threads at once. Says
    nothing about gradients. A function under it as a decorator is fine, a generator is not.
    """
    with ExitStack() as stack:
        for kind in _AUTOCAST:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":  # only then: it makes every call of torch slower
            stack.enter_context(torch.device("cpu"))
        _PROCESS.enter()
        stack.callback(_PROCESS.leave)
        yield


@contextmanager
def training_settings() -> Iterator[None]:
    """:func:`standard_settings` with gradients enabled, even where the caller has disabled them."""
    with standard_settings(), torch.inference_mode(False), torch.enable_grad():
        yield


def bfloat16_map(self_map: Callable[[Tensor], Tensor], device: torch.device | str) -> Callable[[Tensor], Tensor]:
    """``self_map`` (n, *L) → (n, *L) under bfloat16 autocast, for :class:`traj_ood.dynamics.iterate.LowPrecision`.

    Matrix products and convolutions round their factors to 8 bits; softmax, LayerNorm and the weights stay fp32, and
    so does the type of what comes out. On its own it never meets the paper's tolerance.

    Args:
        self_map: f on fp32 latents.
        device: where f runs.
    Raises:
        TrajOODError: neither the CPU nor a CUDA device with bfloat16.
    """
    kind = torch.device(device).type
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not torch.cuda.is_bf16_supported()):
        raise TrajOODError(f"bfloat16 steps: expected the CPU or a CUDA device with bfloat16, got {device}: use fp32")

    def low(latents: Tensor) -> Tensor:
        # No cache of cast weights: f uses each weight once, and a cache would outlive this call in an outer autocast.
        with torch.autocast(kind, dtype=torch.bfloat16, cache_enabled=False):
            return self_map(latents).to(latents.dtype)

    return low
