"""Accept connections: at most as many as there are descriptors for, with a pause while there are none.

asyncio's and uvloop's own servers accept every connection. At the limit of descriptors that leaves none for the
database, checkpoints and uploads, so a client that only holds sockets open could end the jobs of others.
"""

import asyncio
import contextlib
import math
import os
import resource
import socket
from collections.abc import Callable

from runtime.api.http.protocol import Protocol
from runtime.support.logs import get_logger

RESERVED_DESCRIPTORS = 128
"""Descriptors kept free for files; a quarter of the limit if that is less."""
MOST_DESCRIPTORS = 1 << 20
"""Highest limit that is set: the hard one may be a billion, and some libraries make tables of that size."""
ACCEPTED_AT_ONCE = 64
"""Connections taken in one turn of the event loop."""
QUIET_SECONDS = 10.0
"""Seconds between two log lines about the limit: clients decide how often it is reached."""
RETRY_SECONDS = 0.5
"""Seconds of pause after the kernel has refused a descriptor."""

_log = get_logger("server")


def raise_descriptor_limit() -> int:
    """Raise the soft limit of open descriptors as far as allowed. Returns the new limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MOST_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            return wanted
    return MOST_DESCRIPTORS if soft == resource.RLIM_INFINITY else soft


def connections_for(limit: int) -> int:
    """Number of connections that `limit` descriptors leave room for, besides the descriptors open now."""
    reserve = min(RESERVED_DESCRIPTORS, limit // 4)
    return max(4, limit - len(os.listdir("/proc/self/fd")) - reserve)


class Acceptor:
    """Takes connections off one listening socket. Event loop only."""

    def __init__(
        self,
        listener: socket.socket,
        make_protocol: Callable[[], Protocol],
        *,
        most: int,
        make_room: Callable[[], None],
    ) -> None:
        """At most `most` connections are open at once; at that many `make_room` may close idle ones."""
        self._listener = listener
        self._make_protocol = make_protocol
        self._most = most
        self._make_room = make_room
        self._loop = asyncio.get_running_loop()
        self._open = 0
        self._accepting = False
        self._closed = False
        self._retry: asyncio.TimerHandle | None = None
        self._last_warning = -math.inf
        self._tasks: set[asyncio.Task[None]] = set()
        self._resume()

    def close(self) -> None:
        """Stop accepting connections; open ones stay."""
        self._closed = True
        self._pause()
        if self._retry is not None:
            self._retry.cancel()

    def _accept(self) -> None:
        for _ in range(ACCEPTED_AT_ONCE):
            if self._open >= self._most:
                self._warn()
                self._pause()
                self._make_room()
                return
            try:
                connection, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:  # EMFILE, ENFILE, ENOBUFS, ENOMEM: descriptors may become free again
                _log.warning("cannot_accept", reason=error.strerror)
                self._pause()
                self._retry = self._loop.call_later(RETRY_SECONDS, self._resume)
                return
            connection.setblocking(False)
            self._open += 1
            task = self._loop.create_task(self._hand_over(connection))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _warn(self) -> None:
        if self._loop.time() - self._last_warning >= QUIET_SECONDS:
            self._last_warning = self._loop.time()
            _log.warning("connections_at_limit", limit=self._most)

    async def _hand_over(self, connection: socket.socket) -> None:
        protocol = self._make_protocol()
        protocol.on_lost = self._on_lost
        try:
            await self._loop.connect_accepted_socket(lambda: protocol, connection)
        except Exception as error:
            _log.warning("cannot_accept", reason=str(error))
            connection.close()
            self._on_lost()

    def _on_lost(self) -> None:
        self._open -= 1
        if not self._accepting and self._open < self._most and self._retry is None:
            self._resume()

    def _resume(self) -> None:
        self._retry = None
        if not self._accepting and not self._closed:
            self._accepting = True
            self._loop.add_reader(self._listener.fileno(), self._accept)

    def _pause(self) -> None:
        if self._accepting:
            self._accepting = False
            self._loop.remove_reader(self._listener.fileno())
