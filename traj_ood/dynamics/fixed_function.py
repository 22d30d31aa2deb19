"""FixedFunction: a network in evaluation mode under fixed settings, checked to be deterministic and row-wise."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cache, partial
from types import MethodType
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from traj_ood.dynamics.device import standard_settings
from traj_ood.dynamics.function_checks import FLOATS, TRIAL_ROWS, result_of
from traj_ood.dynamics.own_functions import OwnFunctions, errors_of_functions, original
from traj_ood.dynamics.workers import in_threads, single_threaded
from traj_ood.errors import TrajOODError
from traj_ood.io.extensions import own_code
from traj_ood.io.weights import fingerprint, float_types, parts_of, tensors_of

_F = TypeVar("_F", bound="FixedFunction")
_SMALL = 10**7  # parameters
_NARROW = 16  # results per row up to which MKL's rounding may depend on the row's address (seen up to 10)
_SAMPLED_VALUES, _MIN_VALUES = 2**15, 16
"""Number of weight values that are sampled to detect changes, in total and at least per tensor."""


LADDER = (1, 6, 12, 24, 48, 96)
"""The default numbers of rows per call, from which the smallest sufficient one is taken for few images: one, and
multiples of the six rows that MKL's matrix products process at a time (see
:func:`traj_ood.dynamics.chunks.rows_per_call`)."""


class FixedFunction:
    """A network as a mathematical function: the same rows always give the same results, whatever rows are beside them.

    Base class of autoencoders and backbones. Every pass through the network runs inside :meth:`fixed`, and calls have a
    fixed number of rows, as rounding depends on it. Before its first use :meth:`try_once` checks that the network is
    deterministic and treats each row on its own.

    Attributes:
        name: name in messages.
        module: the network.
        chunk: rows per call.
        ladder: numbers of rows that a call may have instead of ``chunk`` for few images, ascending, see
            :func:`few_images`.
            Default :data:`LADDER`; empty for a network that accepts only ``chunk`` rows, which :meth:`try_out` detects.
        side_by_side: whether several threads call the network at once, with a chunk each. Default false: unknown
            code may not allow it, and a large network is faster if all threads compute one chunk.
        equal_rows: numbers of rows below ``chunk`` with which :meth:`try_rows` found every row rounded as in a whole
            chunk. Default: none.
    """

    name: str
    module: nn.Module
    chunk: int
    ladder: tuple[int, ...] = LADDER
    side_by_side: bool = False
    equal_rows: tuple[int, ...] = ()
    _is_tried: bool = False

    @property
    def device(self) -> torch.device:
        """The device of the weights; the CPU for a module without weights."""
        return next((p.device for p in self.module.parameters()), torch.device("cpu"))

    def to(self: _F, device: torch.device | str) -> _F:
        """Move the network to a device; returns self."""
        self.module.to(device)
        return self

    @property
    def rows(self) -> int:
        """Current rows per call: ``chunk``, or within :func:`few_images` the smallest sufficient one of ``ladder``."""
        count = _INSIDE.__dict__.get("few")
        if count is None:
            return self.chunk
        return next((rows for rows in self.ladder if count <= rows < self.chunk), self.chunk)

    @property
    def is_small(self) -> bool:
        """Whether the network has at most 10 million parameters: its products gain little from a second thread."""
        return self.parameter_count() <= _SMALL

    @property
    def is_side_by_side(self) -> bool:
        """Whether several threads call the network at once: ``side_by_side`` permits it, and the device is the CPU."""
        return self.side_by_side and self.device.type == "cpu"

    def modules_used(self) -> tuple[nn.Module, ...]:
        """All networks whose weights and training flags affect the output. Default: :attr:`module` alone."""
        return (self.module,)

    def parameter_count(self) -> int:
        """Number of parameters of all networks used."""
        return sum(p.numel() for module in self.modules_used() for p in module.parameters())

    @contextmanager
    def fixed(self) -> Iterator[None]:
        """Context in which all modules are in evaluation mode under ``standard_settings``, for one thread at a time.

        The caller's training flags and settings are restored at the end, also after an error. It is re-entrant, is
        entered once per pass rather than per step, and leaves gradients as they are.

        Raises:
            TrajOODError: weights that are neither float32 nor float64.
        """
        modules = sorted(self.modules_used(), key=id)  # the same order in all threads, which excludes deadlocks
        held: list[nn.Module] = _INSIDE.__dict__.setdefault("modules", [])
        if all(any(module is other for other in held) for module in modules):  # a nested pass
            yield
            return
        with ExitStack() as stack:
            for module in modules:
                stack.enter_context(_lock_of(module))
            parts = [part for module in modules for part in parts_of(module)]
            _check_type(self.name, parts)
            stack.enter_context(standard_settings())
            stack.enter_context(_evaluation_mode(parts))
            held.extend(modules)
            stack.callback(held.__delitem__, slice(len(held) - len(modules), None))
            yield

    def try_once(self) -> None:
        """Run :meth:`try_out` if it has not been run before.

        Raises:
            TrajOODError: as :meth:`try_out`, or a call changes a buffer of the network.
        """
        if self._is_tried:
            return
        _keep_freed_memory()
        before = self._buffers()
        with single_threaded() if self.is_side_by_side else nullcontext():
            self.try_out()
        after = self._buffers()
        for name in before.keys() & after.keys():
            if not torch.equal(before[name], after[name]):
                raise TrajOODError(
                    f"{self.name}: a call changes the buffer {name[1]!r} of its network: expected a function of its "
                    "input alone: leave counters and statistics as they are in evaluation mode"
                )
        self._is_tried = True

    def _buffers(self) -> dict[tuple[int, str], Tensor]:
        """Copies of all buffers, without NaN, by the number of the network and name."""
        return {
            (number, name): buffer.detach().clone().nan_to_num()
            for number, module in enumerate(self.modules_used())
            for name, buffer in module.named_buffers()
        }

    def try_out(self) -> None:
        """Check that the network is a fixed function; called under :meth:`fixed` and without gradients.

        Raises:
            TrajOODError: see :func:`check_function`.
        """

    def try_places(self, function: Callable[[Tensor], Tensor], trial: Tensor) -> None:
        """Reduce :attr:`chunk` to a number of :attr:`ladder` if the rounding of a row depends on its place in a chunk.

        There are two causes. Without AVX-512, MKL rounds the rows beyond a multiple of six differently. And on some
        processors it rounds products of at most 10 results a row by the row's memory address, unless rows are multiples
        of 16 bytes; ``import traj_ood`` switches that off if it precedes the first product. A path between attractors
        amplifies either. Only networks in which one of them is possible are tried, as two calls of a whole chunk may
        take seconds.

        Args:
            function: one of the network's functions, on the CPU.
            trial: two rows (2, …) of its input; the trial uses a whole chunk of different rows between them.
        """
        weights = [tuple(p.shape) for p in self.module.parameters()]
        has_narrow = any(len(w) == 2 and min(w) <= _NARROW and (w[0] % 4 or w[1] % 4) for w in weights)
        is_possible = not weights or has_narrow or self.chunk not in LADDER
        if not (self.ladder and is_possible and self.device.type == "cpu"):
            return
        smaller = sorted((rows for rows in self.ladder if rows < self.chunk), reverse=True)
        self.chunk = next((rows for rows in (self.chunk, *smaller) if _rounds_alike(function, trial, rows)), 1)

    def try_rows(self, functions: Mapping[Callable[[Tensor], Tensor], Tensor]) -> None:
        """Set :attr:`equal_rows` by a trial, for a network whose chunks run side by side on the CPU.

        Chunks may then be shorter, so that all threads have an equal share of few rows. A trial suffices, because the
        processor's routines, and not the values, decide whether the rounding of a product depends on its number of
        rows.

        Args:
            functions: the network's functions, each with two rows (2, …) of its input, as in :meth:`try_places`.
        """
        if not self.is_side_by_side:
            return

        def computed(function: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
            (result,) = in_threads(partial(result_of, function), [rows])  # as in apply_in_chunks
            return result

        inputs = {f: _between(trial, self.chunk) for f, trial in functions.items()}
        outputs = {f: computed(f, rows) for f, rows in inputs.items()}
        self.equal_rows = tuple(
            size
            for size in sorted(rows for rows in self.ladder if rows < self.chunk)
            if all(torch.equal(computed(f, rows[:size]), outputs[f][:size]) for f, rows in inputs.items())
        )


@cache
def _keep_freed_memory() -> None:
    """Make glibc keep freed memory for the next allocation; without effect on other allocators.

    glibc returns the free end of its heap to the kernel if it is larger than a threshold, which is twice the largest
    block freed so far, of at most 32 MB. With the initial threshold the output of a layer may be returned and requested
    again, page by page, in every call, which took a sixth of the time of the bundled model's f. Freeing a block of
    nearly 32 MB once sets the threshold to its maximum.
    """
    torch.empty(2**25 - 2**16, dtype=torch.uint8, device="cpu")


def _rounds_alike(function: Callable[[Tensor], Tensor], trial: Tensor, count: int) -> bool:
    """Whether each of ``count`` rows gives the same bits at the next place of the chunk; a single row always does."""
    if count == 1:
        return True
    rows = _between(trial, count)
    here, moved = result_of(function, rows), result_of(function, rows.roll(1, 0)).roll(-1, 0)
    return torch.equal(here.nan_to_num(), moved.nan_to_num())


def _between(trial: Tensor, count: int) -> Tensor:
    """``count`` different rows, evenly spaced on the line between the two of ``trial``."""
    share = torch.linspace(0, 1, count, dtype=trial.dtype).view(-1, *[1] * (trial.ndim - 1))
    return trial[:1] + share * (trial[1:2] - trial[:1])


@contextmanager
def few_images(count: int) -> Iterator[None]:
    """Context in which this thread's network calls have only as many rows as ``count`` images need: the smallest
    sufficient number of :attr:`FixedFunction.ladder`, if that is less than a whole chunk.

    A whole chunk of 48 rows takes 25 times as long as one image. Since float32 products of another shape round
    differently, scores agree with those of whole chunks to 1e-5 and not to 1e-9, so do not use it where scores are
    compared with those of a long stream. Do not use it around a generator's ``yield``, since it would then also apply
    to the caller's code.
    """
    before = _INSIDE.__dict__.get("few")
    _INSIDE.few = count
    try:
        yield
    finally:
        _INSIDE.few = before


def fixed_around(function: Callable[..., Any]) -> AbstractContextManager[None]:
    """The context in which to call ``function``: :meth:`FixedFunction.fixed` of the model of which it is a method, else
    :func:`standard_settings`."""
    owner = getattr(function, "__self__", None)
    return owner.fixed() if isinstance(owner, FixedFunction) else standard_settings()


def sizes_side_by_side(function: Callable[..., Any], chunk: int) -> tuple[int, ...]:
    """The numbers of rows up to ``chunk``, ascending, that a call of ``function`` may have if several threads call it;
    empty if all threads have to compute one call.

    Several threads can call only the methods of a model with :attr:`FixedFunction.is_side_by_side`. Even a single chunk
    is then computed by one thread, because the number of threads of a product may change its rounding.
    """
    owner = getattr(function, "__self__", None)
    if not isinstance(owner, FixedFunction) or not owner.is_side_by_side:
        return ()
    # equal_rows was found for the model's own functions: a compiled one rounds calls of other sizes differently.
    fewer = owner.equal_rows if isinstance(function, MethodType) else ()
    return *(rows for rows in fewer if rows < chunk), chunk


def name_around(function: Callable[..., Any]) -> str:
    """Name of ``function`` in messages: f, preceded by the model's name if it is a method of a model."""
    owner = getattr(function, "__self__", None)
    return f"{owner.name}: f" if isinstance(owner, FixedFunction) else "f"


