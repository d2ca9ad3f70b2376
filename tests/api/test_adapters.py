"""Adapters over HTTP: the `openai` client asks for one by name, operators load, swap and delete them."""

import io
import itertools
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from runtime.support import failpoints
from tests.adapter_files import make_adapter, peft_greedy
from tests.api.adapter_requests import ASK, adapter_settings, answer, error
from tests.api.conftest import RunningServer, tiny_settings
from tests.api.fakes import events
from tests.waiting import wait_until


@pytest.fixture(scope="module")
def folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters one, two and three, in PEFT's format."""
    folder = tmp_path_factory.mktemp("lora")
    for seed, name in enumerate(("one", "two", "three"), 1):
        make_adapter(tiny_model, folder / name, seed=seed)
    return folder


@pytest.fixture(scope="module")
def running(tiny_model: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with RunningServer(adapter_settings(tiny_model, tmp_path_factory.mktemp("state"), folder)) as server:
        yield server


@pytest.fixture
def http(running: RunningServer) -> Iterator[httpx.Client]:
    """A client; afterwards the server has no adapters."""
    with httpx.Client(base_url=running.url, timeout=60) as client:
        yield client
        for adapter in client.get("/admin/adapters").json()["adapters"]:
            assert client.delete(f"/admin/adapters/{adapter['name']}?drain=1").status_code == 200


def load(http: httpx.Client, name: str, path: Path, **more: Any) -> httpx.Response:
    return http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(path), **more})


def test_fine_tuned_models_are_deleted_by_the_openai_client(
    running: RunningServer, http: httpx.Client, tiny_model: Path, folder: Path
) -> None:
    for name in ("one", "two"):
        assert load(http, "trial", folder / name, load_inplace=True).status_code == 200
    assert http.post("/admin/adapters/trial/alias", json={"alias": "other"}).status_code == 200
    refused = {
        tiny_model.name: (409, "base_model", "served base model"),
        "other": (409, "conflict", "alias of `trial`"),
        "trial@2": (409, "conflict", "current version"),
        "trial@7": (404, "model_not_found", "does not exist"),
        "nothing": (404, "model_not_found", "does not exist"),
    }
    for name, (status, code, text) in refused.items():
        answer = http.delete(f"/v1/models/{name}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text
        assert text in answer.json()["error"]["message"]
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
        for name in ("trial@1", "trial@2", "trial", "other"):
            card = client.models.retrieve(name).model_dump()
            assert (card["id"], card["parent"]) == (name, tiny_model.name)
            assert card["created"] > 1_700_000_000
        for name in ("trial@1", "trial"):
            assert client.models.delete(name).model_dump() == {"id": name, "object": "model", "deleted": True}
            with pytest.raises(openai.NotFoundError):
                client.models.retrieve(name)
    assert http.get("/admin/adapters").json()["adapters"] == []


def test_the_openai_client_asks_for_an_adapter_by_name(
    running: RunningServer, http: httpx.Client, tiny_model: Path, folder: Path
) -> None:
    added = load(http, "helper", folder / "one")
    assert (added.status_code, added.text) == (200, "Success: LoRA adapter 'helper' added successfully.")
    assert http.post("/admin/adapters/helper/alias", json={"alias": "assistant"}).status_code == 200
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
        models = {model.id: model.model_dump() for model in client.models.list()}
        assert list(models) == [tiny_model.name, "helper", "assistant"]
        assert models["helper"]["parent"] == models["assistant"]["parent"] == tiny_model.name
        shown = http.get("/admin/adapters/helper").json()
        assert models["helper"]["root"] == models["assistant"]["root"] == shown["versions"][0]["path"]
        assert (Path(models["helper"]["root"]) / "adapter_config.json").is_file()
        assert models[tiny_model.name]["root"] == tiny_model.name
        assert models[tiny_model.name]["parent"] is None
        assert client.models.retrieve("assistant").id == "assistant"
        assert client.models.retrieve("helper@1").id == "helper@1"
        for name in ("helper", "assistant", "helper@1"):
            done = client.completions.create(
                model=name,
                prompt=ASK["prompt"],
                max_tokens=8,
                temperature=0,
                extra_body={"ignore_eos": True, "return_token_ids": True},
            )
            assert done.model == name
            assert done.choices[0].model_extra is not None
            assert done.choices[0].model_extra["token_ids"] == peft_greedy(tiny_model, folder / "one", ASK["prompt"], 8)
        chat = client.chat.completions.create(
            model="helper", messages=[{"role": "user", "content": "hi"}], max_tokens=4, stream=True
        )
        assert {chunk.model for chunk in chat} == {"helper"}
        with pytest.raises(openai.NotFoundError, match="`nobody` does not exist"):
            client.completions.create(model="nobody", prompt="a")


def test_the_version_that_answers_is_in_a_header(http: httpx.Client, folder: Path, tiny_model: Path) -> None:
    load(http, "seen", folder / "one")
    load(http, "seen", folder / "two", load_inplace=True)
    http.post("/admin/adapters/seen/alias", json={"alias": "viewed"})
    asked = {
        "/v1/completions": {"prompt": "a"},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}]},
    }
    versions = {"seen": "seen@2", "viewed": "seen@2", "seen@1": "seen@1", tiny_model.name: "base"}

    def version(path: str, model: str, *, stream: bool) -> str:
        body = {**asked[path], "model": model, "max_tokens": 2, "stream": stream}
        answered = http.post(path, json=body)
        assert answered.status_code == 200
        return answered.headers["x-eft-adapter-version"]

    for path, stream in itertools.product(asked, (False, True)):
        assert {model: version(path, model, stream=stream) for model in versions} == versions
    http.post("/admin/adapters/seen/canary", json={"version": 1, "weight": 1.0})
    assert version("/v1/completions", "seen", stream=False) == "seen@1"


