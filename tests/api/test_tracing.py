"""Spans of requests: their tree, the trace that they belong to, and what becomes of them without the package."""

import gzip
import io
import json
import os
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import httpx
import msgspec
import pytest

from runtime.api.app import create_app
from runtime.api.handle import ServiceHandle
from runtime.api.http.record import PHASES
from runtime.support.logs import configure
from settings.schema import ObservabilitySettings, Settings
from tests.api.conftest import tiny_settings
from tests.api.fakes import FakeService
from tests.api.test_server import process

pytest.importorskip("opentelemetry.sdk")

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from runtime.support import tracing
from runtime.support.tracing import Tracing, open_tracing

pytestmark = pytest.mark.anyio

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def spans() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def client(spans: InMemorySpanExporter) -> httpx.AsyncClient:
    handle = ServiceHandle(FakeService())  # type: ignore[arg-type]
    handle.tracing = Tracing(SimpleSpanProcessor(spans))
    app = create_app(handle, Settings())
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1")


def named(spans: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    return {span.name: span for span in spans.get_finished_spans()}


async def test_a_request_is_a_span_of_the_clients_trace(
    client: httpx.AsyncClient, spans: InMemorySpanExporter, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = io.StringIO()
    configure(ObservabilitySettings(log_format="json"), lines)
    headers = {"traceparent": PARENT, "tracestate": "vendor=1", "x-request-id": "r1"}
    body = {"model": "fake", "prompt": "a secret", "max_tokens": 2}
    answer = await client.post("/v1/completions", json=body, headers=headers)
    span = named(spans)["POST /v1/completions"]
    assert span.context is not None
    assert f"{span.context.trace_id:032x}" == "0af7651916cd43dd8448eb211c80319c"
    assert span.parent is not None
    assert f"{span.parent.span_id:016x}" == "b7ad6b7169203331"
    assert answer.headers["traceresponse"] == f"00-{span.context.trace_id:032x}-{span.context.span_id:016x}-01"
    assert dict(span.attributes or {}) == {
        "http.request.method": "POST",
        "http.route": "/v1/completions",
        "http.response.status_code": 200,
        "eft.request_id": "r1",
        "eft.key": "",
        "eft.cached_tokens": 1,
        "gen_ai.response.model": "base",
        "gen_ai.usage.input_tokens": 8,
        "gen_ai.usage.output_tokens": 2,
    }
    (line,) = [json.loads(text) for text in lines.getvalue().splitlines() if '"request"' in text]
    assert (line["trace_id"], line["span_id"]) == (f"{span.context.trace_id:032x}", f"{span.context.span_id:016x}")
    assert "secret" not in str(span.to_json())


@pytest.mark.parametrize("header", ["", "nonsense", "00-" + "0" * 32 + "-b7ad6b7169203331-01", "é" * 500])
async def test_a_bad_context_begins_a_new_trace(
    client: httpx.AsyncClient, spans: InMemorySpanExporter, header: str
) -> None:
    answer = await client.get("/v1/models", headers={"traceparent": header.encode()})  # type: ignore[dict-item]
    assert answer.status_code == 200
    assert named(spans)["GET /v1/models"].parent is None


async def test_errors_and_what_is_not_traced(client: httpx.AsyncClient, spans: InMemorySpanExporter) -> None:
    for path in ("/health", "/metrics", "/", "/page/app.js", "/admin/requests"):
        answer = await client.get(path)
        assert "traceresponse" not in answer.headers
    assert spans.get_finished_spans() == ()
    await client.get("/v1/models/none")
    span = named(spans)["GET /v1/models/{model_id}"]
    assert span.status.is_unset  # the client's fault is no error of the server's span
    assert (span.attributes or {})["error.type"] == "model_not_found"
    spans.clear()
    await client.get("/nowhere/at/all")
    assert [one.name for one in spans.get_finished_spans()] == ["GET unmatched"]


def trace_of(spans: InMemorySpanExporter, details: dict[str, Any], *, status: int = 200) -> list[tuple[str, float]]:
    """Names of the spans below a request of one second, with their seconds."""
    request = Tracing(SimpleSpanProcessor(spans)).request("POST", {})
    request.end(method="POST", route="/x", status=status, seconds=1.0, details=details, phases=PHASES)
    root = named(spans)["POST /x"]
    below = [one for one in spans.get_finished_spans() if one is not root]
    assert all(one.parent is not None and one.parent.span_id == root.context.span_id for one in below)  # type: ignore[union-attr]
    starts = [one.start_time for one in below]
    assert starts == sorted(starts, key=lambda at: at or 0)
    return [(one.name, round(((one.end_time or 0) - (one.start_time or 0)) / 1e9, 3)) for one in below]


def test_phases_follow_one_another(spans: InMemorySpanExporter) -> None:
    details = {"prepare_ms": 100.0, "queue_ms": 50.0, "prefill_ms": 250.0, "decode_ms": 500.0}
    expected = [("prepare", 0.1), ("queue", 0.05), ("prefill", 0.25), ("decode", 0.5), ("deliver", 0.1)]
    assert trace_of(spans, details) == expected


def test_a_request_that_waited_and_left_has_the_phases_that_it_reached(spans: InMemorySpanExporter) -> None:
    details = {"prepare_ms": 100.0, "queue_ms": None, "prefill_ms": None, "decode_ms": None}
    assert trace_of(spans, details) == [("prepare", 0.1), ("deliver", 0.9)]
    spans.clear()
    assert trace_of(spans, {}) == []


@pytest.mark.parametrize(
    ("status", "details", "failed"),
    [(500, {}, True), (200, {"error_code": "engine_unavailable"}, True), (400, {"error_code": "x"}, False)],
)
def test_what_counts_as_an_error(
    spans: InMemorySpanExporter, status: int, details: dict[str, Any], failed: bool
) -> None:
    trace_of(spans, details, status=status)
    assert named(spans)["POST /x"].status.is_ok is not failed
    assert named(spans)["POST /x"].status.is_unset is not failed


def test_a_collector_that_hangs_costs_spans_and_no_time_of_requests() -> None:
    release, seen = threading.Event(), []

    class Hanging(SpanExporter):
        def export(self, spans: Any) -> Any:
            seen.append(threading.current_thread())
            release.wait(30)

    found = Tracing(BatchSpanProcessor(Hanging(), max_queue_size=8, max_export_batch_size=1))
    for _ in range(1000):
        request = found.request("GET", {})
        request.end(method="GET", route="/x", status=200, seconds=0.1, details={}, phases=PHASES)
    assert threading.current_thread() not in seen
    release.set()
    found.close()
    assert len(seen) < 100


def test_other_protocols_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "carrier-pigeon")
    with pytest.raises(ValueError, match="carrier-pigeon"):
        open_tracing()


def test_the_service_has_a_name_that_variables_change(
    monkeypatch: pytest.MonkeyPatch, spans: InMemorySpanExporter
) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "shop")
    trace_of(spans, {})
    assert named(spans)["POST /x"].resource.attributes["service.name"] == "shop"
    assert named(spans)["POST /x"].resource.attributes["service.version"]


class Collector(BaseHTTPRequestHandler):
    """Takes what is exported."""

    bodies: ClassVar[list[bytes]] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.bodies.append(gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body)
        self.send_response(200)
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        pass


def test_a_server_exports_to_the_endpoint_of_the_environment(tiny_model: Path) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    listener = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=listener.serve_forever, daemon=True).start()
    settings = tiny_settings(tiny_model)
    settings = msgspec.structs.replace(settings, observability=ObservabilitySettings(tracing=True))
    endpoint = f"http://127.0.0.1:{listener.server_address[1]}"
    env = {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with process(settings, **env) as (child, url):
        answer = httpx.post(f"{url}/v1/completions", json={"prompt": "a", "max_tokens": 3}, timeout=60)
        assert answer.headers["traceresponse"]
        child.send_signal(signal.SIGTERM)
        assert child.wait(30) == 0
    listener.shutdown()
    found = b"".join(Collector.bodies)
    assert all(name in found for name in (b"POST /v1/completions", b"prefill", b"decode", b"service.name"))


def test_nothing_is_imported_while_it_is_off() -> None:
    script = "import sys, runtime.api.server; sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", script], timeout=240, check=False).returncode == 0
    assert tracing.MAX_STEP_SPANS > 0
