"""A prefix of all paths, for servers behind a proxy that routes by path (`--root-path`).

Some proxies take the prefix off and some leave it on, so both forms of a path are answered. Links and `Location`
headers have it. The names of handlers, metrics and logs are those without it.
"""

from litestar.enums import ScopeType
from litestar.types import ASGIApp, Message, Receive, Scope, Send


class Prefixed:
    """An ASGI app around `app`, which sees paths without `prefix` (as `/llm`, with no slash at its end)."""

    def __init__(self, app: ASGIApp, prefix: str) -> None:
        self._app = app
        self._prefix = prefix
        self._raw_prefix = prefix.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != ScopeType.HTTP:
            await self._app(scope, receive, send)
            return
        path = scope["path"]
        if path == self._prefix or path.startswith(f"{self._prefix}/"):
            scope["path"] = path[len(self._prefix) :] or "/"
            raw = scope.get("raw_path") or b""
            if raw.startswith(self._raw_prefix):
                scope["raw_path"] = raw[len(self._raw_prefix) :] or b"/"

        async def send_prefixed(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    (name, self._raw_prefix + value if name.lower() == b"location" and value[:1] == b"/" else value)
                    for name, value in message.get("headers", ())
                ]
            await send(message)

        await self._app(scope, receive, send_prefixed)
