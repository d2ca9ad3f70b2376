"""The app with training jobs over fakes."""

from pathlib import Path
from typing import Any

import httpx

from runtime.access.keys import StoredKey, change_keys, digest_of
from runtime.api.app import create_app
from runtime.api.handle import ServiceHandle
from settings.api import ServerSettings
from settings.schema import Settings, TrainerSettings
from tests.api.fakes import FakeService
from tests.trainer.jobs.conftest import by_hand, world
from tests.trainer.jobs.fakes import World

__all__ = ["by_hand", "world"]

RECIPE = b"name: shop\nsteps: 3\n"
KEYS = ("ann", "bob", "root")
"""Keys with the scopes train, train and admin, by the same names."""
YAML = {"content-type": "application/yaml"}


def app_of(world: World | None, **trainer: Any) -> Any:
    settings = Settings(trainer=TrainerSettings(**trainer))
    service: Any = FakeService()
    return create_app(ServiceHandle(service, world.manager if world else None), settings)


def admin(world: World | None, **trainer: Any) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app_of(world, **trainer), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1")


def with_keys(world: World, folder: Path) -> httpx.AsyncClient:
    """A client of an app that has KEYS."""
    keys = [
        StoredKey(
            name=name, scopes=("admin" if name == "root" else "train",), sha256=digest_of(name.encode()), created="2026"
        )
        for name in KEYS
    ]
    change_keys(folder / "keys.json", lambda _: keys)
    settings = Settings(server=ServerSettings(keys_file=str(folder / "keys.json")))
    service: Any = FakeService()
    app = create_app(ServiceHandle(service, world.manager), settings)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1")


async def start_job(client: httpx.AsyncClient, recipe: bytes = RECIPE, **headers: str) -> str:
    answer = await client.post("/admin/train", content=recipe, headers={**YAML, **headers})
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])
