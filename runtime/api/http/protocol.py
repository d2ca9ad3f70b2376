"""HTTP/1.1 on a socket, with the deadlines that uvicorn's protocol does not have.

A connection ends when a request's headers are not complete in time (from its first byte on, or from the
connection's start), and when the client reads none of the waiting output for too long. A slow client
loses its own connection only.
"""

import asyncio
import contextlib
import fcntl
import sys
import termios
from collections.abc import Callable, Collection
from typing import Any, ClassVar, cast

import h11
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol
from uvicorn.protocols.websockets.wsproto_impl import WSProtocol

from runtime.api.http.errors import JSON, HeadersTooLarge, encode
from runtime.errors import InvalidRequest, RequestError

# -- linger ----------------------------------------------------------------------------------------
#
# Close a connection without losing the answer.
#
# A socket that is closed while the client still sends answers with a reset, and a reset can destroy what the client
# has not read yet: the 413 with the reason. So the answer is finished, and further input is
# discarded for a moment (RFC 9112, section 9.6).

LINGER = 2.0
"""Seconds that a client gets to read the answer and stop sending."""


class LingeringTransport:
    """A transport whose `close` waits for the client to close too, when the client is still sending."""

    def __init__(self, transport: asyncio.Transport, client_is_sending: Callable[[], bool]) -> None:
        self._transport = transport
        self._client_is_sending = client_is_sending
        self._closing = False

    def close(self) -> None:
        """Close now; or, while the client sends, only the write side, and the rest when the client has closed."""
        if self.is_closing():
            return
        self._closing = True
        if not self._client_is_sending() or not self._transport.can_write_eof():
            self._transport.close()
            return
        self._transport.write_eof()
        self._transport.resume_reading()  # the protocol drops further input, and sees the end
        asyncio.get_running_loop().call_later(LINGER, self._transport.abort)

    def is_closing(self) -> bool:
        return self._closing or self._transport.is_closing()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


MAX_HEADERS = 64 * 1024
"""Bytes of the request line and headers together."""

_SLICE = 16 * 1024


class Deadline:
    """A call that comes after a time, unless it is stopped before. One at most is due."""

    def __init__(self) -> None:
        self._timer: asyncio.TimerHandle | None = None

    @property
    def is_due(self) -> bool:
        return self._timer is not None

    def start(self, loop: asyncio.AbstractEventLoop, seconds: float, call: Callable[[], object]) -> None:
        """Have `call` come after `seconds`, in place of an earlier one."""
        self.stop()
        self._timer = loop.call_later(seconds, self._pass, call)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _pass(self, call: Callable[[], object]) -> None:
        self._timer = None
        call()


