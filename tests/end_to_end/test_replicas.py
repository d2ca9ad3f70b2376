"""Two servers in processes of their own that share adapters: what one publishes the other answers with."""

from pathlib import Path
from typing import Any

import httpx

from tests.adapter_files import make_adapter, peft_greedy
from tests.end_to_end.process import ServerProcess
from tests.waiting import wait_until

PROMPT = [5, 9, 17, 4, 30]
COUNT = 8


def publish(server: ServerProcess, name: str, folder: Path) -> None:
    files = [("file", (path.name, path.read_bytes())) for path in sorted(folder.iterdir())]
    response = server.http.post("/admin/adapters/upload", data={"name": name}, files=files)
    assert response.status_code in (200, 201), response.text


def answer(server: ServerProcess, model: str) -> httpx.Response:
    body = {"model": model, "prompt": PROMPT, "max_tokens": COUNT, "temperature": 0, "ignore_eos": True}
    return server.http.post("/v1/completions", json={**body, "logprobs": 0, "return_tokens_as_token_ids": True})


def tokens(server: ServerProcess, model: str) -> list[int]:
    response = answer(server, model)
    assert response.status_code == 200, response.text
    found = response.json()["choices"][0]["logprobs"]["tokens"]
    return [int(token.removeprefix("token_id:")) for token in found]


def listing(server: ServerProcess) -> Any:
    return server.http.get("/admin/adapters").json()


def test_a_version_published_on_one_answers_on_the_other(tiny_model: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.mkdir()
    adapters = [make_adapter(tiny_model, tmp_path / f"adapter-{seed}", seed=seed) for seed in (1, 2)]
    expected = [peft_greedy(tiny_model, adapter, PROMPT, COUNT) for adapter in adapters]
    assert expected[0] != expected[1]
    shared: dict[str, Any] = {"shared_store": store, "num_blocks": 64, "threads": 1}
    with (
        ServerProcess(str(tiny_model), tmp_path / "a", **shared) as a,
        ServerProcess(str(tiny_model), tmp_path / "b", **shared) as b,
    ):
        publish(a, "news", adapters[0])
        wait_until(lambda: answer(b, "news").status_code == 200, 60)
        assert tokens(a, "news") == tokens(b, "news") == expected[0]
        publish(b, "news", adapters[1])
        wait_until(lambda: listing(a)["adapters"][0]["current"] == 2, 60)
        assert tokens(a, "news") == tokens(b, "news") == expected[1]
        assert tokens(a, "news@1") == expected[0]
        assert listing(a)["adapters"][0]["revision"] == listing(b)["adapters"][0]["revision"]

        store.rename(tmp_path / "away")  # both are cut off, and go on serving
        response = a.http.post("/admin/adapters/news/promote", json={"version": 1})
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "shared_store_unavailable"
        assert "No such file" in listing(a)["shared_problem"]
        assert tokens(a, "news") == tokens(b, "news") == expected[1]
        (tmp_path / "away").rename(store)
        assert a.http.post("/admin/adapters/news/promote", json={"version": 1}).status_code == 200
        wait_until(lambda: listing(b)["adapters"][0]["current"] == 1, 60)
        assert tokens(b, "news") == expected[0]
