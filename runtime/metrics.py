"""Every metric, defined once, in the one table below.

An observation is stored once. The names `eft:…` and `vllm:…` (setting `observability.vllm_names`) and the
labels `model_name` and `engine` are put on when somebody scrapes, so the engine thread pays for one
counter, not for two. Knows nothing of HTTP frameworks, and nothing of torch.
"""

import time
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from runtime.messages import FinishReason, RequestTiming
from runtime.trainer.events import EvalEvent, StepEvent

# Bucket borders are vLLM's, so that its dashboards read ours.
_REQUEST_SECONDS = (
    0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680,
)  # fmt: skip
_FIRST_TOKEN_SECONDS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160,
    640, 2560,
)  # fmt: skip
_TOKEN_SECONDS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80,
)  # fmt: skip
_TRAIN_STEP_SECONDS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300)
_TRAIN_SLICE_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2)
_HTTP_SECONDS = (0.1, 0.5, 1)
_HTTP_FINE_SECONDS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 7.5, 10, 30, 60,
)  # fmt: skip
_STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_CHOICES = (1, 2, 5, 10, 20)
_PREEMPTIONS = (1, 2, 3, 4, 5, 10, 20)

ADAPTER = ("adapter", "version")

Kind = Literal["gauge", "counter", "histogram"]
Twin = Literal["vllm", "plain", "none"]
Families = dict[str, Gauge | Counter | Histogram]


