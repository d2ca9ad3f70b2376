"""The load generator against a server of a few lines that counts a word as a token."""

import asyncio
import io
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from runtime.cli.loadgen import LoadReport, LoadSpec, Sample, Stats, make_report, render, run_load
from runtime.cli.output import CommandError, UsageError

TEMPLATE_TOKENS = 7


@dataclass
class FakeServer:
    """Answers `max_tokens` chunks of one token. `faults` maps a streamed request's number to a fault."""

    faults: dict[int, str] = field(default_factory=dict)
    tokenizes: bool = False
    usage: bool = True
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[str] = field(default_factory=list)
    running: int = 0
    most_running: int = 0
    port: int = 0

    @asynccontextmanager
    async def listen(self) -> AsyncIterator[str]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield f"http://127.0.0.1:{self.port}"
        finally:
            server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = next((int(h.split(":")[1]) for h in head.lower().split("\r\n") if "content-length" in h), 0)
        body = json.loads(await reader.readexactly(length)) if length else {}
        path = head.split(" ")[1]
        if path == "/v1/models":
            self._send(writer, 200, {"data": [{"id": "fake-1"}]})
        elif path == "/tokenize" and self.tokenizes:
            self._send(writer, 200, {"tokens": [10 + i for i, _ in enumerate(body["prompt"].split())]})
        elif path.startswith("/v1/") and body.get("stream"):
            await self._stream(writer, head, body)
        elif path.startswith("/v1/"):
            self._send(writer, 200, {"usage": {"prompt_tokens": count_tokens(body), "completion_tokens": 1}})
        else:
            self._send(writer, 404, {"error": {"message": f"no {path}"}})
        await writer.drain()
        writer.close()

    def _send(self, writer: asyncio.StreamWriter, status: int, body: object) -> None:
        data = json.dumps(body).encode()
        writer.write(f"HTTP/1.1 {status} X\r\nconnection: close\r\ncontent-length: {len(data)}\r\n\r\n".encode())
        writer.write(data)

    async def _stream(self, writer: asyncio.StreamWriter, head: str, body: dict[str, Any]) -> None:
        number = len(self.bodies)
        self.bodies.append(body)
        self.headers.append(head)
        fault = self.faults.get(number)
        if fault == "refuse":
            self._send(writer, 429, {"error": {"message": "the queue is full"}})
            return
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        writer.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-type: text/event-stream\r\n\r\n")
        for event in self._events(body, fault):
            writer.write(f"data: {event}\n\n".encode())
            await writer.drain()
            await asyncio.sleep(0)
        if fault == "hang":
            await asyncio.sleep(5)
        self.running -= 1

    def _events(self, body: dict[str, Any], fault: str | None) -> list[str]:
        chat = "messages" in body
        start = [{"delta": {"role": "assistant", "content": ""}}] if chat else []
        token: dict[str, Any] = {"delta": {"content": " word"}} if chat else {"text": " word"}
        end = {"delta": {}, "finish_reason": "length"} if chat else {"text": "", "finish_reason": "length"}
        events: list[object] = [{"choices": [c]} for c in (*start, *[token] * body["max_tokens"])]
        if fault == "error":
            events.append({"error": {"message": "the step failed"}})
        elif fault is None:
            events.append({"choices": [end]})
            usage = {"prompt_tokens": count_tokens(body), "completion_tokens": body["max_tokens"]}
            details = {"prompt_tokens_details": {"cached_tokens": 2}}
            events += [{"choices": [], "usage": usage | details}] if self.usage else []
        return [json.dumps(event) for event in events] + ["[DONE]"] * (fault is None)


def count_tokens(body: dict[str, Any]) -> int:
    if "messages" in body:
        return TEMPLATE_TOKENS + len(body["messages"][0]["content"].split())
    prompt = body["prompt"]
    return len(prompt) if isinstance(prompt, list) else len(prompt.split())


