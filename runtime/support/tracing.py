"""OpenTelemetry spans of requests and jobs (setting `observability.tracing`, extra `otel`).

Imported only where the setting is on. Spans are made on the event loop from times that are taken anyway; the SDK's
thread exports them from a bounded queue (`OTEL_BSP_MAX_QUEUE_SIZE`) and drops what does not fit. Endpoint, headers,
sampler and the service's name are those of OpenTelemetry's own variables. Names and numbers only, never a text.
"""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from opentelemetry import context as contexts
from opentelemetry import trace
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import Link, Span, SpanContext, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from runtime.support.version import version

FLUSH_SECONDS = 5.0
"""Most that the end of the process waits for the export of what is queued."""

MAX_STEP_SPANS = 1000
"""Spans of steps and evaluations of one job; later ones are left out, and counted on the job's span."""

_SEMANTIC = {
    "model": "gen_ai.response.model",
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "completion_tokens": "gen_ai.usage.output_tokens",
    "error_code": "error.type",
}
"""Field of a request's log line → its name in OpenTelemetry's conventions; others are `eft.FIELD`."""

_STATES = {"validating": "prepare", "queued": "queue", "running": "train", "paused": "pause", "evaluating": "gate",
           "publishing": "publish", "interrupted": "interrupt"}  # fmt: skip
"""State of a job → name of the span of its stay there; other states end the job."""

_CLIENT_ERROR, _SERVER_ERROR = 400, 500


def open_tracing() -> "Tracing":
    """Tracing with the exporter that OTEL_EXPORTER_OTLP_PROTOCOL names: `http/protobuf`, the default, or `grpc`. Raises
    `ImportError` where it is not installed, and `ValueError` for another protocol."""
    wanted = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL")
    exporter: SpanExporter
    if (wanted or "http/protobuf") == "http/protobuf":
        from opentelemetry.exporter.otlp.proto.http import trace_exporter as over_http

        exporter = over_http.OTLPSpanExporter()
    elif wanted == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc import trace_exporter as over_grpc

        exporter = over_grpc.OTLPSpanExporter()
    else:
        raise ValueError(f"OTEL_EXPORTER_OTLP_PROTOCOL must be http/protobuf or grpc, got {wanted!r}.")
    return Tracing(BatchSpanProcessor(exporter))


class Tracing:
    """A provider of spans with one processor. Event-loop thread only, but for `close`."""

    def __init__(self, processor: SpanProcessor) -> None:
        resource = Resource.create({"service.name": "eft", "service.version": version()})
        resource = resource.merge(OTELResourceDetector().detect())
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("eft", version())
        self._propagator = TraceContextTextMapPropagator()
        self.jobs = JobTraces(self._tracer)

    def request(self, method: str, headers: Mapping[bytes, bytes]) -> "RequestTrace":
        """The span of a request that begins now, below the one that its `traceparent` names."""
        carrier = {name: headers[name.encode()].decode("latin-1") for name in _W3C if name.encode() in headers}
        parent = self._propagator.extract(carrier, context=contexts.Context()) if carrier else contexts.Context()
        started = time.time_ns()
        span = self._tracer.start_span(method, context=parent, kind=SpanKind.SERVER, start_time=started)
        return RequestTrace(self._tracer, span, started)

    def close(self) -> None:
        """End the spans of jobs, export what is queued, for `FLUSH_SECONDS` at most, and stop. Blocks."""
        self.jobs.close()
        self._provider.force_flush(int(FLUSH_SECONDS * 1000))
        self._provider.shutdown()


_W3C = ("traceparent", "tracestate")


