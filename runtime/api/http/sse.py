"""Server-sent events: a response that is written as it comes into being.

Nothing is buffered here beyond one event. The transport tells `send` to wait when a client reads too slowly;
the engine's output stream merges what comes meanwhile; and the connection itself ends when a client reads
nothing at all for too long (`runtime.api.protocol`), which arrives here as a disconnect.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing
from typing import Any

import msgspec
from litestar import Request, Response
from litestar.datastructures import Cookie
from litestar.response.base import ASGIResponse
from litestar.types import Receive, Send

from runtime.api.disconnect import cancel, until_disconnect
from runtime.api.errors import encode, to_request_error
from runtime.api.record import RequestRecord

DONE = b"data: [DONE]\n\n"
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # the latter is for nginx

Events = AsyncGenerator[bytes, None]


def event(data: msgspec.Struct) -> bytes:
    return b"data: " + msgspec.json.encode(data) + b"\n\n"


async def with_end(chunks: AsyncGenerator[msgspec.Struct, None], record: RequestRecord) -> Events:
    """The events of `chunks`, then `[DONE]`. A failure becomes an event of OpenAI's error form, before it."""
    try:
        async with aclosing(chunks):
            async for chunk in chunks:
                yield event(chunk)
    except Exception as error:
        shown = to_request_error(error, record.request_id)
        record.log.update(error_code=shown.code)
        yield b"data: " + encode(shown) + b"\n\n"
    yield DONE


class EventStream(Response[Any]):
    """A response over a generator of events. `on_close` is called once, however the response ends."""

    def __init__(self, events: Events, on_close: Callable[[], None]) -> None:
        super().__init__(None, media_type="text/event-stream", status_code=200, headers=_HEADERS)
        self._events = events
        self._on_close = on_close

    def to_asgi_response(
        self,
        app: Any,
        request: Request[Any, Any, Any],
        *,
        background: Any = None,
        cookies: Iterable[Cookie] | None = None,
        encoded_headers: Iterable[tuple[bytes, bytes]] | None = None,
        headers: dict[str, str] | None = None,
        is_head_response: bool = False,
        media_type: Any = None,
        status_code: int | None = None,
        type_encoders: Any = None,
    ) -> ASGIResponse:
        return _ASGIEventStream(self._events, self._on_close, {**(headers or {}), **self.headers})


class _ASGIEventStream(ASGIResponse):
    __slots__ = ("_events", "_on_close")
    _should_set_content_length = False

    def __init__(self, events: Events, on_close: Callable[[], None], headers: dict[str, str]) -> None:
        super().__init__(headers=headers, media_type="text/event-stream", status_code=200)
        self._events = events
        self._on_close = on_close

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_close()

    async def send_body(self, send: Send, receive: Receive) -> None:
        pump = asyncio.create_task(self._pump(send))
        gone = asyncio.create_task(until_disconnect(receive))
        try:
            await asyncio.wait((pump, gone), return_when=asyncio.FIRST_COMPLETED)
        finally:
            await cancel(pump, gone)

    async def _pump(self, send: Send) -> None:
        async with aclosing(self._events) as events:
            try:
                async for data in events:
                    await send({"type": "http.response.body", "body": data, "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})
            except OSError:
                return  # the client is gone: what servers raise from `send` then
