"""Choice of the device, and torch's global settings of precision."""

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

_AUTOCAST = tuple(kind for kind in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(kind))


def resolve_device(name: str = "auto", *, tf32: bool = False) -> torch.device:
    """The device of a name; ``auto`` chooses CUDA, then MPS, then the CPU.

    Args:
        name: auto, cpu, cuda, cuda:1, mps.
        tf32: whether CUDA may use TF32 in fp32 products; passed to :func:`set_tf32`, for CUDA devices only.
    Raises:
        TrajOODError: an unknown device name, or a device that this machine does not have.
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

    traj_ood's default is off, unlike torch's, which allows it in cuDNN's convolutions (such as a ViT's patch
    embedding): TF32 keeps 10 bits of the mantissa of factors, too few for steps as short as the paper's tolerance.
    :func:`standard_settings` applies the last value set here, whatever the caller sets meanwhile.
    """
    _PROCESS.tf32 = allowed
    _round_products(allowed)


def _round_products(tf32: bool) -> None:
    """Set TF32 in both APIs of torch. Since 2.9 there is a second one (``fp32_precision``), and the older getters raise
    if the two disagree; setting both, the older first, makes them agree whatever was set before."""
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    for operation in _operations(torch.backends.cuda, torch.backends.cudnn):
        operation.fp32_precision = "tf32" if tf32 else "ieee"
    for operation in _operations(torch.backends.mkldnn):
        operation.fp32_precision = "ieee"


def _operations(*backends: Any) -> list[Any]:
    """The operations of these backends that have an ``fp32_precision``; none before torch 2.9."""
    found = [getattr(backend, name, None) for backend in backends for name in ("matmul", "conv", "rnn")]
    return [operation for operation in found if hasattr(operation, "fp32_precision")]


@contextmanager
def exact_products() -> Iterator[None]:
    """Context without TF32, even if :func:`set_tf32` allows it, for code that relies on a bound on float32 rounding.

    Other threads are affected meanwhile, but only become more accurate.
    """
    if not _PROCESS.tf32:
        yield
        return
    _round_products(False)
    try:
        yield
    finally:
        _round_products(True)


class _ProcessSettings:
    """torch's settings that hold for the whole process. The first thread to enter sets them, and the last to leave
    restores the caller's. Other threads of the caller see the changed settings meanwhile, since torch has no per-thread
    ones."""

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
        """Set what differs from the standard; returns the functions that undo it."""
        undo: list[Callable[[], None]] = []
        dtype = torch.get_default_dtype()
        if dtype != torch.float32:
            torch.set_default_dtype(torch.float32)
            undo.append(partial(torch.set_default_dtype, dtype))
        return undo if self._is_exact() else undo + self._set_precision()

    def _is_exact(self) -> bool:
        """Whether products already have full precision; only the CPU's settings matter if CUDA was never used."""
        if self.tf32 or torch.cuda.is_initialized():
            return False
        return all(o.fp32_precision in ("ieee", "none") for o in _operations(torch.backends.mkldnn)) and (
            torch.get_float32_matmul_precision() == "highest"
        )

    def _set_precision(self) -> list[Callable[[], None]]:
        backends = torch.backends
        operations = _operations(backends.cuda, backends.cudnn, backends.mkldnn)
        undo: list[Callable[[], None]] = [partial(setattr, o, "fp32_precision", o.fp32_precision) for o in operations]
        # If the two APIs disagree, the older getters raise, and their values cannot be restored.
        with suppress(RuntimeError):
            undo.insert(0, partial(setattr, backends.cudnn, "allow_tf32", backends.cudnn.allow_tf32))
        with suppress(RuntimeError):
            undo.insert(0, partial(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision()))
        _round_products(self.tf32)
        return undo


_PROCESS = _ProcessSettings()


@contextmanager
def standard_settings() -> Iterator[None]:
    """Context of fixed torch settings: no autocast, float32 as default type, the CPU as default device, and float32
    products of full precision (see :func:`set_tf32`).

    The caller's settings are restored at the end, also after an error. It is re-entrant and thread-safe, and leaves
    gradients as they are. As a decorator, use it on functions but not on generators.
    """
    with ExitStack() as stack:
        for kind in _AUTOCAST:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        # Only where needed: the context makes every call of torch slower. ``torch.get_default_device`` fails in torch
        # 2.4 once the default has been set to None.
        if torch.empty(0).device.type != "cpu":
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

    Matrix products and convolutions round their factors to 8 bits; softmax, LayerNorm, the weights and the result stay
    fp32. On its own this map never reaches the paper's tolerance.

    Args:
        self_map: f on fp32 latents.
        device: where f runs.
    Raises:
        TrajOODError: the device is neither the CPU nor a CUDA device with bfloat16.
    """
    kind = torch.device(device).type
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not torch.cuda.is_bf16_supported()):
        raise TrajOODError(f"bfloat16 steps: expected the CPU or a CUDA device with bfloat16, got {device}: use fp32")

    def low(latents: Tensor) -> Tensor:
        # No cache of cast weights: each is used once per call, and within an outer autocast the cache would persist.
        with torch.autocast(kind, dtype=torch.bfloat16, cache_enabled=False):
            return self_map(latents).to(latents.dtype)

    return low
