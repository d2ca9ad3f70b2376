"""Sampling fields: what reaches the engine, and the ranges of the bad-input catalogue."""

from typing import Any

import httpx
import pytest

from runtime.messages import SamplingParams
from tests.api.fakes import FakeService

pytestmark = pytest.mark.anyio
URL = "/v1/completions"

FIELDS: dict[str, Any] = {
    "max_tokens": 3,
    "min_tokens": 2,
    "temperature": 0.5,
    "top_p": 0.25,
    "top_k": 7,
    "min_p": 0.125,
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
    expected = {**FIELDS, "stop": ("x", "y"), "stop_token_ids": (3, 4)}
    assert service.submitted[0].params == SamplingParams(**expected)


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


@pytest.mark.parametrize(("best_of", "status"), [(1, 400), (2, 200), (3, 400)])
async def test_best_of_is_n_or_refused(client: httpx.AsyncClient, best_of: int, status: int) -> None:
    answer = await client.post(URL, json={"prompt": "a", "n": 2, "best_of": best_of})
    assert answer.status_code == status
    if status == 400:
        assert answer.json()["error"]["param"] == "best_of"