def run(server: FakeServer, on_progress: Any = None, **fields: Any) -> LoadReport:
    async def main() -> LoadReport:
        async with server.listen() as url:
            return await run_load(LoadSpec(url=url, **fields), on_progress)

    return asyncio.run(main())


def test_chat_load_is_counted_and_its_prompts_have_the_wanted_length() -> None:
    server = FakeServer()
    seen: list[Sample] = []
    report = run(server, seen.append, requests=9, concurrency=3, input_len=40, output_len=5, api_key="sesame")
    assert (report.completed, report.failed, report.errors) == (9, 0, {})
    assert report.model == "fake-1"
    assert {count_tokens(body) for body in server.bodies} == {40}
    assert (report.prompt_tokens, report.output_tokens, report.cached_tokens) == (9 * 40, 9 * 5, 9 * 2)
    assert report.counted_by == "usage"
    assert report.output_tokens_per_s == pytest.approx(45 / report.duration)
    assert report.prompt_tokens_per_s == pytest.approx(360 / report.duration)
    assert len(seen) == 9
    assert all(len(sample.arrivals) == 5 for sample in seen)
    assert server.most_running <= 3
    assert all("Bearer sesame" in head for head in server.headers)
    assert b"sesame" not in report.to_json()


def test_request_fields_make_the_output_length_exact_unless_turned_off() -> None:
    server = FakeServer()
    run(server, requests=2, output_len=4, input_len=20, seed=10)
    body = server.bodies[0]
    assert (body["max_tokens"], body["min_tokens"], body["ignore_eos"]) == (4, 4, True)
    assert body["stream_options"] == {"include_usage": True}
    assert sorted(b["seed"] for b in server.bodies) == [10, 11]
    plain = FakeServer()
    run(plain, requests=1, output_len=4, input_len=20, ignore_eos=False)
    assert not {"ignore_eos", "min_tokens"} & plain.bodies[0].keys()


def test_completions_with_tokenize_get_token_ids_of_exact_length() -> None:
    server = FakeServer(tokenizes=True)
    report = run(server, endpoint="completions", requests=4, input_len=16, shared_prefix=100, output_len=2)
    prompts = [body["prompt"] for body in server.bodies]
    assert {len(p) for p in prompts} == {116}
    assert len({tuple(p[:100]) for p in prompts}) == 1
    assert len({tuple(p[100:]) for p in prompts}) == 4
    assert report.prompt_tokens == 4 * 116


def test_completions_without_tokenize_are_calibrated() -> None:
    server = FakeServer(tokenizes=False)
    report = run(server, endpoint="completions", requests=3, input_len=30, shared_prefix=10, output_len=2)
    prompts = [body["prompt"].split() for body in server.bodies]
    assert {len(p) for p in prompts} == {40}
    assert len({tuple(p[:10]) for p in prompts}) == 1
    assert report.completed == 3


def test_prompts_depend_on_the_seed_alone() -> None:
    def prompts(seed: int) -> list[str]:
        server = FakeServer()
        run(server, requests=5, concurrency=1, input_len=20, output_len=1, seed=seed)
        return [body["messages"][0]["content"] for body in server.bodies]

    assert prompts(1) == prompts(1)
    assert prompts(1) != prompts(2)


def test_failures_are_counted_and_do_not_enter_the_rates() -> None:
    server = FakeServer(faults={0: "refuse", 1: "error", 2: "cut", 3: "refuse"})
    report = run(server, requests=7, concurrency=1, input_len=10, output_len=3)
    assert (report.completed, report.failed) == (3, 4)
    assert report.errors == {
        "429: the queue is full": 2,
        "the step failed": 1,
        "the stream ended before the answer did": 1,
    }
    assert report.output_tokens == 9


