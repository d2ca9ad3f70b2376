"""`eft top`, against a server that sends three samples and stops."""

import io
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from rich.console import Console

from runtime.cli.top import view
from tests.cli.conftest import Eft
from tests.cli.fake_api import FakeApi, listening


def sample(number: int, **fields: Any) -> dict[str, Any]:
    return {
        "time": 1000.0 + 2 * number,
        "running": number,
        "waiting": 1,
        "kv_cache_usage": 0.25,
        "prompt_tokens": 30.0,
        "generated_tokens": 120.4,
        "trained_tokens": 5000.0,
        "riding_tokens": 6.0,
        "training_share": 0.4,
        "first_token_p50": 0.05,
        "first_token_p95": 1.5,
        "token_p50": 0.0101,
        "token_p95": None,
        **fields,
    }


SERVER = {"model": "tiny", "version": "1.2", "samples": [sample(0)]}


def job(**fields: Any) -> dict[str, Any]:
    known = {"id": "ftjob-1", "name": "newts", "status": "running", "step": 3, "total_steps": 12, "loss": 1.25}
    return {**known, "estimated_finish": None, **fields}


class Watched(FakeApi):
    """Three samples, then the end of the stream."""

    jobs: tuple[dict[str, Any], ...] = (job(),)
    status = 200

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope.get("path") == "/admin/jobs":
            self.known["/admin/jobs"] = {"data": list(self.jobs)}
        if scope.get("path") != "/admin/overview" or self.status != 200:
            return await super().__call__(scope, receive, send)
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for name, data in (("overview", SERVER), ("sample", sample(1)), ("sample", sample(2))):
            body = f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()
            await send({"type": "http.response.body", "body": body, "more_body": True})
        return await send({"type": "http.response.body", "body": b""})


@pytest.fixture
def watched() -> Iterator[tuple[Watched, str]]:
    api = Watched()
    with listening(api) as url:
        yield api, url


def test_a_line_for_each_sample(eft: Eft, watched: tuple[Watched, str]) -> None:
    done = eft("top", "--url", watched[1], "--samples", 2)
    first, second = done.out.splitlines()
    assert (done.code, done.err) == (0, "")
    assert "running 0  waiting 1  kv 25%" in first
    assert "generated 120 tok/s" in first
    assert "riding 6 tok/s" in first
    assert "first token 50 ms/1.5 s  next token 10 ms/–" in first
    assert first.endswith("training 40%  newts 3/12")
    assert "running 1" in second


def test_json(eft: Eft, watched: tuple[Watched, str]) -> None:
    done = eft("top", "--url", watched[1], "--samples", 3, "--json")
    lines = [json.loads(line) for line in done.out.splitlines()]
    assert [line["running"] for line in lines] == [0, 1, 2]
    assert lines[0]["model"] == "tiny"
    assert lines[0]["jobs"] == [job()]


def test_a_server_that_stops_ends_it(eft: Eft, watched: tuple[Watched, str]) -> None:
    done = eft("top", "--url", watched[1])
    assert (done.code, len(done.out.splitlines())) == (1, 3)
    assert "has stopped" in done.err


def test_refusals(eft: Eft, watched: tuple[Watched, str]) -> None:
    api, url = watched
    api.status, api.key = 401, "secret"
    assert "401" in eft("top", "--url", url).err
    assert "eft serve" in eft("top", "--url", "http://127.0.0.1:9").err
    assert eft("top", "--samples", 0).code == 2


def test_the_live_view() -> None:
    jobs = [job(estimated_finish=time.time() + 100), job(name=None, status="queued", total_steps=None, loss=None)]
    console = Console(file=io.StringIO(), width=100)
    console.print(view(SERVER, sample(7), jobs))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for shown in ("tiny", "7 running, 1 waiting", "5,000 trained", "50 ms median, 1.5 s for 95 %", "40%", "newts"):
        assert shown in text
    assert "ftjob-1" in text
    assert "3/12" in text
