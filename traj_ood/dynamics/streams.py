"""Streams that are processed in order, with several items in progress at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

_Item = TypeVar("_Item")
_Companion = TypeVar("_Companion")
_Result = TypeVar("_Result")


def accompanied(
    process: Callable[[Iterator[_Item]], Iterable[_Result]], pairs: Iterable[tuple[_Item, _Companion]]
) -> Iterator[tuple[_Companion, _Result]]:
    """Pass the first of each pair through ``process``, and yield the second with the result.

    Args:
        process: a stream of items → a stream of one result per item, in order; it may read ahead.
        pairs: the items, each with what belongs to it.
    """
    waiting: deque[_Companion] = deque()

    def items() -> Iterator[_Item]:
        for item, companion in pairs:
            waiting.append(companion)
            yield item

    for result in process(items()):
        yield waiting.popleft(), result
