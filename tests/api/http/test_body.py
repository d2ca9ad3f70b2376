"""Bodies: what is read, what is refused, and with which status."""

import gzip
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from runtime.api.app import create_app
from runtime.api.http.body import parse_fields
from runtime.errors import InvalidRequest
from settings.schema import Settings
from tests.api.conftest import client_of
from tests.api.fakes import Exchange, FakeService, settings_with

pytestmark = pytest.mark.anyio
URL = "/v1/completions"
JSON = {"content-type": "application/json"}
GOOD = b'{"prompt": "a", "max_tokens": 1}'


async def post(client: httpx.AsyncClient, content: Any, **headers: str) -> httpx.Response:
    return await client.post(URL, content=content, headers={**JSON, **headers})


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"   ",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b'{"prompt": }',
        b"{'prompt': 'a'}",
        GOOD + b" x",
        GOOD + GOOD,
        b"\xef\xbb\xbf" + GOOD,
        b'{"prompt": "\xff"}',
        b'{"prompt": "a", "unknown": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "a", "prompt": "b"}',
        b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"prompt": "a", "x": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001,
        b'{"prompt": "a", ' + b", ".join(b'"k%d": 1' % index for index in range(2000)) + b"}",
    ],
)
async def test_what_is_not_one_json_object(client: httpx.AsyncClient, service: FakeService, body: bytes) -> None:
    answer = await post(client, body)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert len(answer.content) < 500
    assert not service.submitted


@pytest.mark.parametrize(
    ("body", "fields"),
    [
        (b"{}", []),
        (b' { "a" : 1 , "b" : [ 1 , {"a": 2} ] }\r\n', ["a", "b"]),
        (b'{"a\\"b": "}", "c": {"a\\"b": 1}}', ['a"b', "c"]),
        (b'{"\\u00e9": 1, "e": 1}', ["é", "e"]),
    ],
)
def test_fields_of_an_object(body: bytes, fields: list[str]) -> None:
    assert list(parse_fields(body)) == fields


@pytest.mark.parametrize(
    "body",
    [
        b'{"a":1,"a":1}',
        b'{"a":1,"a":12}',
        b'{"a":12,"a":1}',
        b'{"a":"x","b":2,"a":"x"}',
        b'{"a":[1,2] ,"a": [1, 2]}',
        b'{"\\u0061":1,"a":1}',
        b'{"b":0,"a":{"a":1},"a":{"a":1}}',
    ],
)
def test_a_key_that_is_there_twice(body: bytes) -> None:
    assert json.loads(body)  # other readers take it, each in its own way
    with pytest.raises(InvalidRequest, match="twice"):
        parse_fields(body)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"content-type": "application/xml"}, 415),
        ({"content-type": "application/x-www-form-urlencoded"}, 415),
        ({"content-type": "text/plain"}, 415),
        ({"content-type": "application/json; charset=utf-16"}, 415),
        ({"content-type": "application/json; charset=UTF-8"}, 200),
        ({"content-type": "Application/JSON"}, 200),
        ({"content-type": "application/json", "content-encoding": "identity"}, 200),
    ],
)
async def test_content_types(client: httpx.AsyncClient, headers: dict[str, str], status: int) -> None:
    assert (await client.post(URL, content=GOOD, headers=headers)).status_code == status


@pytest.mark.parametrize("headers", [[], [("content-type", "")], [("content-type", " ")]])
async def test_a_body_needs_a_content_type(client: httpx.AsyncClient, headers: list[tuple[str, str]]) -> None:
    """A browser's page may send a body without one to any address, and no preflight asks first."""

    async def chunks() -> AsyncIterator[bytes]:
        yield GOOD

    for content in (GOOD, chunks()):
        answer = await client.post(URL, content=content, headers=headers)
        assert answer.status_code == 415
        assert answer.json()["error"]["code"] == "unsupported_media_type"


async def test_a_body_without_a_type_or_a_length_is_seen_when_it_is_there(service: FakeService) -> None:
    exchange = Exchange(create_app(service, Settings()), URL, GOOD, headers={"content-type": ""})
    await exchange.task
    assert exchange.status == 415
    assert service.submitted == []


async def test_two_content_types_are_refused(client: httpx.AsyncClient) -> None:
    twice = [("content-type", "text/plain"), ("content-type", "application/json")]
    for headers in (twice, twice[::-1]):
        assert (await client.post(URL, content=GOOD, headers=headers)).status_code == 415


async def test_no_body_is_not_a_question_of_its_type(client: httpx.AsyncClient) -> None:
    assert (await client.post(URL)).status_code == 400


async def test_compressed_bodies_are_refused(client: httpx.AsyncClient) -> None:
    answer = await post(client, gzip.compress(GOOD), **{"content-encoding": "gzip"})
    assert answer.status_code == 415
    assert answer.json()["error"]["code"] == "unsupported_media_type"


async def test_too_large_declared_and_chunked(service: FakeService) -> None:
    client = client_of(service, settings_with("server", max_body=1000))
    read = 0

    async def chunks() -> AsyncIterator[bytes]:
        nonlocal read
        for _ in range(100):
            read += 100
            yield b" " * 100

    declared = await post(client, b" " * 1001)
    assert (declared.status_code, declared.json()["error"]["code"]) == (413, "payload_too_large")
    chunked = await post(client, chunks())
    assert chunked.status_code == 413
    assert read < 2000
    assert chunked.headers["connection"] == "close"
    assert (await post(client, GOOD + b" " * 900)).status_code == 200
