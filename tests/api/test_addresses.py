"""Where a server can be reached: on a Unix socket, and under a prefix."""

import re
import socket
import stat
from pathlib import Path

import httpx
import msgspec
import openai
import pytest

from runtime.api.app import create_app
from settings.api import ServerSettings
from settings.errors import SettingsError
from settings.load import load
from settings.schema import Settings, TrainerSettings
from tests.api.conftest import RunningServer, client_of, tiny_settings
from tests.api.fakes import FakeService, events

HI = [{"role": "user", "content": "hi"}]


def on_socket(path: Path) -> httpx.Client:
    return httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://localhost", timeout=60)


def test_a_unix_socket(tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "eft.sock"
    with socket.socket(socket.AF_UNIX) as left:  # by a server that was killed
        left.bind(str(path))
    settings = msgspec.structs.replace(
        tiny_settings(tiny_model, uds=str(path)), trainer=TrainerSettings(state_dir=str(tmp_path / "state"))
    )
    with RunningServer(settings) as server, on_socket(path) as http:
        assert server.url == f"unix:{path}"
        assert stat.S_ISSOCK(path.stat().st_mode)
        body = {"messages": HI, "max_tokens": 3, "ignore_eos": True, "stream": True}
        chunks = events(http.post("/v1/chat/completions", json=body).text)
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"
        with openai.OpenAI(base_url="http://localhost/v1", api_key="none", http_client=on_socket(path)) as client:
            assert [model.id for model in client.models.list()] == [tiny_model.name]
        # A proxy may stand before the socket: nothing is taken for a person on this machine.
        assert http.get("/admin/adapters").status_code == 403
        token = (tmp_path / "state" / "admin-token").read_text().strip()
        assert http.get("/admin/adapters", headers={"authorization": f"Bearer {token}"}).status_code == 200
        other = RunningServer(msgspec.structs.replace(settings, trainer=TrainerSettings(state_dir=str(tmp_path / "2"))))
        other._thread.start()
        assert other.join() == 1, "the socket is taken"
        assert http.get("/health").status_code == 200
    assert server.exit_code == 0
    assert not path.exists()


def test_a_file_that_is_no_socket_stays(tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("x")
    server = RunningServer(tiny_settings(tiny_model, uds=str(path)))
    server._thread.start()
    assert server.join() == 1
    assert path.read_text() == "x"


@pytest.mark.anyio
async def test_a_prefix_may_be_there_or_taken_off() -> None:
    async with client_of(FakeService(), Settings(server=ServerSettings(root_path="/a/llm"))) as client:
        for path in ("/v1/models", "/a/llm/v1/models"):
            assert (await client.get(path)).json()["data"][0]["id"] == "fake"
        for path in ("/a/llmv1/models", "/x/a/llm/v1/models", "/a/llm/a/llm/v1/models", "/a/llmx", "/llm/v1/models"):
            assert (await client.get(path)).status_code == 404, path
        chat = await client.post("/a/llm/v1/chat/completions", json={"messages": HI, "max_tokens": 2})
        assert chat.status_code == 200
        page, schema = await client.get("/a/llm/docs"), (await client.get("/a/llm/docs/openapi.json")).json()
        assert 'href="/a/llm/docs/openapi.json"' in page.text
        assert schema["servers"] == [{"url": "/a/llm"}]
        metrics = (await client.get("/metrics")).text
        assert re.search(r'eft:http_requests_total{[^}]*handler="/v1/models"[^}]*} 2\.0', metrics)
        refused = await client.get("/a/llm/admin/jobs", headers={"x-forwarded-for": "1.2.3.4"})
        assert refused.status_code == 403  # a key is asked for by the path behind the prefix


@pytest.mark.anyio
async def test_locations_have_the_prefix() -> None:
    from litestar import Litestar, get
    from litestar.response import Redirect

    from runtime.api.app import Prefixed

    @get("/x")
    async def moved() -> Redirect:
        return Redirect("/y")

    transport = httpx.ASGITransport(Prefixed(Litestar([moved]), "/llm"))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
        assert (await client.get("/llm/x")).headers["location"] == "/llm/y"


@pytest.mark.parametrize("value", ["llm", "/llm/", "/", "//llm", "/a b"])
def test_prefixes_that_are_none(value: str) -> None:
    with pytest.raises(SettingsError, match="root_path"):
        load(flags={"root_path": value})


def test_without_a_prefix_the_schema_is_as_it_was() -> None:
    assert create_app(FakeService(), Settings()).openapi_schema.servers[0].url == "/"  # type: ignore[arg-type]
