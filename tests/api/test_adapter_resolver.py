"""Adapters that are found when a request first names them."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import msgspec
import pytest

from runtime.adapters.resolver import AdapterResolver, AdapterSources
from runtime.checkpoints import ModelLoadError
from runtime.errors import AdapterUnavailable
from settings.schema import AdapterSettings
from tests.adapter_files import make_adapter, peft_greedy
from tests.api.adapter_requests import ASK, adapter_settings, answer, error
from tests.api.conftest import RunningServer

pytestmark = pytest.mark.anyio
COMMIT = "0123456789abcdef0123456789abcdef01234567"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters one, two, and a broken one."""
    folder = tmp_path_factory.mktemp("lora")
    for seed, name in enumerate(("one", "two", "broken"), 1):
        make_adapter(tiny_model, folder / name, seed=seed)
    (folder / "broken" / "adapter_model.safetensors").write_bytes(b"x")
    (folder / "empty").mkdir()
    return folder


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="module")
def http(tiny_model: Path, folder: Path, state: Path) -> Iterator[httpx.Client]:
    settings = adapter_settings(tiny_model, state, folder / "nothing")
    adapters = AdapterSettings(max_loaded=2, max_lora_rank=16, resolve_folder=str(folder))
    with (
        RunningServer(msgspec.structs.replace(settings, adapters=adapters)) as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        yield client


def test_first_requests_at_once_load_it_once(http: httpx.Client, tiny_model: Path, folder: Path) -> None:
    body = {**ASK, "model": "one", "return_token_ids": True}
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda _: http.post("/v1/completions", json=body), range(8)))
    shown = http.get("/admin/adapters/one")
    expected = peft_greedy(tiny_model, folder / "one", ASK["prompt"], 8)
    assert [response.json()["choices"][0]["token_ids"] for response in answers] == [expected] * 8
    assert {response.headers["x-eft-adapter-version"] for response in answers} == {"one@1"}
    assert len(shown.json()["versions"]) == 1


def test_chats_texts_and_the_list_of_models(http: httpx.Client, tiny_model: Path, folder: Path, state: Path) -> None:
    assert "two" not in [model["id"] for model in http.get("/v1/models").json()["data"]]
    assert http.get("/v1/models/two").json()["parent"] == tiny_model.name
    chat = {"model": "two", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
    assert http.post("/v1/chat/completions", json=chat).headers["x-eft-adapter-version"] == "two@1"
    assert http.post("/tokenize", json={"model": "two", "prompt": "hi"}).status_code == 200
    assert answer(http, "two") == peft_greedy(tiny_model, folder / "two", ASK["prompt"], 8)
    assert not list((state / "adapters" / ".incoming").iterdir())


def test_what_is_not_there_stays_unknown(http: httpx.Client, tiny_model: Path) -> None:
    names = ("three", "empty", "../lora0/one", "one/", "/etc", "ONE", "one@2", tiny_model.name.upper(), "", ".")
    for name in names:
        response = http.post("/v1/completions", json={**ASK, "model": name})
        assert error(response) == (404, "model", "model_not_found"), name
    assert "three" not in str(http.get("/admin/adapters").json())


def test_a_broken_one_says_why_and_hurts_no_other(http: httpx.Client) -> None:
    refused = http.post("/v1/completions", json={**ASK, "model": "broken"})
    assert error(refused) == (503, "model", "adapter_unavailable")
    assert "adapter_model.safetensors is truncated" in refused.json()["error"]["message"]
    assert answer(http, "one")


def test_one_that_was_unloaded_stays_so(http: httpx.Client) -> None:
    assert answer(http, "one")
    assert http.post("/admin/adapters/one/unload").status_code == 200
    assert http.post("/v1/completions", json={**ASK, "model": "one"}).status_code == 404
    assert http.post("/admin/adapters/one/load").status_code == 200
    assert answer(http, "one")


async def test_a_failure_on_the_hub_is_not_repeated_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None]] = []

    def fetch(model: str, *, revision: str | None = None, files: list[str]) -> Path:
        asked.append((model, revision))
        raise ModelLoadError("the hub cannot be reached")

    async def publish(name: str, folder: Path) -> None:
        raise AssertionError("nothing was found")

    def folder() -> Path:
        made = tmp_path / "incoming"
        made.mkdir()
        return made

    monkeypatch.setattr("runtime.checkpoints.resolve.fetch", fetch)
    sources = AdapterSources.of(AdapterSettings(resolve_hub=("news=some-org/lora@v2",)))
    resolver = AdapterResolver(sources, make_folder=folder, publish=publish)
    for _ in range(3):
        with pytest.raises(AdapterUnavailable, match=r"`news` is there, and cannot be used"):
            await resolver.look_for("news")
    await resolver.look_for("other")
    assert asked == [("some-org/lora", "v2")]
    assert not (tmp_path / "incoming").exists()


def test_a_cached_adapter_of_the_hub(folder: Path, tmp_path: Path) -> None:
    """In a process of its own: the library reads its environment when it is imported."""
    repository = tmp_path / "home" / "hub" / "models--some-org--lora"
    shutil.copytree(folder / "one", repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    (tmp_path / "target").mkdir()
    code = (
        "import sys, pathlib\nfrom runtime.adapters.resolver import AdapterResolver, AdapterSources\n"
        "resolver = AdapterResolver(AdapterSources(hub={'news': 'some-org/lora'}), make_folder=None, publish=None)\n"
        "print(resolver._collect('news', pathlib.Path(sys.argv[1])))"
    )
    environ = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "target")],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        cwd=ROOT,
        env={**environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
    )
    assert done.stdout.strip() == "True"
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "target" / name).read_bytes() == (folder / "one" / name).read_bytes()
