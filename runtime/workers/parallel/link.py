"""One end of a stream to another process: whole messages of bytes, each behind its length."""

import select
import socket
import struct
import time

_LENGTH = struct.Struct("<Q")
_CHUNK = 1 << 20
MOST = 1 << 34
"""Bytes that one message may have: a length beyond is no length."""


class LinkClosed(ConnectionError):
    """The other end is gone."""


class Link:
    """One end of a stream. For one thread at a time."""

    def __init__(self, stream: socket.socket) -> None:
        self._stream = stream
        self._stream.setblocking(False)
        if stream.family != socket.AF_UNIX:
            stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, data: bytes, deadline: float | None = None) -> None:
        """Raises `LinkClosed`, and `TimeoutError` when the other end has not taken it by `deadline` (monotonic)."""
        rest = memoryview(_LENGTH.pack(len(data)) + data)
        while rest:
            try:
                rest = rest[self._stream.send(rest) :]
            except BlockingIOError:
                self._wait(select.POLLOUT, deadline)
            except OSError as error:
                raise LinkClosed(str(error)) from None

    def receive(self, deadline: float | None = None, *, most: int = MOST) -> bytes:
        """The next message. Raises `LinkClosed`, also for one of more than `most` bytes, and `TimeoutError` when it is
        not there by `deadline`."""
        (length,) = _LENGTH.unpack(self._exactly(_LENGTH.size, deadline))
        if length > most:
            raise LinkClosed(f"a message of {length} bytes")
        return self._exactly(length, deadline)

    def close(self) -> None:
        self._stream.close()

    def _exactly(self, count: int, deadline: float | None) -> bytes:
        parts: list[bytes] = []
        while count:
            try:
                part = self._stream.recv(min(count, _CHUNK))
            except BlockingIOError:
                self._wait(select.POLLIN, deadline)
                continue
            except OSError as error:
                raise LinkClosed(str(error)) from None
            if not part:
                raise LinkClosed("the other end has closed")
            parts.append(part)
            count -= len(part)
        return b"".join(parts)

    def _wait(self, event: int, deadline: float | None) -> None:
        poll = select.poll()
        poll.register(self._stream, event)
        left = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
        if not poll.poll(left) and deadline is not None:
            raise TimeoutError
