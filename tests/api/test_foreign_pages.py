"""A server without keys, and the requests that browsers' pages and rebound names make: by their exact headers."""

from typing import Any

import httpx
import pytest

from runtime.api.app import create_app
from settings.api import ServerSettings
from settings.schema import Settings
from tests.api.fakes import FakeService

pytestmark = pytest.mark.anyio
URL = "/v1/completions"
BODY = b'{"prompt": "a", "max_tokens": 1}'
JSON = {"content-type": "application/json"}


def client(service: FakeService, *, to: str = "127.0.0.1:8000", **server: Any) -> httpx.AsyncClient:
    app = create_app(service, Settings(server=ServerSettings(**server)))  # type: ignore[arg-type]
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url=f"http://{to}")


# What Chromium sends for fetch(url, {method: "POST", mode: "no-cors", body}) and for forms.
PAGE = {"origin": "http://evil.example", "sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}
OLD_PAGE = {"origin": "http://evil.example"}
SAME_MACHINE = {"origin": "http://localhost:3000", "sec-fetch-site": "same-site", "sec-fetch-mode": "no-cors"}
FILE_PAGE = {"origin": "null", "sec-fetch-site": "cross-site"}


@pytest.mark.parametrize("page", [PAGE, OLD_PAGE, SAME_MACHINE, FILE_PAGE])
@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"content-type": "text/plain;charset=UTF-8"},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "multipart/form-data; boundary=X"},
        JSON,
    ],
)
async def test_a_page_computes_nothing(service: FakeService, page: dict[str, str], kind: dict[str, str]) -> None:
    answer = await client(service).post(URL, content=BODY, headers={**page, **kind})
    assert answer.status_code in (403, 415)
    assert service.submitted == []


@pytest.mark.parametrize("page", [PAGE, OLD_PAGE, SAME_MACHINE, FILE_PAGE])
@pytest.mark.parametrize("path", ["/admin/train", "/admin/cache/reset", "/v1/load_lora_adapter"])
async def test_a_page_changes_nothing(service: FakeService, page: dict[str, str], path: str) -> None:
    for kind in ({}, {"content-type": "text/plain"}, {"content-type": "multipart/form-data; boundary=X"}):
        answer = await client(service).post(path, content=b"name: pwned\n", headers={**page, **kind})
        assert answer.status_code == 403


@pytest.mark.parametrize("path", ["/v1/models", "/version", "/load", "/docs", "/docs/openapi.json", "/ping"])
async def test_a_rebound_name_reads_nothing(service: FakeService, path: str) -> None:
    """To the browser this is the page's own origin, so only the name tells."""
    rebound = {"sec-fetch-site": "same-origin", "sec-fetch-mode": "cors"}
    answer = await client(service, to="evil.example:8000").get(path, headers=rebound)
    assert answer.status_code == 403
    assert answer.json()["error"]["code"] == "host_not_allowed"
    assert "server.allowed_hosts" in answer.json()["error"]["message"]


async def test_a_rebound_name_computes_nothing(service: FakeService) -> None:
    headers = {**JSON, "origin": "http://evil.example:8000", "sec-fetch-site": "same-origin"}
    answer = await client(service, to="evil.example:8000").post(URL, content=BODY, headers=headers)
    assert answer.status_code == 403
    assert service.submitted == []


@pytest.mark.parametrize("to", ["127.0.0.1:8000", "localhost:8000", "[::1]:8000", "localhost:9000", "127.0.0.1"])
async def test_this_machines_clients_go_on_as_before(service: FakeService, to: str) -> None:
    """Another port too: what `ssh -L` and containers make of it."""
    assert (await client(service, to=to).post(URL, content=BODY, headers=JSON)).status_code == 200


async def test_the_own_page_and_a_development_server_may(service: FakeService) -> None:
    own = {**JSON, "origin": "http://127.0.0.1:8000", "sec-fetch-site": "same-origin"}
    assert (await client(service).post(URL, content=BODY, headers=own)).status_code == 200
    behind_vite = {**JSON, "origin": "http://localhost:3000", "sec-fetch-site": "same-origin"}
    assert (await client(service).post(URL, content=BODY, headers=behind_vite)).status_code == 200


async def test_no_host_is_no_browser(service: FakeService) -> None:
    from tests.api.fakes import Exchange

    exchange = Exchange(create_app(service, Settings()), URL, BODY)  # type: ignore[arg-type]
    await exchange.task
    assert exchange.status == 200


async def test_on_the_network_addresses_and_allowed_names(service: FakeService) -> None:
    for to in ("192.168.1.10:8000", "localhost:8000", "eft:8000"):
        open_to_all = client(service, to=to, host="0.0.0.0", allowed_hosts=("eft:8000",))
        assert (await open_to_all.post(URL, content=BODY, headers=JSON)).status_code == 200
    for to in ("eft:8001", "evil.example:8000"):
        open_to_all = client(service, to=to, host="0.0.0.0", allowed_hosts=("eft:8000",))
        assert (await open_to_all.post(URL, content=BODY, headers=JSON)).status_code == 403


async def test_probes_answer_to_any_name(service: FakeService) -> None:
    """Orchestrators ask by whatever name they have, and there is nothing to read but the state."""
    for path in ("/health", "/ready", "/metrics"):
        assert (await client(service, to="10.0.0.7:8000").get(path)).status_code == 200


async def test_with_keys_any_name_will_do(service: FakeService) -> None:
    """A page has no key, and a proxy has names of its own."""
    headers = {**JSON, "authorization": "Bearer k", "origin": "https://app.example"}
    answer = await client(service, to="models.example", api_key=("k",)).post(URL, content=BODY, headers=headers)
    assert answer.status_code == 200
    assert (await client(service, to="models.example", api_key=("k",)).post(URL, content=BODY)).status_code == 401
