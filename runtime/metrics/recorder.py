"""Recorder of all observations, each stored once, where it is made.

The names `eft:…` and `vllm:…` (setting `observability.vllm_names`) and the labels `model_name` and `engine` are added
at a scrape (`exposition`), so the engine thread pays for one counter, not for two. Independent of HTTP frameworks and
of torch.
"""

import threading
import time
from collections.abc import Collection, Iterator
from typing import get_args

from msgspec import Struct
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from runtime.events import EvalEvent, LatencyTarget, StepEvent
from runtime.messages import FinishReason, RequestTiming
from runtime.metrics.exposition import (
    AdapterTraffic,
    Families,
    NamesCollector,
    ProcessNames,
    Totals,
    render,
    totals_of,
    traffic_of,
)
from runtime.metrics.table import ADAPTER, TABLE
from runtime.support.machine import GpuUsage

# -- timing ----------------------------------------------------------------------------------------
#
# Phase, lateness and durations of a request that has ended, from its times.


def phase_of(timing: RequestTiming) -> str:
    """Phase that the request had reached."""
    if timing.scheduled is None:
        return "queued"
    return "prefill" if timing.first_token is None else "decode"


def is_late(timing: RequestTiming) -> bool:
    """True if the request missed its deadline."""
    if timing.deadline is None or timing.finished is None or timing.finish_reason == "abort":
        return False
    return timing.finish_reason == "timeout" or timing.finished > timing.deadline


def durations(timing: RequestTiming) -> Iterator[tuple[str, float]]:
    """Durations in seconds, by the names of their metrics. Phases that the request never reached have none."""
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


_REASONS = frozenset(
    {
        "queue_full", "context_length_exceeded", "conflict", "engine_unavailable", "rate_limit_exceeded",
        "queue_share_full", "other",
    }
)  # fmt: skip
PUBLISH_OUTCOMES = ("published", "refused", "failed")
"""Refused: the adapter did not fit. Failed: the server could not."""
SWAP_OUTCOMES = ("succeeded", "failed")
_MEASURED = ("time_to_first_token_seconds", "inter_token_latency_seconds", "train_slice_seconds")
"""Histograms of `Metrics.totals`."""
SLEEP_STATES = ("awake", "weights_offloaded", "discard_all")
"""States that vLLM's dashboards know: a model without an awake engine is shown as down."""
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
UNMATCHED = "unmatched"
"""The one `handler` label of all requests that no route answered."""


# -- engines ---------------------------------------------------------------------------------------
#
# Gauges of what engines have to do. While a server moves to another model there are two engines, each with a thread.


class CacheShape(Struct, frozen=True, kw_only=True):
    """The shape of an engine's KV cache."""

    max_model_len: int
    block_size: int
    """Tokens of a block."""
    num_blocks: int
    num_host_blocks: int = 0
    """Blocks in host memory, for what is swapped out."""
    block_bytes: int = 0


class EngineLoad(Struct, frozen=True, kw_only=True):
    """Work of one engine, or of several together."""

    running: int = 0
    """Sequences in the batch."""
    waiting: int = 0
    deferred: int = 0
    """Sequences among the waiting ones that would fit, but must not run."""
    without_adapter: int = 0
    """Sequences among the waiting ones whose adapter version has no place in memory."""
    used_blocks: int = 0
    swapped_blocks: int = 0
    """Blocks whose content is in host memory."""


class EngineGauges:
    """The gauges of one engine, which writes them from its thread. What is shown is the sum over all engines."""

    def __init__(self, metrics: "Metrics", shape: CacheShape) -> None:
        self.shape = shape
        self.load = EngineLoad()
        self.running_adapters: frozenset[str] = frozenset()
        self.active_adapters: frozenset[str] = frozenset()
        self._metrics = metrics

    def on_step(self, load: EngineLoad) -> None:
        """After a step and all of its `on_tokens`, or when none ran."""
        if load != self.load:  # it changes less often than steps are done
            self.load = load
            self._metrics.show_engines()
        self._metrics.end_iteration()

    def on_adapter_step(self, *, running: Collection[str], active: Collection[str]) -> None:
        """The keys of the versions that running requests, and all unfinished requests, are for."""
        if (active or self.active_adapters) and (self.running_adapters != running or self.active_adapters != active):
            self.running_adapters, self.active_adapters = frozenset(running), frozenset(active)
            self._metrics.show_adapters()

    def close(self) -> None:
        """Take the engine out of the sum: it has ended."""
        self._metrics.close_engine(self)


