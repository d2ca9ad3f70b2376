"""Log-probabilities over HTTP: OpenAI's two shapes and vLLM's, whole and streamed, on a fake engine and a real one."""

import math
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM

from settings.schema import Settings
from tests.api.blocking import own_doing
from tests.api.conftest import RunningServer, client_of
from tests.api.fakes import FakeService, events

pytestmark = pytest.mark.anyio
TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello there"}]


async def test_a_chats_shape(client: httpx.AsyncClient, service: FakeService) -> None:
    body = {"messages": HELLO, "max_tokens": 2, "logprobs": True, "top_logprobs": 2}
    choice = (await client.post(CHAT, json=body)).json()["choices"][0]
    content = choice["logprobs"]["content"]
    assert "".join(one["token"] for one in content) == choice["message"]["content"]
    assert content[0] == {
        "token": "u",
        "logprob": -0.5,
        "bytes": [117],
        "top_logprobs": [
            {"token": "a", "logprob": -0.5, "bytes": [97]},
            {"token": "b", "logprob": -1.5, "bytes": [98]},
        ],
    }
    assert service.submitted[0].params.logprobs == 2
    without = (await client.post(CHAT, json={"messages": HELLO, "max_tokens": 2})).json()
    assert without["choices"][0]["logprobs"] is None
    assert without["prompt_logprobs"] is None
    own = (await client.post(CHAT, json={"messages": HELLO, "max_tokens": 1, "logprobs": True})).json()
    assert own["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


async def test_a_completions_shape(client: httpx.AsyncClient) -> None:
    choice = (await client.post(TEXT, json={"prompt": "xyz", "max_tokens": 3, "logprobs": 2})).json()["choices"][0]
    assert choice["logprobs"] == {
        "tokens": ["x", "y", "z"],
        "token_logprobs": [-0.5] * 3,
        "top_logprobs": [{"a": -0.5, "b": -1.5, token: -0.5} for token in "xyz"],
        "text_offset": [0, 1, 2],
    }
    assert choice["prompt_logprobs"] is None


async def test_an_echoed_prompt_is_scored(client: httpx.AsyncClient) -> None:
    body = {"prompt": ["xyz", "pq"], "max_tokens": 1, "logprobs": 1, "echo": True, "n": 2}
    for stream in (False, True):
        answer = await client.post(TEXT, json={**body, "stream": stream})
        found: dict[int, list[Any]] = {}
        for part in events(answer.text) if stream else [answer.json()]:
            for choice in part["choices"]:
                if choice["logprobs"]:
                    found.setdefault(choice["index"], []).append(choice)
        for index, parts in found.items():
            text, logprobs = parts[0]["text"], parts[0]["logprobs"]
            assert text == ("xyzx", "pqp")[index // 2]
            assert logprobs["tokens"] == list(text)
            assert logprobs["text_offset"] == list(range(len(text)))
            assert logprobs["token_logprobs"] == [None, *[-1.5] * (len(text) - 2), -0.5]
            assert logprobs["top_logprobs"][0] is None
        assert sorted(found) == [0, 1, 2, 3]


async def test_a_prompt_is_scored_without_output(client: httpx.AsyncClient) -> None:
    body = {"prompt": "xyz", "max_tokens": 0, "logprobs": 1, "echo": True}
    answer = (await client.post(TEXT, json=body)).json()
    choice = answer["choices"][0]
    assert choice["text"] == "xyz"
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"]["token_logprobs"] == [None, -1.5, -1.5]
    assert answer["usage"]["completion_tokens"] == 0
    streamed = events((await client.post(TEXT, json={**body, "stream": True})).text)
    assert "".join(part["choices"][0]["text"] for part in streamed) == "xyz"
    assert streamed[0]["choices"][0]["logprobs"] == choice["logprobs"]
    refused = await client.post(TEXT, json={"prompt": "xyz", "max_tokens": 0})
    assert refused.status_code == 400
    assert "0 with echo or prompt_logprobs" in refused.json()["error"]["message"]
    assert (await client.post(CHAT, json={"messages": HELLO, "max_tokens": 0})).status_code == 400


async def test_prompt_logprobs_are_vllms(client: httpx.AsyncClient, service: FakeService) -> None:
    body = {"prompt": "xy", "max_tokens": 1, "prompt_logprobs": 1, "n": 2}
    choices = (await client.post(TEXT, json=body)).json()["choices"]
    expected = [
        None,
        {
            "121": {"logprob": -1.5, "rank": 2, "decoded_token": "y"},
            "97": {"logprob": -1.0, "rank": 1, "decoded_token": "a"},
        },
    ]
    assert [choice["prompt_logprobs"] for choice in choices] == [expected, expected]
    assert [one.params.prompt_logprobs for one in service.submitted] == [1, None]  # once for all choices
    chat = (await client.post(CHAT, json={"messages": HELLO, "max_tokens": 1, "prompt_logprobs": 0})).json()
    assert len(chat["prompt_logprobs"]) == chat["usage"]["prompt_tokens"]
    assert chat["prompt_logprobs"][0] is None


async def test_tokens_as_ids(client: httpx.AsyncClient) -> None:
    body = {"prompt": "xyz", "max_tokens": 1, "logprobs": 1, "return_tokens_as_token_ids": True}
    logprobs = (await client.post(TEXT, json=body)).json()["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["token_id:120"]
    assert logprobs["top_logprobs"] == [{"token_id:97": -0.5, "token_id:120": -0.5}]


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (CHAT, {"top_logprobs": 3}, "top_logprobs"),
        (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        (CHAT, {"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        (CHAT, {"logprobs": 3}, "logprobs"),
        (TEXT, {"logprobs": 21}, "logprobs"),
        (TEXT, {"logprobs": -1}, "logprobs"),
        (TEXT, {"logprobs": True}, "logprobs"),
        (TEXT, {"prompt_logprobs": 21}, "prompt_logprobs"),
        (TEXT, {"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        (CHAT, {"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        (TEXT, {"logprobs": 1, "use_beam_search": True}, "logprobs"),
        (CHAT, {"prompt_logprobs": 1, "use_beam_search": True, "temperature": 0}, "prompt_logprobs"),
    ],
)
async def test_what_is_refused(
    client: httpx.AsyncClient, service: FakeService, path: str, fields: dict[str, Any], param: str
) -> None:
    prompt: dict[str, Any] = {"messages": HELLO} if path == CHAT else {"prompt": "abc"}
    answer = await client.post(path, json={**prompt, "max_tokens": 2, **fields})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert not service.submitted


@pytest.mark.parametrize("stream", [False, True])
async def test_many_do_not_block_the_event_loop(stream: bool) -> None:
    """Which every test here watches for."""
    client = client_of(FakeService(context=20_000), Settings())
    body = {"prompt": [97] * 15_000, "max_tokens": 1, "logprobs": 20, "echo": True, "stream": stream}
    if not stream:
        body["prompt_logprobs"] = 20
    answer = await client.post(TEXT, json=body)
    assert answer.status_code == 200
    with own_doing():
        parts = events(answer.text) if stream else [answer.json()]
    choice = parts[0]["choices"][0]
    assert len(choice["logprobs"]["top_logprobs"]) == 15_001
    assert stream or len(choice["prompt_logprobs"]) == 15_000


@pytest.mark.parametrize("stop", [None, ["zq", " t"]])
def test_streams_have_what_whole_answers_have(server: RunningServer, stop: list[str] | None) -> None:
    """On a real engine, whose text is held back where it may be the start of a stop string or half a character."""
    fields = {"max_tokens": 24, "temperature": 1.2, "seed": 7, "stop": stop, "n": 2, "ignore_eos": True}
    chat = {"messages": HELLO, "logprobs": True, "top_logprobs": 3, **fields}
    text = {"prompt": "Hello there", "logprobs": 3, "echo": True, **fields}
    with httpx.Client(base_url=server.url, timeout=60) as client:
        for path, body in ((CHAT, chat), (TEXT, text)):
            whole = client.post(path, json=body).json()["choices"]
            parts = events(client.post(path, json={**body, "stream": True}).text)
            for choice in whole:
                chunks = [one for part in parts for one in part["choices"] if one["index"] == choice["index"]]
                found = [one["logprobs"] for one in chunks if one["logprobs"]]
                if path == CHAT:
                    assert [entry for one in found for entry in one["content"]] == choice["logprobs"]["content"]
                    told = [one["delta"].get("content") for one in chunks if not one["logprobs"]]
                    assert not any(told), "text without the log-probabilities of its tokens"
                else:
                    joined = {key: [entry for one in found for entry in one[key]] for key in choice["logprobs"]}
                    assert joined == choice["logprobs"]


def test_they_are_those_of_transformers(server: RunningServer, tiny_model: Path) -> None:
    ids = [5, 77, 131, 9, 42, 200, 17]
    body = {"prompt": ids, "max_tokens": 0, "echo": True, "logprobs": 2, "return_tokens_as_token_ids": True}
    choice = httpx.post(f"{server.url}{TEXT}", json=body, timeout=60).json()["choices"][0]
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    with torch.inference_mode():
        scores = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    expected = [float(row[id]) for row, id in zip(scores, ids[1:], strict=True)]
    assert choice["logprobs"]["token_logprobs"][1:] == pytest.approx(expected, abs=1e-3)
    assert choice["logprobs"]["tokens"] == [f"token_id:{id}" for id in ids]
    for row, top in zip(scores, choice["logprobs"]["top_logprobs"][1:], strict=True):
        best = f"token_id:{int(row.argmax())}"
        assert max(top, key=top.get) == best
        assert math.exp(top[best]) == pytest.approx(float(row.max().exp()), abs=1e-3)


def test_bytes_join_to_the_text(server: RunningServer) -> None:
    """Of tokens that are parts of characters too."""
    body = {"messages": HELLO, "max_tokens": 64, "temperature": 2.0, "seed": 3, "logprobs": True, "ignore_eos": True}
    choice = httpx.post(f"{server.url}{CHAT}", json={**body, "skip_special_tokens": False}, timeout=60).json()
    content = choice["choices"][0]["logprobs"]["content"]
    joined = b"".join(bytes(one["bytes"]) for one in content).decode("utf-8", "replace")
    assert joined == choice["choices"][0]["message"]["content"]
