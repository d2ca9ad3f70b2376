"""API keys. The routes come from the app's own table, so that a new one cannot be forgotten."""

import re
from typing import Any

import pytest

from runtime.api.app import create_app
from settings.api import ServerSettings
from settings.schema import Settings
from tests.api.conftest import client_of
from tests.api.fakes import Exchange, FakeService, settings_with

pytestmark = pytest.mark.anyio
KEYS = ("first-key", "schlüssel", "third-key")
LOCKED = settings_with("server", api_key=KEYS, admin_key=("boss",))


def routes(settings: Settings = LOCKED) -> list[tuple[str, str]]:
    """Every (method, path) that the app has registered."""
    app = create_app(FakeService(), settings)
    return [
        (method, re.sub(r"{\w+:int}", "1", re.sub(r"{\w+:(str|path)}", "fake", route.path)))
        for route in app.routes
        for handler in route.route_handlers
        for method in handler.http_methods
    ]


def test_the_table_is_not_empty() -> None:
    assert ("POST", "/v1/chat/completions") in routes()
    assert ("GET", "/docs/openapi.json") in routes()
    assert ("GET", "/v1/models/fake") in routes()


async def test_only_probes_and_the_files_of_the_page_are_open() -> None:
    client = client_of(FakeService(), LOCKED)
    opened = {path for method, path in routes() if (await client.request(method, path)).status_code not in (401, 403)}
    assert opened == {"/health", "/ready", "/metrics", "/", "/page/fake"}


async def test_metrics_can_be_closed_too() -> None:
    settings = Settings(server=ServerSettings(api_key=KEYS, public_metrics=False))
    client = client_of(FakeService(), settings)
    assert (await client.get("/metrics")).status_code == 401
    assert (await client.get("/metrics", headers={"authorization": "Bearer first-key"})).status_code == 200


@pytest.mark.parametrize("key", KEYS)
async def test_every_key_opens(key: str) -> None:
    client = client_of(FakeService(), LOCKED)
    raw = [(b"authorization", b"Bearer " + key.encode())]
    assert (await client.get("/v1/models", headers=raw)).status_code == 200


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"Bearer",
        b"Bearer ",
        b"Bearer wrong",
        b"Bearer first-ke",
        b"Bearer first-key2",
        b"Bearer FIRST-KEY",
        b"Basic first-key",
        b"first-key",
        b"Bearer \xff\xfe",
        b"Bearer \xc3\xa4\xc3\xb6",
        b"Bearer first-key third-key",
    ],
)
async def test_wrong_keys(header: bytes) -> None:
    client = client_of(FakeService(), LOCKED)
    answer = await client.get("/v1/models", headers=[(b"authorization", header)])
    assert answer.status_code == 401
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert answer.json()["error"]["code"] == "invalid_api_key"


async def test_no_key_is_told_how_to_send_one() -> None:
    error = (await client_of(FakeService(), LOCKED).get("/v1/models")).json()["error"]
    assert error["code"] == "missing_api_key"
    assert "Authorization: Bearer" in error["message"]


@pytest.mark.parametrize("path", ["//v1/models", "/v1//models", "/v1/models/", "/./v1/models", "/health/../v1/models"])
async def test_no_spelling_of_a_path_gets_around_the_guard(path: str) -> None:
    # What a server makes of /%761/models is /v1/models, so the app never sees the escape.
    exchange = Exchange(create_app(FakeService(), LOCKED), path, method="GET")
    await exchange.task
    assert exchange.status in (401, 404)


async def test_without_keys_nothing_is_asked_for() -> None:
    client = client_of(FakeService(), Settings())
    answers: dict[tuple[str, str], Any] = {}
    for method, path in routes(Settings()):
        answers[method, path] = (await client.request(method, path)).status_code
    assert 401 not in answers.values()
