"""Every route under /admin asks for an admin key: generated from the route table."""

import re
from typing import Any

import httpx
import pytest

from runtime.api.app import create_app
from runtime.api.http.auth import requirement
from settings.api import ServerSettings
from settings.schema import Settings
from tests.api.fakes import FakeService

pytestmark = pytest.mark.anyio

SETTINGS = Settings(server=ServerSettings(api_key=("inference",), admin_key=("boss",)))


def admin_routes() -> list[tuple[str, str, Any]]:
    return [
        (method, re.sub(r"\{\w+:\w+\}", "1", route.path), handler)
        for route in create_app(FakeService(), SETTINGS).routes
        for handler in route.route_handlers
        for method in handler.http_methods
        if route.path.startswith("/admin") and method != "OPTIONS"
    ]


def test_there_are_some() -> None:
    paths = {(method, path) for method, path, _ in admin_routes()}
    assert {("POST", "/admin/train"), ("GET", "/admin/jobs"), ("POST", "/admin/jobs/1/cancel")} <= paths


def test_each_asks_for_the_scope_train_or_admin() -> None:
    assert all(requirement(handler) in ("train", "admin") for _, _, handler in admin_routes())


@pytest.mark.parametrize(("key", "status"), [(None, 401), ("inference", 403), ("bos", 401), ("boss", None)])
async def test_each_asks_for_the_admin_key(key: str | None, status: int | None) -> None:
    transport = httpx.ASGITransport(create_app(FakeService(), SETTINGS))
    headers = {"authorization": f"Bearer {key}"} if key else {}
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", headers=headers) as client:
        for method, path, _ in admin_routes():
            for spelling in (path, path + "/"):
                answered = (await client.request(method, spelling)).status_code
                assert answered == status if status else answered not in (401, 403), (method, spelling)


async def test_without_an_admin_key_only_this_machine_may() -> None:
    transport = httpx.ASGITransport(create_app(FakeService(), Settings()), client=("10.0.0.1", 1))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
        for method, path, _ in admin_routes():
            assert (await client.request(method, path)).status_code == 403
