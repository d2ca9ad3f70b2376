"""POST /v1/feedback: what people say of answers, stored; and /admin/feedback, which lists and exports it."""

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Annotated, Any

import msgspec
from litestar import Response, delete, get, post
from litestar.response import Stream
from msgspec import Meta, Struct

from runtime.api.docs import BODY, QUERY, page_query
from runtime.api.handle import AnyRequest, api_of
from runtime.api.http.auth import ADMIN
from runtime.api.http.query import MAX_PAGE, ObjectPage, check_names, object_page, page_request, single
from runtime.api.http.record import record_of
from runtime.api.openai.batches import check_metadata
from runtime.api.openai.schema import Intake
from runtime.errors import Forbidden, InvalidRequest, PayloadTooLarge
from runtime.feedback import Feedback, FeedbackMessage
from settings.api import LimitSettings

JSONL = "application/jsonl"
EXPORT_PAGE = 100
"""Rows that an export holds in memory at once."""


class FeedbackRequest(Struct, kw_only=True):
    """Feedback on one answer: a `score`, a `correction` or a `comment`. Only what is in it is stored."""

    id: str
    """Id of the answer, from its body or its header X-Request-Id."""
    model: str | None = None
    """Name or version that answered; X-Eft-Adapter-Version of the answer."""
    score: Annotated[float, Meta(ge=-1, le=1)] | None = None
    comment: str | None = None
    messages: list[FeedbackMessage] | None = None
    """The chat before the answer: with it, a correction is a row to train on."""
    answer: str | None = None
    correction: str | None = None
    metadata: dict[str, str] | None = None


class FeedbackView(Struct, kw_only=True):
    """Stored feedback."""

    object: str = "feedback"
    id: str
    created_at: int
    key: str
    answer_id: str
    model: str | None
    score: float | None
    comment: str | None
    messages: list[FeedbackMessage] | None
    answer: str | None
    correction: str | None
    metadata: dict[str, str] | None


class FeedbackDeleted(Struct, kw_only=True):
    """Feedback that was deleted."""

    object: str = "feedback"
    id: str
    deleted: bool = True


_intake = Intake(FeedbackRequest, neutral={}, instead={})


@post("/v1/feedback", status_code=200, opt={BODY: FeedbackRequest})
async def give_feedback(request: AnyRequest) -> FeedbackView:
    """Store a score, a correction or a comment on an answer, with the texts that come along. 403 where the operator
    takes none (feedback.accept_feedback)."""
    api = api_of(request)
    store = api.handle.require_feedback()
    kept = api.settings.feedback
    if not kept.accept_feedback:
        raise Forbidden("This server takes no feedback (feedback.accept_feedback).", code="feedback_disabled")
    asked = await _intake.read(request, api)
    _check(asked, api.settings.limits)
    record = record_of(request)
    feedback = Feedback(
        key=record.key,
        answer_id=asked.id,
        model=asked.model,
        score=asked.score,
        comment=asked.comment,
        messages=asked.messages,
        answer=asked.answer,
        correction=asked.correction,
        metadata=asked.metadata,
    )
    if (size := len(msgspec.json.encode(feedback))) > kept.max_feedback_size:
        raise PayloadTooLarge(
            f"Feedback may have at most {kept.max_feedback_size} bytes (feedback.max_feedback_size), got {size}."
        )
    return _view(await store.add(feedback, record.tenant))


