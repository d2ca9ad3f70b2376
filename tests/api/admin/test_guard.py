"""Who may change the server: holders of an admin key or of the token, and without any key, this machine only."""

import json
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from litestar import Litestar, get, post

from runtime.access import Access
from runtime.api.handle import ServiceHandle
from runtime.api.http.auth import ADMIN, TRAIN, KeyGuard
from runtime.api.http.errors import handle_exception
from runtime.api.http.observe import Observer
from settings.api import ServerSettings
from settings.schema import ObservabilitySettings, Settings

pytestmark = pytest.mark.anyio
TOKEN = "eft-admin-8000-token"


@get("/admin/x", opt={ADMIN: True})
async def admin() -> str:
    return "admin"


@post("/admin/x", opt={ADMIN: True}, status_code=200)
async def change() -> str:
    return "changed"


@get("/admin/train", opt={TRAIN: True})
async def training() -> str:
    return "train"


@get("/v1/x")
async def plain() -> str:
    return "plain"


class ASGI10:
    """A transport that says HTTP/1.0, as nginx does to its upstreams by default."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self._app({**scope, "http_version": "1.0"}, receive, send)


def client(*, address: str = "127.0.0.1", to: str = "127.0.0.1:8000", old: bool = False, **server: Any) -> Any:
    access = Access(Settings(server=ServerSettings(**server)))
    access.ring.set_token(TOKEN)
    app = Litestar(
        [admin, change, training, plain],
        guards=[KeyGuard(access)],
        exception_handlers={Exception: handle_exception},
    )
    app.asgi_handler = Observer(app.asgi_handler, ServiceHandle(), lambda: ObservabilitySettings(log_requests=False))
    transport = httpx.ASGITransport(ASGI10(app) if old else app, client=(address, 1), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url=f"http://{to}")


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


# -- without any key -------------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "::ffff:127.0.0.1", "0:0:0:0:0:0:0:1"])
@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost:8000", "LOCALHOST:8000", "[::1]:8000", "localhost"])
async def test_this_machine_may(address: str, host: str) -> None:
    assert (await client(address=address, to=host).get("/admin/x")).text == "admin"
    assert (await client(address=address, to=host).post("/admin/x")).text == "changed"


OTHERS = [
    "10.0.0.1", "192.168.1.5", "::ffff:10.0.0.1", "fe80::1", "127.0.0.2", "127.0.0.6", "127.8.8.8", "::ffff:127.0.0.6",
    "0.0.0.0", "::", "", "localhost", "2130706433",
]  # fmt: skip


@pytest.mark.parametrize("address", OTHERS)
async def test_other_addresses_may_not(address: str) -> None:
    """127.0.0.6 is Istio's sidecar, which connects on behalf of the whole network."""
    response = await client(address=address).get("/admin/x")
    assert response.status_code == 403
    error = response.json()["error"]
    assert error["code"] == "forbidden"
    assert "server.admin_key" in error["message"]
    assert "admin-token" in error["message"]


@pytest.mark.parametrize(
    "headers",
    [
        {"x-forwarded-for": "203.0.113.9"},
        {"X-Forwarded-Proto": "https"},
        {"x-forwarded-anything": ""},
        {"forwarded": "for=203.0.113.9"},
        {"via": "1.1 nginx"},
        {"x-real-ip": "127.0.0.1"},
        {"cf-connecting-ip": "203.0.113.9"},
        {"x-envoy-external-address": "203.0.113.9"},
        {"x-original-host": "models.example"},
        {"true-client-ip": "203.0.113.9"},
        {"X_Forwarded_For": "203.0.113.9"},
        {"cdn-loop": "cloudflare"},
        {"tailscale-user-login": "eve@example.com"},
    ],
)
async def test_what_a_proxy_brings_may_not(headers: dict[str, str]) -> None:
    assert (await client().get("/admin/x", headers=headers)).status_code == 403


async def test_http_1_0_may_not() -> None:
    assert (await client(old=True).get("/admin/x")).status_code == 403


@pytest.mark.parametrize(
    "host",
    [
        "evil.example", "127.0.0.1.evil.example:8000", "localhost.evil.example:8000", "127.0.0.1:8001", "127.0.0.1",
        "localhost:80", "0.0.0.0:8000", "127.0.0.6:8000", "[::2]:8000", "user@127.0.0.1:8000", "127.0.0.1:8000:8000",
        "127.0.0.1:", "127.0.0.1:99999999", "", " ", "[::1", "127.1:8000", "0x7f.0.0.1:8000", "127.0.0.1:8000, evil",
        "127.0.0.1:8000/", "a b<c>",
    ],
)  # fmt: skip
async def test_a_foreign_host_may_not(host: str) -> None:
    """What a browser sends after DNS rebinding, what a proxy passes on, and what is no host at all."""
    assert (await client().get("/admin/x", headers={"host": host})).status_code in (400, 403)


@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.example", "null", "http://[", "http://", "", "://", "http://127.0.0.1", "http://127.0.0.1:3000",
        "http://localhost:8000", "https://127.0.0.1:8000", "http://127.0.0.1:8000/", "http://127.0.0.1:8000.evil",
        "http://user@127.0.0.1:8000", "http://127.0.0.1:99999", "file://", "chrome-extension://abc", "\xff",
        "http://127.0.0.1:8000, http://127.0.0.1:8000",
    ],
)  # fmt: skip
async def test_a_foreign_or_malformed_origin_may_not(origin: str) -> None:
    for method in ("GET", "POST"):
        response = await client().request(method, "/admin/x", headers=[(b"origin", origin.encode("latin-1"))])
        assert response.status_code == 403
        assert response.json()["error"]["type"] == "permission_error"


