"""`eft adapters` against a real server with a tiny model."""

import json
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from settings.schema import TrainerSettings
from tests.adapters import make_adapter
from tests.api.conftest import RunningServer, tiny_settings
from tests.cli.conftest import Eft


@pytest.fixture(scope="module")
def folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    for seed in (1, 2):
        make_adapter(tiny_model, folder / str(seed), seed=seed, target_modules=["q_proj"])
    return folder


@pytest.fixture
def url(tiny_model: Path, folder: Path, tmp_path: Path) -> Iterator[str]:
    trainer = TrainerSettings(state_dir=str(tmp_path / "state"), data_roots=(str(folder),))
    settings = msgspec.structs.replace(tiny_settings(tiny_model, admin_key=("boss",)), trainer=trainer)
    with RunningServer(settings) as server:
        yield server.url


def test_the_life_of_an_adapter(eft: Eft, url: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    denied = eft("adapters", "list", "--url", url)
    assert (denied.code, denied.out) == (1, "")
    assert "401" in denied.err
    monkeypatch.setenv("EFT_ADMIN_KEY", "boss")

    def call(*arguments: object) -> str:
        done = eft("adapters", *arguments, "--url", url)
        assert done.code == 0, done.err
        return done.out

    assert "a: version 1, served" in call("load", "a", folder / "1")
    assert eft("adapters", "load", "a", folder / "2", "--url", url).code == 1
    assert "a: version 2, served" in call("load", "a", folder / "2", "--inplace")
    shown = json.loads(call("show", "a", "--json"))
    assert [version["current"] for version in shown["versions"]] == [False, True]
    assert "* 1" in call("promote", "a", 1)
    assert "a: version 2" in call("rollback", "a")
    assert "not served" in call("unload", "a")
    assert json.loads(call("list", "--json"))["adapters"][0]["served"] is False
    assert "a: version 2, served" in call("load", "a")
    assert call("list").splitlines()[1].split() == ["a", "2", "yes"]
    assert call("delete", "a", 1) == "Deleted a@1.\n"
    assert call("delete", "a") == "Deleted a.\n"
    assert json.loads(call("list", "--json")) == {"adapters": []}
    missing = eft("adapters", "show", "a", "--url", url)
    assert (missing.code, missing.err) == (1, "eft: 404: There is no adapter 'a'.\n")


def test_no_server(eft: Eft) -> None:
    done = eft("adapters", "list", "--url", "http://127.0.0.1:9")
    assert done.code == 1
    assert "no server answers" in done.err
