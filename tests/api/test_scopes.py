"""Scopes: every route against every kind of key. The routes come from the app's own table."""

import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from runtime.access.keys import SCOPES, StoredKey, change_keys, digest_of
from runtime.api.app import create_app
from runtime.api.http.auth import requirement
from settings.api import ServerSettings
from settings.schema import Settings
from tests.api.fakes import FakeService

pytestmark = pytest.mark.anyio

# What each route needs. A new route is added here on purpose, or the test fails.
OPEN = {"/health", "/ready", "/metrics", "/", "/page/{}"}
TRAIN = {
    ("POST", "/admin/train"), ("GET", "/admin/jobs"), ("GET", "/admin/jobs/{}"), ("GET", "/admin/jobs/{}/events"),
    ("GET", "/admin/jobs/{}/metrics"), ("GET", "/admin/jobs/{}/logs"), ("POST", "/admin/jobs/{}/cancel"),
    ("POST", "/admin/jobs/{}/rerun"), ("GET", "/admin/jobs/{}/report"),
    ("POST", "/admin/jobs/{}/pause"), ("POST", "/admin/jobs/{}/resume"), ("GET", "/admin/adapters"),
    ("GET", "/admin/adapters/{}"), ("GET", "/admin/overview"), ("GET", "/admin/status"),
    ("GET", "/admin/adapters/upload"),
    ("DELETE", "/admin/jobs/{}"), ("GET", "/admin/jobs/{}/recipe"), ("GET", "/admin/jobs/{}/files/{}"),
    ("GET", "/admin/train/schema"),
    ("POST", "/v1/fine_tuning/jobs"), ("GET", "/v1/fine_tuning/jobs"), ("GET", "/v1/fine_tuning/jobs/{}"),
    ("POST", "/v1/fine_tuning/jobs/{}/cancel"), ("POST", "/v1/fine_tuning/jobs/{}/pause"),
    ("POST", "/v1/fine_tuning/jobs/{}/resume"), ("GET", "/v1/fine_tuning/jobs/{}/events"),
    ("GET", "/v1/fine_tuning/jobs/{}/checkpoints"),
}  # fmt: skip


def routes(app: Any) -> list[tuple[str, str, Any]]:
    """(method, path with `{}` for its parameters, handler)."""
    return [
        (method, re.sub(r"{[^}]*}", "{}", route.path), handler)
        for route in app.routes
        for handler in route.route_handlers
        for method in handler.http_methods
        if method != "OPTIONS"
    ]


@pytest.fixture
def locked(tmp_path: Path) -> Any:
    """An app whose keys are `key of SCOPE`, all in the file."""
    path = tmp_path / "keys.json"
    keys = [
        StoredKey(name=scope, scopes=(scope,), sha256=digest_of(f"key of {scope}".encode()), created="2026")
        for scope in SCOPES
    ]
    change_keys(path, lambda _: keys)
    return create_app(FakeService(), Settings(server=ServerSettings(keys_file=str(path))))  # type: ignore[arg-type]


def needed(method: str, path: str) -> str:
    if path in OPEN:
        return "open"
    if (method, path) in TRAIN:
        return "train"
    changes = path.startswith("/admin") or path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")
    changes = changes or (method, path) == ("DELETE", "/v1/models/{}")
    return "admin" if changes else "inference"


def test_every_route_needs_what_the_table_says(locked: Any) -> None:
    table = {(method, path): requirement(handler) for method, path, handler in routes(locked)}
    assert table == {(method, path): needed(method, path) for method, path in table}
    assert set(TRAIN) <= table.keys()
    assert {"open", "inference", "train", "admin"} == set(table.values())


@pytest.mark.parametrize("scope", [*SCOPES, None])
async def test_every_route_with_every_key(locked: Any, scope: str | None) -> None:
    headers = {"authorization": f"Bearer key of {scope}"} if scope else {}
    transport = httpx.ASGITransport(locked, raise_app_exceptions=False)
    opened = {"open", "inference", "train", "admin"} if scope == "admin" else {"open", scope}
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", headers=headers) as client:
        for method, path, _ in routes(locked):
            answer = await client.request(method, re.sub("{}", "1", path))
            if needed(method, path) in opened:
                assert answer.status_code not in (401, 403), (method, path)
            else:
                assert answer.status_code == (403 if scope else 401), (method, path)
                assert answer.json()["error"]["message"]


async def test_a_refusal_says_what_the_key_is_for(locked: Any) -> None:
    transport = httpx.ASGITransport(locked)
    headers = {"authorization": "Bearer key of inference"}
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", headers=headers) as client:
        message = (await client.get("/admin/jobs")).json()["error"]["message"]
    assert message == "This key is for inference; here a train key is needed."


async def test_a_revoked_key_is_refused(locked: Any, tmp_path: Path) -> None:
    transport = httpx.ASGITransport(locked)
    headers = {"authorization": "Bearer key of inference"}
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", headers=headers) as client:
        assert (await client.get("/v1/models")).status_code == 200
        change_keys(tmp_path / "keys.json", lambda keys: [key for key in keys if key.name != "inference"])
        await locked.state.api.access.refresh()
        assert (await client.get("/v1/models")).status_code == 401
