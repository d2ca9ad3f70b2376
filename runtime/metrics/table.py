"""Every metric, defined once: name, kind, labels, buckets, and a second name for some."""

from dataclasses import dataclass
from typing import Literal

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

MetricKind = Literal["gauge", "counter", "histogram"]
Twin = Literal["vllm", "plain", "none"]


@dataclass(frozen=True)
class Spec:
    """One family. `buckets` None in a histogram: the 1-2-5 series up to the context length."""

    name: str
    kind: MetricKind
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] | None = None
    twin: Twin = "vllm"
    """Its second name: with `vllm:` before it, bare (as vLLM has its HTTP metrics), or none at all."""


TABLE: tuple[Spec, ...] = (
    Spec("num_requests_running", "gauge", "Sequences in the running batch."),
    Spec("num_requests_waiting", "gauge", "Sequences waiting to run."),
    Spec("num_requests_waiting_by_reason", "gauge",
         "Waiting sequences by what they wait for: room, a sibling, or a place for their adapter.", ("reason",)),
    Spec("kv_cache_usage_perc", "gauge", "Share of the KV blocks in use, 0 to 1."),
    Spec("cache_config_info", "gauge", "The KV cache's shape, as labels.",
         ("block_size", "num_gpu_blocks", "max_model_len")),
    Spec("engine_sleep_state", "gauge", "State of the engine: 1 for the one that it is in. It never sleeps.",
         ("sleep_state",)),
    Spec("prompt_tokens", "counter", "Prompt tokens of requests that got their first token."),
    Spec("generation_tokens", "counter", "Tokens generated."),
    Spec("prompt_tokens_cached", "counter", "Prompt tokens whose KV came from the prefix cache."),
    Spec("num_preemptions", "counter", "Times a running sequence lost its blocks to another."),
    Spec("swap_out_blocks", "counter", "KV blocks of preempted sequences copied to host memory.", twin="none"),
    Spec("swap_in_blocks", "counter", "KV blocks copied back from host memory.", twin="none"),
    Spec("swap_used_bytes", "gauge", "Host memory that holds the KV of preempted sequences.", twin="none"),
    Spec("swap_capacity_bytes", "gauge", "Host memory for the KV of preempted sequences.", twin="none"),
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
    Spec("iteration_tokens_total", "histogram", "Tokens generated, and of prompts completed, in one step.",
         buckets=_STEP_TOKENS),
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
    Spec("model_swaps", "counter", "Moves of the server to another model, by how they ended.", ("outcome",),
         twin="none"),
    Spec("spec_decode_num_drafts", "counter", "Times that tokens of a sequence were guessed ahead."),
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
    Spec("train_slack_used", "gauge",
         "Part of the time that the targets leave beside steps which training uses; above 1: its least share is more.",
         twin="none"),
    Spec("train_riding_tokens", "counter",
         "Tokens of training whose forward pass was computed in steps of requests, beside their rows.", twin="none"),
    Spec("train_riding_rows", "gauge", "Tokens of training in the last step of requests.", twin="none"),
    Spec("train_target_misses", "counter",
         "Tokens later than tpot_target (or tpot_ratio) or ttft_target that would have been in time without training.",
         ("target",), twin="none"),
    Spec("prompt_chunk_tokens", "histogram",
         "Tokens of prompts in a step beside streams, as many as `tpot_target` was found to leave time for.",
         buckets=_STEP_TOKENS, twin="none"),
    Spec("prompt_reserve", "gauge",
         "Part of the time beside streams that is held back from prompts since steps were late, 0 to 0.5.",
         twin="none"),
    Spec("prompt_target_misses", "counter",
         "Steps longer than `tpot_target` whose streams alone would have been in time: their prompts were too long.",
         twin="none"),
    Spec("eval_metric", "gauge", "Result of the last evaluation, by metric.", ("name",), twin="none"),
    Spec("gpu_utilization", "gauge", "Share of the time in which the GPU computed, 0 to 1.", ("gpu",), twin="none"),
    Spec("gpu_memory_used_bytes", "gauge", "Memory of the GPU in use, by all processes.", ("gpu",), twin="none"),
    Spec("gpu_memory_total_bytes", "gauge", "Memory of the GPU.", ("gpu",), twin="none"),
    Spec("event_loop_lag_seconds", "gauge", "Longest delay of the event loop seen since the last scrape.",
         twin="none"),
    Spec("event_loop_tasks", "gauge", "Tasks of the event loop, at the scrape.", twin="none"),
)  # fmt: skip
