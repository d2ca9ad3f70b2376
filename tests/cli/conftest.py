"""The command line, called in this process."""

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest

from runtime.cli import client, main
from runtime.cli.client import InProcessTransport
from settings.load import Loaded
from tests.cli.fake_api import FakeApi, listening


class Done(NamedTuple):
    code: int
    out: str
    err: str


Eft = Callable[..., Done]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No settings but the defaults, whatever the machine has."""
    import os

    for name in [name for name in os.environ if name.startswith("EFT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("EFT_CHAT_HISTORY", "")
    for command in ("recipe", "chat"):  # whatever else serves on this machine
        monkeypatch.setattr(f"runtime.cli.{command}.DEFAULT_URL", "http://127.0.0.1:9")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def eft(capsys: pytest.CaptureFixture[str]) -> Eft:
    """Run `eft` with these arguments in this process."""

    def run(*arguments: object) -> Done:
        code = main([str(argument) for argument in arguments])
        return Done(code, *capsys.readouterr())

    return run


@pytest.fixture
def api() -> FakeApi:
    return FakeApi()


@pytest.fixture
def url(api: FakeApi) -> Iterator[str]:
    """`api` on a socket."""
    with listening(api) as address:
        yield address


@pytest.fixture
def loaded_here(api: FakeApi, monkeypatch: pytest.MonkeyPatch) -> FakeApi:
    """`api` in the place of a model that a command loads in its own process."""

    @asynccontextmanager
    async def in_process(loaded: Loaded) -> AsyncIterator[httpx.AsyncClient]:
        async with httpx.AsyncClient(transport=InProcessTransport(api), base_url="http://127.0.0.1") as http:
            yield http

    monkeypatch.setattr("runtime.cli.client._GRACE", 0.05)  # the fake does not look whether its client is there
    monkeypatch.setattr(client, "in_process", in_process)
    return api
