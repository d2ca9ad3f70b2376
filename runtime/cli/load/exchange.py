"""One streamed request, timed chunk by chunk."""

import asyncio
import time
from typing import Any

import httpx
import msgspec
from msgspec import Struct

from runtime.cli.client import describe, error_text
from runtime.cli.load.prompts import Prompt, path_of, request_body
from runtime.cli.load.spec import LoadSpec


class Sample(Struct, kw_only=True):
    """What one request came to. Times are `time.perf_counter()` seconds."""

    started: float
    finished: float = 0.0
    arrivals: list[float] = []
    """When each chunk with output came."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    from_usage: bool = False
    """False: the server sent no usage, and each chunk counts as one token."""
    finish_reason: str | None = None
    error: str | None = None

    @property
    def ttft(self) -> float:
        """Seconds to the first output; to the end when no chunk had any (all tokens were special)."""
        return (self.arrivals[0] if self.arrivals else self.finished) - self.started

    @property
    def e2e(self) -> float:
        return self.finished - self.started

    @property
    def gaps(self) -> list[float]:
        """Seconds between neighbouring chunks: the inter-token latencies."""
        return [later - sooner for sooner, later in zip(self.arrivals, self.arrivals[1:], strict=False)]

    @property
    def tpot(self) -> float | None:
        """Mean seconds for each token after the first; None for a single token."""
        if self.output_tokens < 2 or len(self.arrivals) < 2:
            return None
        return (self.arrivals[-1] - self.arrivals[0]) / (self.output_tokens - 1)


class Details(Struct):
    cached_tokens: int | None = None


class Usage(Struct):
    prompt_tokens: int = 0
    completion_tokens: int | None = 0
    prompt_tokens_details: Details | None = None


class Delta(Struct):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[Any] | None = None


class Choice(Struct):
    text: str | None = None
    delta: Delta | None = None
    finish_reason: str | None = None

    @property
    def has_output(self) -> bool:
        said = self.delta or Delta()
        return bool(self.text or said.content or said.reasoning or said.reasoning_content or said.tool_calls)


class Chunk(Struct):
    """The parts of both endpoints' chunks that we look at; other fields are skipped unread."""

    choices: list[Choice] = []
    usage: Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(Chunk).decode


async def exchange(client: httpx.AsyncClient, model: str, spec: LoadSpec, number: int, prompt: Prompt) -> Sample:
    """Send request `number` and read its stream to the end. Failures are in `Sample.error`, not raised."""
    sample = Sample(started=time.perf_counter())
    try:
        async with asyncio.timeout(spec.timeout):
            await _stream(client, spec, _body(model, spec, number, prompt), sample)
    except TimeoutError:
        sample.error = f"no complete answer in {spec.timeout:g} s"
    except httpx.HTTPError as error:
        sample.error = describe(error)
    except msgspec.DecodeError as error:
        sample.error = f"a chunk that is no JSON of the expected form: {error}"
    sample.finished = time.perf_counter()
    return sample


def _body(model: str, spec: LoadSpec, number: int, prompt: Prompt) -> dict[str, Any]:
    body = request_body(model, spec, prompt, spec.output_len)
    body |= {"seed": spec.seed + number, "stream": True, "stream_options": {"include_usage": True}}
    if spec.ignore_eos:
        body |= {"ignore_eos": True, "min_tokens": spec.output_len}
    return body


async def _stream(client: httpx.AsyncClient, spec: LoadSpec, body: dict[str, Any], sample: Sample) -> None:
    async with client.stream("POST", path_of(spec), json=body) as response:
        if response.status_code != 200:
            await response.aread()
            sample.error = error_text(response)
            return
        async for line in response.aiter_lines():
            data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
            if data and data != "[DONE]":
                _note(sample, _decode(data), time.perf_counter())
            if sample.error is not None:
                return
    if sample.finish_reason is None:
        sample.error = "the stream ended before the answer did"
    elif not sample.from_usage:
        sample.output_tokens = len(sample.arrivals)


def _note(sample: Sample, chunk: Chunk, now: float) -> None:
    if chunk.error is not None:
        error = chunk.error
        sample.error = str(error.get("message", error)) if isinstance(error, dict) else str(error)
        return
    for choice in chunk.choices:
        if choice.has_output:
            sample.arrivals.append(now)
        sample.finish_reason = choice.finish_reason or sample.finish_reason
    if usage := chunk.usage:
        sample.from_usage = True
        sample.prompt_tokens = usage.prompt_tokens
        sample.output_tokens = usage.completion_tokens or 0
        details = usage.prompt_tokens_details
        sample.cached_tokens = (details.cached_tokens if details else None) or 0
