"""Sampling fields: what reaches the engine, and the ranges of the bad-input catalogue."""

import hashlib
import inspect
from collections import Counter
from typing import Any

import httpx
import pytest

from runtime.api.openai.schema import ChatRequest, CompletionRequest
from runtime.messages import SamplingParams
from settings.schema import Settings
from tests.api.conftest import client_of
from tests.api.fakes import FakeService, settings_with

pytestmark = pytest.mark.anyio
URL = "/v1/completions"

FIELDS: dict[str, Any] = {
    "max_tokens": 3,
    "min_tokens": 2,
    "temperature": 0.5,
    "top_p": 0.25,
    "top_k": 7,
    "min_p": 0.125,
    "repetition_penalty": 1.25,
    "presence_penalty": -0.5,
    "frequency_penalty": 0.75,
    "logit_bias": {"5": 1.5, "7": -100},
    "bad_words": ["bad"],
    "allowed_token_ids": [5, 7, 9],
    "logprobs": 2,
    "prompt_logprobs": 3,
    "seed": -5,
    "stop": ["x", "y"],
    "stop_token_ids": [3, 4],
    "ignore_eos": True,
    "include_stop_str_in_output": True,
    "skip_special_tokens": False,
}


async def test_every_field_reaches_the_engine(client: httpx.AsyncClient, service: FakeService) -> None:
    assert set(FIELDS) == set(SamplingParams.__struct_fields__)
    await client.post(URL, json={"prompt": "a", **FIELDS})
    expected = {
        **FIELDS,
        "stop": ("x", "y"),
        "stop_token_ids": (3, 4),
        "logit_bias": {5: 1.5, 7: -100.0},
        "bad_words": ("bad",),
        "allowed_token_ids": (5, 7, 9),
    }
    assert service.submitted[0].params == SamplingParams(**expected)


@pytest.mark.parametrize("kind", [ChatRequest, CompletionRequest])
def test_a_sampling_field_is_declared_once(kind: type) -> None:
    """In `SamplingParams`, which bodies inherit; a chat's `logprobs` alone has a type of its own."""
    declared = Counter(name for base in kind.__mro__ for name in inspect.get_annotations(base))
    repeated = {name for name in SamplingParams.__struct_fields__ if declared[name] != 1}
    assert repeated <= {"logprobs"}


async def test_null_is_the_default(client: httpx.AsyncClient, service: FakeService) -> None:
    nothing = {**dict.fromkeys(FIELDS), "n": None, "stream": None, "stream_options": None, "user": None}
    assert (await client.post(URL, json={"prompt": "a", **nothing})).status_code == 200
    assert service.submitted[0].params == SamplingParams(max_tokens=16)


async def test_one_stop_string(client: httpx.AsyncClient, service: FakeService) -> None:
    await client.post(URL, json={"prompt": "a", "stop": "END"})
    assert service.submitted[0].params.stop == ("END",)


async def test_labels_of_the_client_are_accepted(client: httpx.AsyncClient) -> None:
    labels = {"user": "u", "metadata": {"a": "b"}, "safety_identifier": "s", "prompt_cache_key": "k"}
    answer = await client.post(URL, json={"prompt": "a", **labels})
    assert answer.status_code == 200
    assert "x-eft-warning" not in answer.headers


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("max_tokens", 2**63),
        ("max_tokens", 1.5),
        ("max_tokens", "8"),
        ("n", 0),
        ("n", 10**9),
        ("n", -1),
        ("temperature", -1),
        ("temperature", 1e308),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("top_k", 1.5),
        ("min_p", -0.1),
        ("seed", 2**64),
        ("repetition_penalty", 0),
        ("repetition_penalty", 1e308),
        ("presence_penalty", -2.1),
        ("frequency_penalty", 2.1),
        ("logit_bias", {"257": 1}),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {"1": 100.5}),
        ("logit_bias", {"1": "much"}),
        ("logit_bias", [1]),
        ("bad_words", [""]),
        ("bad_words", "bad"),
        ("allowed_token_ids", []),
        ("allowed_token_ids", [257]),
        ("stop", [""]),
        ("stop", ""),
        ("stop", ["x"] * 1000),
        ("stop_token_ids", [257]),
        ("stop_token_ids", [-1]),
        ("min_tokens", 2**31),
        ("min_tokens", -1),
        ("stream", "yes"),
        ("stream_options", {"include_usage": True}),
        ("truncate_prompt_tokens", -2),
        ("cache_salt", "x" * 129),
        ("metadata", {"a": 1}),
        ("ignore_eos", "no"),
    ],
)
async def test_out_of_range(client: httpx.AsyncClient, service: FakeService, field: str, value: Any) -> None:
    answer = await client.post(URL, json={"prompt": "a", field: value})
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert error["type"] == "invalid_request_error"
    assert error["param"].partition(".")[0] == field
    assert not service.submitted