def test_a_name_is_one_thing(http: httpx.Client, folder: Path, tiny_model: Path) -> None:
    """In any case of letters: the base model's, an adapter's, an alias's."""
    base = tiny_model.name
    for name in (base, base.upper(), base.capitalize()):
        refused = load(http, name, folder / "one")
        assert error(refused) == (400, "lora_name", None)
        assert "--served-model-name" in refused.json()["error"]["message"]
    assert load(http, "News", folder / "one").status_code == 200
    refused = load(http, "nEWS", folder / "two")
    assert error(refused) == (409, "lora_name", "conflict")
    assert "'News'" in refused.json()["error"]["message"]
    assert load(http, "News", folder / "two", load_inplace=True).status_code == 200
    for alias, status in (("NEWS", 409), (base.upper(), 400), ("News", 409), ("latest", 200), ("LATEST", 409)):
        assert http.post("/admin/adapters/News/alias", json={"alias": alias}).status_code == status, alias
    assert error(load(http, "Latest", folder / "one")) == (409, "lora_name", "conflict")
    assert [model["id"] for model in http.get("/v1/models").json()["data"]] == [base, "News", "latest"]


def test_export_is_a_folder_of_pefts(http: httpx.Client, folder: Path, tmp_path: Path) -> None:
    load(http, "copied", folder / "one")
    load(http, "copied", folder / "two", load_inplace=True)
    for query, name, number in (("", "two", 2), ("?version=1&format=peft", "one", 1)):
        answered = http.get(f"/admin/adapters/copied/export{query}")
        assert (answered.status_code, answered.headers["content-type"]) == (200, "application/x-tar")
        assert answered.headers["x-eft-adapter-version"] == f"copied@{number}"
        assert answered.headers["content-disposition"] == f'attachment; filename="copied-{number}.tar"'
        with tarfile.open(fileobj=io.BytesIO(answered.content)) as archive:
            archive.extractall(tmp_path / str(number), filter="data")
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            assert (tmp_path / str(number) / "copied" / file).read_bytes() == (folder / name / file).read_bytes()
    for query, status, param in (
        ("?version=3", 404, "version"), ("?version=0", 400, "version"), ("?format=gguf&type=q3", 400, "type"),
        ("?format=x", 400, "format"), ("?verison=1", 400, "verison"),
    ):  # fmt: skip
        assert error(http.get(f"/admin/adapters/copied/export{query}"))[:2] == (status, param)
    assert error(http.get("/admin/adapters/other/export"))[0] == 404


