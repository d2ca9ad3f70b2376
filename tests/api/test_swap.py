"""Moves of a running server to another model. Tokens are transformers' greedy ones for each of the two models."""

import asyncio
import gc
import re
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import msgspec
import psutil
import pytest

from runtime.api.handle import RequestGate
from runtime.checkpoints.model_library import ModelLibrary, ModelRecord
from runtime.cli.app import run
from runtime.engine import assembly
from runtime.errors import EngineUnavailable
from runtime.model.model import DeviceMemory
from runtime.support import failpoints
from settings.schema import Settings, TrainerSettings
from tests.adapter_files import make_adapter, peft_greedy
from tests.api.conftest import RunningServer, tiny_settings
from tests.end_to_end.process import ServerProcess
from tests.engine import services
from tests.tiny import make_tiny_llama
from tests.waiting import wait_until

PROMPT, COUNT = [5, 9, 17, 4, 30], 8
BODY = {"prompt": PROMPT, "max_tokens": COUNT, "temperature": 0, "ignore_eos": True, "logprobs": 0}
SLOW = "engine.deliver@slow"
"""Place at which the request of this id is held, with the engine that computes it."""


@pytest.fixture(autouse=True)
def _no_failpoints() -> Iterator[None]:
    yield
    failpoints.configure("")


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("other") / "other", seed=3)


def publish(state: Path, name: str, source: Path) -> None:
    record = ModelRecord(job=f"job-{name}", step=1, metrics={}, base="tiny-llama", created=1.0)
    ModelLibrary(state).publish(name, source, record)


def settings_of(model: Path, state: Path) -> Settings:
    return msgspec.structs.replace(tiny_settings(model), trainer=TrainerSettings(state_dir=str(state)))


class Client:
    """A client of a server that moves between models."""

    def __init__(self, url: str) -> None:
        self.http = httpx.Client(base_url=url, timeout=60, trust_env=False)

    def tokens(self, model: str, request_id: str | None = None) -> list[int]:
        headers = {} if request_id is None else {"x-request-id": request_id}
        body = {**BODY, "model": model, "return_tokens_as_token_ids": True}
        answer = self.http.post("/v1/completions", json=body, headers=headers)
        assert answer.status_code == 200, answer.text
        return [int(token.removeprefix("token_id:")) for token in answer.json()["choices"][0]["logprobs"]["tokens"]]

    def swap(self, model: str, mode: str = "auto") -> httpx.Response:
        return self.http.post("/admin/model/swap", json={"model": model, "mode": mode})

    def model(self) -> dict[str, Any]:
        found: dict[str, Any] = self.http.get("/admin/model").json()
        return found

    def follow(self, seen: list[tuple[str, str]]) -> None:
        """Note model and status of each move that the stream of changes tells of, to the stream's end."""
        with self.http.stream("GET", "/admin/status", headers={"accept": "text/event-stream"}) as answer:
            lines = answer.iter_lines()
            for line in lines:
                if line == "event: swap":
                    swap = msgspec.json.decode(next(lines).removeprefix("data: "))
                    seen.append((swap["model"], swap["status"]))

    def unfinished(self) -> float:
        """Sequences that run or wait, as the metrics have them."""
        found = re.findall(
            r"^eft:num_requests_(?:running|waiting){.*} (.+)$", self.http.get("/metrics").text, re.MULTILINE
        )
        assert len(found) == 2
        return sum(map(float, found))

    def ended(self) -> dict[str, Any]:
        """The last move, once it has ended."""
        return self.until(lambda found: found["swap"]["finished_at"] is not None)["swap"]

    def until(self, condition: Any) -> dict[str, Any]:
        for _ in range(1200):
            found = self.model()
            if condition(found):
                return found
            time.sleep(0.05)
        raise AssertionError(found)


def held(pool: ThreadPoolExecutor, client: Client, model: str) -> "Future[list[int]]":
    """A request that is under way, and stays so until SLOW is released."""
    failpoints.configure(f"{SLOW}=hold")
    answer = pool.submit(client.tokens, model, "slow")
    while not failpoints.passed(SLOW):
        time.sleep(0.01)
    return answer


