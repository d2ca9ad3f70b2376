"""API keys. A guard on the whole app, so that no spelling of a path gets around it: it runs after routing.

A handler is open only if it says so with `opt={OPEN: True}`; one that says nothing is closed. One that changes the
server says `opt={ADMIN: True}`: it asks for an admin key, and where there is none, for a client on this machine.
"""

import hashlib
import hmac
import ipaddress
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit

from litestar.connection import ASGIConnection
from litestar.handlers import BaseRouteHandler

from runtime.api.record import record_of
from runtime.errors import Forbidden, Unauthorized
from runtime.tenants import tenant_of

OPEN = "eft_open"
"""Key of a handler's `opt`: True lets everybody in."""


ADMIN = "eft_admin"
"""Key of a handler's `opt`: True lets in only who may change the server."""

_LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


class KeyGuard:
    """Asks for one of the keys, unless there are none."""

    def __init__(self, keys: Iterable[str], admin_keys: Iterable[str] = ()) -> None:
        self._keys = _Keys(keys)
        self._admin_keys = _Keys(admin_keys)

    def __call__(self, connection: ASGIConnection[Any, Any, Any, Any], handler: BaseRouteHandler) -> None:
        """Raises `Unauthorized`, or `Forbidden` for who is known and may not do this."""
        if handler.opt.get(ADMIN, False):
            self._admit_admin(connection)
        elif self._keys and not handler.opt.get(OPEN, False):
            given = _given_key(connection)
            if not (self._keys.know(given) or self._admin_keys.know(given)):
                raise Unauthorized("The API key is not valid.")
            record_of(connection).tenant = tenant_of(given)

    def _admit_admin(self, connection: ASGIConnection[Any, Any, Any, Any]) -> None:
        if not self._admin_keys:
            _require_this_machine(connection)
            return
        given = _given_key(connection)
        if self._keys.know(given) and not self._admin_keys.know(given):
            raise Forbidden("This key is for inference; here an admin key is needed.")
        if not self._admin_keys.know(given):
            raise Unauthorized("The admin key is not valid.")


class _Keys:
    """Some keys, to compare with in constant time."""

    def __init__(self, keys: Iterable[str]) -> None:
        # Digests: all comparisons are of one length, so their time says nothing of a key's length either.
        self._digests = [_digest(key.encode()) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def know(self, key: bytes) -> bool:
        """Compares with every key, found or not, so that the time taken does not depend on which one fits."""
        given = _digest(key)
        return sum(hmac.compare_digest(given, digest) for digest in self._digests) > 0


def _given_key(connection: ASGIConnection[Any, Any, Any, Any]) -> bytes:
    header = _authorization(connection)
    if header is None:
        raise Unauthorized("No API key was given. Send it as `Authorization: Bearer YOUR_KEY`.", code="missing_api_key")
    scheme, _, key = header.strip().partition(b" ")
    if scheme.lower() != b"bearer":
        raise Unauthorized("The API key is not valid.")
    return key.strip()


def _require_this_machine(connection: ASGIConnection[Any, Any, Any, Any]) -> None:
    """Raise `Forbidden` unless the client is on this machine and meant to be: a page of another site that a
    browser here shows (an Origin), or a name that somebody made point here (a Host), does not count."""
    client = connection.client.host if connection.client else ""
    if not _is_loopback(client):
        raise Forbidden("Without an admin key, only clients on the server's own machine may do this.")
    names = [_host_name(connection.headers.get("host", ""))]
    if "origin" in connection.headers:
        names.append(urlsplit(connection.headers["origin"]).hostname or "")
    if not _LOOPBACK_NAMES.issuperset(names):
        raise Forbidden("Without an admin key, this must be addressed as localhost, and not from another site's page.")


def _is_loopback(address: str) -> bool:
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    return (getattr(ip, "ipv4_mapped", None) or ip).is_loopback


def _host_name(header: str) -> str:
    try:
        return urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return ""


def _authorization(connection: ASGIConnection[Any, Any, Any, Any]) -> bytes | None:
    """The raw bytes: a key that is not ASCII must be compared, not decoded."""
    return next((value for name, value in connection.scope["headers"] if name == b"authorization"), None)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
