"""A POST that is answered with server-sent events, at little cost: it shares the cores with the peer that it measures.

httpx takes 0.1 to 0.4 ms of a core for an event, which with 32 streams is a good part of a step. This is HTTP/1.1 as
far as servers on the same machine speak it, a connection for each request, as of strangers.
"""

import asyncio
import time
from collections.abc import Callable

OnEvent = Callable[[bytes, float], None]
"""Takes an event's data, and when it came, in `time.perf_counter()` seconds."""


class AnswerError(Exception):
    """The answer is no stream of events, or not all of one."""


async def post(host: str, port: int, path: str, body: bytes, on_event: OnEvent) -> None:
    """Returns at the end of the answer. Raises `AnswerError`, `OSError`, and what `on_event` raises."""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    loop = asyncio.get_running_loop()
    transport, answer = await loop.create_connection(lambda: _Answer(on_event), host, port)
    try:
        transport.write(head.encode() + body)
        await answer.ended
    finally:
        transport.abort()


class _Answer(asyncio.Protocol):
    def __init__(self, on_event: OnEvent) -> None:
        self.ended = asyncio.get_running_loop().create_future()
        self._on_event = on_event
        self._status = 0
        """0 until the header is there."""
        self._chunked = False
        self._came = b""
        """What belongs to a header or a chunk that is not whole yet."""
        self._line = b""
        """The body since its last line end; all of it where it is an error's."""

    def data_received(self, data: bytes) -> None:
        if self.ended.done():
            return
        try:
            self._came += data
            if not self._status and not self._read_head():
                return
            if self._chunked:
                self._read_chunks(time.perf_counter())
            else:
                self._read_body(self._came, time.perf_counter())
                self._came = b""
        except Exception as error:
            self.ended.set_exception(error)

    def connection_lost(self, error: Exception | None) -> None:
        if self.ended.done():
            return
        if error is None and self._status == 200 and not self._chunked:
            self.ended.set_result(None)
        elif self._status not in (0, 200):
            self.ended.set_exception(AnswerError(f"{self._status}: {self._line.decode(errors='replace')}"))
        else:
            self.ended.set_exception(error or AnswerError("the connection ended before the answer did"))

    def _read_head(self) -> bool:
        head, end, rest = self._came.partition(b"\r\n\r\n")
        if end:
            self._status = int(head.split(None, 2)[1])
            self._chunked = b"\r\ntransfer-encoding: chunked" in head.lower()
            self._came = rest
        return bool(end)

    def _read_chunks(self, now: float) -> None:
        came, at = self._came, 0
        while (end := came.find(b"\r\n", at)) >= 0:
            start, size = end + 2, int(came[at:end].partition(b";")[0], 16)
            if size == 0:
                self._end_chunks()
                return
            if len(came) < start + size + 2:
                break
            self._read_body(came[start : start + size], now)
            at = start + size + 2
        self._came = came[at:]

    def _end_chunks(self) -> None:
        if self._status == 200:
            self.ended.set_result(None)
        else:
            self.connection_lost(None)

    def _read_body(self, piece: bytes, now: float) -> None:
        if self._status != 200:
            self._line += piece
            return
        *lines, self._line = (self._line + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._on_event(line[5:].strip(), now)