@given(origin=st.binary(max_size=40), host=st.binary(max_size=40))
def test_no_header_is_a_server_error(origin: bytes, host: bytes) -> None:
    """Of the parsing alone: what h11 lets through is less."""
    from runtime.access.hosts import Arrival, is_cross_origin, not_local

    headers = [("origin", origin.decode("latin-1")), ("host", host.decode("latin-1"))]
    arrival = Arrival(peer="127.0.0.1", port=8000, http_version="1.1", headers=headers)
    assert not_local(arrival, "127.0.0.1") is not None
    is_cross_origin(arrival, frozenset())


async def test_two_hosts_or_origins_may_not() -> None:
    twice = [("host", "127.0.0.1:8000"), ("host", "127.0.0.1:8000")]
    assert (await client().get("/admin/x", headers=twice)).status_code in (400, 403)
    twice = [("origin", "http://127.0.0.1:8000"), ("origin", "http://127.0.0.1:8000")]
    assert (await client().get("/admin/x", headers=twice)).status_code == 403


@pytest.mark.parametrize(("site", "status"), [("cross-site", 403), ("same-site", 403), ("x", 403), ("", 403)])
async def test_a_page_of_another_site_may_not(site: str, status: int) -> None:
    headers = {"sec-fetch-site": site, "sec-fetch-mode": "no-cors"}
    assert (await client().post("/admin/x", headers=headers)).status_code == status


async def test_the_own_page_may() -> None:
    for headers in (
        {"origin": "http://127.0.0.1:8000"},
        {"origin": "HTTP://127.0.0.1:8000", "sec-fetch-site": "same-origin"},
        {"sec-fetch-site": "none"},  # typed into the address bar
    ):
        assert (await client().get("/admin/x", headers=headers)).status_code == 200


async def test_a_wrong_key_takes_nothing_away_from_this_machine() -> None:
    """OpenAI's clients send some key always."""
    assert (await client().get("/admin/x", headers=bearer("none"))).status_code == 200


async def test_it_can_be_closed() -> None:
    closed = client(local_admin="token")
    refused = await closed.get("/admin/x")
    assert refused.status_code == 403
    assert "admin-token" in refused.json()["error"]["message"]
    assert (await closed.get("/admin/x", headers=bearer(TOKEN))).status_code == 200


# -- as soon as there is a key, or the network -------------------------------------------------------


@pytest.mark.parametrize(
    "server",
    [
        {"api_key": ("inference",)},
        {"host": "0.0.0.0"},
        {"host": "::"},
        {"host": "192.168.1.5"},
        {"host": "models.example"},
        {"host": "0.0.0.0", "api_key": ("inference",)},
    ],
)
async def test_being_on_this_machine_is_not_enough(server: dict[str, Any]) -> None:
    for path in ("/admin/x", "//admin/x", "/%61dmin/x", "/admin/x/", "/admin/train"):
        refused = await client(**server).get(f"http://127.0.0.1:8000{path}")
        assert refused.status_code == 403
        error = refused.json()["error"]
        assert error["code"] == "admin_key_required"
        assert "server.admin_key" in error["message"]
        opened = await client(**server).get(f"http://127.0.0.1:8000{path}", headers=bearer(TOKEN))
        assert opened.status_code == 200
    wrong = await client(**server).get("/admin/x", headers=bearer("wrong"))
    assert wrong.status_code == 403


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        (bearer("inference"), 403),
        (bearer("wrong"), 401),
        (bearer("boss"), 200),
        (bearer("bos"), 401),
        (bearer(TOKEN), 200),
        (bearer(TOKEN[:-1]), 401),
    ],
)
async def test_with_an_admin_key_only_that_opens(headers: dict[str, Any], status: int) -> None:
    locked = client(api_key=("inference",), admin_key=("boss",), address="10.0.0.1", to="models.example")
    for path in ("/admin/x", "//admin/x", "/%61dmin/x", "/admin/x/"):  # absolute: a client takes // for a host
        assert (await locked.get(f"http://models.example{path}", headers=headers)).status_code == status


async def test_a_key_is_believed_wherever_it_comes_from() -> None:
    """It is the proof; what comes with it is what proxies and pages add."""
    headers = {**bearer("boss"), "x-forwarded-for": "203.0.113.9", "origin": "https://ops.example"}
    assert (await client(admin_key=("boss",), to="models.example").get("/admin/x", headers=headers)).status_code == 200


async def test_an_admin_key_also_opens_inference() -> None:
    locked = client(api_key=("inference",), admin_key=("boss",))
    assert (await locked.get("/v1/x", headers=bearer("boss"))).status_code == 200
    assert (await locked.get("/v1/x", headers=bearer(TOKEN))).status_code == 200
    assert (await locked.get("/v1/x", headers=bearer("other"))).status_code == 401


async def test_an_admin_key_alone_leaves_inference_open() -> None:
    assert (await client(admin_key=("boss",)).get("/v1/x")).status_code == 200


async def test_refusals_name_no_path(tmp_path: Any) -> None:
    refused = await client(api_key=("k",)).get("/admin/x")
    assert str(tmp_path.parent) not in json.dumps(refused.json())
    assert "/admin-token" not in refused.text
