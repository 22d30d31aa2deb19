"""Checks that a function of rows is deterministic, treats each row on its own and keeps nothing between calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from traj_ood.errors import TrajOODError

TRIAL_ROWS = 2
"""The number of rows of a trial: enough to test whether one image depends on another."""
FLOATS = (torch.float32, torch.float64)
"""The types of what a network returns: shorter ones cannot resolve steps near the tolerance."""
_Rows: TypeAlias = Callable[[Tensor], Tensor]


def check_answer(name: str, answer: object, rows: int) -> Tensor:
    """Return ``answer``, the output of the function ``name``, after checking that it is a tensor of ``rows`` rows.

    Raises:
        TrajOODError: it is not.
    """
    if not isinstance(answer, Tensor):
        raise TrajOODError(f"{name}: expected one tensor, got {type(answer).__name__}: return the tensor alone")
    if not answer.ndim or len(answer) != rows:
        raise TrajOODError(
            f"{name}: expected {rows} rows for {rows} rows, got shape {tuple(answer.shape)}: return one row per input "
            "row, in the same order"
        )
    return answer


def result_of(function: Callable[[Tensor], Any], rows: Tensor) -> Any:
    """``function(rows)`` in memory of its own: a network may begin with an in-place operation on its input, and return
    the same buffer every time, in which two results would always be equal."""
    result = function(rows.clone())
    return result.clone() if isinstance(result, Tensor) else result


def check_floats(name: str, answer: Tensor) -> Tensor:
    """Return ``answer``, the output of the function ``name``, after checking its type.

    Raises:
        TrajOODError: it is neither float32 nor float64.
    """
    if answer.dtype not in FLOATS:
        raise TrajOODError(
            f"{name}: expected float32 or float64, got {str(answer.dtype).removeprefix('torch.')}: convert the model "
            "or its output with .float()"
        )
    return answer


def takes_one(name: str, function: _Rows, rows: Tensor) -> bool:
    """Whether a function accepts a single row; a traced graph may accept only the number of rows it was traced with.

    Raises:
        TrajOODError: the result for a single row has no axis of rows, or differs from that among other rows.
    """
    try:
        again, alone, among = (result_of(function, some) for some in (rows[:1], rows[:1], rows))
    except Exception:  # any network, any error; the other checks report an error of all calls
        return False
    if not (isinstance(alone, Tensor) and isinstance(among, Tensor) and among.dtype in FLOATS):
        return False
    if alone.ndim < among.ndim:
        raise TrajOODError(
            f"{name}: expected shape {(1, *among.shape[1:])} for a single row, got {tuple(alone.shape)}: keep the axis "
            "of rows, which .squeeze() drops (.flatten(1) does not)"
        )
    if alone.shape != among[:1].shape:
        return False
    moved, eps = _difference(alone, among[:1]), torch.finfo(among.dtype).eps
    if moved > eps**0.5 and _difference(again, alone) <= 16 * eps:  # otherwise random, of which check_function tells
        raise TrajOODError(
            f"{name} depends on the number of rows: its outputs for an image alone and beside another differ by "
            f"{moved:.1e} of the largest value: let every row depend on its own image alone"
        )
    return True


def check_function(name: str, function: Callable[[Tensor], Tensor], inputs: Tensor, chunk: int) -> Tensor:
    """Check that a function is deterministic, and that its output for a row does not depend on other rows.

    Rounding is tolerated: 16 units in the last place between two calls of the same shape, half of the digits between
    positions in a batch.

    Args:
        name: name of the function in messages.
        function: rows (n, …) → rows.
        inputs: rows to test it with, of which two are used.
        chunk: number of rows to use if the function accepts no other.
    Returns:
        The outputs for two rows.
    Raises:
        TrajOODError: the function is random, its output for a row depends on other rows, or is not float32 or float64.
    """

    def call(rows: Tensor) -> Tensor:
        return check_answer(name, result_of(function, rows), len(rows))

    rows = inputs[:TRIAL_ROWS]
    try:
        first = call(rows)
    except TrajOODError:
        raise
    except Exception:  # it may accept only ``chunk`` rows; a real error is raised again below
        rows = rows.repeat(-(-chunk // len(rows)), *[1] * (rows.ndim - 1))[:chunk]
        first = call(rows)
    eps = torch.finfo(check_floats(name, first).dtype).eps
    moved = _difference(call(rows), first)
    if moved > 16 * eps:
        raise TrajOODError(
            f"{name} draws random numbers: two calls on the same images differ by {moved:.1e} of the largest value: "
            "return the mean in place of a sample, and switch off dropout and noise in evaluation mode"
        )
    copies = [call(rows[i : i + 1].expand_as(rows).contiguous()) for i in range(len(inputs[:TRIAL_ROWS]))]
    moved = max(_difference(answer, first[i : i + 1].expand_as(answer)) for i, answer in enumerate(copies))
    if moved > eps**0.5:
        raise TrajOODError(
            f"{name} depends on batch-mates: its outputs for an image among others and among copies of itself differ "
            f"by {moved:.1e} of the largest value: let every row depend on its own image alone, such as by running "
            "statistics instead of the batch's (BatchNorm with track_running_stats, LayerNorm, GroupNorm)"
        )
    return first[:TRIAL_ROWS]


def check_forgets(name: str, encode: _Rows, decode: _Rows, images: Tensor, latents: Tensor, rows: int) -> Tensor:
    """Check that ``decode`` reads its latents alone, and nothing that ``encode`` has kept of the images before.

    ``images`` (2, C, H, W) are two different ones, ``latents`` (2, *L) theirs; calls have ``rows`` rows.

    Returns:
        What the latents are decoded to.
    Raises:
        TrajOODError: the same latents are decoded to something else after another image was encoded, or not to one
            float32 or float64 tensor with a row for each.
    """
    latents = latents[torch.arange(rows, device=latents.device) % len(latents)]

    def decoded_after(image: Tensor) -> Tensor:
        encode(image.repeat(rows, *[1] * (image.ndim - 1)))
        answer = check_answer(f"{name}: decode", result_of(decode, latents), rows)
        return check_floats(f"{name}: decode", answer)

    first = decoded_after(images[:1])
    bound = 16 * torch.finfo(first.dtype).eps
    if _difference(result_of(decode, latents), first) > bound:
        return first  # random, of which check_function tells
    moved = _difference(decoded_after(images[1:2]), first)
    if moved > bound:
        raise TrajOODError(
            f"{name}: decode remembers the images that were encoded before: the same latents give images that differ "
            f"by {moved:.1e} of the largest value: expected a function of the latents alone; skip connections, as in a "
            "U-Net, define no map f(z) = encode(decode(z)): remove them, or return all that decode needs as the latent"
        )
    return first


def _difference(a: Tensor, b: Tensor) -> float:
    """Largest |a − b| relative to the largest |b|, over elements that are finite in both."""
    known = a.isfinite() & b.isfinite()
    if a.shape != b.shape or not bool(known.any()):
        return 0.0
    return float((a - b)[known].abs().max() / b[known].abs().max().clamp(min=torch.finfo(b.dtype).tiny))
