"""Bodies that would hold Python's lock for long are refused before they are decoded."""

from typing import Any

import httpx
import msgspec
import pytest

from runtime.api.http import body as counts
from runtime.api.http.body import parse_fields
from runtime.api.openai import schema as cost
from runtime.api.openai.schema import check_cost, check_messages
from runtime.errors import InvalidRequest

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def _small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real limits need bodies of megabytes."""
    monkeypatch.setattr(counts, "LARGE", 10)
    monkeypatch.setattr(counts, "MAX_STRINGS", 60)
    monkeypatch.setattr(counts, "MAX_VALUES", 200)
    monkeypatch.setattr(cost, "MAX_FIELD", 100)
    monkeypatch.setattr(cost, "MAX_IDS", 50)
    monkeypatch.setattr(cost, "MAX_LISTS", 40)


def check(body: Any) -> None:
    encoded = msgspec.json.encode(body)
    check_messages(encoded, max_messages=5)
    check_cost(parse_fields(encoded))


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"metadata": {"a": "b" * 100}}, "metadata"),
        ({"prompt": [1] * 51}, "prompt"),
        ({"prompt": [[1, 2]] * 30}, "prompt"),
        ({"prompt": [[]] * 41}, "prompt"),
        ({"tokens": [1] * 51}, "tokens"),
        ({"prompt": ["a"] * 61}, None),
        ({f"key {index}": 1 for index in range(61)}, None),
        ({"messages": [{"role": "user", "content": "x"}] * 20}, "messages"),
        ({"prompt": "a", "colour": [[]] * 202}, "colour"),
        ({"prompt": 'a "quoted", \\', "tools": [{}] * 202, "stop": "b, c"}, "tools"),
        ({"a": [{"b": [1] * 202}]}, "b"),
    ],
)
def test_too_much(body: Any, param: str | None) -> None:
    with pytest.raises(InvalidRequest) as refused:
        check(body)
    assert refused.value.param == param


@pytest.mark.parametrize(
    "body",
    [
        {"stop": ["a"] * 16},
        {"prompt": "a, b [" * 100},
        {"prompt": '"quoted", ' * 300},
        {"prompt": "\\, " * 150 + "\\"},
        {"prompt": [1] * 50},
        {"prompt": ["many, many, commas [" * 10] * 10},
        {"messages": [{"role": "user", "content": '{"role": "x"}' * 50}] * 5},
    ],
)
def test_what_a_context_can_hold_passes(body: Any) -> None:
    check(body)


async def test_large_bodies_are_parsed_beside_the_loop_with_the_same_answers(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.api.openai.schema.LARGE", 10)
    good = await client.post("/v1/completions", json={"prompt": "abc", "max_tokens": 2, "colour": 1})
    assert good.json()["choices"][0]["text"] == "ab"
    assert good.headers["x-eft-warning"] == "unknown fields: colour"
    bad = await client.post("/v1/completions", json={"prompt": "abc", "max_tokens": "two"})
    assert bad.json()["error"]["param"] == "max_tokens"
