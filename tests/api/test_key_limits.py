"""Limits of keys over HTTP: OpenAI's headers, 429 with Retry-After, and what moves a limiter and what does not."""

import asyncio
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from runtime.access.keys import OwnLimits, StoredKey, change_keys, digest_of
from runtime.api.app import create_app
from settings.api import ServerSettings
from settings.schema import CacheSettings, SchedulerSettings, Settings
from tests.api.conftest import RunningServer, tiny_settings
from tests.api.fakes import Exchange, FakeService
from tests.waiting import until

pytestmark = pytest.mark.anyio
URL = "/v1/completions"


def app_of(service: FakeService, *, keys: tuple[str, ...] = ("a", "b"), cache: Any = None, **limits: Any) -> Any:
    settings = Settings(
        server=ServerSettings(api_key=keys, **{f"key_{name}": value for name, value in limits.items()}),
        scheduler=SchedulerSettings(max_waiting=10, max_running=4),
        cache=cache or CacheSettings(),
    )
    return create_app(service, settings)  # type: ignore[arg-type]


def client(app: Any, key: str = "a", **headers: str) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    headers = {"authorization": f"Bearer {key}", **headers}
    return httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000", headers=headers)


def rates(answer: httpx.Response) -> dict[str, str]:
    return {name: value for name, value in answer.headers.items() if name.startswith("x-ratelimit")}


async def test_no_limits_no_headers(service: FakeService) -> None:
    app = app_of(service)
    for _ in range(20):
        answer = await client(app).post(URL, json={"prompt": "abc", "max_tokens": 2})
        assert answer.status_code == 200
        assert rates(answer) == {}


async def test_requests_a_minute(service: FakeService) -> None:
    app = app_of(service, requests_per_minute=3)
    for left in ("2", "1", "0"):
        answer = await client(app).post(URL, json={"prompt": "abc", "max_tokens": 2})
        assert answer.status_code == 200
        assert answer.headers["x-ratelimit-limit-requests"] == "3"
        assert answer.headers["x-ratelimit-remaining-requests"] == left
    refused = await client(app).post(URL, json={"prompt": "abc", "max_tokens": 2})
    assert refused.status_code == 429
    assert 1 <= int(refused.headers["retry-after"]) <= 20
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    assert refused.headers["x-ratelimit-reset-requests"].endswith("s")
    error = refused.json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    assert "3 requests a minute" in error["message"]
    metrics = (await client(app).get("/metrics")).text
    assert 'eft:admission_rejections_total{model_name="fake",reason="rate_limit_exceeded"} 1.0' in metrics
    assert (await client(app, "b").post(URL, json={"prompt": "a", "max_tokens": 1})).status_code == 200
    assert (await client(app).get("/v1/models")).status_code == 200  # what costs nothing is not counted


async def test_bad_requests_count_as_well(service: FakeService) -> None:
    app = app_of(service, requests_per_minute=2)
    assert [(await client(app).post(URL, json={})).status_code for _ in range(3)] == [400, 400, 429]


async def test_wrong_keys_use_nothing_and_leave_nothing(service: FakeService) -> None:
    app = app_of(service, requests_per_minute=2)
    for number in range(50):
        assert (await client(app, f"wrong-{number}").post(URL, json={})).status_code == 401
    assert len(app.state.api.access.limiter) == 0


@pytest.mark.parametrize("header", ["x-forwarded-for", "x-real-ip", "forwarded", "x-request-id", "user-agent", "host"])
async def test_no_header_moves_the_limiter(service: FakeService, header: str) -> None:
    """Without keys all clients are one: an address that a client can choose is no identity."""
    app = app_of(service, keys=(), requests_per_minute=3)
    statuses = []
    for number in range(6):
        value = f"127.0.0.{number + 1}" if header != "forwarded" else f"for=127.0.0.{number + 1}"
        answer = await client(app, f"key-{number}", **{header: value}).post(URL, json={"prompt": "a", "max_tokens": 1})
        statuses.append(answer.status_code)
    assert statuses == [200, 200, 200, 429, 429, 429]
    assert len(app.state.api.access.limiter) == 1


async def test_tokens_a_minute(service: FakeService) -> None:
    app = app_of(service, tokens_per_minute=100)
    answer = await client(app).post(URL, json={"prompt": "x" * 40, "max_tokens": 10})
    assert answer.json()["usage"]["total_tokens"] == 50
    assert answer.headers["x-ratelimit-limit-tokens"] == "100"
    assert 50 <= int(answer.headers["x-ratelimit-remaining-tokens"]) <= 51
    refused = await client(app).post(URL, json={"prompt": "x" * 40, "max_tokens": 30})
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1
    assert "tokens a minute" in refused.json()["error"]["message"]
    assert len(service.submitted) == 1
    assert (await client(app).post(URL, json={"prompt": "x" * 40, "max_tokens": 5})).status_code == 200


