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
from runtime.errors import InvalidRequest, MethodNotAllowed, NotFound, RequestError
from runtime.support.logs import get_logger

_log = get_logger("api")

JSON = "application/json"

MAX_ECHO = 200
"""Most characters of msgspec's message that an error repeats."""


OUTSIDE = {
    "assistants": "use /v1/responses, with previous_response_id",
    "audio": "prompts and answers are text",
    "chatkit": "use /v1/responses",
    "containers": "this server runs no tools of its own",
    "conversations": "name the response before it in previous_response_id",
    "evals": "jobs score their model on test_datasets, and harnesses score one over /v1/completions",
    "fine_tuning": "jobs are at /v1/fine_tuning/jobs, and there are no graders or permissions",
    "images": "prompts and answers are text",
    "moderations": "check the text before it is sent",
    "organization": "`eft keys` and GET /admin/status have what the operator needs",
    "realtime": "stream /v1/responses, over a WebSocket too",
    "skills": "this server runs no tools of its own",
    "threads": "use /v1/responses, with previous_response_id",
    "uploads": "send the file whole, to /v1/files: it is stored as it arrives",
    "vector_stores": "make embeddings with /v1/embeddings, and keep them beside the server",
    "videos": "prompts and answers are text",
}
"""Resource of OpenAI's API that is not served → what to do instead, or why."""


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


def to_request_error(error: Exception, request_id: str, path: str = "") -> RequestError:
    """`error` in a form that may be shown. An unexpected one is logged here, under `request_id`. `path`: that of the
    request, for one that no route takes."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, HTTPException) and error.status_code < HTTPStatus.INTERNAL_SERVER_ERROR:
        return _from_framework(error, path)
    _log.error("unexpected_error", exc_info=error)
    return RequestError(
        f"An internal error ended this request. Its id, for the server's log: {request_id}.",
        code="internal_error",
    )


def handle_exception(request: Request[Any, Any, Any], error: Exception) -> Response[ErrorBody]:
    """The one exception handler of the app."""
    record = record_of(request)
    shown = to_request_error(error, record.request_id, request.scope["path"])
    record.log.update(error_code=shown.code, error_param=shown.param)
    headers = dict(getattr(error, "headers", None) or {}) if isinstance(error, MethodNotAllowedException) else {}
    if shown.retry_after is not None:
        headers["Retry-After"] = str(shown.retry_after)
    return Response(body_of(shown), status_code=shown.status, media_type=JSON, headers=headers)


def unknown_url(path: str) -> NotFound:
    """The error for a path that is not served; for one of OpenAI's, with what to do instead."""
    root, _, resource = path.strip("/").partition("/")
    name = resource.partition("/")[0]
    instead = OUTSIDE.get(name) if root == "v1" else None
    if instead is None:
        return NotFound("There is no such endpoint.", code="unknown_url")
    return NotFound(f"There is no endpoint /v1/{name} here: {instead}.", code="unknown_url")


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


def _from_framework(error: HTTPException, path: str) -> RequestError:
    """Litestar's own errors, reworded: its texts may hold values of ours."""
    if isinstance(error, NotFoundException):
        return unknown_url(path)
    if isinstance(error, MethodNotAllowedException):
        allowed = dict(error.headers or {}).get("allow", "")
        return MethodNotAllowed(f"This endpoint does not take this method; it takes {allowed}.")
    return InvalidRequest("The request is not valid.")
