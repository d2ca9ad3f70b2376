"""Every way a request can fail, one class an outcome.

The status code, OpenAI error type and default code sit on the class; the raise site gives the
message and names the field. Independent of HTTP frameworks: `runtime.api.http.errors` renders these.
"""

from typing import ClassVar


class RequestError(Exception):
    """A failure that is answered to the client that caused it."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    default_code: ClassVar[str | None] = None
    retry_after: int | None = None
    """Seconds after which to try again: the `Retry-After` header."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or self.default_code


class InvalidRequest(RequestError):
    """The request is malformed or has a value out of range."""

    status = 400
    type = "invalid_request_error"


class ContextLengthExceeded(InvalidRequest):
    """The prompt can never fit: in the model's context, or in the block pool."""

    default_code = "context_length_exceeded"


class Unsupported(InvalidRequest):
    """A field of the API without effect here (yet); refusing it beats ignoring it in silence."""

    default_code = "unsupported_parameter"


class GrammarTooComplex(InvalidRequest):
    """The output cannot be held to the request's grammar any further: it has reached a limit of work or states."""

    default_code = "grammar_too_complex"


class Unauthorized(RequestError):
    """No key, or one that is not known: 401."""

    status = 401
    type = "invalid_request_error"
    default_code = "invalid_api_key"


class Forbidden(RequestError):
    """A known caller without the right: 403."""

    status = 403
    type = "permission_error"
    default_code = "forbidden"


class NotFound(RequestError):
    """No such object: 404."""

    status = 404
    type = "invalid_request_error"
    default_code = "not_found"


class ModelNotFound(NotFound):
    """No model or adapter has the requested name: 404."""

    default_code = "model_not_found"


class MethodNotAllowed(RequestError):
    """A path that has no such method: 405."""

    status = 405
    type = "invalid_request_error"
    default_code = "method_not_allowed"


class Conflict(RequestError):
    """A request that the object's present state does not allow: 409."""

    status = 409
    type = "invalid_request_error"
    default_code = "conflict"


class PayloadTooLarge(RequestError):
    """A body or an upload over its limit: 413."""

    status = 413
    type = "invalid_request_error"
    default_code = "payload_too_large"


class UnsupportedMediaType(RequestError):
    """A body in a form that is not read here: 415."""

    status = 415
    type = "invalid_request_error"
    default_code = "unsupported_media_type"


class TooManyRequests(RequestError):
    """The queue is full."""

    status = 429
    type = "rate_limit_error"
    default_code = "queue_full"

    def __init__(self, message: str, *, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class EngineFailure(RequestError):
    """This one request's step raised; the rest of the batch went on."""

    status = 500
    type = "server_error"
    default_code = "engine_failure"


class EngineUnavailable(RequestError):
    """The engine is dead, stuck, loading, or draining before shutdown."""

    status = 503
    type = "service_unavailable"
    default_code = "engine_unavailable"


class ModelLoading(EngineUnavailable):
    """No model is there yet, or the next one is not there yet."""

    retry_after = 5


class AdapterUnavailable(RequestError):
    """An existing adapter version cannot be used now: its files are gone or broken, or it was unloaded."""

    status = 503
    type = "service_unavailable"
    default_code = "adapter_unavailable"


class DeadlineExceeded(RequestError):
    """The request's deadline passed, or could no longer be kept."""

    status = 504
    type = "timeout_error"
    default_code = "deadline_exceeded"


class StorageUnavailable(RequestError):
    """Nothing was stored: the disk is full, or the database cannot be written.

    `cause` is more precise than the code, where possible: disk_full, too_many_files, storage_read_only.
    """

    status = 503
    type = "service_unavailable"
    default_code = "storage_unavailable"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None, cause: str = "") -> None:
        super().__init__(message, param=param, code=code)
        self.cause = cause or "storage_unavailable"
