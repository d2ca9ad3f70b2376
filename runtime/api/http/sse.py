"""Server-sent events: a response that is written as it is generated.

At most one event is buffered here. `send` waits when a client reads too slowly; the engine's output stream merges
the output that arrives meanwhile. The connection ends when a client reads nothing at all for too long
(`runtime.api.http.protocol`), which arrives here as a disconnect.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable
from contextlib import aclosing
from typing import Any, TypeVar

import msgspec
from litestar import Request, Response
from litestar.datastructures import Cookie
from litestar.response.base import ASGIResponse
from litestar.types import Receive, Send

from runtime.api.http.errors import ClientDisconnected, encode, to_request_error
from runtime.api.http.record import RequestRecord
from runtime.errors import RequestError
from runtime.support.event_loop import cancel

# -- disconnect ------------------------------------------------------------------------------------
#
# Notice that a client has left, and stop its handler, which web frameworks let run on.

T = TypeVar("T")


async def until_disconnect(receive: Receive) -> None:
    """Return when the client is gone. Only for a request whose body has been read."""
    while (await receive())["type"] != "http.disconnect":
        continue


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client leaves. Raises `ClientDisconnected` then."""
    task = asyncio.create_task(work)
    gone = asyncio.create_task(until_disconnect(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnected("The client left before its answer was ready.")
    finally:
        await cancel(task, gone)


DONE = b"data: [DONE]\n\n"
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # the latter is for nginx

Events = AsyncGenerator[bytes, None]
E = TypeVar("E", bound=msgspec.Struct)


def event(data: msgspec.Struct) -> bytes:
    """A server-sent event without a name, its data as JSON."""
    return b"data: " + msgspec.json.encode(data) + b"\n\n"


def named_event(name: str, data: msgspec.Struct) -> bytes:
    """A server-sent event with a name."""
    return b"event: " + name.encode() + b"\n" + event(data)


async def with_end(chunks: AsyncGenerator[msgspec.Struct, None], record: RequestRecord) -> Events:
    """The events of `chunks`, then `[DONE]`. A failure becomes an event of OpenAI's error form, before it."""
    try:
        async with aclosing(chunks):
            async for chunk in chunks:
                yield event(chunk)
    except Exception as error:
        yield b"data: " + encode(noted(error, record)) + b"\n\n"
    yield DONE


async def named_events(
    events: AsyncGenerator[E, None],
    record: RequestRecord,
    *,
    name: Callable[[E], str],
    failure: Callable[[RequestError], tuple[str, msgspec.Struct]],
) -> Events:
    """Events with their names. An exception becomes the last one, with the name and the data that `failure` gives."""
    try:
        async with aclosing(events):
            async for one in events:
                yield named_event(name(one), one)
    except Exception as error:
        yield named_event(*failure(noted(error, record)))


def noted(error: Exception, record: RequestRecord) -> RequestError:
    """The error that ends a stream, as it may be shown; its code is in the request's log line."""
    shown = to_request_error(error, record.request_id)
    record.log.update(error_code=shown.code)
    return shown


class EventStream(Response[Any]):
    """A response over a generator of events. `on_close` is called once, however the response ends."""

    def __init__(self, events: Events, on_close: Callable[[], None] = lambda: None) -> None:
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
                return  # raised by servers from `send` when the client is gone
