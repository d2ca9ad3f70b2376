"""What one streamed request came to, chunk by chunk."""

from typing import Any

import msgspec
from msgspec import Struct


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

_NO_CHUNK = ("", b"", "[DONE]", b"[DONE]")


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

    def read(self, event: bytes | str, now: float) -> None:
        """Note a chunk of the answer, the data of an event that came at `now`. An error in it ends in `error`. Raises
        `msgspec.DecodeError` for what is no chunk."""
        if event in _NO_CHUNK:
            return
        chunk = _decode(event)
        if chunk.error is not None:
            error = chunk.error
            self.error = str(error.get("message", error)) if isinstance(error, dict) else str(error)
            return
        for choice in chunk.choices:
            if choice.has_output:
                self.arrivals.append(now)
            self.finish_reason = choice.finish_reason or self.finish_reason
        if usage := chunk.usage:
            self.from_usage = True
            self.prompt_tokens = usage.prompt_tokens
            self.output_tokens = usage.completion_tokens or 0
            details = usage.prompt_tokens_details
            self.cached_tokens = (details.cached_tokens if details else None) or 0

    def end(self) -> None:
        """The answer is there as far as it goes. Says whether it is whole, and counts tokens where no usage came."""
        if self.error is not None:
            return
        if self.finish_reason is None:
            self.error = "the stream ended before the answer did"
        elif not self.from_usage:
            self.output_tokens = len(self.arrivals)

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
