"""A network as a fixed function: evaluation mode, torch's standard settings, one thread at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from traj_ood.dynamics.device import standard_settings
from traj_ood.errors import TrajOODError
from traj_ood.io.weights import fingerprint, float_types, parts_of, tensors_of

_F = TypeVar("_F", bound="FixedFunction")
_ROWS = 2
"""Of a trial: enough for one image to stand beside another."""
_FLOATS = (torch.float32, torch.float64)
_SAMPLED_VALUES, _MIN_VALUES = 2**15, 16
"""Values of a model's weights that are looked at in all, and at least of a tensor."""


LADDER = (1, 6, 12, 24, 48, 96)
"""Sizes of calls with few images: one, and then what takes no longer than the next smaller one would for its rows. Six
rows are what MKL's matrix products take at a time (see :func:`traj_ood.dynamics.iterate.rows_per_call`)."""


class FixedFunction:
    """Base class of what wraps a network: a name and a module. Every pass through it runs inside :meth:`fixed`.

    Attributes:
        name: what errors call it. module: the network. chunk: rows of one of its calls.
        ladder: numbers of rows that a call may have in place of ``chunk`` when there are few images, see
            :func:`few_images`. Default :data:`LADDER`; of a network that takes no other number than ``chunk``, which
            :meth:`try_out` finds out, none.
    """

    name: str
    module: nn.Module
    chunk: int
    ladder: tuple[int, ...] = LADDER
    _is_tried: bool = False

    @property
    def device(self) -> torch.device:
        """Where the weights are; the CPU for a module without any."""
        return next((p.device for p in self.module.parameters()), torch.device("cpu"))

    def to(self: _F, device: torch.device | str) -> _F:
        """Move the network; returns itself."""
        self.module.to(device)
        return self

    @property
    def rows(self) -> int:
        """Rows of a call now: ``chunk``, or within :func:`few_images` the smallest of ``ladder`` that holds these."""
        count = _INSIDE.__dict__.get("few")
        if count is None:
            return self.chunk
        return next((rows for rows in self.ladder if count <= rows < self.chunk), self.chunk)

    def modules_used(self) -> tuple[nn.Module, ...]:
        """Every network whose weights and training flags decide what comes out."""
        return (self.module,)

    @contextmanager
    def fixed(self) -> Iterator[None]:
        """Evaluation mode for all modules and the device's ``standard_settings``, in one thread at a time.

        The caller's training flags and settings come back at the end, also after an error. Re-entrant. Entered once a
        pass, not once a step. Gradients are left as they are.

        Raises:
            TrajOODError: weights that are neither float32 nor float64.
        """
        modules = sorted(self.modules_used(), key=id)  # one order for all, so that no two threads wait for each other
        held: list[nn.Module] = _INSIDE.__dict__.setdefault("modules", [])
        if all(any(module is other for other in held) for module in modules):  # a pass inside a pass
            yield
            return
        with ExitStack() as stack:
            for module in modules:
                stack.enter_context(_lock_of(module))
            parts = [parts_of(module) for module in modules]
            for own in parts:
                _check_type(self.name, own)
            stack.enter_context(standard_settings())
            for own in parts:
                stack.enter_context(_evaluation_mode(own))
            held.extend(modules)
            stack.callback(held.__delitem__, slice(len(held) - len(modules), None))
            yield

    def try_once(self) -> None:
        """Run :meth:`try_out` the first time this model is used."""
        if not self._is_tried:
            self.try_out()
            self._is_tried = True

    def try_out(self) -> None:
        """Refuse a network that is not a fixed function; called under :meth:`fixed` and without gradients.

        Raises:
            TrajOODError: see :func:`check_function`.
        """


@contextmanager
def few_images(count: int) -> Iterator[None]:
    """Within it this thread's calls of networks have as few rows as ``count`` images need.

    A whole chunk of 48 rows for one image takes 25 times as long. But a float32 product of another shape rounds
    otherwise, so that scores are those of whole chunks to 1e-5, and not to 1e-9: nothing that compares scores with
    those of a long stream may be within it. Not around a generator's ``yield``, which the caller's code would be in.
    """
    before = _INSIDE.__dict__.get("few")
    _INSIDE.few = count
    try:
        yield
    finally:
        _INSIDE.few = before


