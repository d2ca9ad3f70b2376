"""/v1/responses over a WebSocket: the client's messages are requests, and the events of their streams the answers.

The transport of the Open Responses specification, which OpenAI's clients speak too (`client.responses.connect()`). A
message takes the path of `POST /v1/responses` through the whole app, so keys, limits, log, metrics and errors are
those of any request. A connection has one request at work and answers in order. What is not stored can be continued
on the connection that it came on: the last response stays in its memory.
"""

import asyncio
from collections.abc import Mapping
from typing import Any

import msgspec
from litestar.connection import ASGIConnection
from litestar.types import ASGIApp, Message, Receive, Scope, Send

from runtime.api.http.body import LARGE, parse_fields
from runtime.api.http.errors import JSON, ErrorBody, body_of, encode
from runtime.errors import InvalidRequest, NotFound, RequestError, Unsupported
from runtime.responses import StoredResponse
from runtime.support.event_loop import cancel
from settings.api import ServerSettings

PATH = "/v1/responses"

MAX_SECONDS = 3600.0
"""Life of a connection, as the specification has it."""

MAX_WAITING = 4
"""Messages that may wait for those before them; together they have `server.max_body` bytes at most."""

SWITCHING = 101
"""Status of a handshake that is accepted."""

_MEMORY = "eft_socket_memory"
_NORMAL, _POLICY, _TOO_BIG = 1000, 1008, 1009
"""Codes of closing, of RFC 6455."""

# Of one connection, or of a body or an id that each message has for itself.
_HANDSHAKE_HEADERS = frozenset(
    {
        b"connection", b"upgrade", b"content-length", b"content-type", b"content-encoding", b"transfer-encoding",
        b"expect", b"x-request-id",
    }
)  # fmt: skip


# -- memory ----------------------------------------------------------------------------------------


class SocketMemory:
    """The conversation that a connection's last response ends, where it is not stored."""

    def __init__(self, max_bytes: int) -> None:
        """A conversation of over `max_bytes` is not kept."""
        self._max_bytes = max_bytes
        self._chain: list[StoredResponse] = []

    def chain(self, id: str) -> list[StoredResponse] | None:
        """The conversation that the response `id` ends, oldest first; None where another one was the last."""
        return self._chain if self._chain and self._chain[-1].id == id else None

    def keep(self, chain: list[StoredResponse]) -> None:
        size = sum(len(one.input) + len(one.response) for one in chain)
        self._chain = chain if size <= self._max_bytes else []

    def forget(self, id: str) -> None:
        if self.chain(id) is not None:
            self._chain = []


def memory_of(connection: ASGIConnection[Any, Any, Any, Any]) -> SocketMemory | None:
    """The memory of the WebSocket that a request came on; None for a request of its own."""
    found: SocketMemory | None = connection.scope["state"].get(_MEMORY)
    return found


def socket_paths(root_path: str) -> frozenset[str]:
    """Paths with a WebSocket, with the prefix of a proxy and without it."""
    return frozenset({PATH, root_path + PATH})


# -- connections -----------------------------------------------------------------------------------


class ResponseSockets:
    """An ASGI app around `app`: WebSockets become requests of it, everything else is passed on."""

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app = app
        self._settings = settings
        self._paths = socket_paths(settings.root_path)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if str(scope["type"]) != "websocket":
            await self._app(scope, receive, send)
            return
        await receive()  # websocket.connect
        if scope["path"] not in self._paths:
            error = NotFound("There is no WebSocket at this path: there is one at /v1/responses.", code="unknown_url")
            await _refuse(scope, send, error.status, encode(error))
            return
        memory = SocketMemory(self._settings.max_body)
        shaking = _Handshake()
        await self._app(_request(scope, "GET", memory), shaking.receive, shaking.send)
        if shaking.status != SWITCHING:
            await _refuse(scope, send, shaking.status, shaking.body)
            return
        await send({"type": "websocket.accept", "subprotocol": None, "headers": []})
        await _Connection(self._app, scope, receive, send, memory, self._settings.max_body).run()


class _Handshake:
    """The channels of the request that asks whether a connection may be opened."""

    def __init__(self) -> None:
        self.status = 500
        self.body = b""

    async def receive(self) -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        elif message["type"] == "http.response.body":
            self.body += message["body"]