def test_an_export_is_the_merged_model(http: httpx.Client, folder: Path, tmp_path: Path, tiny_model: Path) -> None:
    """As a directory of transformers', and as a GGUF file: the greedy tokens of the served adapter."""
    from transformers import AutoModelForCausalLM

    load(http, "out", folder / "one")
    merged = http.get("/admin/adapters/out/export?format=merged")
    assert merged.headers["content-type"] == "application/x-tar"
    with tarfile.open(fileobj=io.BytesIO(merged.content)) as archive:
        archive.extractall(tmp_path, filter="data")
    written = http.get("/admin/adapters/out/export?format=gguf&type=f32")
    assert written.headers["content-disposition"] == 'attachment; filename="out-1.gguf"'
    (tmp_path / "out.gguf").write_bytes(written.content)
    prompt = [5, 9, 200, 31, 77]
    body = {"model": "out", "prompt": prompt, "max_tokens": 12, "temperature": 0, "return_token_ids": True}
    served = http.post("/v1/completions", json={**body, "ignore_eos": True}).json()["choices"][0]["token_ids"]
    for model in (
        AutoModelForCausalLM.from_pretrained(tmp_path / "out"),
        AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="out.gguf"),
    ):
        ids = torch.tensor([prompt])
        found = model.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False)[0, len(prompt) :]
        assert found.tolist() == served
    assert http.get("/admin/adapters/out/export?format=gguf-lora").content[:4] == b"GGUF"


def test_an_export_outlives_its_version(http: httpx.Client, folder: Path) -> None:
    """The files are open before the answer begins, so that a deletion in the middle changes nothing of it."""
    load(http, "copied", folder / "one")
    with http.stream("GET", "/admin/adapters/copied/export") as answered:
        assert http.delete("/admin/adapters/copied?drain=1").status_code == 200
        content = answered.read()
    assert len(content) == int(answered.headers["content-length"])
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        assert sorted(archive.getnames()) == ["copied/adapter_config.json", "copied/adapter_model.safetensors"]


def test_refusals_in_vllms_shape(http: httpx.Client, folder: Path, tiny_model: Path, tmp_path: Path) -> None:
    assert load(http, "a", folder / "one").status_code == 200
    assert error(load(http, "a", folder / "two")) == (400, "lora_name", "adapter_exists")
    assert error(load(http, "", folder / "two")) == (400, "lora_name", None)
    assert error(load(http, "../x", folder / "two")) == (400, "lora_name", None)
    assert error(load(http, tiny_model.name, folder / "two")) == (400, "lora_name", None)
    assert error(load(http, "b", folder / "nothing")) == (404, "lora_path", "not_found")
    assert error(load(http, "b", folder)) == (400, None, "invalid_adapter")
    assert error(http.post("/v1/load_lora_adapter", json={"lora_name": "b"})) == (400, "lora_path", None)
    for outside in (tiny_model, Path("/etc"), Path("/nowhere"), folder / ".." / "x", Path("relative"), Path("\0")):
        response = load(http, "b", outside)
        assert error(response) == (403, "lora_path", "forbidden")
        assert "trainer.data_roots" in response.json()["error"]["message"]
    (folder / "link").symlink_to(tmp_path)
    assert error(load(http, "b", folder / "link")) == (403, "lora_path", "forbidden")
    (folder / "link").unlink()
    wide = make_adapter(tiny_model, folder / "wide", r=17, target_modules=["q_proj"])
    assert "max_lora_rank allows 16" in load(http, "b", wide).json()["error"]["message"]
    assert error(http.post("/v1/unload_lora_adapter", json={"lora_name": "b"})) == (404, "lora_name", "not_found")
    assert [a["name"] for a in http.get("/admin/adapters").json()["adapters"]] == ["a"]
    removed = http.post("/v1/unload_lora_adapter", json={"lora_name": "a"})
    assert (removed.status_code, removed.text) == (200, "Success: LoRA adapter 'a' removed successfully.")
    assert error(http.post("/v1/completions", json={**ASK, "model": "a"})) == (404, "model", "model_not_found")
    assert load(http, "a", folder / "two").status_code == 200