def greedy(model: Path) -> list[int]:
    import torch
    from transformers import LlamaForCausalLM

    base = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)
    ids = list(PROMPT)
    with torch.inference_mode():
        for _ in range(COUNT):
            ids.append(int(base(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(PROMPT) :]


def test_requests_end_on_the_model_that_they_began_with(
    tiny_model: Path, other_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = tmp_path / "state"
    publish(state, "words", other_model)
    old, new = greedy(tiny_model), greedy(other_model)
    adapter = make_adapter(tiny_model, tmp_path / "adapter")
    adapted = peft_greedy(tiny_model, adapter, PROMPT, COUNT)
    assert len({tuple(one) for one in (old, new, adapted)}) == 3
    with ThreadPoolExecutor() as pool, RunningServer(settings_of(tiny_model, state)) as server:
        client, seen = Client(server.url), list[tuple[str, str]]()
        pool.submit(client.follow, seen)
        files = [("file", (path.name, path.read_bytes())) for path in sorted(adapter.iterdir())]
        assert client.http.post("/admin/adapters/upload", data={"name": "news"}, files=files).status_code == 201
        assert client.tokens("news") == adapted
        assert client.model() == {
            "object": "model",
            "name": "tiny-llama",
            "model": "tiny-llama",
            "models": ["tiny-llama", "words@1"],
            "swap": None,
        }

        # Beside the old model.
        slow = held(pool, client, "tiny-llama")
        begun = client.swap("words@1", "beside")
        assert (begun.status_code, begun.json()["status"]) == (202, "loading")
        client.until(lambda found: found["model"] == "words@1")
        assert client.tokens("tiny-llama") == new
        assert client.model()["swap"]["status"] == "draining"
        assert client.swap("tiny-llama").json()["error"]["code"] == "swap_in_progress"
        assert not slow.done()
        assert client.unfinished() == 1  # on the old model, though the new one stepped last
        wait_until(lambda: ("words@1", "draining") in seen, 20)
        failpoints.release(SLOW)
        assert slow.result() == old
        swap = client.ended()
        assert (swap["status"], swap["mode"], swap["aborted"], swap["error"]) == ("succeeded", "beside", 0, None)
        assert swap["unfit_adapters"] == ["news"]
        refused = client.http.post("/v1/completions", json={**BODY, "model": "news"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")
        assert client.http.get("/v1/models/tiny-llama").json()["root"] == "words@1"
        assert client.swap("words@1").json()["error"]["code"] == "already_served"
        assert "news" not in client.http.get("/metrics").text

        # The old model goes first, and requests wait for the new one.
        slow = held(pool, client, "tiny-llama")
        assert client.swap("tiny-llama", "drain").status_code == 202
        client.until(lambda found: found["swap"]["status"] == "draining")
        waiting = pool.submit(client.tokens, "tiny-llama")
        assert client.http.get("/health").status_code == 200
        assert not slow.done()
        assert not waiting.done()
        wait_until(lambda: ("tiny-llama", "draining") in seen, 20)
        failpoints.release(SLOW)
        assert slow.result() == new
        assert waiting.result() == old
        assert client.ended()["status"] == "succeeded"
        wait_until(lambda: ("tiny-llama", "succeeded") in seen, 20)
        assert client.unfinished() == 0
        assert client.tokens("news") == adapted  # it fits again, and its files were never touched
        assert client.http.delete("/admin/adapters/news").status_code == 200

        # By the command line, where the memory decides.
        capsys.readouterr()
        assert run(["models", "swap", "--url", server.url]) == 0
        assert capsys.readouterr().out == "tiny-llama (served as tiny-llama)\nwords@1\n"
        assert run(["models", "swap", "words@1", "--url", server.url]) == 0
        assert capsys.readouterr().out == "tiny-llama is words@1 now; it was tiny-llama.\n"
        assert client.tokens("tiny-llama") == new
        assert run(["models", "swap", "words@7", "--url", server.url]) == 1
        assert "This server has `tiny-llama`, `words@1`" in capsys.readouterr().err
        metrics = client.http.get("/metrics").text
        assert 'eft:model_swaps_total{model_name="tiny-llama",outcome="succeeded"} 3.0' in metrics
        assert metrics.count("eft:cache_config_info{") == 1


def test_what_fails_leaves_the_old_model(tiny_model: Path, other_model: Path, tmp_path: Path) -> None:
    state, broken = tmp_path / "state", tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text('{"architectures": ["NoSuchModel"]}')
    publish(state, "words", other_model)
    publish(state, "broken", broken)
    old = greedy(tiny_model)
    with RunningServer(settings_of(tiny_model, state)) as server:
        client = Client(server.url)

        def failure(model: str, mode: str, failpoint: str = "") -> str:
            failpoints.configure(failpoint)
            assert client.swap(model, mode).status_code == 202
            swap = client.ended()
            assert (swap["status"], client.model()["model"]) == ("failed", "tiny-llama")
            assert client.tokens("tiny-llama") == old
            assert str(tmp_path) not in swap["error"]["message"]
            return str(swap["error"]["code"])

        assert failure("words@1", "beside", "swap.load@words@1=raise") == "internal_error"
        assert failure("words@1", "beside", "swap.open@words@1=raise") == "internal_error"
        assert failure("words@1", "drain", "swap.load@words@1=raise") == "internal_error"
        assert failure("broken@1", "beside") == "model_not_loaded"
        for body, status, param in (
            ({"model": "../words@1"}, 404, "model"),
            ({"model": "words@1", "mode": "soon"}, 400, "mode"),
            ({}, 400, "model"),
        ):
            answer = client.http.post("/admin/model/swap", json=body)
            assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)
        assert 'outcome="failed"} 4.0' in client.http.get("/metrics").text

        # Nothing can be served any more: the server ends, and what supervises it starts it again.
        failpoints.configure("swap.load=raise")
        assert client.swap("words@1", "drain").status_code == 202
        assert server.join() == 1


def test_what_needs_no_model_answers_while_none_is_there(
    tiny_model: Path, other_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old model has gone and the new one loads. Every request comes on a connection of its own."""
    state = tmp_path / "state"
    publish(state, "words", other_model)
    adapter = make_adapter(tiny_model, tmp_path / "adapter")
    with RunningServer(settings_of(tiny_model, state)) as server:
        client = Client(server.url)
        files = [("file", (path.name, path.read_bytes())) for path in sorted(adapter.iterdir())]
        assert client.http.post("/admin/adapters/upload", data={"name": "news"}, files=files).status_code == 201

        def ask(path: str, **options: Any) -> httpx.Response:
            method = "POST" if options else "GET"
            return httpx.request(method, server.url + path, timeout=30, trust_env=False, **options)

        load = "swap.load@words@1"
        failpoints.configure(f"{load}=hold")
        assert client.swap("words@1", "drain").status_code == 202
        wait_until(lambda: failpoints.passed(load))
        status = ask("/admin/status").json()
        assert (status["model"], status["ready"], status["swap"]["status"]) == ("tiny-llama", False, "loading")
        assert [one["name"] for one in status["adapters"]["adapters"]] == ["news"]
        reads = ("overview", "adapters", "adapters/news", "jobs", "model", "system", "requests")
        paths = ("/health", "/load", "/v1/files", *(f"/admin/{name}" for name in reads))
        assert {path: ask(path).status_code for path in paths} == dict.fromkeys(paths, 200)
        assert 'model_name="tiny-llama"' in ask("/metrics").text

        monkeypatch.setattr("runtime.api.handle.MAX_WAIT_SECONDS", 0.01)
        recipe = {"content": b"adapter: lora", "headers": {"content-type": "application/yaml"}}
        for answer in (
            ask("/ready"),
            ask("/v1/models"),
            ask("/v1/completions", json={**BODY, "model": "tiny-llama"}),
            ask("/admin/train?dry_run=1", **recipe),
        ):
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_unavailable"), answer.url
            assert answer.headers["retry-after"] == "5"
            assert "moving to another model" in answer.json()["error"]["message"]
        failpoints.release(load)
        assert client.ended()["unfit_adapters"] == ["news"]
        status = ask("/admin/status").json()
        assert (status["ready"], status["swap"]["status"]) == (True, "succeeded")


@pytest.mark.timeout(180)
def test_a_server_of_two_ranks_moves(tiny_model: Path, other_model: Path, tmp_path: Path) -> None:
    """The ranks of the old model end, and those of the new one answer."""
    publish(tmp_path / "state", "words", other_model)

    def ranks() -> set[int]:
        return {one.pid for one in psutil.Process(server.pid).children() if one.status() != psutil.STATUS_ZOMBIE}

    with ServerProcess(str(tiny_model), tmp_path / "state", tp=2, threads=1) as server:
        client, name = Client(server.url), tiny_model.name
        before = ranks()
        assert client.tokens(name) == greedy(tiny_model)
        assert client.swap("words@1").status_code == 202
        swap = client.ended()
        assert (swap["status"], swap["mode"], swap["error"]) == ("succeeded", "drain", None)
        assert client.tokens(name) == greedy(other_model)
        after = ranks()
        assert len(after) == len(before)
        assert not after & before


def test_a_model_that_was_let_go_takes_no_memory(tiny_model: Path) -> None:
    async def ask(service: services.EngineService) -> None:
        await services.gather(service.submit(services.submission("one")))

    service = services.run(tiny_model, ask, asynchronous="on")
    worker: Any = service.engine._executor._worker  # type: ignore[attr-defined]
    left = [weakref.ref(one) for one in (service.decoder.layers[0], *worker._cache.layers[0])]  # type: ignore[union-attr]
    gc.disable()  # its objects are frozen in a server, so no collection would find a circle of them
    try:
        service.unload()
        assert [one() for one in left] == [None] * len(left)
    finally:
        gc.enable()


@pytest.mark.parametrize(("free", "fits"), [(1 << 40, True), (1 << 16, False)])
def test_the_memory_decides(free: int, fits: bool, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assembly, "device_memory", lambda device: DeviceMemory(free))
    assert assembly.fits_beside(tiny_settings(tiny_model), 128) is fits


@pytest.mark.anyio
async def test_the_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = RequestGate()
    first = await gate.enter()
    gate.next_model()
    second = await gate.enter()
    before, all_left = (asyncio.create_task(gate.until_left(before=which)) for which in (True, False))
    await asyncio.sleep(0)
    gate.leave(first)
    await before
    gate.shut()
    waiting = asyncio.create_task(gate.enter())
    gate.leave(second)
    await all_left
    assert not waiting.done()
    gate.open()
    gate.leave(await waiting)
    gate.shut()
    monkeypatch.setattr("runtime.api.handle.MAX_WAIT_SECONDS", 0.01)
    with pytest.raises(EngineUnavailable, match="another model"):
        await gate.enter()