class Protocol(H11Protocol):
    """One connection. The deadlines are on the class: make a subclass per server with `configured`."""

    header_timeout: ClassVar[float]
    write_timeout: ClassVar[float]
    socket_paths: ClassVar[Collection[str]]
    """Paths at which a connection may become a WebSocket."""

    on_lost: Callable[[], None] | None = None
    """Called once the connection is gone."""

    _unsent = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._headers_due, self._writes_due = Deadline(), Deadline()

    @classmethod
    def configured(
        cls, *, header_timeout: float, write_timeout: float, socket_paths: Collection[str] = ()
    ) -> type["Protocol"]:
        fields = {"header_timeout": header_timeout, "write_timeout": write_timeout, "socket_paths": socket_paths}
        return type("ConfiguredProtocol", (cls,), fields)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        lingering = LingeringTransport(transport, self._has_unread_input)
        super().connection_made(cast(asyncio.Transport, lingering))
        self._watch_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._headers_due.stop()
        self._writes_due.stop()
        super().connection_lost(exc)
        if self.on_lost is not None:
            self.on_lost()

    @property
    def idle(self) -> bool:
        """True between two requests and before the first byte of one."""
        between = self.cycle is None or self.cycle.response_complete
        return between and self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]

    def data_received(self, data: bytes) -> None:
        # In slices: h11 checks its limit only on headers that are not complete, so a megabyte of them that
        # arrives at once would be parsed.
        for start in range(0, len(data), _SLICE):
            if self.transport.is_closing():
                return  # also discards the rest of a request that was answered early
            super().data_received(data[start : start + _SLICE])
        self._watch_headers()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_headers()
        self._watch_writes()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._watch_writes()  # unsent data would otherwise keep the closed connection open

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_writes()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._writes_due.stop()

    def send_400_response(self, msg: str) -> None:
        """Answer 400. uvicorn calls this when h11 rejects the client's input."""
        cause = sys.exception()
        hint = getattr(cause, "error_status_hint", 400)
        error: RequestError = InvalidRequest("The HTTP request is malformed.")
        if hint == 431:
            error = HeadersTooLarge(f"The headers are longer than {MAX_HEADERS} bytes.")
        try:
            self._send_error(error)
        except h11.LocalProtocolError:  # an answer has begun already
            self.transport.abort()

    def _should_upgrade(self) -> bool:
        """True for a whole handshake where there is a WebSocket. Elsewhere `Upgrade` is ignored, as RFC 9110 has it,
        and the request is answered as it is."""
        headers = dict(self.headers)
        whole = b"sec-websocket-key" in headers and headers.get(b"sec-websocket-version", b"").strip() == b"13"
        return whole and self.scope["path"] in self.socket_paths and super()._should_upgrade()

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        """Hand the connection over to a `SocketProtocol`."""
        self._headers_due.stop()
        self._writes_due.stop()
        super().handle_websocket_upgrade(event)
        cast(SocketProtocol, self.transport.get_protocol()).on_lost = self.on_lost

    def _send_error(self, error: RequestError) -> None:
        body = encode(error)
        headers = [
            (b"content-type", JSON.encode()),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        events: list[Any] = [
            h11.Response(status_code=error.status, headers=headers, reason=STATUS_PHRASES[error.status]),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ]
        for event in events:
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _has_unread_input(self) -> bool:
        return self.conn.their_state in (h11.SEND_BODY, h11.ERROR)

    # -- headers -------------------------------------------------------------------------------

    def _watch_headers(self) -> None:
        """Arm the deadline once a request has begun, and disarm it once its headers are there."""
        if not self._awaits_headers():
            self._headers_due.stop()
        elif not self._headers_due.is_due:
            self._headers_due.start(self.loop, self.header_timeout, self.transport.abort)

    def _awaits_headers(self) -> bool:
        """True if a request has begun and its headers are incomplete. Idle connections have the keep-alive timeout."""
        if self.conn.their_state is not h11.IDLE or self.transport.is_closing():
            return False
        return self.cycle is None or bool(self.conn.trailing_data[0])

    # -- writes --------------------------------------------------------------------------------

    def _watch_writes(self) -> None:
        """Restart the write deadline. Called when no more is written until the client reads, or ever."""
        self._writes_due.stop()
        if self.transport.get_write_buffer_size() > 0:
            self._unsent = self._count_unsent()
            self._writes_due.start(self.loop, self.write_timeout, self._check_writes)

    def _check_writes(self) -> None:
        """Abort the connection if the client took nothing since the last check."""
        answered = self.cycle is None or self.cycle.response_complete
        settled = self.flow.write_paused or self.transport.is_closing() or answered
        if settled and self.transport.get_write_buffer_size() > 0 and self._count_unsent() >= self._unsent:
            self.transport.abort()
        else:
            self._watch_writes()

    def _count_unsent(self) -> int:
        """Bytes that the client has not taken, here and in the kernel: a slow reader empties the kernel's buffer
        long before ours, and differs from a client that reads nothing."""
        waiting: int = self.transport.get_write_buffer_size()
        with contextlib.suppress(OSError, AttributeError):  # not a TCP socket, or not on Linux
            queued = bytearray(4)
            fcntl.ioctl(self.transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, queued)
            waiting += int.from_bytes(queued, sys.byteorder)
        return waiting


# -- WebSockets ------------------------------------------------------------------------------------


class SocketProtocol(WSProtocol):
    """A connection that has become a WebSocket. It ends when the client reads none of the waiting output, or answers
    no ping, for too long."""

    write_timeout: ClassVar[float]

    on_lost: Callable[[], None] | None = None
    """Called once the connection is gone."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._writes_due = Deadline()

    @classmethod
    def configured(cls, *, write_timeout: float) -> type["SocketProtocol"]:
        return type("ConfiguredSocketProtocol", (cls,), {"write_timeout": write_timeout})

    def connection_lost(self, exc: Exception | None) -> None:
        self._writes_due.stop()
        super().connection_lost(exc)
        if self.on_lost is not None:
            self.on_lost()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._writes_due.start(self.loop, self.write_timeout, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._writes_due.stop()

    def keepalive_timeout(self) -> None:
        self.transport.abort()  # closing would wait for output that the client does not read

    def on_task_complete(self, task: "asyncio.Task[None]") -> None:
        super().on_task_complete(task)
        self.loop.call_later(LINGER, self.transport.abort)
