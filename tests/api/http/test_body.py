"""Bodies: what is read, what is refused, and with which status."""

import gzip
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from runtime.api.body import parse_fields
from runtime.errors import InvalidRequest
from tests.api.conftest import client_of
from tests.api.fakes import FakeService, settings_with

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


async def test_no_content_type_is_json(client: httpx.AsyncClient) -> None:
    assert (await client.post(URL, content=GOOD)).status_code == 200


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
