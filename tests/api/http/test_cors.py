"""CORS: the pages of `server.cors_origins` may use the API, and never what changes the server."""

from typing import Any

import httpx
import pytest

from runtime.api.app import create_app
from settings.api import ServerSettings
from settings.schema import Settings
from tests.api.fakes import FakeService

pytestmark = pytest.mark.anyio
APP = "https://app.example"
URL = "/v1/chat/completions"
CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
PREFLIGHT = {
    "origin": APP,
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type,x-stainless-lang,x-stainless-retry-count",
}


def client(service: FakeService, *origins: str, **server: Any) -> httpx.AsyncClient:
    app = create_app(service, Settings(server=ServerSettings(cors_origins=origins, **server)))  # type: ignore[arg-type]
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000")


def cors(answer: httpx.Response) -> dict[str, str]:
    return {name: value for name, value in answer.headers.items() if name.startswith("access-control")}


async def test_none_by_default(service: FakeService) -> None:
    asked = await client(service).options(URL, headers=PREFLIGHT)
    assert cors(asked) == {}
    assert cors(await client(service).get("/v1/models", headers={"origin": APP})) == {}


@pytest.mark.parametrize("keys", [(), ("k",)])
async def test_a_preflight(service: FakeService, keys: tuple[str, ...]) -> None:
    """It carries no key, also where one is needed."""
    answer = await client(service, APP, api_key=keys).options(URL, headers=PREFLIGHT)
    assert answer.status_code == 204
    assert answer.content == b""
    assert cors(answer) == {
        "access-control-allow-origin": APP,
        "access-control-allow-methods": "GET, POST",
        "access-control-allow-headers": PREFLIGHT["access-control-request-headers"],
        "access-control-max-age": "600",
    }
    assert answer.headers["vary"] == "Origin"


@pytest.mark.parametrize("keys", [(), ("k",)])
async def test_an_answer_can_be_read(service: FakeService, keys: tuple[str, ...]) -> None:
    headers = {"origin": APP, "sec-fetch-site": "cross-site", "authorization": "Bearer k"}
    answer = await client(service, APP, api_key=keys).post(URL, json=CHAT, headers=headers)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == APP
    assert answer.headers["vary"] == "Origin"
    exposed = answer.headers["access-control-expose-headers"].lower().split(", ")
    assert {"x-request-id", "retry-after", "x-ratelimit-remaining-requests", "x-eft-adapter-version"} <= set(exposed)
    assert "access-control-allow-credentials" not in answer.headers


async def test_errors_can_be_read_too(service: FakeService) -> None:
    answer = await client(service, APP, api_key=("k",)).post(URL, json=CHAT, headers={"origin": APP})
    assert answer.status_code == 401
    assert answer.headers["access-control-allow-origin"] == APP
    bad = await client(service, APP).post(
        URL, content=b"{", headers={"origin": APP, "content-type": "application/json"}
    )
    assert bad.status_code == 400
    assert bad.headers["access-control-allow-origin"] == APP


async def test_a_stream_can_be_read(service: FakeService) -> None:
    answer = await client(service, APP).post(URL, json={**CHAT, "stream": True}, headers={"origin": APP})
    assert answer.headers["access-control-allow-origin"] == APP
    assert answer.text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize(
    "origin",
    ["https://app.example.evil", "https://evil.example", "http://app.example", "https://app.example:444", "null", "",
     "https://app.example/", "https://APP.example.", "https://sub.app.example"],
)  # fmt: skip
async def test_other_origins_may_not(service: FakeService, origin: str) -> None:
    http = client(service, APP)
    assert cors(await http.options(URL, headers={**PREFLIGHT, "origin": origin})) == {}
    assert (await http.post(URL, json=CHAT, headers={"origin": origin})).status_code == 403
    assert service.submitted == []


@pytest.mark.parametrize("origins", [(APP,), ("*",)])
@pytest.mark.parametrize(
    "path",
    ["/admin/train", "//admin/train", "/admin/train/", "/admin/jobs", "/admin/adapters/a", "/v1/load_lora_adapter",
     "/admin/cache/reset", "/nowhere"],
)  # fmt: skip
async def test_what_changes_the_server_is_no_pages_business(
    service: FakeService, origins: tuple[str, ...], path: str
) -> None:
    """Not with a key either."""
    for keys in ({}, {"api_key": ("k",), "admin_key": ("boss",)}):
        http = client(service, *origins, **keys)
        for method in ("GET", "POST", "DELETE"):
            headers = {**PREFLIGHT, "access-control-request-method": method}
            assert cors(await http.options(f"http://127.0.0.1:8000{path}", headers=headers)) == {}
        headers = {"origin": APP, "authorization": "Bearer boss"}
        assert cors(await http.get(f"http://127.0.0.1:8000{path}", headers=headers)) == {}


async def test_any_origin(service: FakeService) -> None:
    answer = await client(service, "*").post(URL, json=CHAT, headers={"origin": "null"})
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "*"
    asked = await client(service, "*").options("/v1/models/x", headers={**PREFLIGHT, "origin": "https://x.example"})
    assert asked.headers["access-control-allow-methods"] == "GET"
    deleted = await client(service, "*").delete("/v1/models/x", headers={"origin": "https://x.example"})
    assert cors(deleted) == {}


async def test_no_header_of_a_request_gets_into_an_answer(service: FakeService) -> None:
    for names in ("a b", "x-\xe9", "a" * 5000, ",", "a,,b", "x:y"):
        raw = [(b"origin", APP.encode()), (b"access-control-request-method", b"POST"),
               (b"access-control-request-headers", names.encode("latin-1"))]  # fmt: skip
        answer = await client(service, APP).options(URL, headers=raw)
        assert "access-control-allow-headers" not in answer.headers


async def test_a_rebound_name_gets_no_preflight(service: FakeService) -> None:
    answer = await client(service, APP).options(URL, headers={**PREFLIGHT, "host": "evil.example"})
    assert answer.status_code == 403
    assert "access-control-allow-methods" not in answer.headers


async def test_ordinary_requests_are_untouched(service: FakeService) -> None:
    answer = await client(service, APP).post(URL, json=CHAT)
    assert cors(answer) == {}
    options = await client(service, APP).options(URL, headers={"origin": APP})
    assert options.status_code == 204
    assert "POST" in options.headers["allow"]