async def test_every_choice_counts_and_a_prompt_once(service: FakeService) -> None:
    app = app_of(service, tokens_per_minute=150)
    answer = await client(app).post(URL, json={"prompt": "x" * 40, "max_tokens": 10, "n": 4})
    assert answer.json()["usage"]["total_tokens"] == 80
    assert 70 <= int(answer.headers["x-ratelimit-remaining-tokens"]) <= 71
    refused = await client(app).post(URL, json={"prompt": ["x" * 30, "y" * 30], "max_tokens": 10, "n": 2})
    assert refused.status_code == 429  # 60 and 40


async def test_a_client_that_leaves_pays_for_what_was_computed(service: FakeService) -> None:
    app = app_of(service, tokens_per_minute=1000)
    service.stall_after = 5
    body = {"prompt": "x" * 20, "max_tokens": 100, "stream": True}
    exchange = Exchange(app, URL, body, headers={"authorization": "Bearer a"})
    await until(lambda: len(exchange.sent) > 5)
    exchange.leave()
    await exchange.task
    service.stall_after = None
    answer = await client(app).post("/tokenize", json={"prompt": "a"})
    assert 970 <= int(answer.headers["x-ratelimit-remaining-tokens"]) <= 976


async def test_what_the_engine_refuses_is_given_back(service: FakeService) -> None:
    from runtime.errors import EngineUnavailable

    app = app_of(service, tokens_per_minute=1000)
    service.reject = lambda submission: EngineUnavailable("no")
    refused = await client(app).post(URL, json={"prompt": "x" * 20, "max_tokens": 100})
    assert refused.status_code == 503
    assert (await client(app).post("/tokenize", json={"prompt": "a"})).headers["x-ratelimit-remaining-tokens"] == "1000"


async def test_requests_at_once(service: FakeService) -> None:
    app = app_of(service, max_concurrent=2)
    service.stall_after = 1
    headers = {"authorization": "Bearer a"}
    held = [Exchange(app, URL, {"prompt": "abc", "stream": True}, headers=headers) for _ in range(2)]
    await until(lambda: all(len(exchange.sent) > 1 for exchange in held))
    refused = await client(app).post(URL, json={"prompt": "a", "max_tokens": 1})
    assert refused.status_code == 429
    assert refused.headers["retry-after"] == "1"
    assert (await client(app, "b").post("/tokenize", json={"prompt": "a"})).status_code == 200
    held[0].leave()
    await held[0].task
    assert (await client(app).post("/tokenize", json={"prompt": "a"})).status_code == 200
    held[1].leave()
    await held[1].task


async def test_share_of_the_queue(service: FakeService) -> None:
    """Of 10 that may wait one key has 5, so the other keys' requests still find room."""
    app = app_of(service, max_queue_share=0.5)
    service.num_running = 4
    service.stall_after = 0
    headers = {"authorization": "Bearer a"}
    held = Exchange(app, URL, {"prompt": "abc", "n": 4, "max_tokens": 5}, headers=headers)
    await until(lambda: len(service.submitted) == 4)
    refused = await client(app).post(URL, json={"prompt": "abc", "n": 2, "max_tokens": 5})
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "queue_share_full"
    assert len(service.submitted) == 4
    other = Exchange(app, URL, {"prompt": "abc", "n": 5, "max_tokens": 5}, headers={"authorization": "Bearer b"})
    await until(lambda: len(service.submitted) == 9)
    for exchange in (held, other):
        exchange.leave()
        await exchange.task
    service.stall_after = None
    assert (await client(app).post(URL, json={"prompt": "abc", "n": 5, "max_tokens": 1})).status_code == 200


async def test_urgency(service: FakeService) -> None:
    settings = Settings(
        scheduler=SchedulerSettings(policy="priority"),
        server=ServerSettings(api_key=("a",), key_min_priority=0, key_min_deadline=2.0),
    )
    http = client(create_app(service, settings))  # type: ignore[arg-type]
    for field, value in (("priority", -1), ("deadline_ms", 1999)):
        refused = await http.post(URL, json={"prompt": "a", "max_tokens": 1, field: value})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, field)
    allowed = {"prompt": "a", "max_tokens": 1, "priority": 3, "deadline_ms": 2000}
    assert (await http.post(URL, json=allowed)).status_code == 200


