"""Idle connections are closed, because the service accepts only a few hundred at a time."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol


def connections(patience: float) -> type[H11Protocol]:
    """uvicorn's h11 protocol, extended to close idle connections.

    A connection is closed if it begins no request within ``patience`` seconds of its start or of its last response; the
    check runs every half of that. uvicorn alone waits for ever for an unfinished header, and for the rest of a refused
    body. h11 limits a header to 64 KiB.
    """

    class Connection(H11Protocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._idle_since = self.loop.time()
            self._check: asyncio.TimerHandle = self.loop.call_later(patience / 2, self._close_when_idle)

        def connection_lost(self, exc: Exception | None) -> None:
            self._check.cancel()
            super().connection_lost(exc)

        def _close_when_idle(self) -> None:
            now = self.loop.time()
            if self.cycle is not None and not self.cycle.response_complete:
                self._idle_since = now  # the application limits the time for a body and a response
            elif now - self._idle_since >= patience:
                self.transport.close()
                return
            self._check = self.loop.call_later(patience / 2, self._close_when_idle)

    return Connection