@get(
    "/admin/feedback",
    opt={
        ADMIN: True,
        QUERY: page_query(MAX_PAGE, model={"type": "string"}, format={"enum": ["feedback", "messages", "preferences"]}),
    },
)
async def list_feedback(request: AnyRequest) -> Response[ObjectPage[FeedbackView]]:
    """The newest feedback first; `model` takes that on one model. With `Accept: application/jsonl`: all of it, or
    `limit` rows after the one `after`, a row a line, in the `format` feedback, messages (the chats that end with a
    correction, to train on) or preferences (those with the answer and its correction)."""
    store = api_of(request).handle.require_feedback()
    page = page_request(request, further=("model", "format"))
    model, form = single(request, "model"), single(request, "format") or "feedback"
    if form not in EXPORTS:
        raise InvalidRequest(f"format: expected one of {', '.join(EXPORTS)}, got `{form[:50]}`.", param="format")
    if JSONL in request.headers.get("accept", ""):
        rows = await store.all(model=model, after=page.after, newest_first=page.newest_first, size=EXPORT_PAGE)
        lines = _lines(rows, EXPORTS[form], None if single(request, "limit") is None else page.limit)
        return Stream(lines, media_type=JSONL)  # type: ignore[return-value]
    if form != "feedback":
        raise InvalidRequest(f"format {form} is for exports: send `Accept: {JSONL}`.", param="format")
    listed, more = await store.page(model=model, after=page.after, limit=page.limit, newest_first=page.newest_first)
    return Response(object_page([_view(row) for row in listed], more))


@delete("/admin/feedback/{feedback_id:str}", status_code=200, opt={ADMIN: True})
async def delete_feedback(request: AnyRequest) -> FeedbackDeleted:
    """Delete one feedback."""
    check_names(request, ())
    feedback_id = str(request.path_params["feedback_id"])
    await api_of(request).handle.require_feedback().delete(feedback_id)
    return FeedbackDeleted(id=feedback_id)


def _check(asked: FeedbackRequest, limits: LimitSettings) -> None:
    """Raise `InvalidRequest` for feedback that says nothing, and for labels that are too long."""
    for name in ("id", "model"):
        label = getattr(asked, name)
        if label is not None and not 1 <= len(label) <= limits.max_label:
            raise InvalidRequest(f"{name} must have 1 to {limits.max_label} characters, got {len(label)}.", param=name)
    if len(asked.messages or ()) > limits.max_messages:
        raise InvalidRequest(
            f"messages must have at most {limits.max_messages} entries, got {len(asked.messages or ())}.",
            param="messages",
        )
    check_metadata(asked.metadata, limits)
    if asked.score is None and not asked.comment and asked.correction is None:
        raise InvalidRequest("The feedback says nothing: give a score, a correction or a comment.", param="score")


def _view(row: Feedback) -> FeedbackView:
    fields: dict[str, Any] = {name: getattr(row, name) for name in row.__struct_fields__ if name != "created_at"}
    return FeedbackView(**fields, created_at=int(row.created_at))


Write = Callable[[Feedback], Any]


async def _lines(
    found: AsyncGenerator[list[Feedback], None], write: Write, limit: int | None
) -> AsyncGenerator[bytes, None]:
    """The rows as lines, at most `limit` of them."""
    left = limit
    async with aclosing(found):
        async for rows in found:
            written = [msgspec.json.encode(line) for row in rows if (line := write(row)) is not None][:left]
            yield b"".join(line + b"\n" for line in written)
            if left is not None:
                left -= len(written)
                if left == 0:
                    return


def _messages(row: Feedback) -> dict[str, Any] | None:
    """The chat with its correction; None for feedback without one."""
    if not row.messages or row.correction is None:
        return None
    return {"messages": [*row.messages, FeedbackMessage(role="assistant", content=row.correction)]}


def _preferences(row: Feedback) -> dict[str, Any] | None:
    """The chat with the correction as the better answer; None for feedback without both."""
    if not row.messages or row.correction is None or row.answer is None:
        return None
    better, worse = (FeedbackMessage(role="assistant", content=text) for text in (row.correction, row.answer))
    return {"messages": row.messages, "chosen": better, "rejected": worse}


EXPORTS: dict[str, Write] = {"feedback": _view, "messages": _messages, "preferences": _preferences}
"""Form of an export → its rows; None leaves a row out."""

ROUTES: tuple[Any, ...] = (give_feedback, list_feedback, delete_feedback)