class RequestTrace:
    """The span of one request, and the current one while it is handled."""

    def __init__(self, tracer: trace.Tracer, span: Span, started: int) -> None:
        """`started`: in nanoseconds since the epoch."""
        self._tracer = tracer
        self._span = span
        self._started = started
        self._token = contexts.attach(trace.set_span_in_context(span))
        found = span.get_span_context()
        self.ids = {"trace_id": f"{found.trace_id:032x}", "span_id": f"{found.span_id:016x}"}
        """Fields for the log lines of the request."""
        self.header = f"00-{self.ids['trace_id']}-{self.ids['span_id']}-{found.trace_flags:02x}"
        """The span in the form of `traceparent`, for the response (`traceresponse`)."""

    def end(
        self,
        *,
        method: str,
        route: str,
        status: int,
        seconds: float,
        details: Mapping[str, Any],
        phases: Sequence[str],
    ) -> None:
        """End the span after `seconds`, with a span below it for each phase. `details`: fields of the log line, of
        which the `phases` are in milliseconds, one after the other from the beginning."""
        contexts.detach(self._token)
        if not self._span.is_recording():
            return
        self._span.update_name(f"{method} {route}")
        self._span.set_attributes(
            {"http.request.method": method, "http.route": route, "http.response.status_code": status}
            | {_SEMANTIC.get(name, f"eft.{name}"): value for name, value in details.items() if name not in phases}
        )
        if status >= _SERVER_ERROR or (status < _CLIENT_ERROR and "error_code" in details):  # the latter in a stream
            self._span.set_status(Status(StatusCode.ERROR, str(details.get("error_code", ""))))
        ended = self._started + int(seconds * 1e9)
        self._add_phases({name: details.get(name) for name in phases}, ended)
        self._span.end(ended)

    def _add_phases(self, phases: Mapping[str, float | None], ended: int) -> None:
        """Add the phases that the request came to, and what remained after them."""
        at, below = self._started, trace.set_span_in_context(self._span)
        for name, milliseconds in phases.items():
            if milliseconds is None:
                break
            phase = self._tracer.start_span(name.removesuffix("_ms"), context=below, start_time=at)
            at = min(ended, at + int(milliseconds * 1e6))
            phase.end(at)
        if at > self._started:
            self._tracer.start_span("deliver", context=below, start_time=at).end(ended)


@dataclass(eq=False)
class _JobSpans:
    """The open spans of one job."""

    root: Span
    state: Span
    latest: int
    """Time of the last report or change, in nanoseconds since the epoch."""
    reports: int = 0
    left_out: int = field(default=0)


class JobTraces:
    """Spans of jobs: one a job, below it one for each stay in a state, below training one a step and evaluation.

    A job that another process began gets a span of what happens in this one.
    """

    def __init__(self, tracer: trace.Tracer) -> None:
        self._tracer = tracer
        self._jobs: dict[str, _JobSpans] = {}
        self._origins: dict[str, SpanContext] = {}

    def expect(self, job_id: str) -> None:
        """Link the job's span to the request that is handled now."""
        found = trace.get_current_span().get_span_context()
        if found.is_valid:
            self._origins[job_id] = found

    def on_state(self, job_id: str, state: str, moment: float, details: Mapping[str, Any]) -> None:
        """The job came to another state at `moment`, in seconds since the epoch."""
        at = int(moment * 1e9)
        job, name = self._jobs.get(job_id), _STATES.get(state)
        if job is None:
            if name is not None:
                self._jobs[job_id] = self._begin(job_id, name, at)
            return
        job.state.end(at)
        job.latest = at
        if name is not None:
            job.state = self._below(job.root, name, at)
            return
        job.root.set_attributes({"eft.state": state, "eft.reports_left_out": job.left_out})
        job.root.set_attributes({f"eft.{key}": value for key, value in details.items() if isinstance(value, _PLAIN)})
        if state == "failed":
            job.root.set_status(Status(StatusCode.ERROR, str(details.get("code", ""))))
        job.root.end(at)
        del self._jobs[job_id]

    def on_report(self, job_id: str, kind: str, moment: float, details: Mapping[str, Any]) -> None:
        """A step or an evaluation (`kind`) ended at `moment`; it took `details["seconds"]`, or all since the last."""
        job = self._jobs.get(job_id)
        if job is None:
            return
        at = int(moment * 1e9)
        begun = at - int(details["seconds"] * 1e9) if "seconds" in details else job.latest
        job.latest = at
        if job.reports >= MAX_STEP_SPANS:
            job.left_out += 1
            return
        job.reports += 1
        span = self._below(job.state, kind, min(begun, at))
        span.set_attributes({f"eft.{key}": value for key, value in details.items() if isinstance(value, _PLAIN)})
        span.end(at)

    def refuse(self, job_id: str, code: str | None) -> None:
        """End the span of a job whose recipe was refused: there is no such job any more."""
        self._origins.pop(job_id, None)
        self.on_state(job_id, "failed", time.time(), {"code": code or ""})

    def close(self) -> None:
        """End all spans: their jobs go on in another process."""
        for job in self._jobs.values():
            job.state.end()
            job.root.end()
        self._jobs.clear()

    def _begin(self, job_id: str, name: str, at: int) -> _JobSpans:
        origin = self._origins.pop(job_id, None)
        links: Sequence[Link] = () if origin is None else (Link(origin),)
        attributes = {"eft.job": job_id}
        root = self._tracer.start_span(
            "job", context=contexts.Context(), links=links, attributes=attributes, start_time=at
        )
        return _JobSpans(root, self._below(root, name, at), at)

    def _below(self, parent: Span, name: str, at: int) -> Span:
        context = trace.set_span_in_context(parent, contexts.Context())
        return self._tracer.start_span(name, context=context, start_time=at)


_PLAIN = (str, bool, int, float)
