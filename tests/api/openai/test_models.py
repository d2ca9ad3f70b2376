"""/v1/models/{id}: names with slashes, and names that there are not."""

import httpx
import pytest

from settings.schema import Settings
from tests.api.conftest import client_of
from tests.api.fakes import FakeService

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("path", ["org/model", "org%2Fmodel"])
async def test_a_name_with_a_slash(service: FakeService, path: str) -> None:
    service.model_name = "org/model"
    async with client_of(service, Settings()) as client:
        card = (await client.get(f"/v1/models/{path}")).json()
        assert [card] == (await client.get("/v1/models")).json()["data"]
        assert (card["id"], card["created"]) == ("org/model", service.created)
        deleted = await client.delete(f"/v1/models/{path}")
        assert (deleted.status_code, deleted.json()["error"]["code"]) == (409, "base_model")


async def test_what_is_no_model(client: httpx.AsyncClient) -> None:
    for name in ("gpt-7", "fake@3", "ft:fake:eft:x:y", "a/b/c"):
        answer = await client.get(f"/v1/models/{name}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found"), name
    answer = await client.get("/v1/models/fake", params={"x": "y"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "x")
