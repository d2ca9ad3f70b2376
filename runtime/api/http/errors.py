"""Every failure in OpenAI's form: `{"error": {"message", "type", "param", "code"}}`.

A client's error goes to the client, with the field. An internal error goes to the log, with a traceback,
and the client gets an id to quote.
"""

import re
from http import HTTPStatus
from typing import Any

import msgspec
from litestar import Request, Response
from litestar.exceptions import HTTPException, MethodNotAllowedException, NotFoundException

from runtime.api.http.record import record_of
from runtime.errors import InvalidRequest, MethodNotAllowed, NotFound, RequestError, TooManyRequests
from runtime.support.logs import get_logger

_log = get_logger("api")

JSON = "application/json"

MAX_ECHO = 200
"""Most characters of msgspec's message that an error repeats."""


class ClientDisconnected(RequestError):
    """The client left before its answer was ready. Not sent to anyone; logged and counted as 499."""

    status = 499
    type = "client_disconnected"


class RequestTimeout(RequestError):
    """The client did not finish sending its request in time."""

    status = 408
    type = "invalid_request_error"
    default_code = "request_timeout"


class HeadersTooLarge(RequestError):
    status = 431
    type = "invalid_request_error"
    default_code = "headers_too_large"


class ErrorDetail(msgspec.Struct):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(msgspec.Struct):
    """The body of every answer that is not a success."""

    error: ErrorDetail


def body_of(error: RequestError) -> ErrorBody:
    """OpenAI's error body for an error."""
    return ErrorBody(ErrorDetail(error.message, error.type, error.param, error.code))


def encode(error: RequestError) -> bytes:
    """The JSON of `error`, for responses and for error events in a stream."""
    return msgspec.json.encode(body_of(error))


def to_request_error(error: Exception, request_id: str) -> RequestError:
    """`error` in a form that may be shown. An unexpected one is logged here, under `request_id`."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, HTTPException) and error.status_code < HTTPStatus.INTERNAL_SERVER_ERROR:
        return _from_framework(error)
    _log.error("unexpected_error", exc_info=error)
    return RequestError(
        f"An internal error ended this request. Its id, for the server's log: {request_id}.",
        code="internal_error",
    )


def handle_exception(request: Request[Any, Any, Any], error: Exception) -> Response[ErrorBody]:
    """The one exception handler of the app."""
    record = record_of(request)
    shown = to_request_error(error, record.request_id)
    record.log.update(error_code=shown.code, error_param=shown.param)
    headers = dict(getattr(error, "headers", None) or {}) if isinstance(error, MethodNotAllowedException) else {}
    if isinstance(shown, TooManyRequests):
        headers["Retry-After"] = str(shown.retry_after)
    return Response(body_of(shown), status_code=shown.status, media_type=JSON, headers=headers)


def from_validation(error: msgspec.ValidationError) -> InvalidRequest:
    """msgspec's error, with its JSON path as `param`: `$.messages[0].role` → `messages[0].role`."""
    text = str(error)
    message, _, path = text.partition(" - at `")
    path = path.removeprefix("key` in `")  # the wrong key of an object, which is named itself
    param = path.rstrip("`").removeprefix("$").removeprefix(".").removesuffix("[...]") or None
    missing = re.search(r"missing required field `([^`]+)`", message)
    if missing is not None:
        param = f"{param}.{missing[1]}" if param else missing[1]
    if len(message) > MAX_ECHO:  # it holds the value that was sent
        message = message[:MAX_ECHO] + "…"
    return InvalidRequest(f"{param}: {message}." if param else f"{message}.", param=param)


def _from_framework(error: HTTPException) -> RequestError:
    """Litestar's own errors, reworded: its texts may hold values of ours."""
    if isinstance(error, NotFoundException):
        return NotFound("There is no such endpoint.", code="unknown_url")
    if isinstance(error, MethodNotAllowedException):
        allowed = dict(error.headers or {}).get("allow", "")
        return MethodNotAllowed(f"This endpoint does not take this method; it takes {allowed}.")
    return InvalidRequest("The request is not valid.")
