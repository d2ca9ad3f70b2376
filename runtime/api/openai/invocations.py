"""POST /invocations, SageMaker's one path for all requests: the body's fields tell which endpoint is meant."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from litestar import Request, Response, post

from runtime.api.docs import BODY
from runtime.api.handle import AnyRequest, api_of
from runtime.api.http.body import LARGE, parse_fields, read_body
from runtime.api.openai.chat import create_chat_completion
from runtime.api.openai.completions import create_completion
from runtime.api.openai.embeddings import create_embeddings
from runtime.api.openai.pooling import EmbeddingRequest, RerankRequest, ScoreRequest
from runtime.api.openai.schema import ChatRequest, CompletionRequest
from runtime.api.openai.scores import rerank, score
from runtime.errors import InvalidRequest

ENDPOINTS = (
    ("messages", create_chat_completion),
    ("prompt", create_completion),
    ("input", create_embeddings),
    ("text_1", score),
    ("queries", score),
    ("query", rerank),
)
"""A field that only this endpoint needs, and its handler; the first match counts, as in vLLM."""


@post(
    "/invocations",
    status_code=200,
    opt={BODY: (ChatRequest, CompletionRequest, EmbeddingRequest, ScoreRequest, RerankRequest)},
)
async def invoke(request: AnyRequest) -> Response[Any]:
    """A chat where there are `messages`, a completion where there is a `prompt`, embeddings, scores or a ranking by
    their fields. The path that SageMaker sends to."""
    body = await read_body(request, api_of(request).settings.server)
    fields = await asyncio.to_thread(parse_fields, body) if len(body) > LARGE else parse_fields(body)
    for field, handler in ENDPOINTS:
        if field in fields:
            answered: Response[Any] = await handler.fn(_again(request, body))
            return answered
    known = ", ".join(f"`{field}` for {min(handler.paths)}" for field, handler in ENDPOINTS)
    raise InvalidRequest(f"The body names no endpoint by its fields: send {known}.", param=ENDPOINTS[0][0])


def _again(request: AnyRequest, body: bytes) -> AnyRequest:
    """The request with its body still to be read. What follows the body, the end of the connection, is the same."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]
    rest: Callable[[], Awaitable[Any]] = request.receive

    async def receive() -> Any:
        return messages.pop() if messages else await rest()

    return Request(request.scope, receive=receive, send=request.send)
