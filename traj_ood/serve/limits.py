"""What the service takes at most, and who is refused beyond that."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from traj_ood.errors import TrajOODError

BYTES_PER_PIXEL = 28
"""Measured: as decoded, as RGB, and what the model's preprocessing makes of it on the way."""


@dataclass(frozen=True)
class Limits:
    """What the service takes at most; a request beyond them is answered 413 or 429, with a reason.

    Attributes:
        images: in one request, and no more than ``queue``. Default 64.
        body: bytes of one request, and no more than ``bodies``. Default 32 MiB.
        bodies: bytes of all requests that are being received or waiting. Default 128 MiB.
        pixels: of one image, by its header. Default 38 million, what one GiB holds decoded.
        decoded: bytes of all images that are being decoded, at 28 bytes a pixel. Default 1 GiB.
        queue: images that wait for the detector. Default 512, some seconds of work.
        linger: seconds that an image may wait for others to be judged with it. Default 0.005.
        batch: images judged at a time. Default 64: a small part of the queue, so that none waits for long.
        patience: seconds for a request to arrive, and again for its answer (408, 504). Default 30.
    Raises:
        TrajOODError: a limit that no request could meet.
    """

    images: int = 64
    body: int = 32 * 2**20
    bodies: int = 128 * 2**20
    pixels: int = 2**30 // BYTES_PER_PIXEL
    decoded: int = 2**30
    queue: int = 512
    linger: float = 0.005
    batch: int = 64
    patience: float = 30.0

    def __post_init__(self) -> None:
        for name in ("images", "body", "bodies", "pixels", "decoded", "queue", "batch", "patience"):
            if not 0 < getattr(self, name) < math.inf:
                raise TrajOODError(f"{name}: expected a number above 0, got {getattr(self, name)!r}")
        if not 0 <= self.linger < self.patience:
            raise TrajOODError(f"linger: expected seconds from 0 to patience ({self.patience:g}), got {self.linger!r}")
        # Beyond these a request would be told for ever to try again.
        object.__setattr__(self, "body", min(self.body, self.bodies))
        object.__setattr__(self, "images", min(self.images, self.queue))


class RefusedError(Exception):
    """A request that is answered with this status and reason."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Budget:
    """An amount that all requests share; used from the event loop's thread alone.

    Attributes:
        total: of it. taken: now. peak: the largest part that was ever taken.
    """

    def __init__(self, total: int, what: str) -> None:
        self.total, self.taken, self.peak = total, 0, 0
        self._what = what

    def take(self, amount: int) -> None:
        """Take ``amount``; :meth:`give` returns it.

        Raises:
            RefusedError: 429, there is not as much left.
        """
        if self.taken + amount > self.total:
            raise RefusedError(429, f"{self._what}: {self.total} are taken by other requests: try again")
        self.taken += amount
        self.peak = max(self.peak, self.taken)

    def give(self, amount: int) -> None:
        self.taken -= amount

    @contextmanager
    def part(self, amount: int) -> Iterator[None]:
        """``amount`` until the block ends."""
        self.take(amount)
        try:
            yield
        finally:
            self.give(amount)
