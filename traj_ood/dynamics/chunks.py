"""f on a fixed number of rows at a time: float32 products round by their shape, and no row may follow its batch."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from traj_ood.dynamics.fixed_function import check_answer
from traj_ood.errors import TrajOODError

ROWS = 24
"""Rows per call of a network that says nothing about itself (see :func:`rows_per_call`)."""


def rows_per_call(target: float) -> int:
    """About ``target`` rows, such that a row's place among them does not change its rounding: 1, or 6, 12, 24, 48, 96.

    MKL's matrix products on processors without AVX-512 take six rows at a time and round what is left over otherwise:
    of 128 rows the last two, which a trajectory then amplifies to 1e-6 of f.
    """
    return 1 if target < 3 else 6 * 2 ** min(4, max(0, round(math.log2(target / 6))))


def apply_in_chunks(function: Callable[[Tensor], Tensor], inputs: Tensor, chunk: int, name: str = "f") -> Tensor:
    """``function`` on exactly ``chunk`` rows at a time, whatever the batch: float32 products round by their shape.

    A last chunk that is short is filled up with copies of its last row, and their results are dropped. Every chunk is a
    copy: a network may begin with an operation in place, such as ``nn.ReLU(inplace=True)``, and the rows are the
    caller's.

    Raises:
        TrajOODError: an answer that is no tensor of ``chunk`` rows, or chunks whose answers do not go together; calls
            the function ``name``.
    """
    if not len(inputs):
        return check_answer(name, function(inputs.new_zeros(chunk, *inputs.shape[1:])), chunk)[:0]
    answers: Tensor | None = None
    for first, part in zip(range(0, len(inputs), chunk), inputs.split(chunk), strict=True):
        answer = check_answer(name, function(filled(part, chunk)), chunk)
        if answers is None:  # copied into: a network may answer in one buffer again and again
            answers = answer.new_empty((len(inputs), *answer.shape[1:]))
        if kind(answer) != kind(answers):
            raise TrajOODError(
                f"{name}: expected rows alike in every chunk, got {kind(answers)} and then {kind(answer)}: return "
                "one shape, type and device"
            )
        answers[first : first + len(part)] = answer[: len(part)]
    assert answers is not None
    return answers


def filled(rows: Tensor, count: int) -> Tensor:
    """A copy with its last row repeated up to ``count`` rows, in the usual order in memory: convolutions round images
    whose channels come last otherwise."""
    full = rows.new_empty((count, *rows.shape[1:]))
    full[: len(rows)] = rows
    full[len(rows) :] = rows[-1:]
    return full


def kind(rows: Tensor) -> str:
    return f"{str(rows.dtype).removeprefix('torch.')} {tuple(rows.shape[1:])} on {rows.device}"
