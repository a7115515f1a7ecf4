"""uvicorn's HTTP protocol with limits for clients that are silent, slow, or do not read."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

SILENCE = 20.0  # seconds for the head and body of a request
UNREAD = 30.0  # seconds for which an answer may wait for its reader


class Protocol(H11Protocol):
    """A connection that is aborted when a request takes too long to arrive, or its answer is not read."""

    silence, unread = SILENCE, UNREAD
    _arriving: asyncio.TimerHandle | None = None
    _leaving: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._arriving = self.loop.call_later(self.silence, self._abort)

    def data_received(self, data: bytes) -> None:
        if self._arriving is None:  # the first bytes of a further request
            self._arriving = self.loop.call_later(self.silence, self._abort)
        super().data_received(data)
        if self.cycle is not None and not (self.cycle.more_body or self.cycle.response_complete):
            self._arrived()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._arrived()  # from here the timeout of idle connections counts

    def pause_writing(self) -> None:
        super().pause_writing()
        self._leaving = self._leaving or self.loop.call_later(self.unread, self._abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._leaving is not None:
            self._leaving.cancel()
            self._leaving = None

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._arrived()
        if self._leaving is not None:
            self._leaving.cancel()
            self._leaving = None

    def _arrived(self) -> None:
        if self._arriving is not None:
            self._arriving.cancel()
            self._arriving = None

    def _abort(self) -> None:
        self.transport.abort()
