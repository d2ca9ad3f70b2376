"""An httpx transport that runs an ASGI app in this process and streams its response.

`httpx.ASGITransport` returns nothing before the app has finished, so an answer would not stream, and
leaving it would not reach the app. Here the body arrives as it is sent, and closing the response is
a disconnect, as it is over a socket. Runs no lifespan: the caller starts everything that the app needs.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from typing import Any

import httpx

AsgiMessage = MutableMapping[str, Any]
App = Callable[[Any, Any, Any], Awaitable[None]]

_GRACE = 5.0
"""Seconds that an app gets to notice a disconnect before its task is cancelled."""


class InProcessTransport(httpx.AsyncBaseTransport):
    """Transport that sends every request to one ASGI app."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        exchange = _Exchange(await request.aread())
        exchange.start(self._app, _scope(request))
        try:
            start = await exchange.next_message()
        except BaseException:  # cancelled while the app is at work: it must get the disconnect
            await exchange.aclose()
            raise
        if start is None:
            await exchange.aclose()
            raise httpx.RemoteProtocolError("the application ended without a response", request=request)
        return httpx.Response(start["status"], headers=start.get("headers", []), stream=exchange)


class _Exchange(httpx.AsyncByteStream):
    """One request's messages, in both directions. Also the response's body stream."""

    def __init__(self, body: bytes) -> None:
        self._body: bytes | None = body
        self._sent: asyncio.Queue[AsgiMessage | None] = asyncio.Queue()
        self._closed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self, app: App, scope: AsgiMessage) -> None:
        self._task = asyncio.create_task(self._run(app, scope))

    async def _run(self, app: App, scope: AsgiMessage) -> None:
        try:
            await app(scope, self._receive, self._send)
        finally:
            self._sent.put_nowait(None)

    async def _receive(self) -> AsgiMessage:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._closed.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: AsgiMessage) -> None:
        if self._closed.is_set():
            raise OSError("the client has gone")  # as a server's `send` does after a disconnect
        self._sent.put_nowait(message)

    async def next_message(self) -> AsgiMessage | None:
        """The next message sent; None at the end. Raises the error of the app."""
        message = await self._sent.get()
        if message is None and self._task is not None:
            await self._task
        return message

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while (message := await self.next_message()) is not None:
            if message.get("body"):
                yield message["body"]
            if not message.get("more_body", False):
                return

    async def aclose(self) -> None:
        """Disconnect, and give the app `_GRACE` seconds to finish. Errors that it raises then are dropped."""
        self._closed.set()
        if self._task is None:
            return
        done, _ = await asyncio.wait([self._task], timeout=_GRACE)
        if not done:
            self._task.cancel()
        elif not self._task.cancelled():
            self._task.exception()


def _scope(request: httpx.Request) -> AsgiMessage:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": request.method,
        "headers": [(name.lower(), value) for name, value in request.headers.raw],
        "scheme": request.url.scheme,
        "path": request.url.path,
        "raw_path": request.url.raw_path.split(b"?")[0],
        "query_string": request.url.query,
        "server": (request.url.host, request.url.port),
        "client": ("127.0.0.1", 0),
        "root_path": "",
        "state": {},
    }
