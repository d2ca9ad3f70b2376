"""What a load came to: counts, rates and percentiles, as JSON and as a table."""

import statistics
from collections import Counter
from collections.abc import Sequence

import msgspec
from msgspec import Struct
from rich.table import Table

from runtime.cli.load.sample import Sample
from runtime.cli.load.spec import LoadSpec

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
        """None for no values."""
        if not values:
            return None
        # One value has no quantiles; twice itself, it is all of them.
        points = values if len(values) > 1 else [*values, *values]
        cuts = statistics.quantiles(points, n=100, method="inclusive")
        return cls(mean=statistics.fmean(values), p50=cuts[49], p90=cuts[89], p95=cuts[94], p99=cuts[98])


class LoadReport(Struct, frozen=True, kw_only=True):
    """Rates are over `duration`, and count completed requests only; latencies are in seconds."""

    spec: LoadSpec
    """As it was run, the API key left out."""
    model: str
    completed: int
    failed: int
    errors: dict[str, int]
    """The commonest error messages, and how often each came."""
    duration: float
    """From the first request's start to the last one's end."""
    prompt_tokens: int
    cached_tokens: int
    """Prompt tokens that the server had in its prefix cache, where it says so."""
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
    """Seconds a token after the first, a value for each request."""
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
