"""Requests that the server makes of itself: a line of a batch takes the path of a request over HTTP, without a socket.

They are admitted as their key's holder, run in the background, and are not counted among the key's limits.
"""

import asyncio
from contextlib import suppress
from typing import Any

from litestar import Litestar
from litestar.types import Message, Scope

from runtime.access import Access
from runtime.access.keys import Principal
from runtime.api.handle import RequestGate
from runtime.api.http.errors import JSON, encode
from runtime.api.http.record import RequestRecord, attach, make_id
from runtime.batches.records import Answer
from runtime.errors import EngineUnavailable, Unauthorized

RETRY_AFTER = b"retry-after"


class InsideClient:
    """Client of the app in its own process."""

    def __init__(self, app: Litestar, access: Access, gate: RequestGate) -> None:
        self._app = app
        self._gate = gate
        self._handler = app.asgi_handler
        """Without what is put around it later, which is for requests from outside."""
        self._access = access

    async def __call__(self, path: str, body: bytes, *, owner: str) -> Answer:
        """The response to a POST of JSON. `owner`: label of the key whose request it is. When the caller is cancelled,
        so is the request."""
        record = RequestRecord(make_id(), background=True, inside=self._holder(owner))
        if record.inside is None:
            gone = Unauthorized("The API key that this batch was created with is no longer valid.")
            return Answer(status=gone.status, body=encode(gone), request_id=record.request_id)
        exchange = _Exchange(body)
        scope = _scope(self._app, path, len(body))
        attach(scope, record)
        model = await self._enter()
        try:
            await self._handler(scope, exchange.receive, exchange.send)
        finally:
            self._gate.leave(model)
        return exchange.answer(record.request_id)

    async def _enter(self) -> int:
        while True:
            with suppress(EngineUnavailable):  # it has time
                return await self._gate.enter()

    def _holder(self, owner: str) -> Principal | None:
        """Holder of the key with this label, with its scopes of now; None where there is no such key any more."""
        if not owner:
            keyless = not self._access.asks_for_keys
            return Principal(name="", scopes=frozenset({"inference"})) if keyless else None
        found = self._access.ring.holder(owner)
        return found if found is not None and found.may("inference") else None


class _Exchange:
    """The two ASGI channels of one request."""

    def __init__(self, body: bytes) -> None:
        self._unread: bytes | None = body
        self._status = 0
        self._retry_after: float | None = None
        self._parts: list[bytes] = []

    async def receive(self) -> Any:
        if self._unread is None:
            await asyncio.Event().wait()  # its client never leaves: it cancels
        body, self._unread = self._unread, None
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            self._retry_after = _seconds(dict(message.get("headers", ())).get(RETRY_AFTER))
        elif message["type"] == "http.response.body":
            self._parts.append(message.get("body", b""))

    def answer(self, request_id: str) -> Answer:
        return Answer(
            status=self._status, body=b"".join(self._parts), request_id=request_id, retry_after=self._retry_after
        )


def _scope(app: Litestar, path: str, length: int) -> Scope:
    headers = [(b"content-type", JSON.encode()), (b"content-length", str(length).encode())]
    return {  # type: ignore[return-value]
        "litestar_app": app,
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": headers,
        "scheme": "http",
        "server": None,
        "client": None,
        "root_path": "",
        "state": {},
    }


def _seconds(header: bytes | None) -> float | None:
    return float(header) if header is not None and header.isdigit() else None
