"""The server's life: loading, failing to, draining, being told twice."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import msgspec
import pytest

from runtime.api.server import serve
from settings.api import ServerSettings
from settings.schema import ModelSettings, SchedulerSettings, Settings
from tests.api.conftest import RunningServer, tiny_settings
from tests.api.fakes import events
from tests.end_to_end.process import ServerProcess

LONG = {"prompt": "The newt", "max_tokens": 500, "ignore_eos": True, "stream": True}

TRAINING = """
name: newt
adapter: lora
datasets: [{path: train.jsonl, type: completion}]
sequence_len: 64
max_steps: 4
learning_rate: 1e-4
"""

MAIN = """
import sys, msgspec, uvloop
from runtime.api.server import serve
from settings.schema import Settings
settings = msgspec.json.decode(sys.argv[1], type=Settings)
sys.exit(uvloop.run(serve(settings, on_ready=lambda url, model: print(url, flush=True))))
"""


@contextmanager
def process(settings: Settings, **env: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server in a process of its own, and its URL."""
    command = [sys.executable, "-c", MAIN, msgspec.json.encode(settings).decode()]
    root = Path(__file__).parents[2]
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=root, env={**os.environ, "PYTHONPATH": str(root), **env}
    )
    assert child.stdout is not None
    try:
        yield child, child.stdout.readline().strip()
    finally:
        child.kill()
        child.wait()
        child.stdout.close()


def slow_settings(model: Path, drain_timeout: float) -> Settings:
    return tiny_settings(model, drain_timeout=drain_timeout)


@contextmanager
def busy_stream(url: str) -> Iterator[httpx.Response]:
    """A stream that has begun and is far from its end."""
    # Many choices, so that a tiny model is at work for longer than the test needs.
    body = {**LONG, "n": 48}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
        yield answer


def test_sigterm_refuses_new_requests_and_finishes_the_running_ones(tiny_model: Path) -> None:
    with process(slow_settings(tiny_model, 60.0)) as (child, url), busy_stream(url) as answer:
        lines = answer.iter_text()
        text = next(lines)
        child.send_signal(signal.SIGTERM)
        for _ in range(100):
            if (ready := httpx.get(f"{url}/ready")).status_code == 503:
                break
            time.sleep(0.02)
        assert ready.status_code == 503
        assert httpx.get(f"{url}/health").status_code == 200
        refused = httpx.post(f"{url}/v1/completions", json={"prompt": "a"})
        assert refused.status_code == 503
        assert refused.json()["error"]["type"] == "service_unavailable"
        text += "".join(lines)
        assert "error" not in events(text)[-1]
        assert child.wait(30) == 0


def test_what_outlives_the_drain_time_gets_an_error_event(tiny_model: Path) -> None:
    with process(slow_settings(tiny_model, 0.1)) as (child, url), busy_stream(url) as answer:
        lines = answer.iter_text()
        text = next(lines)
        child.send_signal(signal.SIGTERM)
        text += "".join(lines)
        assert events(text)[-1]["error"]["type"] == "service_unavailable"
        assert child.wait(30) == 0


def test_fifty_streams_finish_or_get_an_error_event(tiny_model: Path) -> None:
    """Short ones and long ones, running and waiting, when the process is told to end."""
    settings = slow_settings(tiny_model, 1.0)
    settings = msgspec.structs.replace(settings, scheduler=SchedulerSettings(max_running=16))
    with process(settings) as (child, url):
        texts = asyncio.run(_drained(url, 50, lambda: child.send_signal(signal.SIGTERM)))
        assert child.wait(30) == 0
    last = [[one for one in events(text) if one != "[DONE]"][-1] for text in texts]
    assert all("error" in one or one["choices"][0]["finish_reason"] for one in last)
    assert all(text.endswith("data: [DONE]\n\n") for text in texts)
    failed = [one["error"] for one in last if "error" in one]
    assert all((one["type"], one["code"]) == ("service_unavailable", "engine_unavailable") for one in failed)


async def _drained(url: str, count: int, tell: Callable[[], None]) -> list[str]:
    """Texts of as many streams that were open when `tell` was called."""
    opened = asyncio.Semaphore(0)

    async def follow(client: httpx.AsyncClient, number: int) -> str:
        body = {**LONG, "max_tokens": 400 if number % 2 else 20}
        async with client.stream("POST", f"{url}/v1/completions", json=body) as answer:
            assert answer.status_code == 200
            opened.release()
            return "".join([text async for text in answer.aiter_text()])

    async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=count)) as client:
        following = [asyncio.ensure_future(follow(client, number)) for number in range(count)]
        for _ in range(count):
            await opened.acquire()
        tell()
        return await asyncio.gather(*following)