class Metrics:
    """The metrics of one served model. Engine threads and event loop all write; each write is atomic."""

    def __init__(
        self,
        model_name: str,
        *,
        vllm_names: bool,
        shape: CacheShape,
        max_adapters: int = 0,
    ) -> None:
        """`shape`: of the first engine's cache. Its context length is what buckets of lengths reach to."""
        lengths = _one_two_five(shape.max_model_len)
        self._gauges: dict[str, Gauge] = {}
        self._train_shares: dict[str, float] = {}
        """Share of the time of each job at work."""
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
        """Key → labels of the adapter versions in memory. Only these have samples, so there are never many."""
        self._max_adapters = str(max_adapters)
        self._adapters_at_work = ("", "")
        self._first_shape = shape
        self._engines: list[EngineGauges] = []
        """Engines that have not ended, the newest last."""
        self._engines_lock = threading.Lock()
        self._shown_requests = (0, 0, 0, 0)
        """Running, waiting and deferred requests, and those without an adapter, as the gauges have them."""
        self._shown_swapped = 0
        """Bytes of what is swapped out, as the gauge has them."""
        self._step_tokens = 0
        """Tokens of the step that is being delivered, as vLLM counts them: the generated ones, and all computed ones of
        each prompt that was completed in it, over however many steps."""
        self._fill_labels()
        self._show_shapes()
        self._registry = CollectorRegistry()
        families: Families = {**self._gauges, **self._counters, **self._histograms}
        self._registry.register(NamesCollector(families, {"model_name": model_name}, vllm_names))
        self._registry.register(ProcessNames(vllm_names))

    # -- engines -------------------------------------------------------------------------------

    def open_engine(self, shape: CacheShape) -> EngineGauges:
        """The gauges of a new engine, until they are closed."""
        gauges = EngineGauges(self, shape)
        with self._engines_lock:
            self._engines.append(gauges)
            self._show_shapes()
        self.show_engines()
        return gauges

    def close_engine(self, gauges: EngineGauges) -> None:
        """Take an engine out of the sum. One that was taken out already is fine."""
        with self._engines_lock:
            if gauges in self._engines:
                self._engines.remove(gauges)
            self._show_shapes()
        self.show_engines()
        self.show_adapters()

    @property
    def load(self) -> EngineLoad:
        """Work of all engines together. Any thread."""
        loads = [one.load for one in list(self._engines)]
        if len(loads) == 1:
            return loads[0]
        return EngineLoad(**{name: sum(getattr(one, name) for one in loads) for name in EngineLoad.__struct_fields__})

    @property
    def kv_usage(self) -> float:
        """Share of the KV blocks of all engines in use, 0 to 1. Any thread."""
        return self.load.used_blocks / max(1, sum(one.shape.num_blocks for one in list(self._engines)))

    def show_engines(self) -> None:
        """Set the gauges of the work of all engines together. Any thread."""
        with self._engines_lock:
            load, gauges = self.load, self._gauges
            gauges["kv_cache_usage_perc"].set(self.kv_usage)
            requests = load.running, load.waiting, load.deferred, load.without_adapter
            if self._shown_requests != requests:  # they change less often than blocks are taken
                self._shown_requests = requests
                gauges["num_requests_running"].set(load.running)
                gauges["num_requests_waiting"].set(load.waiting)
                by_reason = gauges["num_requests_waiting_by_reason"]
                by_reason.labels("capacity").set(load.waiting - load.deferred - load.without_adapter)
                by_reason.labels("deferred").set(load.deferred)
                by_reason.labels("adapter").set(load.without_adapter)
            swapped = sum(one.load.swapped_blocks * one.shape.block_bytes for one in self._engines)
            if self._shown_swapped != swapped:
                self._shown_swapped = swapped
                gauges["swap_used_bytes"].set(swapped)

    def _show_shapes(self) -> None:
        """Set the gauges of the caches: the room of all, and the shape of the newest. Under the lock."""
        shapes = [one.shape for one in self._engines] or [self._first_shape]
        self._gauges["swap_capacity_bytes"].set(sum(one.num_host_blocks * one.block_bytes for one in shapes))
        newest, info = shapes[-1], self._gauges["cache_config_info"]
        info.clear()
        info.labels(str(newest.block_size), str(newest.num_blocks), str(newest.max_model_len)).set(1)

    def show_adapters(self) -> None:
        """Name the adapters at work on all engines. Any thread."""
        with self._engines_lock:
            running = {key for one in self._engines for key in one.running_adapters}
            waiting = {key for one in self._engines for key in one.active_adapters} - running
            names = [",".join(sorted(key.partition("@")[0] for key in keys)) for keys in (running, waiting)]
            if self._adapters_at_work != (now := (names[0], names[1])):
                info = self._gauges["lora_requests_info"]
                info.labels(self._max_adapters, *now).set(time.time())
                info.remove(self._max_adapters, *self._adapters_at_work)
                self._adapters_at_work = now

    def end_iteration(self) -> None:
        """Count the tokens of the step that ends."""
        if self._step_tokens:
            self._histograms["iteration_tokens_total"].observe(self._step_tokens)
            self._step_tokens = 0

    # -- labels --------------------------------------------------------------------------------

    def _fill_labels(self) -> None:
        """Bounded label sets are there from the start, at 0: a rate needs a first sample to rise from."""
        for reason in ("capacity", "deferred", "adapter"):
            self._gauges["num_requests_waiting_by_reason"].labels(reason)
        for state in SLEEP_STATES:
            self._gauges["engine_sleep_state"].labels(state).set(state == "awake")
        for finish in get_args(FinishReason):
            self._counters["request_success"].labels(finish)
        for reason in sorted(_REASONS):
            self._counters["admission_rejections"].labels(reason)
        for phase in ("queued", "prefill", "decode"):
            self._counters["aborts"].labels(phase)
            self._counters["timeouts"].labels(phase)
        for outcome in PUBLISH_OUTCOMES:
            self._counters["adapter_publishes"].labels(outcome)
        for outcome in SWAP_OUTCOMES:
            self._counters["model_swaps"].labels(outcome)
        for target in get_args(LatencyTarget):
            self._counters["train_target_misses"].labels(target)
        self._gauges["lora_requests_info"].labels(self._max_adapters, "", "").set(time.time())

    # -- observations --------------------------------------------------------------------------

    def on_prefix_lookup(self, queries: int, hits: int) -> None:
        """A prompt of `queries` tokens was looked up and `hits` of them were cached."""
        self._counters["prefix_cache_queries"].inc(queries)
        self._counters["prefix_cache_hits"].inc(hits)

    def on_preemptions(self, count: int) -> None:
        self._counters["num_preemptions"].inc(count)

    def on_drafts(self, drafted: int, accepted: int, *, drafts: int) -> None:
        """`drafted` tokens were guessed, in `drafts` guesses, and `accepted` of them were right."""
        self._counters["spec_decode_num_drafts"].inc(drafts)
        self._counters["spec_decode_num_draft_tokens"].inc(drafted)
        self._counters["spec_decode_num_accepted_tokens"].inc(accepted)

    def on_prompt_pace(self, steps: int, tokens: int, *, late: int, reserve: float) -> None:
        """`steps` had `tokens` of prompts beside streams with a target, which `late` of them missed. `reserve`: part of
        the time for prompts that is held back from now on."""
        if not steps:
            return
        for _ in range(steps):
            self._histograms["prompt_chunk_tokens"].observe(tokens / steps)
        self._counters["prompt_target_misses"].inc(late)
        self._gauges["prompt_reserve"].set(reserve)

    def on_swap(self, *, out: int, back: int) -> None:
        """`out` blocks were copied to host memory, and `back` blocks from it."""
        self._counters["swap_out_blocks"].inc(out)
        self._counters["swap_in_blocks"].inc(back)

    def on_tokens(self, timing: RequestTiming, count: int, now: float) -> None:
        """`count` tokens came at `now`; called before `timing`'s own token times move on."""
        self._counters["generation_tokens"].inc(count)
        self._step_tokens += count
        if timing.first_token is None:
            self._step_tokens += max(0, timing.prompt_tokens - timing.cached_tokens)
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
            self._counters["aborts"].labels(phase_of(timing)).inc()
        if timing.finish_reason == "timeout":
            self._counters["timeouts"].labels(phase_of(timing)).inc()
        if is_late(timing):
            self._counters["deadline_misses"].inc()
        for name, value in durations(timing):
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

    def adapter_traffic(self, key: str) -> AdapterTraffic | None:
        """Traffic of a version since it was loaded; None for one that is not in memory."""
        if (labels := self._adapters.get(key)) is None:
            return None
        return traffic_of(
            self._counters["adapter_requests"].labels(*labels),
            self._counters["adapter_prompt_tokens"].labels(*labels),
            self._counters["adapter_generation_tokens"].labels(*labels),
            self._histograms["adapter_time_to_first_token_seconds"].labels(*labels),
        )

    def on_publish(self, outcome: str) -> None:
        """A version was published, or was not; one of `PUBLISH_OUTCOMES`."""
        self._counters["adapter_publishes"].labels(outcome).inc()

    def on_model_swap(self, outcome: str) -> None:
        """The server has moved to another model, or has not; one of `SWAP_OUTCOMES`."""
        self._counters["model_swaps"].labels(outcome).inc()

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

    def on_train_step(self, event: StepEvent, job_id: str) -> None:
        """A training step of a job was taken."""
        self._gauges["train_loss"].set(event.loss)
        self._counters["train_tokens"].inc(event.tokens)
        self._histograms["train_step_seconds"].observe(event.seconds)
        if event.seconds > 0:
            self._train_shares[job_id] = event.busy_seconds / event.seconds
            self._gauges["train_share"].set(min(1.0, sum(self._train_shares.values())))

    def on_train_pause(self, job_id: str) -> None:
        """A job is not at work any more."""
        if self._train_shares.pop(job_id, None) is not None:
            self._gauges["train_share"].set(min(1.0, sum(self._train_shares.values())))

    def on_slice(self, seconds: float, slack_used: float) -> None:
        """Training had the engine thread for this long; `slack_used`: part of the slack between steps that it uses."""
        self._histograms["train_slice_seconds"].observe(seconds)
        self._gauges["train_slack_used"].set(slack_used)

    def on_ride(self, tokens: int) -> None:
        """This number of tokens of training was computed in a step of requests."""
        self._gauges["train_riding_rows"].set(tokens)
        self._counters["train_riding_tokens"].inc(tokens)

    def on_target_miss(self, target: LatencyTarget) -> None:
        """A token was late because of training; `target` is "tpot" or "ttft"."""
        self._counters["train_target_misses"].labels(target).inc()

    def on_eval(self, event: EvalEvent) -> None:
        """The held-out rows were scored."""
        for name, value in event.named.items():
            self._gauges["eval_metric"].labels(name).set(value)

    def on_jobs(self, counts: dict[str, int]) -> None:
        """Set the number of jobs in each state."""
        for state, count in counts.items():
            self._gauges["jobs"].labels(state).set(count)

    def on_loop(self, *, lag: float, tasks: int) -> None:
        """The event loop at a scrape: its longest delay since the last one, in seconds, and its tasks."""
        self._gauges["event_loop_lag_seconds"].set(lag)
        self._gauges["event_loop_tasks"].set(tasks)

    def on_gpus(self, found: Collection[GpuUsage]) -> None:
        """The GPUs at a scrape. No series where there are none."""
        for one in found:
            label = str(one.index)
            self._gauges["gpu_memory_used_bytes"].labels(label).set(one.used)
            self._gauges["gpu_memory_total_bytes"].labels(label).set(one.total)
            if one.busy is not None:
                self._gauges["gpu_utilization"].labels(label).set(one.busy)

    def totals(self, now: float) -> Totals:
        """Totals of the families without labels, at `now`."""
        plain = {spec.name for spec in TABLE if not spec.labels}
        counters = {name: family for name, family in self._counters.items() if name in plain}
        return totals_of(now, counters, {name: self._histograms[name] for name in _MEASURED})

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """The exposition and its content type: OpenMetrics where `accept` requests it, else plain text."""
        return render(self._registry, accept)


def _one_two_five(limit: int) -> tuple[float, ...]:
    """1, 2, 5, 10, 20, 50, … as far as `limit`."""
    series = (digit * 10**power for power in range(len(str(limit))) for digit in (1, 2, 5))
    return tuple(float(value) for value in series if value <= limit)