@dataclass(frozen=True)
class Spec:
    """One family. `buckets` None in a histogram: the 1-2-5 series up to the context length."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] | None = None
    twin: Twin = "vllm"
    """Its second name: with `vllm:` before it, bare (as vLLM has its HTTP metrics), or none at all."""


TABLE: tuple[Spec, ...] = (
    Spec("num_requests_running", "gauge", "Sequences in the running batch."),
    Spec("num_requests_waiting", "gauge", "Sequences waiting to run."),
    Spec("num_requests_waiting_by_reason", "gauge", "Waiting sequences by what they wait for.", ("reason",)),
    Spec("kv_cache_usage_perc", "gauge", "Share of the KV blocks in use, 0 to 1."),
    Spec("cache_config_info", "gauge", "The KV cache's shape, as labels.",
         ("block_size", "num_gpu_blocks", "max_model_len")),
    Spec("prompt_tokens", "counter", "Prompt tokens of requests that got their first token."),
    Spec("generation_tokens", "counter", "Tokens generated."),
    Spec("prompt_tokens_cached", "counter", "Prompt tokens whose KV came from the prefix cache."),
    Spec("num_preemptions", "counter", "Times a running sequence lost its blocks to another."),
    Spec("request_success", "counter", "Requests ended, by how they ended.", ("finished_reason",)),
    Spec("prefix_cache_queries", "counter", "Tokens looked up in the prefix cache."),
    Spec("prefix_cache_hits", "counter", "Tokens found in the prefix cache."),
    Spec("admission_rejections", "counter", "Requests turned away, by reason.", ("reason",)),
    Spec("e2e_request_latency_seconds", "histogram", "Arrival to end.", buckets=_REQUEST_SECONDS),
    Spec("request_queue_time_seconds", "histogram", "Arrival to first computation.",
         buckets=_REQUEST_SECONDS),
    Spec("request_inference_time_seconds", "histogram", "First computation to last token.",
         buckets=_REQUEST_SECONDS),
    Spec("request_prefill_time_seconds", "histogram", "First computation to first token.",
         buckets=_REQUEST_SECONDS),
    Spec("request_decode_time_seconds", "histogram", "First token to last token.", buckets=_REQUEST_SECONDS),
    Spec("time_to_first_token_seconds", "histogram", "Arrival to first token.", buckets=_FIRST_TOKEN_SECONDS),
    Spec("inter_token_latency_seconds", "histogram", "One token to the next, per request.",
         buckets=_TOKEN_SECONDS),
    Spec("request_time_per_output_token_seconds", "histogram", "Mean time per token after the first.",
         buckets=_TOKEN_SECONDS),
    Spec("request_prompt_tokens", "histogram", "Prompt length in tokens."),
    Spec("request_generation_tokens", "histogram", "Tokens generated per sequence."),
    Spec("request_max_num_generation_tokens", "histogram", "Longest choice of a request, in tokens."),
    Spec("request_params_max_tokens", "histogram", "The limit on generated tokens that was in force."),
    Spec("request_prefill_kv_computed_tokens", "histogram", "Prompt tokens computed, cached ones excluded."),
    Spec("iteration_tokens_total", "histogram", "Tokens computed in one step.", buckets=_STEP_TOKENS),
    Spec("request_params_n", "histogram", "Choices asked for.", buckets=_CHOICES),
    Spec("request_num_preemptions", "histogram", "Preemptions per request.", buckets=_PREEMPTIONS),
    Spec("http_requests", "counter", "HTTP requests.", ("method", "status", "handler"), twin="plain"),
    Spec("http_request_duration_seconds", "histogram", "Request to end of response, by handler.",
         ("handler", "method"), _HTTP_SECONDS, twin="plain"),
    Spec("http_request_duration_highr_seconds", "histogram", "Request to end of response, all handlers.",
         buckets=_HTTP_FINE_SECONDS, twin="plain"),
    Spec("lora_requests_info", "gauge", "Adapters at work, as labels; the value is the time of the last change.",
         ("max_lora", "running_lora_adapters", "waiting_lora_adapters")),
    Spec("adapter_requests", "counter", "Requests ended, by adapter version.", ADAPTER, twin="none"),
    Spec("adapter_prompt_tokens", "counter", "Prompt tokens of requests that ended, by adapter version.",
         ADAPTER, twin="none"),
    Spec("adapter_generation_tokens", "counter", "Tokens generated, by adapter version.", ADAPTER, twin="none"),
    Spec("adapter_time_to_first_token_seconds", "histogram", "Arrival to first token, by adapter version.",
         ADAPTER, _FIRST_TOKEN_SECONDS, twin="none"),
    Spec("adapter_publishes", "counter", "Adapter versions published, or not.", ("outcome",), twin="none"),
    Spec("spec_decode_num_draft_tokens", "counter", "Tokens guessed ahead."),
    Spec("spec_decode_num_accepted_tokens", "counter", "Guessed tokens that proved right."),
    Spec("deadline_misses", "counter", "Requests not done by their deadline, or given up on before it.",
         twin="none"),
    Spec("timeouts", "counter", "Requests ended by their deadline, by how far they had come.", ("phase",),
         twin="none"),
    Spec("aborts", "counter", "Requests aborted, by how far they had come.", ("phase",), twin="none"),
    Spec("jobs", "gauge", "Training jobs, by state.", ("state",), twin="none"),
    Spec("train_loss", "gauge", "Loss of the last training step, in nats a token.", twin="none"),
    Spec("train_tokens", "counter", "Tokens computed by training steps.", twin="none"),
    Spec("train_step_seconds", "histogram", "End of a training step to the end of the next.",
         buckets=_TRAIN_STEP_SECONDS, twin="none"),
    Spec("train_slice_seconds", "histogram", "One slice of training, between two inference steps.",
         buckets=_TRAIN_SLICE_SECONDS, twin="none"),
    Spec("train_share", "gauge", "Share of the last training step's time that went to training, 0 to 1.",
         twin="none"),
    Spec("eval_metric", "gauge", "Result of the last evaluation, by metric.", ("name",), twin="none"),
    Spec("event_loop_lag_seconds", "gauge", "Longest delay of the event loop seen since the last scrape.",
         twin="none"),
)  # fmt: skip

_REASONS = frozenset({"queue_full", "context_length_exceeded", "conflict", "engine_unavailable", "other"})
PUBLISH_OUTCOMES = ("published", "refused", "failed")
"""Refused: the adapter did not fit. Failed: the server could not."""
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
UNMATCHED = "unmatched"
"""The one `handler` label of all requests that no route answered."""


class Metrics:
    """The metrics of one served model. Engine thread and event loop both write; each write is atomic."""

    def __init__(
        self,
        model_name: str,
        *,
        vllm_names: bool,
        max_model_len: int,
        block_size: int,
        num_blocks: int,
        max_adapters: int = 0,
    ) -> None:
        lengths = _one_two_five(max_model_len)
        self._gauges: dict[str, Gauge] = {}
        self._counters: dict[str, Counter] = {}
        self._histograms: dict[str, Histogram] = {}
        for spec in TABLE:
            if spec.kind == "gauge":
                self._gauges[spec.name] = Gauge(spec.name, spec.help, spec.labels, registry=None)
            elif spec.kind == "counter":
                self._counters[spec.name] = Counter(spec.name, spec.help, spec.labels, registry=None)
            else:
                self._histograms[spec.name] = Histogram(
                    spec.name, spec.help, spec.labels, buckets=spec.buckets or lengths, registry=None
                )
        self._adapters: dict[str, tuple[str, str]] = {}
        """Key → labels, of the versions in memory: of these only are there samples, so there are never many."""
        self._max_adapters = str(max_adapters)
        self._adapters_at_work = ("", "")
        self._fill_labels(block_size, num_blocks, max_model_len)
        self._registry = CollectorRegistry()
        families: Families = {**self._gauges, **self._counters, **self._histograms}
        self._registry.register(_Names(families, {"model_name": model_name}, vllm_names))
        self._registry.register(_ProcessNames(vllm_names))

    def _fill_labels(self, block_size: int, num_blocks: int, max_model_len: int) -> None:
        """Bounded label sets are there from the start, at 0: a rate needs a first sample to rise from."""
        shape = (str(block_size), str(num_blocks), str(max_model_len))
        self._gauges["cache_config_info"].labels(*shape).set(1)
        for reason in ("capacity", "deferred"):
            self._gauges["num_requests_waiting_by_reason"].labels(reason)
        for finish in get_args(FinishReason):
            self._counters["request_success"].labels(finish)
        for reason in sorted(_REASONS):
            self._counters["admission_rejections"].labels(reason)
        for phase in ("queued", "prefill", "decode"):
            self._counters["aborts"].labels(phase)
            self._counters["timeouts"].labels(phase)
        for outcome in PUBLISH_OUTCOMES:
            self._counters["adapter_publishes"].labels(outcome)
        self._gauges["lora_requests_info"].labels(self._max_adapters, "", "").set(time.time())

    def on_step(self, *, running: int, waiting: int, kv_usage: float, tokens: int, deferred: int = 0) -> None:
        """After a step of `tokens` (0: none ran). `deferred` of the `waiting` would fit but must not run."""
        self._gauges["num_requests_running"].set(running)
        self._gauges["num_requests_waiting"].set(waiting)
        by_reason = self._gauges["num_requests_waiting_by_reason"]
        by_reason.labels("capacity").set(waiting - deferred)
        by_reason.labels("deferred").set(deferred)
        self._gauges["kv_cache_usage_perc"].set(kv_usage)
        if tokens:
            self._histograms["iteration_tokens_total"].observe(tokens)

    def on_prefix_lookup(self, queries: int, hits: int) -> None:
        """A prompt of `queries` tokens was looked up and `hits` of them were cached."""
        self._counters["prefix_cache_queries"].inc(queries)
        self._counters["prefix_cache_hits"].inc(hits)

    def on_preemptions(self, count: int) -> None:
        self._counters["num_preemptions"].inc(count)

    def on_drafts(self, drafted: int, accepted: int) -> None:
        """So many tokens were guessed, and `accepted` of them were right."""
        self._counters["spec_decode_num_draft_tokens"].inc(drafted)
        self._counters["spec_decode_num_accepted_tokens"].inc(accepted)

    def on_tokens(self, timing: RequestTiming, count: int, now: float) -> None:
        """`count` tokens came at `now`; called before `timing`'s own token times move on."""
        self._counters["generation_tokens"].inc(count)
        if timing.first_token is None:
            self._histograms["time_to_first_token_seconds"].observe(now - timing.arrival)
            if (labels := self._adapters.get(timing.adapter)) is not None:
                self._histograms["adapter_time_to_first_token_seconds"].labels(*labels).observe(now - timing.arrival)
            self._counters["prompt_tokens"].inc(timing.prompt_tokens)
            self._counters["prompt_tokens_cached"].inc(timing.cached_tokens)
        elif timing.last_token is not None:
            self._histograms["inter_token_latency_seconds"].observe(now - timing.last_token)

    def on_finish(self, timing: RequestTiming) -> None:
        """A sequence ended, however it ended. What it never reached (a first token, say) is not observed."""
        self._counters["request_success"].labels(timing.finish_reason or "error").inc()
        if timing.finish_reason == "abort":
            self._counters["aborts"].labels(_phase(timing)).inc()
        if timing.finish_reason == "timeout":
            self._counters["timeouts"].labels(_phase(timing)).inc()
        if _late(timing):
            self._counters["deadline_misses"].inc()
        for name, value in _durations(timing):
            self._histograms[name].observe(value)
        if (labels := self._adapters.get(timing.adapter)) is not None:
            self._counters["adapter_requests"].labels(*labels).inc()
            self._counters["adapter_prompt_tokens"].labels(*labels).inc(timing.prompt_tokens)
            self._counters["adapter_generation_tokens"].labels(*labels).inc(timing.generated_tokens)
        computed = max(0, timing.prompt_tokens - timing.cached_tokens)
        self._histograms["request_prompt_tokens"].observe(timing.prompt_tokens)
        self._histograms["request_generation_tokens"].observe(timing.generated_tokens)
        self._histograms["request_params_max_tokens"].observe(timing.max_tokens)
        self._histograms["request_prefill_kv_computed_tokens"].observe(computed)
        self._histograms["request_num_preemptions"].observe(timing.preemptions)

    def on_adapter_loaded(self, key: str) -> None:
        """A version (`name@number:…`) is in memory: its samples are there from now on, at 0."""
        name, _, rest = key.partition("@")
        labels = self._adapters[key] = (name, rest.partition(":")[0])
        for spec in TABLE:
            if spec.labels == ADAPTER:
                {**self._counters, **self._histograms}[spec.name].labels(*labels)

    def on_adapter_unloaded(self, key: str) -> None:
        labels = self._adapters.pop(key, None)
        if labels is not None and labels not in self._adapters.values():
            for spec in TABLE:
                if spec.labels == ADAPTER:
                    {**self._counters, **self._histograms}[spec.name].remove(*labels)

    def on_adapter_step(self, *, running: Collection[str], active: Collection[str]) -> None:
        """The keys of the versions that running requests, and all unfinished requests, are for."""
        names = [
            ",".join(sorted(key.partition("@")[0] for key in keys)) for keys in (running, set(active) - set(running))
        ]
        if self._adapters_at_work != (now := (names[0], names[1])):
            info = self._gauges["lora_requests_info"]
            info.labels(self._max_adapters, *now).set(time.time())
            info.remove(self._max_adapters, *self._adapters_at_work)
            self._adapters_at_work = now

    def on_publish(self, outcome: str) -> None:
        """A version was published, or was not; one of `PUBLISH_OUTCOMES`."""
        self._counters["adapter_publishes"].labels(outcome).inc()

    def on_request(self, *, choices: int, longest: int) -> None:
        """An API request of `choices` sequences ended; `longest` is the most tokens that one generated."""
        self._histograms["request_params_n"].observe(choices)
        self._histograms["request_max_num_generation_tokens"].observe(longest)

    def on_rejection(self, reason: str) -> None:
        """A request was turned away before it waited; `reason` is its error code. Unforeseen ones are `other`."""
        label = reason if reason in _REASONS else "other"
        self._counters["admission_rejections"].labels(label).inc()

    def on_http(self, method: str, status: int, handler: str, seconds: float) -> None:
        """A response ended. `handler` is the route's template, or `UNMATCHED`: never the path itself."""
        verb = method if method in _METHODS else "OTHER"
        self._counters["http_requests"].labels(verb, str(status), handler).inc()
        self._histograms["http_request_duration_seconds"].labels(handler, verb).observe(seconds)
        self._histograms["http_request_duration_highr_seconds"].observe(seconds)

    def on_train_step(self, event: StepEvent) -> None:
        """A training step was taken."""
        self._gauges["train_loss"].set(event.loss)
        self._counters["train_tokens"].inc(event.tokens)
        self._histograms["train_step_seconds"].observe(event.seconds)
        if event.seconds > 0:
            self._gauges["train_share"].set(min(1.0, event.busy_seconds / event.seconds))

    def on_slice(self, seconds: float) -> None:
        """Training had the engine thread for this long."""
        self._histograms["train_slice_seconds"].observe(seconds)

    def on_eval(self, event: EvalEvent) -> None:
        """The held-out rows were scored."""
        self._gauges["eval_metric"].labels("loss").set(event.loss)
        self._gauges["eval_metric"].labels("accuracy").set(event.accuracy)

    def on_jobs(self, counts: dict[str, int]) -> None:
        """How many jobs are in each state."""
        for state, count in counts.items():
            self._gauges["jobs"].labels(state).set(count)

    def on_lag(self, seconds: float) -> None:
        self._gauges["event_loop_lag_seconds"].set(seconds)

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """The exposition and its content type: OpenMetrics where `accept` asks for it, else plain text."""
        return _render(self._registry, accept)


