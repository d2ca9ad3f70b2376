"""POST /v1/embeddings."""

import base64
from typing import Any, Literal

import msgspec
from litestar import Response, post
from msgspec import Struct

from runtime.api.docs import BODY
from runtime.api.handle import AnyRequest, api_of
from runtime.api.http.sse import unless_disconnected
from runtime.api.openai.generation import take_id
from runtime.api.openai.models import resolve_model
from runtime.api.openai.pooling import (
    DEFAULT_POOLING,
    EmbeddingRequest,
    PooledUsage,
    Vector,
    normalised,
    pooled,
    tokenise,
    usage_of,
)
from runtime.api.openai.schema import Intake
from runtime.errors import InvalidRequest


class EmbeddingItem(Struct, kw_only=True):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str
    """The numbers; or the same as float32, little-endian, in base64."""


class EmbeddingList(Struct, kw_only=True):
    object: Literal["list"] = "list"
    data: list[EmbeddingItem]
    model: str
    usage: PooledUsage


_intake = Intake(EmbeddingRequest)


@post("/v1/embeddings", status_code=200, opt={BODY: EmbeddingRequest})
async def create_embeddings(request: AnyRequest) -> Response[EmbeddingList]:
    """Embed texts: pooled hidden states of the last layer, after the norm, of the base model or an adapter."""
    api = api_of(request)
    service = api.handle.require()
    asked = await _intake.read(request, api)
    served = await resolve_model(service, asked.model)
    size = service.decoder.spec.hidden_size
    if asked.dimensions is not None and not 1 <= asked.dimensions <= size:
        raise InvalidRequest(
            f"dimensions must be between 1 and {size}, the model's hidden size, got {asked.dimensions}.",
            param="dimensions",
        )
    record = take_id(request, asked.request_id, served)
    prompts = await tokenise(asked, asked.input, served, api, request.receive, field="input")
    await served.ready(record)
    # Encoded one by one as they come: all at once they would hold the event loop.
    items: list[EmbeddingItem] = []

    async def embed() -> None:
        async for index, vector in pooled(served, prompts, asked.pooling or DEFAULT_POOLING, record, api):
            items.append(EmbeddingItem(index=index, embedding=_encoded(_finished(vector, asked), asked)))

    await unless_disconnected(request.receive, embed())
    answer = EmbeddingList(data=items, model=served.name, usage=usage_of(prompts))
    return Response(answer)


def _finished(vector: Vector, asked: EmbeddingRequest) -> Vector:
    if asked.normalize is False:
        return vector[: asked.dimensions]
    return normalised(vector, asked.dimensions)


def _encoded(vector: Vector, asked: EmbeddingRequest) -> Any:
    """The vector as JSON that is encoded already."""
    if asked.encoding_format == "base64":
        return msgspec.Raw(msgspec.json.encode(base64.b64encode(vector.astype("<f4").tobytes()).decode()))
    return msgspec.Raw(msgspec.json.encode(vector.tolist()))
