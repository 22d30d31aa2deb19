"""Calls of a function on a fixed number of rows, because the rounding of float32 products depends on the shape."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import closing

import torch
from torch import Tensor

from traj_ood.dynamics.fixed_function import errors_around, sizes_side_by_side
from traj_ood.dynamics.function_checks import check_answer
from traj_ood.dynamics.workers import in_threads, thread_count
from traj_ood.errors import TrajOODError

ROWS = 24
"""Default number of rows per call (see :func:`rows_per_call`)."""


def rows_per_call(target: float) -> int:
    """The number of rows near ``target`` for which rounding does not depend on a row's position: 1, 6, 12, 24, 48 or
    96.

    On processors without AVX-512, MKL's matrix products process six rows at a time and round the remaining rows
    differently: of 128 rows the last two. A trajectory amplifies that difference to 1e-6 of f.
    """
    return 1 if target < 3 else 6 * 2 ** min(4, max(0, round(math.log2(target / 6))))


def apply_in_chunks(
    function: Callable[[Tensor], Tensor],
    inputs: Tensor,
    chunk: int,
    name: str = "f",
    beside: Callable[[], None] | None = None,
) -> Tensor:
    """Apply ``function`` to ``inputs`` in calls of exactly ``chunk`` rows, so that results do not depend on the batch.

    A short last chunk is padded with copies of its last row, whose results are dropped. Every chunk is a copy, because
    a network may begin with an in-place operation such as ``nn.ReLU(inplace=True)``.

    On the CPU, chunks of a model with ``side_by_side`` are computed by several threads at once, a chunk each. Several
    threads in each small product are slightly slower on an idle machine, and several times on a busy one. Such a model
    is called with fewer rows where that changes no bit of the result (``FixedFunction.equal_rows``).

    Args:
        function: rows (chunk, *I) → rows (chunk, *O); each row of the result depends on its own row alone.
        inputs: (B, *I).
        chunk: rows per call.
        name: name of the function in messages.
        beside: another task, which one of the threads does meanwhile; it is done first if chunks do not run side by
            side.
    Returns:
        (B, *O).
    Raises:
        TrajOODError: the function does not return as many rows as it was given, or its results for two chunks differ in
            shape, type or device.
    """
    if not len(inputs):
        with errors_around(function, name):
            return check_answer(name, function(inputs.new_zeros(chunk, *inputs.shape[1:])), chunk)[:0]
    no_gradients = torch.is_inference_mode_enabled()
    sizes = sizes_side_by_side(function, chunk) if no_gradients else ()

    def size_for(count: int) -> int:
        return next((size for size in sizes if size >= count), chunk)

    def call(part: Tensor) -> Tensor:
        size = size_for(len(part))
        with errors_around(function, name):
            return check_answer(name, function(filled(part, size)), size)

    threads = thread_count()
    parts = list(inputs.split(size_for(-(-len(inputs) // threads))))
    if threads > 1:  # halves let the threads end at about the same time
        parts[-1:] = parts[-1].split(size_for(-(-len(parts[-1]) // 2)))
    if not sizes and beside is not None:
        beside()
    answers: Tensor | None = None
    first = 0
    # Closed at once after an error: until then threads run, and torch's operations have one thread.
    with closing(in_threads(call, parts, beside) if sizes else (call(part) for part in parts)) as results:
        for part, answer in zip(parts, results, strict=True):
            if answers is None:  # copy the results: a network may return the same buffer every time
                answers = answer.new_empty((len(inputs), *answer.shape[1:]))
            if kind(answer) != kind(answers):
                raise TrajOODError(
                    f"{name}: expected the same shape, type and device for every chunk, got {kind(answers)} and then "
                    f"{kind(answer)}: return rows of one kind"
                )
            answers[first : first + len(part)] = answer[: len(part)]
            first += len(part)
    assert answers is not None
    return answers


def filled(rows: Tensor, count: int) -> Tensor:
    """A copy of ``rows``, padded to ``count`` rows with its last row; always in contiguous memory order, because
    convolutions round images in channels-last order differently."""
    full = rows.new_empty((count, *rows.shape[1:]))
    full[: len(rows)] = rows
    full[len(rows) :] = rows[-1:]
    return full


def kind(rows: Tensor) -> str:
    """Type, row shape and device of a tensor as text, for comparisons and messages."""
    return f"{str(rows.dtype).removeprefix('torch.')} {tuple(rows.shape[1:])} on {rows.device}"
