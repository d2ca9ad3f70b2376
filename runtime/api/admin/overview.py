"""/admin/overview and /admin/requests: what the server does now and did lately, in memory and bounded.

A sample is taken every `INTERVAL_SECONDS`, from the metrics, whether or not a client watches.
"""

import asyncio
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

import msgspec
from litestar import Response, get
from msgspec import Struct

from runtime.api.admin.jobs import follow
from runtime.api.docs import QUERY
from runtime.api.handle import AnyRequest, RequestEntry, ServiceHandle, api_of
from runtime.api.http.auth import ADMIN, TRAIN
from runtime.api.http.query import Page, check_names, integer
from runtime.api.http.sse import Events
from runtime.metrics import Metrics, Totals, quantile
from runtime.support.version import version

INTERVAL_SECONDS = 2.0
MAX_SAMPLES = 1800
"""Samples that are kept: an hour."""
DEFAULT_SAMPLES = 150
QUANTILE_SAMPLES = 15
"""Samples whose observations make a quantile: half a minute."""

_FIRST_TOKEN = "time_to_first_token_seconds"
_BETWEEN_TOKENS = "inter_token_latency_seconds"


class OverviewSample(Struct, frozen=True, kw_only=True):
    """The engine over the seconds before `time`. Quantiles are in seconds, over the last half minute, and null without
    observations in it."""

    time: float
    """Seconds since the epoch."""
    running: int
    """Sequences in the batch."""
    waiting: int
    kv_cache_usage: float
    """Share of the KV blocks in use, 0 to 1."""
    prompt_tokens: float
    """Prompt tokens a second."""
    generated_tokens: float
    """Generated tokens a second."""
    trained_tokens: float
    """Tokens a second that training steps computed, over the last half minute: a step may take seconds."""
    riding_tokens: float
    """Tokens of training a second whose forward pass was computed in steps of requests, beside their rows."""
    training_share: float
    """Share of the time that training had the engine, 0 to 1."""
    first_token_p50: float | None
    first_token_p95: float | None
    token_p50: float | None
    """From one token to the next."""
    token_p95: float | None


class Overview(Struct, kw_only=True):
    """The server and its last samples, the oldest first."""

    object: str = "overview"
    model: str
    version: str
    max_model_len: int
    interval: float = INTERVAL_SECONDS
    samples: list[OverviewSample]


class OverviewHistory:
    """The last samples. Event-loop thread only."""

    def __init__(self, handle: ServiceHandle) -> None:
        self.samples: deque[OverviewSample] = deque(maxlen=MAX_SAMPLES)
        self._handle = handle
        self._metrics: Metrics | None = None
        """Metrics of the served model; None before the first."""
        self._totals: deque[Totals] = deque(maxlen=QUANTILE_SAMPLES + 1)
        self._next: asyncio.Future[OverviewSample | None] | None = None

    def take(self, now: float) -> None:
        """Take a sample, and hand it to the requests that wait. `now`: seconds since the epoch."""
        service = self._handle.service
        if service is not None:
            self._metrics = service.metrics
        if self._metrics is None:
            return
        load, totals = self._metrics.load, self._metrics.totals(now)
        before = self._totals[-1] if self._totals else totals
        self._totals.append(totals)
        first, between = (self._observed(name) for name in (_FIRST_TOKEN, _BETWEEN_TOKENS))
        sample = OverviewSample(
            time=now,
            running=load.running,
            waiting=load.waiting,
            kv_cache_usage=self._metrics.kv_usage,
            prompt_tokens=totals.rate("prompt_tokens", before),
            generated_tokens=totals.rate("generation_tokens", before),
            trained_tokens=totals.rate("train_tokens", self._totals[0]),
            riding_tokens=totals.rate("train_riding_tokens", before),
            training_share=min(1.0, totals.rate("train_slice_seconds", before)),
            first_token_p50=quantile(first, 0.5),
            first_token_p95=quantile(first, 0.95),
            token_p50=quantile(between, 0.5),
            token_p95=quantile(between, 0.95),
        )
        self.samples.append(sample)
        # Without a service one model gives way to another: what follows the samples waits along.
        self._announce(sample if service is None or service.ready else None)

    async def next_sample(self) -> OverviewSample | None:
        """The next sample; None when the server stops."""
        if self._next is None:
            self._next = asyncio.get_running_loop().create_future()
        return await asyncio.shield(self._next)

    async def run(self) -> None:
        """Take samples until cancelled."""
        try:
            while True:
                self.take(time.time())
                await asyncio.sleep(INTERVAL_SECONDS)
        finally:
            self._announce(None)

    def _announce(self, sample: OverviewSample | None) -> None:
        waiting, self._next = self._next, None
        if waiting is not None and not waiting.done():
            waiting.set_result(sample)

    def _observed(self, name: str) -> Mapping[float, float]:
        """Observations of a histogram over the last samples: bucket's border → count up to it."""
        oldest, newest = self._totals[0].buckets[name], self._totals[-1].buckets[name]
        return {border: count - oldest[border] for border, count in newest.items()}


@get(
    "/admin/overview",
    opt={TRAIN: True, QUERY: {"limit": {"type": "integer", "minimum": 1, "maximum": MAX_SAMPLES}}},
)
async def overview(request: AnyRequest) -> Response[Overview]:
    """The engine's last `limit` samples, one every two seconds, up to an hour. With `Accept: text/event-stream`: the
    same as the first event, then each sample as it is taken."""
    api = api_of(request)
    check_names(request, ("limit",))
    limit = integer(request, "limit", default=DEFAULT_SAMPLES, least=1, most=MAX_SAMPLES)
    service = api.handle.require_latest()
    history: OverviewHistory = request.app.state.history
    found = Overview(
        model=service.model_name,
        version=version(),
        max_model_len=service.max_model_len,
        samples=list(history.samples)[-limit:],
    )
    if "text/event-stream" in request.headers.get("accept", ""):
        return follow(api, _events(history, found))
    return Response(found)


async def _events(history: OverviewHistory, found: Overview) -> Events:
    yield b"event: overview\ndata: " + msgspec.json.encode(found) + b"\n\n"
    while (sample := await history.next_sample()) is not None:
        yield b"event: sample\ndata: " + msgspec.json.encode(sample) + b"\n\n"


@get("/admin/requests", opt={ADMIN: True})
async def recent_requests(request: AnyRequest) -> Response[Page[RequestEntry]]:
    """The last 300 requests that ended, the newest first: names, numbers and times, never a text."""
    check_names(request, ())
    return Response(Page(data=list(reversed(api_of(request).handle.recent))))


ROUTES: tuple[Any, ...] = (overview, recent_requests)
