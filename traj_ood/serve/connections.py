"""Connections that ask for nothing are closed: a service takes a few hundred at a time."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol


def connections(patience: float) -> type[H11Protocol]:
    """uvicorn's protocol on h11, which bounds a request's head at 64 KiB, for connections that have to begin a request
    within ``patience`` seconds of their start and of each answer, and a half more at most; uvicorn alone waits for ever
    for a head that does not end, and for the rest of a body that it has refused."""

    class Connection(H11Protocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._idle_since = self.loop.time()
            self._look: asyncio.TimerHandle = self.loop.call_later(patience / 2, self._close_when_idle)

        def connection_lost(self, exc: Exception | None) -> None:
            self._look.cancel()
            super().connection_lost(exc)

        def _close_when_idle(self) -> None:
            now = self.loop.time()
            if self.cycle is not None and not self.cycle.response_complete:
                self._idle_since = now  # the application bounds how long a body and an answer may take
            elif now - self._idle_since >= patience:
                self.transport.close()
                return
            self._look = self.loop.call_later(patience / 2, self._close_when_idle)

    return Connection
