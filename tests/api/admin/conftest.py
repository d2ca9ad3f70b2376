"""The app with training jobs over fakes."""

from typing import Any

import httpx

from runtime.api.app import create_app
from runtime.api.handle import ServiceHandle
from settings.schema import Settings, TrainerSettings
from tests.api.fakes import FakeService
from tests.trainer.jobs.conftest import by_hand, world
from tests.trainer.jobs.fakes import World

__all__ = ["by_hand", "world"]

RECIPE = b"name: shop\nsteps: 3\n"
YAML = {"content-type": "application/yaml"}


def app_of(world: World | None, **trainer: Any) -> Any:
    settings = Settings(trainer=TrainerSettings(**trainer))
    service: Any = FakeService()
    return create_app(ServiceHandle(service, world.manager if world else None), settings)


def admin(world: World | None, **trainer: Any) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app_of(world, **trainer), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1")


async def start_job(client: httpx.AsyncClient, recipe: bytes = RECIPE) -> str:
    answer = await client.post("/admin/train", content=recipe, headers=YAML)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])