def errors_around(function: Callable[..., Any], name: str) -> AbstractContextManager[None]:
    """Context in which to call ``function``, named ``name`` in messages. If it is a method of a user's model, its
    errors are reported with the user's file and line; if it calls a user's functions, as those of their model."""
    owner = getattr(function, "__self__", None)
    if isinstance(owner, OwnFunctions):
        return errors_of_functions(name)
    return own_code(type(owner), name) if isinstance(owner, FixedFunction) else nullcontext()


def float_type(module: nn.Module) -> torch.dtype | None:
    """The input type of a module: the type of its weights, float32 if they have several, None if there are none."""
    types = float_types(parts_of(module))
    return (types.pop() if len(types) == 1 else torch.float32) if types else None


def _check_type(name: str, parts: list[nn.Module]) -> None:
    short = float_types(parts) - set(FLOATS)
    if short:
        found = " and ".join(sorted(str(t).removeprefix("torch.") for t in short))
        raise TrajOODError(
            f"{name}: expected float32 or float64 weights, got {found}: convert the model with .float(), because "
            "shorter types cannot resolve steps near the tolerance"
        )


# ---------------------------------------------------------------------- evaluation mode, one thread at a time

_INSIDE = threading.local()
"""The modules that this thread has locked, and its number of ``few`` images."""
_GUARD = threading.Lock()
_LOCKS: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_SWITCHED: dict[nn.Module, int] = {}
"""Modules that were in training mode, with the number of passes that hold them in evaluation mode."""


