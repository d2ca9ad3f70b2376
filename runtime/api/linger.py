"""Closing a connection without taking back the answer.

A socket that is closed while the client still sends answers with a reset, and a reset can destroy what the
client has not read yet: the 413 that would have told it what is wrong. So the answer is finished, and what
still comes is thrown away for a moment (RFC 9112, section 9.6).
"""

import asyncio
from collections.abc import Callable
from typing import Any

LINGER = 2.0
"""Seconds that a client gets to read the answer and stop sending."""


class LingeringTransport:
    """A transport whose `close` waits for the client to close too, when the client is still sending."""

    def __init__(self, transport: asyncio.Transport, client_is_sending: Callable[[], bool]) -> None:
        self._transport = transport
        self._client_is_sending = client_is_sending
        self._closing = False

    def close(self) -> None:
        """Close now, or half now and half when the client has closed its side."""
        if self.is_closing():
            return
        self._closing = True
        if not self._client_is_sending() or not self._transport.can_write_eof():
            self._transport.close()
            return
        self._transport.write_eof()
        self._transport.resume_reading()  # the protocol drops what comes, and sees the end
        asyncio.get_running_loop().call_later(LINGER, self._transport.abort)

    def is_closing(self) -> bool:
        return self._closing or self._transport.is_closing()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)
