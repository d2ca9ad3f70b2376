"""What a request's times say when it has ended."""

from collections.abc import Iterator

from runtime.messages import RequestTiming


def phase_of(timing: RequestTiming) -> str:
    """How far it had come."""
    if timing.scheduled is None:
        return "queued"
    return "prefill" if timing.first_token is None else "decode"


def is_late(timing: RequestTiming) -> bool:
    """Whether it missed its deadline."""
    if timing.deadline is None or timing.finished is None or timing.finish_reason == "abort":
        return False
    return timing.finish_reason == "timeout" or timing.finished > timing.deadline


def durations(timing: RequestTiming) -> Iterator[tuple[str, float]]:
    """By the names of their metrics, in seconds; none of what it never reached."""
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
