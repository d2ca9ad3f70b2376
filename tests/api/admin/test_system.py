"""GET /admin/system: settings with their origins, keys without secrets, facts of the machine and the process."""

import os
from pathlib import Path
from typing import Any

import httpx
import msgspec
import psutil
import pytest

from runtime.access.keys import StoredKey, change_keys, digest_of
from runtime.api.app import create_app
from runtime.api.handle import ServiceHandle
from settings.api import ServerSettings
from settings.load import load
from settings.schema import Settings
from tests.api.conftest import client_of
from tests.api.fakes import FakeService

pytestmark = pytest.mark.anyio

ADMIN = "sk-admin-of-the-test"


async def system(app: Any, **headers: str) -> httpx.Response:
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", headers=headers) as client:
        return await client.get("/admin/system")


async def test_facts(client: httpx.AsyncClient, service: FakeService) -> None:
    found = (await client.get("/admin/system")).json()
    assert (found["object"], found["health"]) == ("system", "ready")
    assert found["model"]["kernels"] == "reference"
    assert found["process"]["pid"] == os.getpid()
    assert found["process"]["started"] == pytest.approx(psutil.Process().create_time())
    assert found["machine"]["memory_total"] == psutil.virtual_memory().total
    assert {"python", "msgspec", "litestar"} <= found["versions"].keys()
    service.ready = False
    assert (await client.get("/admin/system")).json()["health"] == "draining"
    service.healthy = False
    assert (await client.get("/admin/system")).json()["health"] == "unhealthy"
    assert (await client.get("/admin/system?x=1")).status_code == 400


async def test_it_answers_while_the_model_loads() -> None:
    found = (await system(create_app(ServiceHandle(), Settings()))).json()
    assert (found["health"], found["model"]) == ("loading", None)


async def test_settings_say_where_they_came_from(service: FakeService, tmp_path: Path) -> None:
    file = tmp_path / "eft.toml"
    file.write_text("[scheduler]\nmax_running = 3\n")
    loaded = load(flags={"port": "0"}, env={"EFT_MODEL_THREADS": "1"}, file=file)
    found = (await system(create_app(service, loaded.settings, origins=loaded.origins))).json()["settings"]  # type: ignore[arg-type]
    settings = {one["key"]: (one["value"], one["origin"]) for one in found}
    assert settings["server.port"] == ("0", "flag --port")
    assert settings["model.threads"] == ("1", "environment EFT_MODEL_THREADS")
    assert settings["scheduler.max_running"] == ("3", f"file {file}")
    assert settings["server.host"][1] == "default"
    assert all(one["doc"] for one in found)
    assert settings.keys() == loaded.origins.keys()


async def test_without_origins_a_changed_setting_is_not_called_a_default(service: FakeService) -> None:
    answer = await client_of(service, Settings(server=ServerSettings(max_body=12345))).get("/admin/system")
    origins = {one["key"]: one["origin"] for one in answer.json()["settings"]}
    assert origins["server.max_body"] == "this program"
    assert origins["server.port"] == "default"


async def test_keys_have_names_scopes_and_limits_only(service: FakeService, tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    stored = StoredKey(name="shop", scopes=("inference",), sha256=digest_of(b"sk-shop"), created="2026")
    stored = msgspec.convert({**msgspec.to_builtins(stored), "limits": {"requests_per_minute": 60}}, StoredKey)
    change_keys(file, lambda keys: [*keys, stored])
    app = create_app(service, Settings(server=ServerSettings(keys_file=str(file), admin_key=(ADMIN,))))  # type: ignore[arg-type]
    answer = await system(app, authorization=f"Bearer {ADMIN}")
    found = answer.json()
    assert found["asks_for_keys"] is True
    keys = {key["name"]: key for key in found["keys"]}
    assert keys["shop"] == {"name": "shop", "scopes": ["inference"], "limits": {"requests_per_minute": 60}}
    assert {tuple(key["scopes"]) for key in found["keys"]} == {("inference",), ("admin",)}
    for secret in (ADMIN, digest_of(ADMIN.encode()), "sk-shop", digest_of(b"sk-shop")):
        assert secret not in answer.text
    assert (await system(app, authorization="Bearer sk-shop")).status_code == 403