def render_process(accept: str = "") -> tuple[bytes, str]:
    """What can be scraped while no model is loaded: the process's own metrics."""
    registry = CollectorRegistry()
    registry.register(_ProcessNames(True))
    return _render(registry, accept)


def _render(registry: CollectorRegistry, accept: str) -> tuple[bytes, str]:
    if "application/openmetrics-text" in accept:
        text: bytes = openmetrics.generate_latest(registry)  # type: ignore[no-untyped-call]
        return text, openmetrics.CONTENT_TYPE_LATEST
    return generate_latest(registry), CONTENT_TYPE_PLAIN_0_0_4


class _Names(Collector):
    """Collects the table's families under their names and labels."""

    def __init__(self, families: Families, labels: dict[str, str], twins: bool) -> None:
        self._families = families
        self._labels = labels
        self._twins = twins

    def collect(self) -> Iterator[Metric]:
        for spec in TABLE:
            family = next(iter(self._families[spec.name].collect()))
            model = {} if spec.twin == "plain" else self._labels
            yield _renamed(family, "eft:", model)
            if self._twins and spec.twin == "vllm":
                yield _renamed(family, "vllm:", {**model, "engine": "0"})
            elif self._twins and spec.twin == "plain":
                yield _renamed(family, "", {})


class _ProcessNames(Collector):
    """CPU, memory and file descriptors of this process, as `eft:process_…` and as plain `process_…`."""

    def __init__(self, twins: bool) -> None:
        self._process = ProcessCollector(registry=None)
        self._twins = twins

    def collect(self) -> Iterator[Metric]:
        for family in self._process.collect():
            yield _renamed(family, "eft:", {})
            if self._twins:
                yield _renamed(family, "", {})

    def describe(self) -> Iterable[Metric]:
        return ()  # nothing to read /proc for when registering


