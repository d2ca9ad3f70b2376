"""Middleware around the whole app: request ids, request log, HTTP metrics, and headers of every response.

Runs outside routing, so that it also sees requests that match no route. Refuses the few requests that must not
reach a handler.
"""

import time
import zlib
from collections.abc import Callable
from email.utils import formatdate
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import msgspec
import structlog
from litestar.enums import ScopeType
from litestar.types import ASGIApp, Message, Receive, Scope, Send

from runtime.access.audit import AuditLog
from runtime.api.handle import RequestEntry, ServiceHandle
from runtime.api.http.errors import JSON, HeadersTooLarge, encode
from runtime.api.http.record import PHASES, RequestRecord, attach, make_id
from runtime.errors import EngineUnavailable, InvalidRequest, RequestError
from runtime.metrics import UNMATCHED
from runtime.support.logs import get_logger
from settings.schema import ObservabilitySettings

if TYPE_CHECKING:
    from runtime.engine.service import EngineService
    from runtime.support.tracing import RequestTrace

MAX_HEADERS = 64 * 1024
"""Bytes of a request's target and header lines."""

_PROBES = frozenset({"/health", "/ready", "/ping", "/metrics", "/load"})
"""Paths that machines poll every few seconds: logged on failure, or at level debug."""

_PAGE = frozenset({"/", "/page/{name}", "/admin/overview", "/admin/requests", "/admin/status"})
"""Routes of what watches the server: not among the requests that it watches."""

_log = get_logger("http")


class Observer:
    """An ASGI app around `app`."""

    def __init__(
        self,
        app: ASGIApp,
        handle: ServiceHandle,
        settings: Callable[[], ObservabilitySettings],
        *,
        audit: AuditLog | None = None,
    ) -> None:
        """`settings`: those in force now, which SIGHUP may change."""
        self._app = app
        self._handle = handle
        self._settings = settings
        self._audit = audit or AuditLog()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != ScopeType.HTTP:
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        record = RequestRecord(make_id(headers.get(b"x-request-id", b"").decode("latin-1")))
        attach(scope, record)
        exchange = _Exchange(record, self._handle, receive, send, unread=_has_body(headers))
        trace: RequestTrace | None = None
        ids: dict[str, str] = {}
        if self._handle.tracing is not None and not _is_watching(scope["path"]):
            trace = self._handle.tracing.request(str(scope["method"]), headers)
            record.headers["traceresponse"] = trace.header
            ids = trace.ids
        started = time.monotonic()
        with structlog.contextvars.bound_contextvars(request_id=record.request_id, **ids):
            try:
                refused = _refusal(scope)
                if refused is not None:
                    await _answer(refused, exchange.send)
                else:
                    await self._pass_on(scope, exchange)
            finally:
                self._finish(scope, record, exchange.status, time.monotonic() - started, trace)

    async def _pass_on(self, scope: Scope, exchange: "_Exchange") -> None:
        """Have the app answer: with one model from the beginning of a request to its end."""
        if scope.get("method") != "POST" or scope["path"].startswith("/admin"):
            await self._app(scope, exchange.receive, exchange.send)
            return
        gate = self._handle.gate
        try:
            model = await gate.enter()
        except EngineUnavailable as error:
            await _answer(error, exchange.send)
            return
        try:
            await self._app(scope, exchange.receive, exchange.send)
        finally:
            gate.leave(model)

    def _finish(
        self, scope: Scope, record: RequestRecord, status: int, seconds: float, trace: "RequestTrace | None"
    ) -> None:
        service = self._handle.latest
        if record.quota is not None:
            record.quota.leave()
            if record.quota.refused is not None and service is not None:
                service.metrics.on_rejection(record.quota.refused)
        if record.action:
            self._record_action(scope, record, status)
        handler = scope.get("path_template") or UNMATCHED
        method = str(scope.get("method", ""))
        if service is not None:
            service.metrics.on_http(method, status, handler, seconds)
        details = {key: value for key, value in record.log.items() if value is not None}
        quiet = handler in _PROBES and status < HTTPStatus.BAD_REQUEST
        if not quiet and handler not in _PAGE:
            entry = RequestEntry(
                id=record.request_id,
                time=time.time(),
                method=method,
                handler=handler,
                status=status,
                milliseconds=round(seconds * 1000, 1),
                key=record.key,
                details=details,
            )
            self._handle.recent.append(entry)
        if trace is not None:
            known = {"request_id": record.request_id, "key": record.key, **details}
            trace.end(method=method, route=handler, status=status, seconds=seconds, details=known, phases=PHASES)
        if self._is_logged(record, status, seconds):
            (_log.debug if quiet else _log.info)(
                "request",
                method=method,
                handler=handler,
                status=status,
                ms=round(seconds * 1000, 1),
                **details,
            )

    def _is_logged(self, record: RequestRecord, status: int, seconds: float) -> bool:
        """True for what failed or was slow, and for the share of others that the settings name: which ones, their ids
        decide."""
        settings = self._settings()
        if not settings.log_requests:
            return False
        failed = status >= HTTPStatus.BAD_REQUEST or "error_code" in record.log
        if failed or seconds >= settings.slow_request or settings.log_share >= 1.0:
            return True
        return zlib.crc32(record.request_id.encode()) < settings.log_share * 2**32

    def _record_action(self, scope: Scope, record: RequestRecord, status: int) -> None:
        client = scope.get("client")
        self._audit.write(
            key=record.key,
            action=record.action,
            target=record.target or "/".join(map(str, scope.get("path_params", {}).values())),
            status=status,
            client=client[0] if client else "",
            request_id=record.request_id,
        )