def test_a_second_signal_ends_at_once(tiny_model: Path) -> None:
    with process(slow_settings(tiny_model, 60.0)) as (child, url), busy_stream(url) as answer:
        lines = answer.iter_text()
        next(lines)
        child.send_signal(signal.SIGTERM)
        while httpx.get(f"{url}/ready").status_code == 200:
            time.sleep(0.02)
        child.send_signal(signal.SIGTERM)
        assert child.wait(10) == 0


def test_an_engine_that_always_fails_ends_the_process(tiny_model: Path) -> None:
    with process(tiny_settings(tiny_model), EFT_FAILPOINTS="worker.row=raise") as (child, url):
        answers = []
        for _ in range(10):
            try:
                answers.append(httpx.post(f"{url}/v1/completions", json={"prompt": "a"}, timeout=30).status_code)
            except httpx.TransportError:
                break
        assert set(answers) <= {500, 503}
        assert child.wait(30) == 1


def test_a_step_that_hangs_is_bad_health(tiny_model: Path) -> None:
    settings = tiny_settings(tiny_model, step_timeout=0.2)
    with process(settings, EFT_FAILPOINTS="worker.row=sleep:2") as (_, url), ThreadPoolExecutor(1) as pool:
        answer = pool.submit(httpx.post, f"{url}/v1/completions", json={"prompt": "a", "max_tokens": 1}, timeout=30)
        statuses = set()
        while not answer.done():
            statuses.add(httpx.get(f"{url}/health").status_code)
            time.sleep(0.05)
        assert 503 in statuses
        assert answer.result().status_code == 200
        assert httpx.get(f"{url}/health").status_code == 200


def test_stopping_while_idle(tiny_model: Path) -> None:
    with RunningServer(tiny_settings(tiny_model)) as server:
        with httpx.Client(base_url=server.url) as client:  # keeps a connection open
            assert client.get("/ready").status_code == 200
            server.stop()
            assert server.join() == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.url}/health")


def test_stopping_while_loading_does_not_wait(tiny_model: Path) -> None:
    async def main() -> int:
        stop = asyncio.Event()
        stop.set()
        return await serve(tiny_settings(tiny_model), stop=stop)

    assert asyncio.run(main()) == 0


def test_a_model_that_is_not_there(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    settings = Settings(model=ModelSettings(model=str(tmp_path / "nothing")), server=ServerSettings(port=0))
    assert asyncio.run(serve(settings)) == 1
    line = json.loads(capfd.readouterr().err.strip().splitlines()[-1])
    assert line["event"] == "cannot_load_model"
    assert "nothing" in line["reason"]


def test_an_address_that_is_taken(tiny_model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = tiny_settings(tiny_model, port=taken.getsockname()[1])
        assert asyncio.run(serve(settings)) == 1
    line = json.loads(capfd.readouterr().err.strip().splitlines()[-1])
    assert line["event"] == "cannot_listen"


def test_operators_are_answered_while_the_model_loads(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from runtime.engine.service import EngineService

    may_load = threading.Event()
    load = EngineService.load

    def load_later(settings: Settings) -> EngineService:
        may_load.wait(60)
        return load(settings)

    monkeypatch.setattr(EngineService, "load", load_later)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    async def main() -> None:
        stop, ready = asyncio.Event(), asyncio.Event()
        settings = tiny_settings(tiny_model, port=port)
        serving = asyncio.create_task(serve(settings, stop=stop, on_ready=lambda url, model: ready.set()))
        transport = httpx.AsyncHTTPTransport(retries=10)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", transport=transport) as client:
            assert (await client.get("/health")).status_code == 200
            assert (await client.get("/ready")).status_code == 503
            assert (await client.get("/metrics")).status_code == 200
            assert (await client.get("/v1/models")).status_code == 503
            may_load.set()
            await asyncio.wait_for(ready.wait(), 60)
            assert (await client.get("/ready")).status_code == 200
            assert (await client.get("/v1/models")).status_code == 200
        stop.set()
        assert await serving == 0

    asyncio.run(main())


@pytest.mark.parametrize("place", ["worker.row", "train.step"])
def test_a_second_signal_ends_it_whatever_hangs(tiny_model: Path, tmp_path: Path, place: str) -> None:
    """A step, or a slice of training, that would take ten minutes."""
    with ServerProcess(
        str(tiny_model), tmp_path, failpoints=f"{place}=sleep:600", drain_timeout="60s", threads=1
    ) as server:
        if place == "train.step":
            server.train(TRAINING, {"train.jsonl": b'{"text": "the newt crosses the road"}\n' * 4})

        def ask() -> None:
            with suppress(httpx.HTTPError):
                httpx.post(f"{server.url}/v1/completions", json={"prompt": "a"}, trust_env=False)

        threading.Thread(target=ask, daemon=True).start()
        time.sleep(1.0)
        os.kill(server.pid, signal.SIGTERM)
        time.sleep(0.5)
        assert server.running
        os.kill(server.pid, signal.SIGTERM)
        began = time.monotonic()
        server.wait_for_exit()
        assert time.monotonic() - began < 10  # of the 60 and the 600 that something would have liked
