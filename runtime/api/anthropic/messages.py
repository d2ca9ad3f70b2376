"""POST /v1/messages and /v1/messages/count_tokens."""

import re
from contextlib import ExitStack
from http import HTTPStatus
from typing import Any

import msgspec
from litestar import Request, Response, post

from runtime.api.anthropic.schema import (
    INSTEAD,
    NEUTRAL,
    CountRequest,
    Message,
    MessageError,
    MessageErrorDetail,
    MessageRequest,
    TokenCount,
)
from runtime.api.anthropic.translate import EventTranslator, chat_body, message_of
from runtime.api.docs import BODY
from runtime.api.handle import AnyRequest, Api, api_of
from runtime.api.http.errors import JSON, handle_exception
from runtime.api.http.record import record_of
from runtime.api.http.sse import EventStream, named_events, unless_disconnected
from runtime.api.openai.chat import count_chat, open_chat
from runtime.api.openai.schema import ChatRequest, Intake
from runtime.errors import RequestError

_TYPES = {
    HTTPStatus.UNAUTHORIZED: "authentication_error",
    HTTPStatus.FORBIDDEN: "permission_error",
    HTTPStatus.NOT_FOUND: "not_found_error",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "request_too_large",
    HTTPStatus.TOO_MANY_REQUESTS: "rate_limit_error",
    HTTPStatus.SERVICE_UNAVAILABLE: "overloaded_error",
    HTTPStatus.GATEWAY_TIMEOUT: "timeout_error",
}

_messages = Intake(MessageRequest, neutral=NEUTRAL, instead=INSTEAD)
_counts = Intake(CountRequest, neutral=NEUTRAL, instead=INSTEAD)
_chats = Intake(ChatRequest)


def error_of(error: RequestError, request_id: str) -> MessageError:
    """An error in Anthropic's shape, in which a field has its name in that API."""
    kind = _TYPES.get(HTTPStatus(error.status) if error.status in set(HTTPStatus) else HTTPStatus.OK)
    if kind is None:
        kind = "api_error" if error.status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"
    message = error.message
    if error.param == "stop":
        message = re.sub(r"\bstop\b", "stop_sequences", message)
    return MessageError(error=MessageErrorDetail(type=kind, message=message), request_id=request_id)


def handle_message_exception(request: Request[Any, Any, Any], error: Exception) -> Response[MessageError]:
    """The app's exception handler, with the body in Anthropic's shape."""
    answer = handle_exception(request, error)
    record = record_of(request)
    detail = answer.content.error
    shown = RequestError(detail.message, param=detail.param, code=detail.code)
    shown.status = answer.status_code  # type: ignore[misc, assignment]
    return Response(
        error_of(shown, record.request_id),
        status_code=answer.status_code,
        media_type=JSON,
        headers={**answer.headers, "request-id": record.request_id},
    )


_HANDLERS: Any = {Exception: handle_message_exception}


@post("/v1/messages", status_code=200, opt={BODY: MessageRequest}, exception_handlers=_HANDLERS)
async def create_message(request: AnyRequest) -> Response[Message]:
    """Answer a conversation in Anthropic's shape, whole or as a stream of events."""
    api = api_of(request)
    asked = await _messages.read(request, api)
    chat, given = await _as_chat(asked, api)
    generation, make, record = await open_chat(request, api, chat, given)
    id, headers = f"msg_{record.request_id}", {"request-id": record.request_id}
    with ExitStack() as stack:
        stack.callback(generation.close)
        answer = make()
        if asked.stream:
            events = named_events(
                EventTranslator(id, chat.model or "").events(answer.chunks()),
                record,
                name=lambda event: str(event.__struct_config__.tag),
                failure=lambda error: ("error", error_of(error, record.request_id)),
            )
            return EventStream(events, stack.pop_all().close)
        whole = answer.whole(await unless_disconnected(request.receive, generation.collect()))
        return Response(message_of(whole, id), headers=headers)


@post("/v1/messages/count_tokens", status_code=200, opt={BODY: CountRequest}, exception_handlers=_HANDLERS)
async def count_message_tokens(request: AnyRequest) -> Response[TokenCount]:
    """The number of tokens that the prompt of a message has."""
    api = api_of(request)
    asked = await _counts.read(request, api)
    chat, _ = await _as_chat(asked, api)
    return Response(TokenCount(input_tokens=await count_chat(request, api, chat)))


async def _as_chat(asked: CountRequest, api: Api) -> tuple[ChatRequest, frozenset[str]]:
    """The chat that a message is, checked as one, and the fields that it sets."""
    template = api.handle.require().tokenizer.chat_template or ""
    translated = chat_body(
        asked, max_messages=api.settings.limits.max_messages, takes_effort="reasoning_effort" in template
    )
    body = msgspec.json.encode(translated)
    chat, given = (await _chats.parse(body, api.settings.limits))[:2]
    return chat, given
