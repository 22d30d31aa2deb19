"""Limits of the service, and the refusal of requests beyond them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from traj_ood.errors import TrajOODError

BYTES_PER_PIXEL = 28
"""Bytes of memory per pixel while an image is prepared, measured: the decoded image, its RGB copy and the intermediate
results of preprocessing."""


@dataclass(frozen=True)
class Limits:
    """Limits of the service; a request beyond them gets the status 413 or 429, with a reason."""

    images: int = 64  # in one request, and at most ``queue``
    body: int = 32 * 2**20  # bytes of one request, and at most ``bodies``
    bodies: int = 128 * 2**20  # bytes of all requests being received or waiting
    pixels: int = 2**30 // BYTES_PER_PIXEL  # of one image, by its header: 38 million, which take one GiB to decode
    decoded: int = 2**30  # bytes of all images being decoded
    queue: int = 512  # images waiting for the detector, some seconds of work
    linger: float = 0.005  # seconds that an image may wait for others to fill a batch
    batch: int = 64  # images judged at a time: a small part of the queue, so that no image waits long
    patience: float = 30.0  # seconds for a request to arrive (else 408), and again for its response (else 504)

    def __post_init__(self) -> None:
        for name in ("images", "body", "bodies", "pixels", "decoded", "queue", "batch", "patience"):
            if not 0 < getattr(self, name) < math.inf:
                raise TrajOODError(f"{name}: expected a number above 0, got {getattr(self, name)!r}")
        if not 0 <= self.linger < self.patience:
            raise TrajOODError(f"linger: expected seconds from 0 to patience ({self.patience:g}), got {self.linger!r}")
        # A larger request would be answered 429 (try again later) every time.
        object.__setattr__(self, "body", min(self.body, self.bodies))
        object.__setattr__(self, "images", min(self.images, self.queue))


class RefusedError(Exception):
    """Raised to refuse a request with an HTTP status and a reason."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Budget:
    """A resource that all requests share, such as bytes; used only from the event loop's thread. Of ``total``,
    ``taken`` is in use."""

    def __init__(self, total: int, what: str) -> None:
        self.total, self.taken, self._what = total, 0, what

    def take(self, amount: int) -> None:
        """Take ``amount``, or refuse the request with 429; :meth:`give` returns it."""
        if self.taken + amount > self.total:
            raise RefusedError(429, f"{self._what}: {self.total} are taken by other requests: try again")
        self.taken += amount

    def give(self, amount: int) -> None:
        self.taken -= amount

    @contextmanager
    def part(self, amount: int) -> Iterator[None]:
        """Context manager that takes ``amount`` and gives it back at the end of the block."""
        self.take(amount)
        try:
            yield
        finally:
            self.give(amount)