def _renamed(family: Metric, prefix: str, labels: dict[str, str]) -> Metric:
    twin = Metric(prefix + family.name, family.documentation, family.type)
    twin.samples = [
        Sample(prefix + sample.name, {**sample.labels, **labels}, sample.value)
        for sample in family.samples
        if not sample.name.endswith("_created")
    ]
    return twin


def _phase(timing: RequestTiming) -> str:
    if timing.scheduled is None:
        return "queued"
    return "prefill" if timing.first_token is None else "decode"


def _late(timing: RequestTiming) -> bool:
    if timing.deadline is None or timing.finished is None or timing.finish_reason == "abort":
        return False
    return timing.finish_reason == "timeout" or timing.finished > timing.deadline


def _durations(timing: RequestTiming) -> Iterator[tuple[str, float]]:
    if timing.finished is not None:
        yield "e2e_request_latency_seconds", timing.finished - timing.arrival
    if timing.scheduled is None:
        return
    yield "request_queue_time_seconds", timing.scheduled - timing.arrival
    if timing.first_token is None or timing.last_token is None:
        return
    decode = timing.last_token - timing.first_token
    yield "request_prefill_time_seconds", timing.first_token - timing.scheduled
    yield "request_decode_time_seconds", decode
    yield "request_inference_time_seconds", timing.last_token - timing.scheduled
    if timing.generated_tokens > 1:
        yield "request_time_per_output_token_seconds", decode / (timing.generated_tokens - 1)


def _one_two_five(limit: int) -> tuple[float, ...]:
    """1, 2, 5, 10, 20, 50, … as far as `limit`."""
    series = (digit * 10**power for power in range(len(str(limit))) for digit in (1, 2, 5))
    return tuple(float(value) for value in series if value <= limit)
