"""Access by API key and scope. A guard on the whole app runs after routing, so no spelling of a path bypasses it.

Every route has one of four requirements, set in its handler's `opt`. `OPEN: True` requires nothing; `TRAIN: True`
requires a key with the scope train; `ADMIN: True` one with the scope admin; the default is the scope inference.
If no key is configured, inference is open to requests addressed to the server by a name of its own, and train and
admin are open to this machine only (`runtime.access.hosts`).
"""

from typing import Any, Literal

from litestar.connection import ASGIConnection
from litestar.handlers import BaseRouteHandler

from runtime.access import Access
from runtime.access.access import FILE
from runtime.access.hosts import Arrival, is_cross_origin, not_local
from runtime.access.keys import SCOPES, Principal, Scope
from runtime.api.http.record import RequestRecord, record_of
from runtime.errors import Forbidden, Unauthorized

OPEN = "eft_open"
"""Key of a handler's `opt`: True requires no key."""

TRAIN = "eft_train"
"""Key of a handler's `opt`: True requires the scope train."""

ADMIN = "eft_admin"
"""Key of a handler's `opt`: True requires the scope admin."""

Connection = ASGIConnection[Any, Any, Any, Any]
Requirement = Literal["open"] | Scope

_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
_HOW_TO_ADMIN = (
    "Set server.admin_key, or make a key with `eft keys new NAME --scope {scope}`, and send it as `Authorization: "
    f"Bearer KEY`; or send the token in the file {FILE} of the server's state directory, as the command line does on "
    "this machine."
)


def requirement(handler: BaseRouteHandler) -> Requirement:
    """Requirement of a route: the strictest that its handler sets, so that no mistake opens it."""
    if handler.opt.get(ADMIN, False):
        return "admin"
    if handler.opt.get(TRAIN, False):
        return "train"
    return "open" if handler.opt.get(OPEN, False) else "inference"


class KeyGuard:
    """Let a request through to its handler, or raise. Writes the key's holder into the request's record."""

    def __init__(self, access: Access) -> None:
        self._access = access

    def __call__(self, connection: Connection, handler: BaseRouteHandler) -> None:
        """Raises `Unauthorized`; `Forbidden` for a valid key without the scope; `RateLimited`."""
        needed = requirement(handler)
        if needed == "open":
            return
        record = record_of(connection)
        if record.inside is not None:
            self._note(record, record.inside)
            return
        method = str(connection.scope.get("method", ""))
        changes = method not in _SAFE_METHODS
        if changes and needed != "inference":
            record.action = f"{method} {connection.scope.get('path_template', '')}"
        principal = self._holder(connection)
        if principal is not None:
            record.key = principal.name
            if not principal.may(needed):
                raise _lacking(principal, needed)
        elif needed == "inference":
            # A browser lets any page open a WebSocket, as it lets it send a form.
            principal = self._admit_keyless(connection, changes=changes or _is_handshake(connection))
        else:
            principal = self._admit_local(connection, needed)
        self._note(record, principal)
        if changes and needed == "inference":
            record.quota = self._access.limiter.enter(principal)
            record.quota.admit()

    def _holder(self, connection: Connection) -> Principal | None:
        """Holder of the key that was sent; None for no key or an unknown one."""
        key = _sent_key(connection)
        return self._access.ring.find(key) if key else None

    def _note(self, record: RequestRecord, principal: Principal) -> None:
        record.key, record.tenant = principal.name, principal.label
        apart = self._access.asks_for_keys and not self._access.share_prefixes
        record.salt = principal.label if apart else ""
        record.is_admin = principal.may("admin")
        record.may_load = not principal.label or principal.may("train")

    def _admit_keyless(self, connection: Connection, *, changes: bool) -> Principal:
        access = self._access
        if access.asks_for_keys:
            raise _unknown_key(connection, "API")
        arrival = _arrival(connection)
        host = arrival.one("host")
        if host is not None and not access.hosts.allows(host):  # browsers always send one
            raise Forbidden(
                "This server asks for no API key, so it answers only to names that are known to be its own, and "
                f"{host[:100]!r} is not one. Add it to server.allowed_hosts, or set an API key.",
                code="host_not_allowed",
            )
        if changes and is_cross_origin(arrival, access.cors_origins):
            raise Forbidden(
                "A page of another origin sent this. Without an API key that is refused; server.cors_origins names the "
                "origins that may.",
                code="cross_origin",
            )
        return Principal(name="", scopes=frozenset({"inference"}), limits=access.keyless_limits)

    def _admit_local(self, connection: Connection, needed: Scope) -> Principal:
        access, how = self._access, _HOW_TO_ADMIN.format(scope=needed)
        if access.local_admin:
            reason = not_local(_arrival(connection), access.listen)
            if reason is None:
                return Principal(name="local", scopes=frozenset(SCOPES))
            raise Forbidden(
                "Without an admin key, this is only for requests that come straight from the server's own machine, and "
                f"this one does not: {reason}. {how}"
            )
        if access.ring.any_may("admin") or access.ring.any_may(needed):
            raise _unknown_key(connection, "admin")
        raise Forbidden(f"This needs an admin key, and this server has none. {how}", code="admin_key_required")


def _lacking(principal: Principal, needed: Scope) -> Forbidden:
    has = ", ".join(scope for scope in SCOPES if scope in principal.scopes)
    article = "a" if needed == "train" else "an"
    return Forbidden(f"This key is for {has}; here {article} {needed} key is needed.")


def _unknown_key(connection: Connection, kind: str) -> Unauthorized:
    if _authorization(connection) is None and not _sent_key(connection):
        message = f"No {kind} key was given. Send it as `Authorization: Bearer YOUR_KEY`."
        return Unauthorized(message, code="missing_api_key")
    return Unauthorized(f"The {kind} key is not valid.")


def _bearer(header: bytes | None) -> bytes:
    scheme, _, key = (header or b"").strip().partition(b" ")
    return key.strip() if scheme.lower() == b"bearer" else b""


def _sent_key(connection: Connection) -> bytes:
    """The key in `Authorization`, or else in `X-Api-Key`, where Anthropic's clients put it."""
    if key := _bearer(_authorization(connection)):
        return key
    return next((value.strip() for name, value in connection.scope["headers"] if name == b"x-api-key"), b"")


def _authorization(connection: Connection) -> bytes | None:
    """Raw bytes of the Authorization header: a key that is not ASCII is compared, not decoded."""
    return next((value for name, value in connection.scope["headers"] if name == b"authorization"), None)


def _is_handshake(connection: Connection) -> bool:
    return any(name == b"upgrade" for name, _ in connection.scope["headers"])


def _arrival(connection: Connection) -> Arrival:
    scope = connection.scope
    client, server = scope.get("client"), scope.get("server")
    return Arrival(
        peer=client[0] if client else "",
        port=server[1] if server else None,
        http_version=str(scope.get("http_version", "1.1")),
        headers=[(name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in scope["headers"]],
    )
