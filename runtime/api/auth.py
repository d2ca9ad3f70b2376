"""API keys. A guard on the whole app, so that no spelling of a path gets around it: it runs after routing.

A handler is open only if it says so with `opt={OPEN: True}`; one that says nothing is closed.
"""

import hashlib
import hmac
from collections.abc import Iterable
from typing import Any

from litestar.connection import ASGIConnection
from litestar.handlers import BaseRouteHandler

from runtime.errors import Unauthorized

OPEN = "eft_open"
"""Key of a handler's `opt`: True lets everybody in."""


class KeyGuard:
    """Asks for one of the keys, unless there are none."""

    def __init__(self, keys: Iterable[str]) -> None:
        # Digests: all comparisons are of one length, so their time says nothing of a key's length either.
        self._digests = [_digest(key.encode()) for key in keys]

    def __call__(self, connection: ASGIConnection[Any, Any, Any, Any], handler: BaseRouteHandler) -> None:
        """Raises `Unauthorized`."""
        if not self._digests or handler.opt.get(OPEN, False):
            return
        header = _authorization(connection)
        if header is None:
            raise Unauthorized(
                "No API key was given. Send it as `Authorization: Bearer YOUR_KEY`.", code="missing_api_key"
            )
        scheme, _, key = header.strip().partition(b" ")
        if scheme.lower() != b"bearer" or not self._knows(key.strip()):
            raise Unauthorized("The API key is not valid.")

    def _knows(self, key: bytes) -> bool:
        """Compares with every key, found or not, so that the time taken does not depend on which one fits."""
        given = _digest(key)
        return sum(hmac.compare_digest(given, digest) for digest in self._digests) > 0


def _authorization(connection: ASGIConnection[Any, Any, Any, Any]) -> bytes | None:
    """The raw bytes: a key that is not ASCII must be compared, not decoded."""
    return next((value for name, value in connection.scope["headers"] if name == b"authorization"), None)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
