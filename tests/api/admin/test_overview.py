"""/admin/overview and /admin/requests."""

import asyncio
from typing import Any

import httpx
import msgspec
import pytest

from runtime.api.admin.overview import MAX_SAMPLES, OverviewHistory
from runtime.api.handle import MAX_RECENT_REQUESTS, ServiceHandle
from runtime.api.openai.generation import PHASES
from runtime.messages import RequestTiming
from runtime.metrics import CacheShape, EngineLoad
from settings.schema import Settings
from tests.api.conftest import RunningServer, client_of
from tests.api.fakes import FakeService
from tests.trainer.jobs.fakes import step_event

pytestmark = pytest.mark.anyio


def history_of(service: Any) -> OverviewHistory:
    return OverviewHistory(ServiceHandle(service))


def test_rates_and_quantiles_are_those_of_the_time_between_samples(service: FakeService) -> None:
    history = history_of(service)
    history.take(100.0)
    timing = RequestTiming(arrival=1.0, prompt_tokens=30, max_tokens=10)
    service.metrics.on_tokens(timing, 1, now=1.09)
    timing.first_token = timing.last_token = 1.09
    service.metrics.on_tokens(timing, 9, now=1.12)
    service.metrics.on_slice(0.5, slack_used=1.0)
    service.metrics.on_ride(tokens=12)
    engine = service.metrics.open_engine(CacheShape(max_model_len=64, block_size=16, num_blocks=8))
    engine.on_step(EngineLoad(running=3, used_blocks=2))
    history.take(102.0)
    sample = history.samples[-1]
    assert (sample.generated_tokens, sample.prompt_tokens) == (5.0, 15.0)
    assert (sample.running, sample.kv_cache_usage, sample.training_share) == (3, 0.25, 0.25)
    assert sample.riding_tokens == 6.0
    assert sample.first_token_p50 is not None
    assert 0.08 <= sample.first_token_p50 <= 0.1  # the borders of the bucket that 90 ms are in
    assert sample.token_p95 is not None
    assert 0.025 <= sample.token_p95 <= 0.05
    for moment in range(104, 140, 2):
        history.take(float(moment))
    last = history.samples[-1]
    assert (last.generated_tokens, last.riding_tokens) == (0.0, 0.0)
    assert (last.first_token_p50, last.token_p50) == (None, None)


def test_trained_tokens_are_averaged_over_half_a_minute(service: FakeService) -> None:
    """A step of seconds would else make a peak in one sample, and nothing in the next ones."""
    history = history_of(service)
    history.take(100.0)
    service.metrics.on_train_step(step_event(1), "ftjob-1")  # 20 tokens
    for moment in range(102, 134, 2):
        history.take(float(moment))
    assert [sample.trained_tokens for sample in history.samples][:3] == [0.0, 10.0, 5.0]
    assert history.samples[-2].trained_tokens == pytest.approx(20 / 30)
    assert history.samples[-1].trained_tokens == 0.0


def test_the_history_is_bounded(service: FakeService) -> None:
    history = history_of(service)
    for moment in range(MAX_SAMPLES + 10):
        history.take(float(moment))
    assert len(history.samples) == MAX_SAMPLES
    assert history.samples[0].time == 10.0


def test_nothing_is_sampled_while_the_model_loads() -> None:
    history = history_of(None)
    history.take(1.0)
    assert not history.samples


async def test_those_that_wait_get_each_sample_and_the_end(service: FakeService) -> None:
    history = history_of(service)
    waiting = [asyncio.create_task(history.next_sample()) for _ in range(2)]
    gone = asyncio.create_task(history.next_sample())
    await asyncio.sleep(0)
    gone.cancel()
    await asyncio.sleep(0)
    history.take(1.0)
    assert [sample and sample.time for sample in await asyncio.gather(*waiting)] == [1.0, 1.0]
    last = asyncio.create_task(history.next_sample())
    await asyncio.sleep(0)
    service.ready = False  # the server drains
    history.take(3.0)
    assert await last is None


def test_requests_have_their_version_and_phases(server: RunningServer) -> None:
    body = {"prompt": "The newt", "max_tokens": 8, "request_id": "phases-of-it"}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=30)
    entry = next(one for one in httpx.get(f"{server.url}/admin/requests").json()["data"] if one["id"] == "phases-of-it")
    details = entry["details"]
    assert details["model"] == answer.headers["x-eft-adapter-version"]
    phases = [details[name] for name in PHASES]
    assert all(phase >= 0 for phase in phases)
    assert 0 < details["decode_ms"] < sum(phases) <= entry["milliseconds"]


async def test_the_endpoint(client: httpx.AsyncClient) -> None:
    found = (await client.get("/admin/overview")).json()
    assert (found["object"], found["model"], found["samples"]) == ("overview", "fake", [])
    for query in ("limit=0", f"limit={MAX_SAMPLES + 1}", "limit=x", "since=1"):
        answer = await client.get(f"/admin/overview?{query}")
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == query.partition("=")[0]


async def test_requests_are_listed_without_their_texts(service: FakeService) -> None:
    client = client_of(service, Settings())
    await client.post("/v1/completions", json={"prompt": "a secret", "max_tokens": 2})
    await client.post("/v1/completions", json={"prompt": "x", "max_tokens": -1})
    await client.get("/health")
    await client.get("/admin/overview")
    answer = await client.get("/admin/requests")
    refused, done = answer.json()["data"]
    assert (refused["handler"], refused["status"]) == ("/v1/completions", 400)
    assert refused["details"]["error_param"] == "max_tokens"
    assert (done["status"], done["details"]["completion_tokens"]) == (200, 2)
    assert b"secret" not in answer.content
    for _ in range(MAX_RECENT_REQUESTS + 5):
        await client.get("/version")
    assert len((await client.get("/admin/requests")).json()["data"]) == MAX_RECENT_REQUESTS


async def test_the_stream_ends_with_the_server(service: FakeService) -> None:
    from runtime.api.admin import overview

    history = history_of(service)
    head = overview.Overview(model="fake", version="1", max_model_len=8, samples=[])
    events = overview._events(history, head)
    assert (await anext(events)).startswith(b"event: overview\ndata: {")
    following = asyncio.ensure_future(anext(events))
    await asyncio.sleep(0)
    history.take(5.0)
    name, data = (await following).decode().strip().split("\n")
    assert name == "event: sample"
    assert msgspec.json.decode(data.removeprefix("data: "))["time"] == 5.0
    ending = asyncio.ensure_future(anext(events, b"end"))
    await asyncio.sleep(0)
    service.ready = False
    history.take(7.0)
    assert await ending == b"end"