def test_versions_over_http(http: httpx.Client, tiny_model: Path, folder: Path) -> None:
    expected = {name: peft_greedy(tiny_model, folder / name, ASK["prompt"], 8) for name in ("one", "two", "three")}
    load(http, "story", folder / "one")
    assert load(http, "story", folder / "two", load_inplace=True).status_code == 200
    assert answer(http, "story") == expected["two"]
    load(http, "story", folder / "three", load_inplace=True)
    shown = http.get("/admin/adapters/story").json()
    assert [v["number"] for v in shown["versions"]] == [1, 2, 3]
    assert [v["loaded"] for v in shown["versions"]] == [False, True, True]  # adapters.max_loaded is 2
    assert answer(http, "story@1") == expected["one"]  # loaded when it is asked for
    assert http.post("/admin/adapters/story/promote", json={"version": 1}).json()["current"] == 1
    assert answer(http, "story") == expected["one"]
    assert http.post("/admin/adapters/story/rollback").json()["current"] == 3
    assert answer(http, "story") == expected["three"]
    assert http.post("/admin/adapters/story/canary", json={"version": 2, "weight": 1.0}).status_code == 200
    assert answer(http, "story") == expected["two"]
    assert error(http.post("/admin/adapters/story/promote", json={"version": 9})) == (404, "version", "not_found")
    assert error(http.delete("/admin/adapters/story/versions/3")) == (409, "version", "conflict")
    assert http.delete("/admin/adapters/story/versions/2").json() == {"id": "story@2", "deleted": True}
    assert answer(http, "story") == expected["three"]
    assert http.post("/admin/adapters/story/alias", json={"alias": "tale"}).json()["aliases"] == ["tale"]
    assert answer(http, "tale") == expected["three"]
    assert error(http.delete("/admin/adapters/other/alias/tale")) == (404, "alias", "not_found")
    assert http.delete("/admin/adapters/story/alias/tale").json()["aliases"] == []
    assert error(http.post("/admin/adapters/nobody/rollback")) == (404, "name", "not_found")
    assert answer(http, tiny_model.name) not in expected.values()


def test_a_swap_during_decoding(http: httpx.Client, folder: Path) -> None:
    """Fault 24: a stream that runs keeps its version; what is asked after the swap has the new one's answer."""
    load(http, "a", folder / "one")
    long = {"max_tokens": 300}
    alone = {"one": answer(http, "a", **long)}
    http.post("/v1/load_lora_adapter", json={"lora_name": "b", "lora_path": str(folder / "two")})
    alone["two"] = answer(http, "b", **long)
    assert alone["one"] != alone["two"]
    streamed: list[int] = []
    begun, swapped = threading.Event(), threading.Event()

    def read() -> None:
        body = {**ASK, **long, "model": "a", "stream": True, "return_token_ids": True}
        with httpx.stream("POST", f"{http.base_url}/v1/completions", json=body, timeout=60) as response:
            text = ""
            for piece in response.iter_text():
                text += piece
                if not begun.is_set():
                    begun.set()
                    swapped.wait(60)
        for event in events(text):
            if event["choices"]:
                streamed.extend(event["choices"][0].get("token_ids") or [])

    failpoints.configure("worker.row=sleep:0.01")  # so that the stream outlasts the swap
    reader = threading.Thread(target=read)
    reader.start()
    assert begun.wait(60)
    assert load(http, "a", folder / "two", load_inplace=True).status_code == 200
    assert http.get("/load").json()["running"] == 1
    failpoints.configure("")
    assert answer(http, "a", **long) == alone["two"]
    swapped.set()
    reader.join(60)
    assert streamed == alone["one"]


def test_metrics_of_an_idle_adapter_and_of_one_at_work(http: httpx.Client, folder: Path) -> None:
    load(http, "idle", folder / "one")
    load(http, "busy", folder / "two")

    def value(name: str, adapter: str) -> float | None:
        lines = http.get("/metrics").text.splitlines()
        found = [line for line in lines if line.startswith(f"eft:{name}{{") and f'adapter="{adapter}"' in line]
        return float(found[0].rpartition(" ")[2]) if found else None

    assert value("adapter_requests_total", "idle") == 0.0
    answer(http, "busy")
    wait_until(lambda: value("adapter_requests_total", "busy") == 1.0)
    assert value("adapter_generation_tokens_total", "busy") == 8.0
    assert value("adapter_time_to_first_token_seconds_count", "busy") == 1.0
    assert value("adapter_requests_total", "idle") == 0.0
    load(http, "third", folder / "three")  # takes the place of the idle one
    wait_until(lambda: value("adapter_requests_total", "idle") is None)
    assert "vllm:lora_requests_info{" in http.get("/metrics").text


