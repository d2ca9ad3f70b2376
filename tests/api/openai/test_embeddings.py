"""Embeddings, scores and ranks by the unmodified `openai` client; numbers against transformers' hidden states."""

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from tests.adapter_files import make_adapter
from tests.api.conftest import RunningServer
from tests.api.state import stateful_settings

TEXTS = ["The newt is a small amphibian.", "An eft", "When the rain comes in spring, thousands cross. " * 12]
"""The last one has more tokens than a step, so that it is computed in chunks."""


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tiny_model, tmp_path_factory.mktemp("adapter") / "adapter")


@pytest.fixture(scope="module")
def server(tiny_model: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    from msgspec.structs import replace

    settings = stateful_settings(tiny_model, tmp_path_factory.mktemp("state"))
    settings = replace(settings, trainer=replace(settings.trainer, data_roots=(str(adapter.parent),)))
    with RunningServer(settings) as running:
        loaded = httpx.post(
            f"{running.url}/v1/load_lora_adapter", json={"lora_name": "tuned", "lora_path": str(adapter)}, timeout=60
        )
        assert loaded.status_code == 200, loaded.text
        yield running


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def name(client: openai.OpenAI) -> str:
    return client.models.list().data[0].id


def hidden_states(model: Path, adapter: Path | None, ids: list[int]) -> np.ndarray:
    """[tokens, hidden] after the last norm, by transformers and PEFT."""
    import torch
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if adapter is not None:
        from peft import PeftModel

        loaded = PeftModel.from_pretrained(loaded, adapter)
    with torch.no_grad():
        found = loaded(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0]
    return np.asarray(found.numpy(), dtype=np.float64)


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.may_block("transformers runs in this process")
def test_embeddings_are_transformers_hidden_states(
    client: openai.OpenAI, name: str, tiny_model: Path, adapter: Path, pooling: str, adapted: bool
) -> None:
    asked: dict[str, Any] = {"model": "tuned" if adapted else name, "input": TEXTS, "encoding_format": "float"}
    answer = client.embeddings.create(**asked, extra_body={"pooling": pooling})
    raw = client.embeddings.create(**asked, extra_body={"pooling": pooling, "normalize": False})
    counted = 0
    for text, found, plain in zip(TEXTS, answer.data, raw.data, strict=True):
        ids = httpx.post(f"{str(client.base_url)[:-3]}tokenize", json={"prompt": text}).json()["tokens"]
        counted += len(ids)
        states = hidden_states(tiny_model, adapter if adapted else None, ids)
        expected = states.mean(0) if pooling == "mean" else states[-1]
        assert np.abs(np.array(plain.embedding) - expected).max() < 1e-3
        assert np.abs(np.array(found.embedding) - unit(expected)).max() < 1e-3
    assert [item.index for item in answer.data] == [0, 1, 2]
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == counted
    assert counted > 3 * 64


def test_an_adapter_embeds_otherwise(client: openai.OpenAI, name: str) -> None:
    base, tuned = (
        client.embeddings.create(model=model, input="The newt").data[0].embedding for model in (name, "tuned")
    )
    assert np.abs(np.array(base) - np.array(tuned)).max() > 1e-3


def test_forms_of_input_and_output(client: openai.OpenAI, name: str) -> None:
    ids = httpx.post(f"{str(client.base_url)[:-3]}tokenize", json={"prompt": "The newt"}).json()["tokens"]
    inputs: list[Any] = ["The newt", ["The newt"], ids, [ids]]
    vectors = [client.embeddings.create(model=name, input=one).data[0].embedding for one in inputs]
    assert all(vector == vectors[0] for vector in vectors)  # the client asks for base64 by itself
    floats = client.embeddings.create(model=name, input="The newt", encoding_format="float").data[0].embedding
    assert np.array_equal(np.array(floats, dtype=np.float32), np.array(vectors[0], dtype=np.float32))
    body = {"model": name, "input": "The newt", "encoding_format": "base64"}
    encoded = httpx.post(f"{client.base_url}embeddings", json=body).json()["data"][0]["embedding"]
    assert np.array_equal(np.frombuffer(base64.b64decode(encoded), "<f4"), np.array(floats, dtype=np.float32))
    short = client.embeddings.create(model=name, input="The newt", dimensions=5, encoding_format="float")
    assert np.allclose(short.data[0].embedding, unit(np.array(floats[:5])), atol=1e-6)


def test_many_inputs_are_what_one_is(client: openai.OpenAI, name: str) -> None:
    """More of them than may run at once, beside requests that generate."""
    inputs = [f"The eft number {number} crosses the road." for number in range(150)]
    together = client.embeddings.create(model=name, input=inputs)
    assert [item.index for item in together.data] == list(range(150))
    for number in (0, 70, 149):
        alone = client.embeddings.create(model=name, input=inputs[number])
        assert np.allclose(alone.data[0].embedding, together.data[number].embedding, atol=1e-5)
    again = client.embeddings.create(model=name, input=inputs)  # no prefix that is cached stands for hidden states
    assert np.allclose([item.embedding for item in again.data], [item.embedding for item in together.data], atol=1e-5)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", ""]}, "input[1]"),
        ({"input": ["a", 3]}, "input"),
        ({"input": [3, 100_000]}, "input"),
        ({"input": [True]}, "input[0]"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": "a", "dimensions": 65}, "dimensions"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "a", "pooling": "max"}, "pooling"),
        ({"input": ["a"] * 3000}, "input"),
        ({"input": "word " * 2000}, "input"),
        ({"input": [[5] * 513, [5]]}, "input[0]"),
        ({"input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({}, "input"),
    ],
)
def test_what_is_refused(client: openai.OpenAI, body: dict[str, Any], param: str) -> None:
    answer = httpx.post(f"{client.base_url}embeddings", json=body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param, error


def test_a_prompt_of_the_whole_context_and_a_cut_one(client: openai.OpenAI, name: str) -> None:
    whole = client.embeddings.create(model=name, input=[[5 + n % 400 for n in range(512)]])
    assert whole.usage.prompt_tokens == 512
    cut = client.embeddings.create(model=name, input="word " * 2000, extra_body={"truncate_prompt_tokens": -1})
    assert cut.usage.prompt_tokens == 512


def test_scores_and_ranks(client: openai.OpenAI, name: str) -> None:
    url = str(client.base_url)
    query, documents = TEXTS[0], ["The newt is a small amphibian", "def add(a, b)", TEXTS[1]]
    vectors = [item.embedding for item in client.embeddings.create(model=name, input=[query, *documents]).data]
    expected = [float(np.dot(vectors[0], vector)) for vector in vectors[1:]]
    scored = httpx.post(f"{url}score", json={"model": name, "text_1": query, "text_2": documents}).json()
    assert np.allclose([item["score"] for item in scored["data"]], expected, atol=1e-5)
    assert "cosine" in scored["method"]
    paired = httpx.post(f"{url}score", json={"queries": documents, "documents": documents}).json()
    assert np.allclose([item["score"] for item in paired["data"]], 1.0, atol=1e-5)
    ranked = httpx.post(f"{url}rerank", json={"query": query, "documents": documents, "top_n": 2}).json()
    order = sorted(range(3), key=lambda index: -expected[index])[:2]
    assert [result["index"] for result in ranked["results"]] == order
    assert ranked["results"][0]["document"] == {"text": documents[order[0]]}
    assert ranked["results"][0]["relevance_score"] == pytest.approx(expected[order[0]], abs=1e-5)
    assert "cosine" in ranked["method"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("score", {}, "text_1"),
        ("score", {"text_1": "a"}, "text_2"),
        ("score", {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, "text_1"),
        ("score", {"text_1": "a", "text_2": []}, "text_1"),
        ("rerank", {"query": "a", "documents": []}, "documents"),
        ("rerank", {"query": "a", "documents": ["b"], "top_n": 0}, "top_n"),
        ("rerank", {"documents": ["b"]}, "query"),
    ],
)
def test_what_scores_refuse(client: openai.OpenAI, path: str, body: dict[str, Any], param: str) -> None:
    answer = httpx.post(f"{client.base_url}{path}", json=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


def test_unknown_models(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="gpt-7", input="x")


def test_the_pool_is_empty_afterwards(server: RunningServer) -> None:
    load = httpx.get(f"{server.url}/load").json()
    assert load["server_load"] == 0
    assert load["kv_cache_usage"] == 0


def test_tokenizer_info(server: RunningServer) -> None:
    info = httpx.get(f"{server.url}/tokenizer_info").json()
    assert info["eos_token"] == "<|im_end|>"
    assert info["model_max_length"] == 512
    assert "<|im_start|>" in info["chat_template"]
