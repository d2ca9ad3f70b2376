"""POST /v1/score and /v1/rerank, in vLLM's shape: texts compared by their embeddings.

The model is a language model, not a cross-encoder: each text is embedded by itself, and the score is the cosine of two
embeddings. Every answer says so in `method`.
"""

import time
from typing import Literal

import numpy as np
from litestar import Response, post
from litestar.types import Receive
from msgspec import Struct

from runtime.api.docs import BODY
from runtime.api.handle import AnyRequest, Api, api_of
from runtime.api.http.record import RequestRecord
from runtime.api.http.sse import unless_disconnected
from runtime.api.openai.generation import take_id
from runtime.api.openai.models import Served, resolve_model
from runtime.api.openai.pooling import (
    DEFAULT_POOLING,
    PooledUsage,
    PoolingRequest,
    RerankDocument,
    RerankRequest,
    ScoreRequest,
    Vector,
    normalised,
    pooled,
    tokenise,
    usage_of,
)
from runtime.api.openai.schema import Intake
from runtime.errors import InvalidRequest


class TextScore(Struct, kw_only=True):
    index: int
    object: Literal["score"] = "score"
    score: float


class ScoreList(Struct, kw_only=True):
    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[TextScore]
    usage: PooledUsage
    method: str


class RerankResult(Struct, kw_only=True, omit_defaults=True):
    index: int
    relevance_score: float
    document: RerankDocument | None = None


class RerankAnswer(Struct, kw_only=True):
    id: str
    model: str
    usage: PooledUsage
    results: list[RerankResult]
    method: str


_scores = Intake(ScoreRequest)
_reranks = Intake(RerankRequest)


@post(["/v1/score", "/score"], status_code=200, opt={BODY: ScoreRequest})
async def score(request: AnyRequest) -> Response[ScoreList]:
    """Score pairs of texts by the cosine of their embeddings."""
    api = api_of(request)
    asked = await _scores.read(request, api)
    served = await resolve_model(api.handle.require(), asked.model)
    record = take_id(request, asked.request_id, served)
    left, right, names = _sides(asked)
    if not left or not right or len(left) not in (1, len(right)):
        raise InvalidRequest(
            f"{names[0]} must be one text, or as many as {names[1]} has, and neither may be empty; got {len(left)} and "
            f"{len(right)}.",
            param=names[0],
        )
    vectors, usage = await _embedded(asked, [*left, *right], served, record, api, request.receive, names[1])
    firsts, seconds = vectors[: len(left)], vectors[len(left) :]
    if len(firsts) == 1:
        firsts *= len(seconds)
    data = [
        TextScore(index=index, score=_cosine(a, b)) for index, (a, b) in enumerate(zip(firsts, seconds, strict=True))
    ]
    return Response(
        ScoreList(
            id=f"score-{record.request_id}",
            created=int(time.time()),
            model=served.name,
            data=data,
            usage=usage,
            method=_method(asked),
        )
    )


@post(["/v1/rerank", "/rerank", "/v2/rerank"], status_code=200, opt={BODY: RerankRequest})
async def rerank(request: AnyRequest) -> Response[RerankAnswer]:
    """Order documents by the cosine of their embeddings and the query's, the closest first."""
    api = api_of(request)
    asked = await _reranks.read(request, api)
    served = await resolve_model(api.handle.require(), asked.model)
    record = take_id(request, asked.request_id, served)
    if not asked.documents:
        raise InvalidRequest("documents must hold at least one text, got none.", param="documents")
    if asked.top_n is not None and asked.top_n < 1:
        raise InvalidRequest(f"top_n must be at least 1, got {asked.top_n}.", param="top_n")
    texts = [document if isinstance(document, str) else document.text for document in asked.documents]
    everything = [asked.query, *texts]
    (query, *others), usage = await _embedded(asked, everything, served, record, api, request.receive, "documents")
    scores = [_cosine(query, other) for other in others]
    order = sorted(range(len(scores)), key=lambda index: -scores[index])[: asked.top_n]
    results = [
        RerankResult(
            index=index,
            relevance_score=scores[index],
            document=None if asked.return_documents is False else RerankDocument(text=texts[index]),
        )
        for index in order
    ]
    return Response(
        RerankAnswer(
            id=f"rerank-{record.request_id}",
            model=served.name,
            usage=usage,
            results=results,
            method=_method(asked),
        )
    )


def _sides(asked: ScoreRequest) -> tuple[list[str], list[str], tuple[str, str]]:
    """The texts of both sides, and the names of their fields. Raises `InvalidRequest`."""
    pairs = {
        ("text_1", "text_2"): (asked.text_1, asked.text_2),
        ("queries", "documents"): (asked.queries, asked.documents),
    }
    given = {names: sides for names, sides in pairs.items() if sides != (None, None)}
    if len(given) != 1:
        raise InvalidRequest("Send either `text_1` and `text_2`, or `queries` and `documents`.", param="text_1")
    [(names, sides)] = given.items()
    for name, side in zip(names, sides, strict=True):
        if side is None:
            raise InvalidRequest(f"{name} is missing: {names[0]} and {names[1]} come together.", param=name)
    left, right = ([side] if isinstance(side, str) else list(side or ()) for side in sides)
    return left, right, names


async def _embedded(
    asked: PoolingRequest,
    texts: list[str],
    served: Served,
    record: RequestRecord,
    api: Api,
    receive: Receive,
    field: str,
) -> tuple[list[Vector], PooledUsage]:
    """A vector of length 1 for each text."""
    prompts = await tokenise(asked, [*texts], served, api, receive, field=field)
    await served.ready(record)
    vectors: list[Vector] = []

    async def embed() -> None:
        async for _, vector in pooled(served, prompts, asked.pooling or DEFAULT_POOLING, record, api):
            vectors.append(normalised(vector))

    await unless_disconnected(receive, embed())
    return vectors, usage_of(prompts)


def _cosine(a: Vector, b: Vector) -> float:
    return float(np.dot(a, b))


def _method(asked: PoolingRequest) -> str:
    return f"cosine of embeddings ({asked.pooling or DEFAULT_POOLING} pooling of hidden states), not a cross-encoder"