def _lock_of(module: nn.Module) -> threading.RLock:
    with _GUARD:
        return _LOCKS.setdefault(original(module), threading.RLock())


@contextmanager
def _evaluation_mode(parts: list[nn.Module]) -> Iterator[None]:
    """Set only the flags: a module's own ``eval`` and ``train`` may have other effects, which could not be undone."""
    with _GUARD:
        held = [part for part in parts if getattr(part, "training", False) or part in _SWITCHED]
        for part in held:
            _SWITCHED[part] = _SWITCHED.get(part, 0) + 1
            part.training = False
    try:
        yield
    finally:
        with _GUARD:
            for part in held:
                _SWITCHED[part] -= 1
                if not _SWITCHED[part]:
                    del _SWITCHED[part]
                    part.training = True


# ---------------------------------------------------------------------- images of a trial


def trial_rows(shape: tuple[int, ...], like: nn.Module) -> Tensor:
    """A dark and a bright noise image (2, C, H, W) in [0, 1], always the same, in the type and device of ``like``."""
    noise = torch.rand(TRIAL_ROWS, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    images = (noise + torch.arange(TRIAL_ROWS).view(-1, *[1] * len(shape))) / TRIAL_ROWS
    device = next((p.device for p in like.parameters()), images.device)
    return images.to(device, float_type(like) or images.dtype)


# ---------------------------------------------------------------------- changes of weights


class KnownWeights:
    """A record of a model's weights and buffers, to detect later changes.

    :meth:`are_unchanged` compares the identities and version counters of the tensors, and a sample of their values,
    which also detects changes that bypass the counters (``parameter.data``). If these differ, a hash of all values
    decides, so that moving a model or loading equal weights is not a change.
    """

    def __init__(self, model: FixedFunction) -> None:
        self._name, self._modules = model.name, model.modules_used()
        self._digest = self._hash()
        self._mark()

    def are_unchanged(self) -> bool:
        """Whether weights and buffers have the values of the record."""
        if self._marks == self._look() and torch.equal(self._values, torch.cat(self._sample)):
            return True
        if self._hash() != self._digest:
            return False
        self._mark()
        return True

    def check(self) -> None:
        """Raise ``TrajOODError`` if weights or buffers have changed."""
        if not self.are_unchanged():
            raise TrajOODError(
                f"{self._name}: its weights or batch statistics have changed since the scorer was fitted: fit again, "
                "or load the weights that it was fitted with"
            )

    def _mark(self) -> None:
        tensors = self._tensors()
        share = max(_MIN_VALUES, _SAMPLED_VALUES // max(1, len(tensors)))
        self._sample = [_sample_of(t, share) for t in tensors] or [torch.zeros(1, device="cpu")]
        self._marks, self._values = self._look(), torch.cat(self._sample)

    def _tensors(self) -> list[Tensor]:
        return tensors_of([part for module in self._modules for part in parts_of(module)])

    def _look(self) -> list[tuple[int, int, int]]:
        return [(id(t), t.data_ptr(), 0 if t.is_inference() else t._version) for t in self._tensors()]

    def _hash(self) -> list[str]:
        return [fingerprint(module, None) for module in self._modules]


def _sample_of(tensor: Tensor, count: int) -> Tensor:
    """A view of at most about ``count`` values, spread evenly over the tensor's memory."""
    values = tensor.detach()
    size = min(tensor.numel(), values.untyped_storage().nbytes() // values.element_size() - values.storage_offset())
    step = -(-size // count) | 1  # odd, since rows have even lengths and an even step would sample few columns
    return values.as_strided((-(-size // step),), (step,)) if size > 0 else values.flatten()