def test_a_request_over_the_timeout_has_failed() -> None:
    report = run(FakeServer(faults={0: "hang"}), requests=1, input_len=10, output_len=1, timeout=0.2)
    assert report.errors == {"no complete answer in 0.2 s": 1}
    assert report.ttft is None
    assert report.output_tokens_per_s == 0.0


def test_chunks_are_counted_where_there_is_no_usage() -> None:
    report = run(FakeServer(usage=False), requests=2, input_len=10, output_len=6)
    assert (report.counted_by, report.output_tokens) == ("chunks", 12)


def test_nobody_listening_is_one_clear_error() -> None:
    with pytest.raises(CommandError, match="no server answers"):
        asyncio.run(run_load(LoadSpec(url="http://127.0.0.1:9", requests=1)))


def test_arrivals_are_poisson_and_depend_on_the_seed_alone() -> None:
    spec = LoadSpec(requests=4000, rate=50.0, seed=3)
    times = np.array(spec.due_times())
    assert spec.due_times() == list(times)
    assert LoadSpec(requests=4000, rate=50.0, seed=4).due_times() != list(times)
    gaps = np.diff(times)
    assert times[0] == 0.0
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.05)
    assert gaps.std() == pytest.approx(1 / 50, rel=0.05)  # an exponential's deviation is its mean
    assert LoadSpec(requests=3).due_times() == [0.0, 0.0, 0.0]


def test_open_loop_sends_everything() -> None:
    server = FakeServer()
    report = run(server, requests=20, rate=500.0, input_len=10, output_len=2)
    assert report.completed == 20


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"requests": 0}, "requests must be at least 1, got 0"),
        ({"output_len": -1}, "output_len must be at least 1, got -1"),
        ({"rate": float("nan")}, "rate must be a number above 0"),
        ({"rate": 1.0, "concurrency": 2}, "not both"),
        ({"timeout": 0.0}, "timeout must be"),
        ({"temperature": -1.0}, "temperature must be"),
    ],
)
def test_specs_that_make_no_sense_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        LoadSpec(**fields).verify()


def test_percentiles_are_numpys() -> None:
    values = [float(v) for v in np.random.default_rng(5).exponential(size=137)]
    stats = Stats.of(values)
    assert stats is not None
    assert stats.mean == pytest.approx(np.mean(values))
    for name, rank in (("p50", 50), ("p90", 90), ("p95", 95), ("p99", 99)):
        assert getattr(stats, name) == pytest.approx(np.percentile(values, rank))
    assert Stats.of([]) is None
    assert Stats.of([2.0]) == Stats(mean=2.0, p50=2.0, p90=2.0, p95=2.0, p99=2.0)


def test_report_of_known_times() -> None:
    samples = [
        Sample(started=0.0, arrivals=[1.0, 1.5, 2.5], finished=3.0, output_tokens=3, from_usage=True),
        # Five tokens in two chunks: one gap, but four tokens after the first.
        Sample(started=2.0, arrivals=[2.5, 4.5], finished=5.0, output_tokens=5, from_usage=True),
        Sample(started=4.0, finished=10.0, error="gone"),
    ]
    report = make_report(LoadSpec(requests=3), "m", samples)
    assert (report.completed, report.failed, report.duration) == (2, 1, 10.0)
    assert report.output_tokens_per_s == 0.8
    assert [s and s.mean for s in (report.ttft, report.itl, report.tpot, report.e2e)] == pytest.approx(
        [0.75, 3.5 / 3, (0.75 + 0.5) / 2, 3.0]
    )


def test_table_shows_the_numbers_and_the_errors() -> None:
    samples = [
        Sample(started=0.0, arrivals=[0.25, 0.5], finished=1.0, output_tokens=2, from_usage=True),
        Sample(started=0.0, finished=1.0, error="429: the queue is full"),
    ]
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(render(make_report(LoadSpec(concurrency=4), "m", samples)))
    text = console.export_text()
    assert "1 completed, 1 failed" in text
    assert "250.0" in text
    assert "1 × 429: the queue is full" in text