def test_a_restart_serves_what_was_published(tiny_model: Path, folder: Path, tmp_path: Path) -> None:
    settings = adapter_settings(tiny_model, tmp_path, folder)
    with RunningServer(settings) as server, httpx.Client(base_url=server.url, timeout=60) as http:
        load(http, "a", folder / "one")
        before = answer(http, "a")
        with RunningServer(tiny_settings(tiny_model)) as beside:  # another state directory: no harm
            assert httpx.get(f"{beside.url}/v1/models").status_code == 200
    with RunningServer(settings) as server, httpx.Client(base_url=server.url, timeout=60) as http:
        assert answer(http, "a") == before
        assert http.get("/admin/adapters/a").json()["versions"][0]["loaded"] is True


def test_a_state_directory_that_is_taken(tiny_model: Path, folder: Path, tmp_path: Path) -> None:
    """Asked for: the second server does not start. The default one: it serves the base, and says what is missing."""
    settings = adapter_settings(tiny_model, tmp_path, folder)
    with RunningServer(settings):
        second = RunningServer(settings)
        with second:
            assert second.join() == 1
    with RunningServer(tiny_settings(tiny_model)) as first, RunningServer(tiny_settings(tiny_model)) as other:
        statuses = {httpx.get(f"{server.url}/admin/adapters").status_code for server in (first, other)}
        assert 503 in statuses
        for server in (first, other):
            body = {**ASK, "model": tiny_model.name}
            assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).status_code == 200


def test_only_admins(tiny_model: Path, folder: Path, tmp_path: Path) -> None:
    settings = adapter_settings(tiny_model, tmp_path, folder, api_key=("user",), admin_key=("boss",))
    with RunningServer(settings) as server:
        body = {"lora_name": "a", "lora_path": str(folder / "one")}
        for key, status in (("user", 403), ("wrong", 401), ("boss", 200)):
            headers = {"authorization": f"Bearer {key}"}
            response = httpx.post(f"{server.url}/v1/load_lora_adapter", json=body, headers=headers, timeout=60)
            assert response.status_code == status


def test_an_inference_key_loads_no_old_versions(tiny_model: Path, folder: Path, tmp_path: Path) -> None:
    """Two fit into memory. Names may be asked for by every key; versions that are on the disk only, not."""
    settings = adapter_settings(tiny_model, tmp_path, folder, api_key=("user",), admin_key=("boss",))
    user, boss = ({"authorization": f"Bearer {key}"} for key in ("user", "boss"))
    with RunningServer(settings) as server, httpx.Client(base_url=server.url, timeout=60) as http:

        def ask(model: str, headers: dict[str, str]) -> int:
            return http.post("/v1/completions", json={**ASK, "model": model}, headers=headers).status_code

        for name, path in (("a", "one"), ("a", "two"), ("b", "three")):
            body = {"lora_name": name, "lora_path": str(folder / path), "load_inplace": True}
            assert http.post("/v1/load_lora_adapter", json=body, headers=boss).status_code == 200
        http.post("/admin/adapters/a/alias", json={"alias": "helper"}, headers=boss).raise_for_status()
        assert [ask(model, user) for model in ("a", "b", "helper", "a@2")] == [200, 200, 200, 200]
        refused = http.post("/v1/completions", json={**ASK, "model": "a@1"}, headers=user)
        assert error(refused) == (403, "model", "forbidden")
        assert ask("a:1", user) == 403
        assert ask("a@1", boss) == 200  # and now it is in memory
        assert ask("a@1", user) == 200
        assert ask("a@9", user) == 404


@pytest.mark.parametrize("number", ["0", "-1", "9" * 19, "9" * 25, "9" * 5000, "0" * 5000, "1.5", "x", "٣", "1e3"])
def test_numbers_of_versions(http: httpx.Client, folder: Path, number: str) -> None:
    load(http, "a", folder / "one")
    assert http.delete(f"/admin/adapters/a/versions/{number}").status_code in (400, 404)
    for path, rest in (("promote", ""), ("canary", ', "weight": 0.5')):
        body = f'{{"version": {number}{rest}}}'.encode()
        answer = http.post(f"/admin/adapters/a/{path}", content=body, headers={"content-type": "application/json"})
        assert answer.status_code in (400, 404)
    asked = http.post("/v1/completions", json={**ASK, "model": f"a@{number[:200]}"})
    assert asked.status_code == 404
    assert http.delete("/admin/adapters/a", params={"drain": number[:200]}).status_code in (200, 400)