async def _refuse(scope: Scope, send: Send, status: int, body: bytes) -> None:
    """Refuse the handshake with an HTTP answer, where the server can send one."""
    if "websocket.http.response" not in (scope.get("extensions") or {}):
        await send({"type": "websocket.close", "code": _POLICY, "reason": ""})
        return
    headers = [(b"content-type", JSON.encode()), (b"content-length", str(len(body)).encode())]
    start = {"type": "websocket.http.response.start", "status": status, "headers": headers}
    await send(start)  # type: ignore[arg-type]  # of an extension that Litestar does not know
    await send({"type": "websocket.http.response.body", "body": body, "more_body": False})


class _Connection:
    """One WebSocket, from its acceptance to its end."""

    def __init__(
        self, app: ASGIApp, scope: Scope, receive: Receive, send: Send, memory: SocketMemory, max_bytes: int
    ) -> None:
        self._app = app
        self._scope = scope
        self._receive = receive
        self._send = send
        self._memory = memory
        self._max_bytes = max_bytes
        self._waiting: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._waiting_bytes = 0
        self._gone = asyncio.Event()
        self._sending = asyncio.Lock()
        self._closed = False

    async def run(self) -> None:
        """Answer message after message, until the client leaves or the connection is too old."""
        reader = asyncio.create_task(self._read())
        ends = asyncio.get_running_loop().time() + MAX_SECONDS
        try:
            while (message := await self._next(ends)) is not None:
                await self._answer(message)
        except OSError:
            return  # raised by servers from `send` when the client is gone
        finally:
            await cancel(reader)

    async def _read(self) -> None:
        """Take messages as they come: a client that leaves must be seen while it is being answered."""
        while (message := await self._receive())["type"] == "websocket.receive":
            text: Any = message.get("text")
            data: bytes = message.get("bytes") or b"" if text is None else text.encode()
            if self._waiting.qsize() >= MAX_WAITING or self._waiting_bytes + len(data) > self._max_bytes:
                await self._close(_TOO_BIG, "Too much waits for the answer before it.")
                break
            self._waiting_bytes += len(data)
            self._waiting.put_nowait(data)
        self._gone.set()
        self._waiting.put_nowait(None)

    async def _next(self, ends: float) -> bytes | None:
        """The next message; None when there will be none."""
        try:
            if asyncio.get_running_loop().time() >= ends:
                raise TimeoutError
            async with asyncio.timeout_at(ends):
                message = await self._waiting.get()
        except TimeoutError:
            error = InvalidRequest(
                f"A connection lasts {MAX_SECONDS / 60:g} minutes: open a new one.",
                code="websocket_connection_limit_reached",
            )
            await self.say(_envelope(error.status, body_of(error)))
            await self._close(_NORMAL, "")
            return None
        if message is None or self._gone.is_set():
            return None
        self._waiting_bytes -= len(message)
        return message

    async def _answer(self, message: bytes) -> None:
        """Answer one message. A failure ends it with an error, and what it was to continue is forgotten."""
        try:
            asked = await asyncio.to_thread(_asked, message) if len(message) > LARGE else _asked(message)
        except RequestError as error:
            await self.say(_envelope(error.status, body_of(error)))
            return
        turn = _Turn(self, asked.body)
        await self._app(_request(self._scope, "POST", self._memory, len(asked.body)), turn.receive, turn.send)
        if await turn.end() and asked.previous is not None:
            self._memory.forget(asked.previous)

    async def until_gone(self) -> None:
        await self._gone.wait()

    async def say(self, data: bytes) -> None:
        """Send JSON as a text. Raises `OSError` when the connection is closed."""
        async with self._sending:
            if self._closed:
                raise ConnectionError("This connection is closed.")
            await self._send({"type": "websocket.send", "text": data.decode(), "bytes": None})

    async def _close(self, code: int, reason: str) -> None:
        async with self._sending:
            self._closed = True
            await self._send({"type": "websocket.close", "code": code, "reason": reason})