class _Exchange:
    """The two ASGI channels of one request, watched."""

    def __init__(
        self, record: RequestRecord, handle: ServiceHandle, receive: Receive, send: Send, *, unread: bool
    ) -> None:
        self._record = record
        self._handle = handle
        self._receive = receive
        self._send = send
        self._unread = unread
        self.status = 499
        """Status of the response; 499 until there is one, and if the client leaves first."""

    async def receive(self) -> Any:
        message = await self._receive()
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            self._unread = False
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", ()), *self._headers()]
        await self._send(message)

    def _headers(self) -> list[tuple[bytes, bytes]]:
        headers = [(b"x-request-id", self._record.request_id.encode()), (b"date", _date())]
        if self._record.quota is not None:
            self._record.headers.update(self._record.quota.headers())
        headers += [(name.encode(), value.encode("latin-1", "replace")) for name, value in self._record.headers.items()]
        if self._record.warnings:
            headers.append((b"x-eft-warning", "; ".join(self._record.warnings).encode("ascii", "replace")))
        if self._record.load_format and self._handle.service is not None:
            headers.append((b"endpoint-load-metrics", _load(self._handle.service, self._record.load_format)))
        if self._unread:
            # The rest of the body stays unread: without this the connection would receive all of it.
            headers.append((b"connection", b"close"))
        return headers


def _is_watching(path: str) -> bool:
    """True for paths that watch the server or load the page: they are not traced."""
    return path in _PROBES or path in _PAGE or path.startswith("/page/")


def _load(service: "EngineService", form: str) -> bytes:
    """Load of the engine in a form of ORCA's, under vLLM's names."""
    metrics = {"kv_cache_usage_perc": float(service.kv_usage), "num_requests_waiting": float(service.num_waiting)}
    if form == "JSON":
        return b"JSON " + msgspec.json.encode({"named_metrics": metrics})
    return ("TEXT " + ", ".join(f"named_metrics.{name}={value}" for name, value in metrics.items())).encode()


def _has_body(headers: dict[bytes, bytes]) -> bool:
    return b"transfer-encoding" in headers or headers.get(b"content-length", b"0").strip() != b"0"


def _refusal(scope: Scope) -> RequestError | None:
    """Error of a request that must not reach a handler; None for all others."""
    headers = scope["headers"]
    target = len(scope.get("raw_path") or b"") + len(scope["query_string"])
    if target + sum(len(name) + len(value) + 4 for name, value in headers) > MAX_HEADERS:  # 4: ": " and CR LF
        return HeadersTooLarge(f"The headers are longer than {MAX_HEADERS} bytes.")
    names = {name for name, _ in headers}
    if b"content-length" in names and b"transfer-encoding" in names:
        # RFC 9112, section 6.1: a sign of request smuggling.
        return InvalidRequest("Content-Length and Transfer-Encoding exclude each other.")
    return None


async def _answer(error: RequestError, send: Callable[[Any], Any]) -> None:
    body = encode(error)
    headers = [(b"content-type", JSON.encode()), (b"content-length", str(len(body)).encode())]
    if error.retry_after is not None:
        headers.append((b"retry-after", str(error.retry_after).encode()))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


_date_cache = (0, b"")


def _date() -> bytes:
    """The Date header; formatted once a second."""
    global _date_cache
    now = int(time.time())
    if _date_cache[0] != now:
        _date_cache = (now, formatdate(now, usegmt=True).encode())
    return _date_cache[1]
