"""Who may change the server: holders of an admin key, or without one, this machine only."""

from typing import Any

import httpx
import pytest
from litestar import Litestar, get

from runtime.api.auth import ADMIN, KeyGuard
from runtime.api.errors import handle_exception
from runtime.api.handle import ServiceHandle
from runtime.api.observe import Observer

pytestmark = pytest.mark.anyio


@get("/admin/x", opt={ADMIN: True})
async def admin() -> str:
    return "admin"


@get("/v1/x")
async def plain() -> str:
    return "plain"


def client(
    *,
    keys: tuple[str, ...] = (),
    admin_keys: tuple[str, ...] = (),
    address: str = "127.0.0.1",
    host: str = "127.0.0.1:8000",
) -> httpx.AsyncClient:
    app = Litestar(
        [admin, plain], guards=[KeyGuard(keys, admin_keys)], exception_handlers={Exception: handle_exception}
    )
    app.asgi_handler = Observer(app.asgi_handler, ServiceHandle(), log_requests=False)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app, client=(address, 1)), base_url=f"http://{host}")


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.mark.parametrize("address", ["127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1"])
@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost:8000", "[::1]:8000", "localhost"])
async def test_without_an_admin_key_this_machine_may(address: str, host: str) -> None:
    assert (await client(address=address, host=host).get("/admin/x")).text == "admin"


@pytest.mark.parametrize("address", ["10.0.0.1", "192.168.1.5", "::ffff:10.0.0.1", "fe80::1"])
async def test_without_an_admin_key_others_may_not(address: str) -> None:
    response = await client(address=address).get("/admin/x")
    assert response.status_code == 403
    assert response.json()["error"]["code"] == "forbidden"


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example"},
        {"host": "127.0.0.1.evil.example"},
        {"origin": "http://evil.example"},
        {"origin": "null"},
    ],
)
async def test_a_foreign_host_or_origin_may_not(headers: dict[str, str]) -> None:
    assert (await client().get("/admin/x", headers=headers)).status_code == 403


async def test_an_own_origin_may() -> None:
    assert (await client().get("/admin/x", headers={"origin": "http://localhost:8000"})).status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [({}, 401), (bearer("inference"), 403), (bearer("wrong"), 401), (bearer("boss"), 200), (bearer("bos"), 401)],
)
async def test_with_an_admin_key_only_that_opens(headers: dict[str, Any], status: int) -> None:
    locked = client(keys=("inference",), admin_keys=("boss",), address="10.0.0.1", host="models.example")
    for path in ("/admin/x", "//admin/x", "/%61dmin/x", "/admin/x/"):  # absolute: a client takes // for a host
        assert (await locked.get(f"http://models.example{path}", headers=headers)).status_code == status


async def test_an_admin_key_also_opens_inference() -> None:
    locked = client(keys=("inference",), admin_keys=("boss",))
    assert (await locked.get("/v1/x", headers=bearer("boss"))).status_code == 200
    assert (await locked.get("/v1/x", headers=bearer("other"))).status_code == 401
