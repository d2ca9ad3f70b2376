"""Pooled hidden states of prompts, for the endpoints that embed and compare texts."""

import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import ExitStack
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from runtime.api.handle import Api
from runtime.api.http.record import RequestRecord
from runtime.api.openai.models import Served
from runtime.api.openai.prompts import PromptEncoder, PromptInput, count_prompts
from runtime.engine.delivery import OutputStream
from runtime.errors import ContextLengthExceeded, EngineUnavailable, InvalidRequest, RequestError
from runtime.messages import Pooling, SamplingParams, Submission

Vector = NDArray[np.float32]

WAVE_STEPS = 8
"""Steps' worth of tokens that a request has in the engine at once, so that other requests come in between."""

DEFAULT_POOLING: Pooling = "mean"


class PoolingRequest(msgspec.Struct, kw_only=True):
    """Fields that all requests for pooled hidden states have in common."""

    model: str | None = None
    user: str | None = None
    pooling: Pooling | None = None
    """Ours: `mean` of all tokens (the default), or the `last` token."""
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = None
    request_id: str | None = None


class EmbeddingRequest(PoolingRequest, kw_only=True):
    input: str | list[str | int | list[int]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    normalize: bool | None = None
    """vLLM's: false leaves the vectors as the model has them."""


class ScoreRequest(PoolingRequest, kw_only=True):
    """Two texts, one text and several, or two lists of as many: `text_1` and `text_2`, or `queries` and
    `documents`."""

    text_1: str | list[str] | None = None
    text_2: str | list[str] | None = None
    queries: str | list[str] | None = None
    documents: str | list[str] | None = None


class RerankDocument(msgspec.Struct, kw_only=True):
    text: str


class RerankRequest(PoolingRequest, kw_only=True):
    query: str
    documents: list[str | RerankDocument]
    top_n: int | None = None
    return_documents: bool | None = None


class PooledUsage(msgspec.Struct, kw_only=True):
    prompt_tokens: int
    total_tokens: int
    completion_tokens: int = 0


def usage_of(prompts: Sequence[Sequence[int]]) -> PooledUsage:
    """Usage of prompts that were pooled, in tokens."""
    count = sum(map(len, prompts))
    return PooledUsage(prompt_tokens=count, total_tokens=count)


async def tokenise(
    asked: PoolingRequest, inputs: PromptInput, served: Served, api: Api, receive: object, *, field: str
) -> list[list[int]]:
    """Token ids of each input; `field` is where they are. Raises `InvalidRequest`, `ContextLengthExceeded`."""
    service, limits = served.service, api.settings.limits
    if (count := count_prompts(inputs)) > limits.max_inputs:
        raise InvalidRequest(f"{field} must hold at most {limits.max_inputs} inputs, got {count}.", param=field)
    if len(asked.user or "") > limits.max_label:
        raise InvalidRequest(
            f"user must have a text of at most {limits.max_label} characters, got {len(asked.user or '')}.",
            param="user",
        )
    context, keep = service.max_model_len, asked.truncate_prompt_tokens
    if keep is not None and keep != -1 and not 1 <= keep <= context:
        raise InvalidRequest(
            f"truncate_prompt_tokens must be -1, or between 1 and {context}, got {keep}.",
            param="truncate_prompt_tokens",
        )
    encoder = PromptEncoder(
        served.tokenizer,
        served.vocab_size,
        None if keep is not None else context,
        limits.max_tokenize_chars,
        receive,  # type: ignore[arg-type]
    )
    special = asked.add_special_tokens is not False
    prompts = await encoder.prompts(inputs, add_special_tokens=special, field=field)
    if keep is not None:
        return [prompt[: context if keep == -1 else keep] for prompt in prompts]
    for index, prompt in enumerate(prompts):
        if len(prompt) > context:
            raise ContextLengthExceeded(
                f"This model's maximum context length is {context} tokens; the input has {len(prompt)}.",
                param=field if len(prompts) == 1 else f"{field}[{index}]",
            )
    return prompts


async def pooled(
    served: Served, prompts: list[list[int]], kind: Pooling, record: RequestRecord, api: Api
) -> AsyncGenerator[tuple[int, Vector], None]:
    """The vector [hidden] of each prompt, with its index. `served` is ready, and nothing was awaited since. The engine
    has a part of the prompts at a time. Raises the errors of `EngineService.submit_all`, and of requests that fail."""
    service, scheduler = served.service, api.settings.scheduler
    tokens = sum(map(len, prompts))
    if record.quota is not None:
        record.quota.reserve(
            sequences=min(len(prompts), scheduler.max_running),
            prompt_tokens=tokens,
            max_tokens=0,
            num_running=service.num_running,
            priority=0,
            deadline=None,
        )
    computed = 0
    try:
        for wave in _waves(prompts, scheduler.max_running, WAVE_STEPS * scheduler.max_batched_tokens):
            with ExitStack() as stack:
                streams = _submit(served, [prompts[index] for index in wave], kind, record)
                for stream in streams:
                    stack.callback(stream.cancel)
                for index, stream in zip(wave, streams, strict=True):
                    vector = await _vector(stream)
                    computed += len(prompts[index])
                    if record.quota is not None:
                        record.quota.started()
                    yield index, vector
    finally:
        if record.quota is not None:
            record.quota.settle(computed)
        record.log.update(prompt_tokens=computed)


def normalised(vector: Vector, dimensions: int | None = None) -> Vector:
    """The first `dimensions` of a vector, with a length of 1. A vector of zeros stays."""
    part = vector if dimensions is None else vector[:dimensions]
    length = float(np.linalg.norm(part.astype(np.float64)))
    return part if length == 0.0 else (part / length).astype(np.float32)


def _submit(served: Served, prompts: list[list[int]], kind: Pooling, record: RequestRecord) -> list[OutputStream]:
    arrival = time.monotonic()
    submissions = [
        Submission(
            request_id=record.request_id,
            prompt_ids=prompt,
            params=SamplingParams(),
            pooling=kind,
            background=record.background,
            adapter=served.key,
            cache_salt=record.salt,
            tenant=record.tenant,
            arrival=arrival,
        )
        for prompt in prompts
    ]
    try:
        return served.service.submit_all(submissions)
    except RequestError as error:
        served.service.metrics.on_rejection(error.code or "")
        raise


async def _vector(stream: OutputStream) -> Vector:
    async for output in stream:
        if output.finish_reason in ("abort", "error", "timeout"):
            raise EngineUnavailable(output.error or "The request was aborted before it was complete.")
        if output.pooled:
            return np.array(output.pooled, dtype=np.float32)
    raise EngineUnavailable("The request ended without a result.")


def _waves(prompts: list[list[int]], most: int, tokens: int) -> Iterator[list[int]]:
    """Indices of the prompts that are in the engine together: at most `most`, and no more than one of them beyond
    `tokens`."""
    wave: list[int] = []
    size = 0
    for index, prompt in enumerate(prompts):
        wave.append(index)
        size += len(prompt)
        if len(wave) == most or size >= tokens:
            yield wave
            wave, size = [], 0
    if wave:
        yield wave