async def test_a_keys_own_limits_win(service: FakeService, tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    own = {"free": OwnLimits(requests_per_minute=None), "small": OwnLimits(requests_per_minute=1), "usual": OwnLimits()}
    keys = [
        StoredKey(name=name, scopes=("inference",), sha256=digest_of(name.encode()), created="2026", limits=limits)
        for name, limits in own.items()
    ]
    change_keys(path, lambda _: keys)
    settings = Settings(server=ServerSettings(keys_file=str(path), key_requests_per_minute=2))
    app = create_app(service, settings)  # type: ignore[arg-type]
    passed = {}
    for name in own:
        answers = [await client(app, name).post("/tokenize", json={"prompt": "a"}) for _ in range(4)]
        passed[name] = [answer.status_code for answer in answers].count(200)
    assert passed == {"free": 4, "small": 1, "usual": 2}


async def test_prefixes_are_kept_apart(service: FakeService) -> None:
    """What one key's prompt left in the cache is found by that key alone, whatever the other calls its salt."""
    app = app_of(service)
    for key, salt in (("a", None), ("b", None), ("a", "s"), ("b", "s"), ("a", None)):
        body = {"prompt": "secret", "max_tokens": 1} | ({"cache_salt": salt} if salt else {})
        await client(app, key).post(URL, json=body)
    salts = [submission.cache_salt for submission in service.submitted]
    assert len(set(salts)) == 4
    assert salts[0] == salts[4]
    label = service.submitted[0].tenant
    for forged in (f"{label}\0", f"{label}\0s", label, "\0"):
        await client(app, "b").post(URL, json={"prompt": "secret", "max_tokens": 1, "cache_salt": forged})
        assert service.submitted[-1].cache_salt not in salts


async def test_prefixes_can_be_shared(service: FakeService) -> None:
    app = app_of(service, cache=CacheSettings(share_prefixes=True))
    for key in ("a", "b"):
        await client(app, key).post(URL, json={"prompt": "common", "max_tokens": 1, "cache_salt": "s"})
    assert [submission.cache_salt for submission in service.submitted] == ["s", "s"]


def test_no_key_learns_what_another_sent(tiny_model: Path) -> None:
    """Over a real cache: `cached_tokens` counts what the key itself has sent, and nothing else."""
    prompt = list(range(5, 85))
    with RunningServer(tiny_settings(tiny_model, api_key=("a", "b"))) as server:

        def cached(key: str) -> int:
            body = {"prompt": prompt, "max_tokens": 1}
            headers = {"authorization": f"Bearer {key}"}
            usage = httpx.post(f"{server.url}{URL}", json=body, headers=headers, timeout=60).json()["usage"]
            return int(usage["prompt_tokens_details"]["cached_tokens"])

        assert cached("a") == 0
        assert cached("b") == 0
        assert cached("a") >= 64
        assert cached("b") >= 64


def test_the_openai_client_sees_its_limit(tiny_model: Path) -> None:
    limited = tiny_settings(tiny_model, api_key=("a",), key_requests_per_minute=2)
    with RunningServer(limited) as server:
        ask = openai.OpenAI(base_url=f"{server.url}/v1", api_key="a", max_retries=0)
        for _ in range(2):
            raw = ask.completions.with_raw_response.create(model=tiny_model.name, prompt="a", max_tokens=1)
            assert raw.headers["x-ratelimit-limit-requests"] == "2"
        with pytest.raises(openai.RateLimitError) as refused:
            ask.completions.create(model=tiny_model.name, prompt="a", max_tokens=1)
        assert refused.value.code == "rate_limit_exceeded"
        assert 1 <= int(refused.value.response.headers["retry-after"]) <= 30


async def test_use_is_given_back_however_a_request_ends(service: FakeService) -> None:
    """Aborts, failures and refusals at random: afterwards the key has everything again."""
    app = app_of(service, max_concurrent=3, max_queue_share=0.3)
    headers = {"authorization": "Bearer a"}
    for number in range(60):
        service.fail_after = 1 if number % 3 == 0 else None
        body: dict[str, Any] = {"prompt": "abc", "max_tokens": 5, "stream": number % 2 == 0, "n": 1 + number % 2}
        exchange = Exchange(app, URL, body if number % 5 else b"{", headers=headers)
        for _ in range(number % 7):
            await asyncio.sleep(0)
        exchange.leave()
        await exchange.task
    (use,) = app.state.api.access.limiter._uses.values()
    assert (use.open, use.pending) == (0, 0)