class _Turn:
    """The two ASGI channels of the request that a message has become."""

    def __init__(self, connection: _Connection, body: bytes) -> None:
        self._connection = connection
        self._unread: bytes | None = body
        self._status = 500
        self._refusal = b""
        self._error: bytes | None = None
        """The event `error` of a stream. It is held back: `response.failed`, if that follows, says the same."""
        self._failed = False

    async def receive(self) -> Any:
        if self._unread is None:
            await self._connection.until_gone()
            return {"type": "http.disconnect"}
        body, self._unread = self._unread, None
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
        elif message["type"] == "http.response.body" and self._status != 200:
            self._refusal += message["body"]
        elif message["type"] == "http.response.body" and message["body"]:
            await self._send_event(message["body"])

    async def _send_event(self, event: bytes) -> None:
        """`event`: one of `runtime.api.http.sse`, with a name and its data in a line each."""
        name, data = (line.partition(b": ")[2] for line in event.rstrip().split(b"\n"))
        if name == b"error":
            self._error = data
            return
        if name == b"response.failed":
            self._failed, self._error = True, None
        await self._connection.say(data)

    async def end(self) -> bool:
        """Send the error that ended the request, if there is one that was not sent. True for a request that failed."""
        if self._status != 200:
            refusal = msgspec.json.decode(self._refusal, type=ErrorBody)
            await self._connection.say(_envelope(self._status, refusal))
        elif self._error is not None:
            error = msgspec.json.decode(self._error)
            shown = RequestError(error["message"], param=error.get("param"), code=error.get("code"))
            await self._connection.say(_envelope(shown.status, body_of(shown)))
        return self._failed or self._status != 200 or self._error is not None


# -- messages --------------------------------------------------------------------------------------


class _Asked(msgspec.Struct):
    """A message as a request."""

    body: bytes
    previous: str | None
    """The response that it continues."""


def _asked(message: bytes) -> _Asked:
    """Raises `InvalidRequest` and `Unsupported`."""
    fields = parse_fields(message)
    kind = fields.pop("type", None)
    if kind is None or bytes(kind) != b'"response.create"':
        raise InvalidRequest("type must be `response.create`.", param="type")
    if bytes(fields.get("stream", b"null")) not in (b"null", b"true"):
        raise Unsupported("`stream`: over a WebSocket every response is a stream of events.", param="stream")
    if bytes(fields.get("background", b"null")) not in (b"null", b"false"):
        raise Unsupported("`background`: send it with a POST; a WebSocket has the events at once.", param="background")
    if bytes(fields.pop("generate", b"null")) not in (b"null", b"true"):
        raise Unsupported("`generate`: send the input with the turn; prefixes are cached by then.", param="generate")
    fields["stream"] = msgspec.Raw(b"true")
    previous: Any = msgspec.json.decode(fields.get("previous_response_id", b"null"))
    return _Asked(msgspec.json.encode(fields), previous if isinstance(previous, str) else None)


def _envelope(status: int, error: ErrorBody) -> bytes:
    """An error as the specification has it: with the status that it has over HTTP, and always with a code."""
    detail = {**msgspec.to_builtins(error.error), "code": error.error.code or error.error.type}
    return msgspec.json.encode({"type": "error", "status": status, "error": detail})


def _request(scope: Scope, method: str, memory: SocketMemory, length: int | None = None) -> Scope:
    """The scope of a request of the connection that `scope` is of. `length`: bytes of its body, which is JSON."""
    headers = [
        (name, value)
        for name, value in scope["headers"]
        if name not in _HANDSHAKE_HEADERS and not name.startswith(b"sec-websocket-")
    ]
    if length is None:
        headers.append((b"upgrade", b"websocket"))
    else:
        headers += [(b"content-type", JSON.encode()), (b"content-length", str(length).encode())]
    kept: Mapping[str, Any] = {name: scope[name] for name in _KEPT if name in scope}  # type: ignore[literal-required]
    return {  # type: ignore[return-value]
        **kept,
        "type": "http",
        "method": method,
        "scheme": {"wss": "https"}.get(scope["scheme"], "http"),
        "query_string": b"",
        "headers": headers,
        "state": {_MEMORY: memory},
    }


_KEPT = ("asgi", "http_version", "path", "raw_path", "root_path", "server", "client", "litestar_app")
"""What a request has of its connection."""
