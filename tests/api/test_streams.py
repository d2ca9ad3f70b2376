"""Every way out of a request: the client leaves, the engine fails, the reader stalls."""

import asyncio
from typing import Any

import httpx
import pytest

from runtime.api.app import create_app
from runtime.errors import EngineUnavailable
from settings.schema import Settings
from tests.api.fakes import Exchange, FakeService, events
from tests.waiting import until

pytestmark = pytest.mark.anyio
URL = "/v1/completions"


def value(service: FakeService, name: str) -> float:
    """A sample of the exposition, such as `eft:aborts_total{…}`."""
    text = service.metrics.render()[0].decode()
    return next(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name))


async def left(exchange: Exchange) -> None:
    exchange.leave()
    await asyncio.wait_for(exchange.task, 5)


@pytest.mark.parametrize("choices", [1, 3])
async def test_a_client_that_leaves_before_its_whole_answer(service: FakeService, choices: int) -> None:
    service.stall_after = 1
    exchange = Exchange(create_app(service, Settings()), URL, {"prompt": "abc", "n": choices})
    await until(lambda: len(service.submitted) == choices)
    await left(exchange)
    assert sorted(service.aborted) == sorted(submission.id for submission in service.submitted)
    assert exchange.status == 499
    assert value(service, "eft:request_params_n_count") == 1


@pytest.mark.parametrize("choices", [1, 3])
async def test_a_client_that_leaves_a_stream(service: FakeService, choices: int) -> None:
    service.stall_after = 1
    body = {"prompt": "abc", "n": choices, "stream": True}
    exchange = Exchange(create_app(service, Settings()), URL, body)
    await exchange.arrived.wait()
    assert exchange.status == 200
    await left(exchange)
    assert len(service.aborted) == choices
    assert not service.running
    assert exchange.sent[-1].get("more_body", True)  # no end was made up for nobody


async def test_a_client_that_leaves_before_the_stream_begins(service: FakeService) -> None:
    service.stall_after = 0
    exchange = Exchange(create_app(service, Settings()), URL, {"prompt": "abc", "stream": True})
    await until(lambda: service.submitted)
    await left(exchange)
    assert len(service.aborted) == 1


async def test_a_client_that_leaves_while_it_sends_its_body(service: FakeService) -> None:
    exchange = Exchange(create_app(service, Settings()), URL, b"")
    exchange._inbox.get_nowait()
    exchange._inbox.put_nowait({"type": "http.request", "body": b'{"pro', "more_body": True})
    await left(exchange)
    assert exchange.status == 499
    assert not service.submitted


async def test_a_cancelled_handler_aborts(service: FakeService) -> None:
    service.stall_after = 1
    exchange = Exchange(create_app(service, Settings()), URL, {"prompt": "abc", "stream": True})
    await exchange.arrived.wait()
    exchange.task.cancel()
    await asyncio.gather(exchange.task, return_exceptions=True)
    assert len(service.aborted) == 1


async def test_no_task_is_left_behind(service: FakeService) -> None:
    service.stall_after = 1
    app = create_app(service, Settings())
    before = asyncio.all_tasks()
    for stream in (False, True):
        for _ in range(5):
            exchange = Exchange(app, URL, {"prompt": "abc", "n": 4, "stream": stream})
            await until(lambda: service.running)
            await left(exchange)
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == before
    assert not service.running


@pytest.mark.parametrize("choices", [1, 2])
async def test_a_failure_in_a_stream_is_an_event(client: httpx.AsyncClient, service: FakeService, choices: int) -> None:
    service.fail_after = 2
    answer = await client.post(URL, json={"prompt": "abc", "n": choices, "stream": True})
    assert answer.status_code == 200
    *_, last = events(answer.text)
    assert last == {"error": {"message": "It broke.", "type": "server_error", "param": None, "code": "engine_failure"}}
    assert not service.running


@pytest.mark.parametrize("choices", [1, 2])
async def test_a_failure_before_a_whole_answer_is_a_status(
    client: httpx.AsyncClient, service: FakeService, choices: int
) -> None:
    service.fail_after = 2
    answer = await client.post(URL, json={"prompt": "abc", "n": choices})
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "engine_failure"
    assert not service.running


async def test_an_abort_by_the_server_is_an_error_event(service: FakeService) -> None:
    service.stall_after = 2
    exchange = Exchange(create_app(service, Settings()), URL, {"prompt": "abc", "stream": True})
    await exchange.arrived.wait()
    for stream in service.running.values():
        stream.fail(EngineUnavailable("The server is shutting down."))
    await asyncio.wait_for(exchange.task, 5)
    text = b"".join(message["body"] for message in exchange.sent[1:]).decode()
    assert events(text)[-1]["error"]["type"] == "service_unavailable"
    assert not exchange.sent[-1]["more_body"]


async def test_a_slow_reader_gets_everything_in_fewer_events(service: FakeService) -> None:
    body: dict[str, Any] = {"prompt": "abcdefghij", "max_tokens": 100, "stream": True}
    exchange = Exchange(create_app(service, Settings()), URL, body)
    gate = asyncio.Event()
    send = exchange._send

    async def slow(message: dict[str, Any]) -> None:
        await gate.wait()
        await send(message)

    exchange.task.cancel()
    app = create_app(service, Settings())
    exchange = Exchange(lambda scope, receive, _: app(scope, receive, slow), URL, body)
    send = exchange._send
    await until(lambda: service.submitted and not service.running)
    gate.set()
    await asyncio.wait_for(exchange.task, 5)
    chunks = events(b"".join(message["body"] for message in exchange.sent[1:]).decode())
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "abcdefghij" * 10
    assert len(chunks) < 30