async def test_min_tokens_above_max_tokens(client: httpx.AsyncClient, service: FakeService) -> None:
    answer = await client.post(URL, json={"prompt": "a", "min_tokens": 3, "max_tokens": 2})
    assert answer.json()["error"]["param"] == "min_tokens"
    await client.post(URL, json={"prompt": "a", "min_tokens": 20})  # only the default is in the way
    assert service.submitted[0].params.max_tokens == 20


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999", "-1e999"])
async def test_numbers_that_json_or_floats_do_not_have(client: httpx.AsyncClient, number: str) -> None:
    body = f'{{"prompt": "a", "temperature": {number}}}'.encode()
    answer = await client.post(URL, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400


@pytest.mark.parametrize(
    ("best_of", "stream", "status"), [(1, False, 400), (65, False, 400), (3, True, 400), (2, True, 200)]
)
async def test_best_of_lies_between_n_and_the_limit_and_is_not_streamed(
    client: httpx.AsyncClient, best_of: int, stream: bool, status: int
) -> None:
    answer = await client.post(URL, json={"prompt": "a", "n": 2, "best_of": best_of, "stream": stream})
    assert answer.status_code == status
    if status == 400:
        assert answer.json()["error"]["param"] == "best_of"


async def test_all_of_best_of_are_generated_scored_and_forked_and_n_come_back(
    client: httpx.AsyncClient, service: FakeService
) -> None:
    answer = await client.post(URL, json={"prompt": ["a", "b"], "n": 2, "best_of": 3, "max_tokens": 2})
    assert [choice["index"] for choice in answer.json()["choices"]] == [0, 1, 2, 3]
    assert answer.json()["usage"]["completion_tokens"] == 12  # all that were generated count
    first, second = service.submitted[0].id, service.submitted[3].id
    assert [s.fork_of for s in service.submitted] == [0, first, first, 0, second, second]
    assert len({s.id for s in service.submitted}) == 6
    assert len({s.request_id for s in service.submitted}) == 1
    assert all(s.scored for s in service.submitted)


async def test_the_likeliest_of_best_of_come_first(client: httpx.AsyncClient, service: FakeService) -> None:
    service.logprobs = [-3.0, -1.0, -2.0]
    asked = {"prompt": "a", "n": 2, "best_of": 3, "max_tokens": 1, "request_id": "r"}
    answer = await client.post(URL, json=asked)
    assert [choice["text"] for choice in answer.json()["choices"]] == ["1", "2"]


async def test_urgency_reaches_the_engine(service: FakeService) -> None:
    client = client_of(service, settings_with("scheduler", policy="priority"))
    await client.post(URL, json={"prompt": "a", "priority": -3, "deadline_ms": 1500})
    submission = service.submitted[0]
    assert submission.priority == -3
    assert submission.deadline is not None
    assert submission.deadline - submission.arrival == pytest.approx(1.5)


async def test_a_priority_that_the_policy_would_ignore_is_refused(client: httpx.AsyncClient) -> None:
    answer = await client.post(URL, json={"prompt": "a", "priority": 1})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "priority"
    assert "fcfs" in answer.json()["error"]["message"]
    assert (await client.post(URL, json={"prompt": "a", "priority": 0})).status_code == 200


@pytest.mark.parametrize(
    ("field", "value"),
    [("priority", 2**32), ("deadline_ms", 0), ("deadline_ms", -5), ("deadline_ms", 2**40), ("deadline_ms", "1s")],
)
async def test_urgency_out_of_range(client: httpx.AsyncClient, field: str, value: Any) -> None:
    answer = await client.post(URL, json={"prompt": "a", field: value})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == field


async def test_a_missed_deadline_is_a_504(client: httpx.AsyncClient, service: FakeService) -> None:
    service.timeout_after = 1
    answer = await client.post(URL, json={"prompt": "a", "deadline_ms": 10})
    assert answer.status_code == 504
    assert answer.json()["error"]["code"] == "deadline_exceeded"


async def test_the_tenant_is_a_label_of_the_key_that_was_checked(service: FakeService) -> None:
    key = "sesame"
    client = client_of(service, settings_with("server", api_key=(key,)), authorization=f"Bearer {key}")
    await client.post(URL, json={"prompt": "a"})
    assert service.submitted[0].tenant == hashlib.sha256(key.encode()).hexdigest()[:12]
    open_client = client_of(service, Settings(), authorization="Bearer whatever I like to be")
    await open_client.post(URL, json={"prompt": "a"})
    assert service.submitted[1].tenant == ""  # nobody checked that key, so it buys no share