def fixed_around(function: Callable[..., Any]) -> AbstractContextManager[None]:
    """:meth:`FixedFunction.fixed` of the model that ``function`` is a method of; standard settings for any other
    function."""
    owner = getattr(function, "__self__", None)
    return owner.fixed() if isinstance(owner, FixedFunction) else standard_settings()


def name_around(function: Callable[..., Any]) -> str:
    """How errors name ``function``: f, with the model's name where it is a method of a model."""
    owner = getattr(function, "__self__", None)
    return f"{owner.name}: f" if isinstance(owner, FixedFunction) else "f"


def float_type(module: nn.Module) -> torch.dtype | None:
    """The type that a module takes: that of its weights, float32 where they have several types, None where it has
    none."""
    types = float_types(parts_of(module))
    return (types.pop() if len(types) == 1 else torch.float32) if types else None


def _check_type(name: str, parts: list[nn.Module]) -> None:
    short = float_types(parts) - set(_FLOATS)
    if short:
        found = " and ".join(sorted(str(t).removeprefix("torch.") for t in short))
        raise TrajOODError(
            f"{name}: expected float32 or float64 weights, got {found}: convert the model with .float(); steps as "
            "short as the tolerance need it"
        )


# ---------------------------------------------------------------------- evaluation mode, one thread at a time

_INSIDE = threading.local()
"""What this thread holds."""
_GUARD = threading.Lock()
_LOCKS: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_SWITCHED: dict[nn.Module, int] = {}
"""Modules that were in training mode, and how many passes hold them in evaluation mode: parts may be shared."""


def _lock_of(module: nn.Module) -> threading.RLock:
    with _GUARD:
        return _LOCKS.setdefault(getattr(module, "_orig_mod", module), threading.RLock())  # what torch.compile wraps


@contextmanager
def _evaluation_mode(parts: list[nn.Module]) -> Iterator[None]:
    """The flags alone: a module's own ``eval`` and ``train`` may do more, and could not be undone."""
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


# ---------------------------------------------------------------------- is it one?


def check_answer(name: str, answer: object, rows: int) -> Tensor:
    """Check that ``answer`` is a tensor of ``rows`` rows, and return it.

    Raises:
        TrajOODError: names the function, what it returned, and what to return.
    """
    if not isinstance(answer, Tensor):
        raise TrajOODError(f"{name}: expected one tensor, got {type(answer).__name__}: return the tensor alone")
    if not answer.ndim or len(answer) != rows:
        raise TrajOODError(
            f"{name}: expected {rows} rows for {rows} rows, got shape {tuple(answer.shape)}: return one row for each, "
            "in their order"
        )
    return answer


def takes(function: Callable[[Tensor], Tensor], rows: Tensor) -> bool:
    """Whether a function takes one row alone: a recorded graph may take one number of rows and no other."""
    try:
        return len(function(rows[:1])) == 1
    except Exception:  # any network, any error
        return False


