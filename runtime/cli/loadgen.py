"""A load generator for any OpenAI-compatible server.

    report = asyncio.run(run_load(LoadSpec(url="http://127.0.0.1:8000", requests=64, concurrency=32)))
    rich.print(render(report))

Closed loop (a fixed number of concurrent requests) or open loop (Poisson arrivals). Needs no model, no tokenizer
and no torch on this side; independent of the command line.
"""

import asyncio
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import httpx
import msgspec
from msgspec import Struct
from rich.table import Table

from runtime.cli.client import describe, error_text, remote, served_model
from runtime.cli.load_prompts import LoadPrompt, LoadSpec, make_prompts, path_of, request_body

# -- one request -----------------------------------------------------------------------------------
#
# Measurements of one streamed request, chunk by chunk.


class Details(Struct):
    """`usage.prompt_tokens_details` of an answer."""

    cached_tokens: int | None = None


class SampleUsage(Struct):
    """`usage` of an answer."""

    prompt_tokens: int = 0
    completion_tokens: int | None = 0
    prompt_tokens_details: Details | None = None


class Delta(Struct):
    """`delta` of a streamed choice."""

    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[Any] | None = None


class Choice(Struct):
    """A choice of a streamed chunk: of a chat (`delta`) or a completion (`text`)."""

    text: str | None = None
    delta: Delta | None = None
    finish_reason: str | None = None

    @property
    def has_output(self) -> bool:
        said = self.delta or Delta()
        return bool(self.text or said.content or said.reasoning or said.reasoning_content or said.tool_calls)


class Chunk(Struct):
    """The fields of both endpoints' chunks that are used; others are skipped."""

    choices: list[Choice] = []
    usage: SampleUsage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(Chunk).decode

_NO_CHUNK = ("", b"", "[DONE]", b"[DONE]")


