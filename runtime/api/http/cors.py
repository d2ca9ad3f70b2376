"""CORS: origins whose scripts may use the API from a browser.

Not Litestar's own: that would open every route alike, and answers no preflight of a request that needs a key. Here
routes that change the server (scopes train and admin) are never opened to other origins, and routing decides which
route a path means: the headers are added to the app's answer.
"""

import re
from collections.abc import Iterator

from litestar import Litestar
from litestar.enums import ScopeType
from litestar.types import Message, Receive, Scope, Send

from runtime.api.http.auth import requirement

MAX_AGE = 600
"""Seconds for which a browser may keep a preflight's answer."""

EXPOSED = (
    "X-Request-Id", "X-Eft-Adapter-Version", "X-Eft-Warning", "Retry-After", "X-RateLimit-Limit-Requests",
    "X-RateLimit-Remaining-Requests", "X-RateLimit-Reset-Requests", "X-RateLimit-Limit-Tokens",
    "X-RateLimit-Remaining-Tokens", "X-RateLimit-Reset-Tokens",
)  # fmt: skip

_HEADER_NAMES = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+(\s*,\s*[A-Za-z0-9!#$%&'*+.^_`|~-]+)*")
_MAX_HEADER_NAMES = 4096
"""Characters of a preflight's header names. OpenAI's client alone sends a dozen `x-stainless-…`."""


class Cors:
    """ASGI middleware that adds the CORS headers."""

    def __init__(self, app: Litestar, origins: frozenset[str]) -> None:
        self._app = app.asgi_handler
        self._any = "*" in origins
        self._origins = origins
        self._methods = dict(_opened(app))
        """Path template → the methods that other origins may use, for the routes that have any."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {name: value.decode("latin-1") for name, value in scope.get("headers", ())}
        origin = headers.get(b"origin")
        if scope["type"] != ScopeType.HTTP or origin is None or not (self._any or origin.lower() in self._origins):
            await self._app(scope, receive, send)
            return
        preflight = scope.get("method") == "OPTIONS" and b"access-control-request-method" in headers

        async def answer(message: Message) -> None:
            methods = self._methods.get(str(scope.get("path_template", "")))
            if methods is not None and not preflight and scope.get("method") not in (*methods.split(", "), "OPTIONS"):
                methods = None
            if message["type"] == "http.response.start" and methods is not None:
                # A preflight carries no key, so the app's refusal for that reason is dropped; other refusals stay.
                if preflight and message["status"] in (204, 401):
                    message["status"] = 204
                    message["headers"] = self._preflight(origin, methods, headers)
                else:
                    message["headers"] = [*message.get("headers", ()), *self._allow(origin), _EXPOSE]
            elif message["type"] == "http.response.body" and preflight and methods is not None:
                message["body"] = b""
            await send(message)

        await self._app(scope, receive, answer)

    def _allow(self, origin: str) -> list[tuple[bytes, bytes]]:
        if self._any:
            return [(b"access-control-allow-origin", b"*")]
        return [(b"access-control-allow-origin", origin.encode("latin-1")), (b"vary", b"Origin")]

    def _preflight(self, origin: str, methods: str, asked: dict[bytes, str]) -> list[tuple[bytes, bytes]]:
        found = [
            *self._allow(origin),
            (b"access-control-allow-methods", methods.encode()),
            (b"access-control-max-age", str(MAX_AGE).encode()),
        ]
        names = asked.get(b"access-control-request-headers", "")
        if len(names) <= _MAX_HEADER_NAMES and _HEADER_NAMES.fullmatch(names):
            found.append((b"access-control-allow-headers", names.encode("latin-1")))
        if asked.get(b"access-control-request-private-network") == "true":
            found.append((b"access-control-allow-private-network", b"true"))
        return found


_EXPOSE = (b"access-control-expose-headers", ", ".join(EXPOSED).encode())


def _opened(app: Litestar) -> Iterator[tuple[str, str]]:
    for route in app.routes:
        handlers = [
            handler
            for handler in getattr(route, "route_handlers", ())
            if "OPTIONS" not in handler.http_methods and requirement(handler) in ("open", "inference")
        ]
        if handlers:
            yield route.path_format, ", ".join(sorted({method for one in handlers for method in one.http_methods}))