def check_function(name: str, function: Callable[[Tensor], Tensor], inputs: Tensor, chunk: int) -> Tensor:
    """Refuse a function of rows (n, …) whose output for a row depends on other rows, or changes from call to call.

    Rounding is let pass: 16 units in the last place between two calls of one shape, half of the digits between places
    in a batch. A network that takes no other batches than ``chunk`` rows is tried on as many.

    Returns:
        The answers to two rows.
    Raises:
        TrajOODError: it draws random numbers, or looks at other rows of the batch; says what to do.
    """

    def call(rows: Tensor) -> Tensor:
        return check_answer(name, function(rows), len(rows))

    rows = inputs[:_ROWS]
    try:
        first = call(rows)
    except TrajOODError:
        raise
    except Exception:  # any network, any error: the caller's own call names it, if this one has it, too
        rows = rows.repeat(-(-chunk // len(rows)), *[1] * (rows.ndim - 1))[:chunk]
        first = call(rows)
    eps = torch.finfo(first.dtype).eps if first.is_floating_point() else 1.0
    moved = _difference(call(rows), first)
    if moved > 16 * eps:
        raise TrajOODError(
            f"{name} draws random numbers: two calls on the same images differ by {moved:.1e} of the largest value: "
            "return the mean in place of a sample, and switch off dropout and noise in evaluation mode"
        )
    copies = [call(rows[i : i + 1].expand_as(rows).contiguous()) for i in range(len(inputs[:_ROWS]))]
    moved = max(_difference(answer, first[i : i + 1].expand_as(answer)) for i, answer in enumerate(copies))
    if moved > eps**0.5:
        raise TrajOODError(
            f"{name} depends on batch-mates: an image among others and among copies of itself differ by {moved:.1e} of "
            "the largest value: let every row depend on its own image alone, such as with running statistics in place "
            "of the batch's (BatchNorm with track_running_stats, LayerNorm, GroupNorm)"
        )
    return first[:_ROWS]


def trial_rows(shape: tuple[int, ...], like: nn.Module) -> Tensor:
    """A dark and a bright image (2, C, H, W) of noise in [0, 1], always the same, as ``like`` takes them."""
    noise = torch.rand(_ROWS, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    images = (noise + torch.arange(_ROWS).view(-1, *[1] * len(shape))) / _ROWS
    device = next((p.device for p in like.parameters()), images.device)
    return images.to(device, float_type(like) or images.dtype)


def _difference(a: Tensor, b: Tensor) -> float:
    """Largest |a − b| as a share of the largest |b|, where both are finite."""
    known = a.isfinite() & b.isfinite()
    if a.shape != b.shape or not bool(known.any()):
        return 0.0
    return float((a - b)[known].abs().max() / b[known].abs().max().clamp(min=torch.finfo(b.dtype).tiny))


# ---------------------------------------------------------------------- are its weights what they were?


class KnownWeights:
    """A record of a model's weights and buffers, to detect later changes.

    A look compares the tensors' identities and version counters and a sample of their values, which also sees what goes
    past the counters (``parameter.data``). Where those differ a hash of all values decides, so that moving a model, or
    loading equal weights into it, changes nothing.
    """

    def __init__(self, model: FixedFunction) -> None:
        self._name, self._modules = model.name, model.modules_used()
        self._digest = self._hash()
        self._mark()

    def check(self) -> None:
        """Raises ``TrajOODError`` when they have changed."""
        if self._marks == self._look() and torch.equal(self._values, torch.cat(self._sample)):
            return
        if self._hash() != self._digest:
            raise TrajOODError(
                f"{self._name}: its weights, or batch statistics, have changed since the scorer was fitted: fit again, "
                "or load the weights that it was fitted with"
            )
        self._mark()

    def _mark(self) -> None:
        tensors = self._tensors()
        share = max(_MIN_VALUES, _SAMPLED_VALUES // max(1, len(tensors)))
        self._marks, self._sample = (
            self._look(),
            [torch.zeros(1, device="cpu"), *(_sample_of(t, share) for t in tensors)],
        )
        self._values = torch.cat(self._sample)

    def _tensors(self) -> list[Tensor]:
        return tensors_of([part for module in self._modules for part in parts_of(module)])

    def _look(self) -> list[tuple[int, int, int]]:
        return [(id(t), t.data_ptr(), 0 if t.is_inference() else t._version) for t in self._tensors()]

    def _hash(self) -> list[str]:
        return [fingerprint(module, None) for module in self._modules]


def _sample_of(tensor: Tensor, count: int) -> Tensor:
    """A view of at most ``count`` of the values, all over the tensor, whatever order they lie in."""
    values = tensor.detach()
    size = min(tensor.numel(), values.untyped_storage().nbytes() // values.element_size() - values.storage_offset())
    step = -(-size // count) | 1  # odd: rows are of even lengths, and a column is not the tensor
    return values.as_strided((-(-size // step),), (step,)) if size > 0 else values.flatten()