class Sample(Struct, kw_only=True):
    """Measurements of one request. Times are `time.perf_counter()` seconds."""

    started: float
    finished: float = 0.0
    arrivals: list[float] = []
    """Arrival time of each chunk with output."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    from_usage: bool = False
    """False: the server sent no usage, and each chunk counts as one token."""
    finish_reason: str | None = None
    error: str | None = None

    def read(self, event: bytes | str, now: float) -> None:
        """Record a chunk of the answer, the data of an event that arrived at `now`. Sets `error` for an error in it.
        Raises `msgspec.DecodeError` for data that is no chunk."""
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
        """Finish the sample: set `error` for an incomplete answer, and count tokens if no usage arrived."""
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
        """Mean seconds per token after the first; None for a single token."""
        if self.output_tokens < 2 or len(self.arrivals) < 2:
            return None
        return (self.arrivals[-1] - self.arrivals[0]) / (self.output_tokens - 1)


# -- exchange --------------------------------------------------------------------------------------
#
# One streamed request, timed chunk by chunk.


async def exchange(client: httpx.AsyncClient, model: str, spec: LoadSpec, number: int, prompt: LoadPrompt) -> Sample:
    """Send request `number` and read its stream to the end. Failures are in `Sample.error`, not raised."""
    sample = Sample(started=time.perf_counter())
    try:
        async with asyncio.timeout(spec.timeout):
            await _stream(client, spec, streamed_body(model, spec, number, prompt), sample)
    except TimeoutError:
        sample.error = f"no complete answer in {spec.timeout:g} s"
    except httpx.HTTPError as error:
        sample.error = describe(error)
    except msgspec.DecodeError as error:
        sample.error = f"a chunk that is no JSON of the expected form: {error}"
    sample.finished = time.perf_counter()
    return sample


def streamed_body(model: str, spec: LoadSpec, number: int, prompt: LoadPrompt) -> dict[str, Any]:
    """Body of request `number`, for a streamed answer."""
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
            if line.startswith("data:"):
                sample.read(line.removeprefix("data:").strip(), time.perf_counter())
            if sample.error is not None:
                return
    sample.end()


# -- report ----------------------------------------------------------------------------------------
#
# Report on a load: counts, rates and percentiles, as JSON and as a table.

_MOST_ERRORS = 5


class Stats(Struct, frozen=True, kw_only=True):
    """Mean and percentiles (linear between ranks, as numpy's) of a time, in seconds."""

    mean: float
    p50: float
    p90: float
    p95: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Stats | None":
        """Statistics of `values`; None if it is empty."""
        if not values:
            return None
        # One value has no quantiles; twice itself, it is all of them.
        points = values if len(values) > 1 else [*values, *values]
        cuts = statistics.quantiles(points, n=100, method="inclusive")
        return cls(mean=statistics.fmean(values), p50=cuts[49], p90=cuts[89], p95=cuts[94], p99=cuts[98])


class LoadReport(Struct, frozen=True, kw_only=True):
    """Results of a load. Rates are over `duration`, and count completed requests only; latencies are in seconds."""

    spec: LoadSpec
    """The spec of the run, without the API key."""
    model: str
    completed: int
    failed: int
    errors: dict[str, int]
    """The most common error messages, with their counts."""
    duration: float
    """From the first request's start to the last one's end."""
    prompt_tokens: int
    cached_tokens: int
    """Prompt tokens from the prefix cache of the server, if it reports them."""
    output_tokens: int
    counted_by: str
    """"usage", or "chunks" where the server reports no usage (then chunks are taken for tokens)."""
    requests_per_s: float
    prompt_tokens_per_s: float
    output_tokens_per_s: float
    ttft: Stats | None
    itl: Stats | None
    """Gaps between chunks, over all requests. A chunk may hold more than one token."""
    tpot: Stats | None
    """Seconds per token after the first, one value per request."""
    e2e: Stats | None

    def to_json(self) -> bytes:
        return msgspec.json.encode(self)


def make_report(spec: LoadSpec, model: str, samples: Sequence[Sample]) -> LoadReport:
    """The report on these requests, in any order."""
    good = [s for s in samples if s.error is None]
    errors = Counter(s.error for s in samples if s.error is not None)
    duration = max(s.finished for s in samples) - min(s.started for s in samples)
    prompt_tokens = sum(s.prompt_tokens for s in good)
    output_tokens = sum(s.output_tokens for s in good)
    return LoadReport(
        spec=msgspec.structs.replace(spec, api_key=None),
        model=model,
        completed=len(good),
        failed=len(samples) - len(good),
        errors=dict(errors.most_common(_MOST_ERRORS)),
        duration=duration,
        prompt_tokens=prompt_tokens,
        cached_tokens=sum(s.cached_tokens for s in good),
        output_tokens=output_tokens,
        counted_by="usage" if all(s.from_usage for s in good) else "chunks",
        requests_per_s=_rate(len(good), duration),
        prompt_tokens_per_s=_rate(prompt_tokens, duration),
        output_tokens_per_s=_rate(output_tokens, duration),
        ttft=Stats.of([s.ttft for s in good]),
        itl=Stats.of([gap for s in good for gap in s.gaps]),
        tpot=Stats.of([s.tpot for s in good if s.tpot is not None]),
        e2e=Stats.of([s.e2e for s in good]),
    )


def render(report: LoadReport) -> Table:
    """The report as a rich table; latencies in milliseconds."""
    table = Table(title=_title(report), title_justify="left", caption=_errors(report), caption_justify="left")
    table.add_column("")
    for name in Stats.__struct_fields__:
        table.add_column(f"{name} ms", justify="right")
    rows = {
        "time to first token": report.ttft,
        "inter-token": report.itl,
        "per output token": report.tpot,
        "end to end": report.e2e,
    }
    for label, stats in rows.items():
        values = [None] * 5 if stats is None else [getattr(stats, name) for name in Stats.__struct_fields__]
        table.add_row(label, *("–" if value is None else f"{value * 1000:.1f}" for value in values))
    return table


def _title(report: LoadReport) -> str:
    spec = report.spec
    load = f"{spec.rate:g} requests/s" if spec.rate is not None else f"{spec.in_flight} at once"
    return (
        f"{report.model}: {report.completed} completed, {report.failed} failed in {report.duration:.2f} s"
        f" ({load})\n"
        f"output {report.output_tokens_per_s:.1f} tok/s, prompt {report.prompt_tokens_per_s:.1f} tok/s, "
        f"{report.requests_per_s:.2f} requests/s\n"
        f"{report.prompt_tokens} prompt tokens ({report.cached_tokens} cached), "
        f"{report.output_tokens} output tokens (by {report.counted_by})"
    )


def _errors(report: LoadReport) -> str | None:
    return "\n".join(f"{count} × {message}" for message, count in report.errors.items()) or None


def _rate(count: int, duration: float) -> float:
    return count / duration if duration > 0 else 0.0


# -- the load ---------------------------------------------------------------------------------------

OnProgress = Callable[[Sample], None]


async def run_load(spec: LoadSpec, on_progress: OnProgress | None = None) -> LoadReport:
    """Run the load; `on_progress` is called as each request ends, `Sample.error` set when it failed.

    Raises `UsageError` for an invalid spec and `CommandError` when the server cannot be
    reached at all or its tokens not counted. Requests that fail later are counted in the report.
    """
    spec.verify()
    async with remote(spec.url, spec.api_key) as client:
        model = spec.model or await served_model(client)
        prompts = await make_prompts(client, model, spec)
        return make_report(spec, model, await _send_all(client, model, spec, prompts, on_progress))


async def _send_all(
    client: httpx.AsyncClient,
    model: str,
    spec: LoadSpec,
    prompts: list[LoadPrompt],
    on_progress: OnProgress | None,
) -> list[Sample]:
    begin = time.perf_counter()
    slots = asyncio.Semaphore(spec.in_flight)

    async def one(number: int, due: float) -> Sample:
        await asyncio.sleep(begin + due - time.perf_counter())
        async with slots:
            sample = await exchange(client, model, spec, number, prompts[number])
        if on_progress is not None:
            on_progress(sample)
        return sample

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(number, due)) for number, due in enumerate(spec.due_times())]
    return [task.result() for task in tasks]
