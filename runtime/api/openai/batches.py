"""/v1/batches: create, list, retrieve and cancel batches."""

from typing import Any, Literal

from litestar import get, post
from msgspec import Struct

from runtime.api.docs import BODY, QUERY, page_query
from runtime.api.handle import AnyRequest, api_of
from runtime.api.http.query import MAX_PAGE, ObjectPage, check_names, object_page, page_request
from runtime.api.http.record import record_of, visible_to
from runtime.api.openai.schema import Intake
from runtime.batches.manager import BatchManager
from runtime.batches.records import (
    ENDPOINTS,
    MAX_WINDOW_SECONDS,
    Batch,
    BatchUsage,
    Counts,
    LineError,
    window_seconds,
)
from runtime.errors import InvalidRequest
from runtime.files.store import MAX_EXPIRY_SECONDS, MIN_EXPIRY_SECONDS
from settings.api import LimitSettings


class ExpiresAfter(Struct, kw_only=True):
    anchor: Literal["created_at"]
    seconds: int


class BatchRequest(Struct, kw_only=True):
    input_file_id: str
    endpoint: str
    completion_window: str
    metadata: dict[str, str] | None = None
    output_expires_after: ExpiresAfter | None = None


class BatchErrors(Struct, kw_only=True):
    object: Literal["list"] = "list"
    data: list[LineError]


class BatchObject(Struct, kw_only=True):
    """A batch, in OpenAI's form. Times are seconds since the epoch."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    model: str | None
    errors: BatchErrors | None
    input_file_id: str
    completion_window: str
    status: str
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: Counts
    usage: BatchUsage
    metadata: dict[str, str] | None


_intake = Intake(BatchRequest)

_SAME = frozenset(Batch.__struct_fields__) & frozenset(BatchObject.__struct_fields__) - {"errors", "usage"}


@post("/v1/batches", status_code=200, opt={BODY: BatchRequest})
async def create_batch(request: AnyRequest) -> BatchObject:
    """Answer the requests of a file beside live traffic, which goes first. The file is checked at once; a fault in it
    fails the batch, with the numbers of the lines."""
    api = api_of(request)
    batches = api.handle.require_batches()
    check_names(request, ())
    asked = await _intake.read(request, api)
    record = record_of(request)
    if asked.endpoint not in ENDPOINTS:
        raise InvalidRequest(
            f"endpoint must be one of {', '.join(ENDPOINTS)}, got `{asked.endpoint[:100]}`.", param="endpoint"
        )
    window = window_seconds(asked.completion_window)
    if window is None:
        raise InvalidRequest(
            "completion_window must be a time such as 24h, in s, m, h or d, of at most "
            f"{MAX_WINDOW_SECONDS // 86400} days, got `{asked.completion_window[:50]}`.",
            param="completion_window",
        )
    check_metadata(asked.metadata, api.settings.limits)
    batch = await batches.create(
        owner=record.tenant,
        endpoint=asked.endpoint,
        input_file_id=asked.input_file_id,
        completion_window=asked.completion_window,
        window_seconds=window,
        metadata=asked.metadata,
        output_lifetime=_lifetime(asked.output_expires_after),
    )
    record.target = batch.id
    return batch_object(batch)


@get("/v1/batches", opt={QUERY: page_query(MAX_PAGE)})
async def list_batches(request: AnyRequest) -> ObjectPage[BatchObject]:
    """The newest batches first. `after` takes an id, `limit` up to 100, `order` asc or desc."""
    batches = _batches(request)
    page = page_request(request)
    found, more = await batches.store.page(
        visible_to(record_of(request)), after=page.after, limit=page.limit, newest_first=page.newest_first
    )
    return object_page([batch_object(batches.current(batch)) for batch in found], more)


@get("/v1/batches/{batch_id:str}")
async def retrieve_batch(request: AnyRequest) -> BatchObject:
    """One batch."""
    batches = _batches(request)
    check_names(request, ())
    return batch_object(batches.current(await batches.store.get(_batch_id(request), visible_to(record_of(request)))))


@post("/v1/batches/{batch_id:str}/cancel", status_code=200)
async def cancel_batch(request: AnyRequest) -> BatchObject:
    """Cancel a batch. Requests under way are stopped; answers that are there stay, in its output file."""
    check_names(request, ())
    return batch_object(await _batches(request).cancel(_batch_id(request), visible_to(record_of(request))))


ROUTES = (create_batch, list_batches, retrieve_batch, cancel_batch)


def batch_object(batch: Batch) -> BatchObject:
    """A batch in OpenAI's shape."""
    fields: dict[str, Any] = {name: getattr(batch, name) for name in _SAME}
    return BatchObject(
        **fields,
        errors=BatchErrors(data=batch.errors) if batch.errors else None,
        usage=batch.usage or BatchUsage(),
        request_counts=Counts(total=batch.total, completed=batch.completed, failed=batch.failed),
    )


def check_metadata(metadata: dict[str, str] | None, limits: LimitSettings) -> None:
    """Raise `InvalidRequest` for too many entries, or too long ones."""
    if len(metadata or {}) > limits.max_metadata:
        raise InvalidRequest(
            f"metadata must have at most {limits.max_metadata} entries, got {len(metadata or {})}.", param="metadata"
        )
    for text in (text for entry in (metadata or {}).items() for text in entry):
        if len(text) > limits.max_label:
            raise InvalidRequest(
                f"metadata must have keys and values of at most {limits.max_label} characters, got {len(text)}.",
                param="metadata",
            )


def _lifetime(asked: ExpiresAfter | None) -> int | None:
    if asked is None:
        return None
    if not MIN_EXPIRY_SECONDS <= asked.seconds <= MAX_EXPIRY_SECONDS:
        raise InvalidRequest(
            f"output_expires_after.seconds must be between {MIN_EXPIRY_SECONDS} and {MAX_EXPIRY_SECONDS}, got "
            f"{asked.seconds}.",
            param="output_expires_after.seconds",
        )
    return asked.seconds


def _batches(request: AnyRequest) -> BatchManager:
    return api_of(request).handle.require_batches()


def _batch_id(request: AnyRequest) -> str:
    return str(request.path_params["batch_id"])
