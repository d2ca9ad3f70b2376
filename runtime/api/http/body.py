"""A JSON body: read under a limit and a deadline (`runtime.api.http.body`), and decoded into a struct.

It must be UTF-8, plainly encoded. Anything else is refused by name, without guessing.
"""

import asyncio
import json
import re
from collections.abc import AsyncGenerator, Mapping
from typing import Any, TypeVar

import msgspec
from litestar import Request

from runtime.api.http.errors import ClientDisconnected, RequestTimeout, from_validation
from runtime.errors import InvalidRequest, PayloadTooLarge, UnsupportedMediaType
from settings.api import ServerSettings

LARGE = 256 * 1024
"""Bytes from which a body, or a message of a WebSocket, is decoded on its own thread."""

# -- receive ---------------------------------------------------------------------------------------
#
# Read a request's body, of any type, under a limit and a deadline.


def check_encoding(request: Request[Any, Any, Any]) -> None:
    """Raise `UnsupportedMediaType` for a compressed body."""
    if request.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
        raise UnsupportedMediaType("Send the body without a Content-Encoding.")


def content_type(request: Request[Any, Any, Any]) -> str:
    """The one Content-Type header; "" if the headers show neither that nor a body.

    Raises `UnsupportedMediaType` for several, and for a body without one: a browser sends such a body from any page
    without a preflight; for `application/json` it sends one.
    """
    types = request.headers.getall("content-type", [])
    if len(types) > 1:
        raise UnsupportedMediaType("The request has several Content-Type headers; send one.")
    given = "".join(types).strip()
    has_body = request.headers.get("content-length", "").strip("0") or "transfer-encoding" in request.headers
    check_typed(request, b"?" if has_body else b"")
    return given


def check_typed(request: Request[Any, Any, Any], body: bytes) -> None:
    """Raise `UnsupportedMediaType` for a body without a Content-Type."""
    if body and not request.headers.get("content-type", "").strip():
        raise UnsupportedMediaType(
            "The body has no Content-Type. Send one: `application/json`, or what the endpoint takes."
        )


def check_length(request: Request[Any, Any, Any], limit: int) -> None:
    """Raise `PayloadTooLarge` if Content-Length is over `limit` bytes."""
    declared = request.headers.get("content-length", "")
    if declared.isascii() and declared.isdigit() and int(declared[:20]) > limit:
        raise too_large(limit)


async def receive_all(request: Request[Any, Any, Any], *, limit: int, timeout: float) -> bytes:
    """The whole body, complete in `timeout` seconds.

    Raises `PayloadTooLarge`, `RequestTimeout`, `ClientDisconnected`.
    """
    check_length(request, limit)
    try:
        async with asyncio.timeout(timeout):
            return b"".join([chunk async for chunk in _chunks(request, limit)])
    except TimeoutError:
        raise RequestTimeout(f"The request's body was not complete after {timeout:g} seconds.") from None


async def receive_chunks(request: Request[Any, Any, Any], *, limit: int, timeout: float) -> AsyncGenerator[bytes, None]:
    """Chunks of the body as they arrive, each within `timeout` seconds. Raises as `receive_all` does."""
    check_length(request, limit)
    chunks = _chunks(request, limit)
    while True:
        try:
            async with asyncio.timeout(timeout):
                chunk = await anext(chunks, None)
        except TimeoutError:
            raise RequestTimeout(f"Nothing of the request's body came for {timeout:g} seconds.") from None
        if chunk is None:
            return
        yield chunk


async def _chunks(request: Request[Any, Any, Any], limit: int) -> AsyncGenerator[bytes, None]:
    size = 0
    more = True
    while more:
        message: Any = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnected("The client left before its request was complete.")
        chunk: bytes = message.get("body", b"")
        more = message.get("more_body", False)
        size += len(chunk)
        if size > limit:
            raise too_large(limit)
        yield chunk


def too_large(limit: int) -> PayloadTooLarge:
    """Error for a body over `limit` bytes."""
    return PayloadTooLarge(f"The request's body is larger than {limit} bytes.")


T = TypeVar("T")
Fields = Mapping[str, msgspec.Raw]
"""The top level of a JSON object: each key with its value still encoded."""

_BOM = b"\xef\xbb\xbf"
_fields_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])
MAX_STRINGS = 150_000
"""Most strings in a body, keys included: the longest allowed chat has about half of that."""

MAX_VALUES = 3_000_000
"""Most commas outside of a body's strings: the largest prompt of token ids has two millions."""

MAX_KEYS = 1000
MAX_KEY = 256
_KEY = re.compile(rb'[\s,{]*("[^"\\]*(?:\\.[^"\\]*)*")\s*:\s*')


async def read_body(request: Request[Any, Any, Any], settings: ServerSettings) -> bytes:
    """The whole body.

    Raises `UnsupportedMediaType`, `PayloadTooLarge`, `RequestTimeout`, `ClientDisconnected`.
    """
    _check_headers(request)
    body = await receive_all(request, limit=settings.max_body, timeout=settings.body_timeout)
    check_typed(request, body)
    return body


def parse_fields(body: bytes) -> dict[str, msgspec.Raw]:
    """The object's keys and their still encoded values. Raises `InvalidRequest` for any other body."""
    if body.startswith(_BOM):
        raise InvalidRequest("The body begins with a byte order mark; send UTF-8 without one.")
    try:
        if len(body) > LARGE:
            _check_counts(body)
        body.decode("utf-8")  # msgspec skips strings that are not decoded, valid or not
        fields = _fields_decoder.decode(body)
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"The body is not valid UTF-8 at byte {error.start}.") from None
    except RecursionError:
        raise InvalidRequest("The body is nested too deep.") from None
    except msgspec.ValidationError:
        raise InvalidRequest("The body must be a JSON object.") from None
    except msgspec.DecodeError as error:
        raise _malformed(body, error) from None
    _refuse_duplicates(body, fields)
    return fields


def _check_counts(body: bytes) -> None:
    """Raise `InvalidRequest` for a body whose values are too many to be decoded.

    Decoding holds Python's lock from its first byte to its last, and 16 MiB of tiny values take a second, in which no
    stream moves. Counting bytes takes milliseconds.
    """
    if has_many_strings(body):
        raise InvalidRequest(f"The body holds more than {MAX_STRINGS} strings.")
    if body.count(b",") <= MAX_VALUES:
        return
    parts = body.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')  # every second one is inside a string
    counts = [part.count(b",") for part in parts[::2]]
    if sum(counts) > MAX_VALUES:
        most = 2 * counts.index(max(counts))
        name = parts[most - 1].decode("utf-8", "replace") if most and len(parts[most - 1]) <= MAX_KEY else None
        raise InvalidRequest(f"The body holds more than {MAX_VALUES} values.", param=name)


def has_many_strings(body: bytes) -> bool:
    """A body of more than `MAX_STRINGS` strings. Escaped quotes inside a text do not count."""
    quotes = body.count(b'"')
    return quotes > 2 * MAX_STRINGS and quotes - body.count(b'\\"') > 2 * MAX_STRINGS


def decode(value: bytes | msgspec.Raw, decoder: "msgspec.json.Decoder[T]") -> T:
    """`value` as the decoder's type. Raises `InvalidRequest` with the JSON path as `param`."""
    try:
        return decoder.decode(value)
    except msgspec.ValidationError as error:
        raise from_validation(error) from None
    except RecursionError:
        raise InvalidRequest("The body is nested too deep.") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"The body is not valid JSON: {error}.") from None


def _check_headers(request: Request[Any, Any, Any]) -> None:
    media_type, _, parameters = content_type(request).partition(";")
    if media_type.strip().lower() not in ("application/json", ""):
        raise UnsupportedMediaType("Send JSON, with `Content-Type: application/json`.")
    charset = re.search(r"charset\s*=\s*\"?([^\s\";]+)", parameters, re.IGNORECASE)
    if charset is not None and charset[1].lower() not in ("utf-8", "utf8", "us-ascii"):
        raise UnsupportedMediaType("Send the JSON in UTF-8.")
    check_encoding(request)


def _malformed(body: bytes, error: msgspec.DecodeError) -> InvalidRequest:
    if not body.strip():
        return InvalidRequest("The request has no body; it needs a JSON object.")
    reason = str(error).removeprefix("JSON is malformed: ")
    if reason == "Input data was truncated" and body.rstrip().endswith(b"}"):
        reason = r"an unclosed bracket or string, or half a surrogate pair (\ud800)"
    return InvalidRequest(f"The body is not valid JSON: {reason}.")


def _refuse_duplicates(body: bytes, fields: Fields) -> None:
    """Raise for a key that the top level has twice.

    JSON leaves the meaning of that open, and two readers that pick differently are a hole. Walks the keys and
    skips each value by the length of the one that the decoder kept: with a key there twice, either the walk
    meets it twice, or the other value does not match. Costs a comparison of memory, not a second parse.
    """
    if len(fields) > MAX_KEYS or any(len(key) > MAX_KEY for key in fields):
        raise InvalidRequest(f"The body has more than {MAX_KEYS} keys, or one of over {MAX_KEY} characters.")
    position = 0
    seen: set[str] = set()
    while (match := _KEY.match(body, position)) is not None:
        key = json.loads(match[1])
        value = bytes(fields[key])
        if key in seen or not body.startswith(value, match.end()):
            raise InvalidRequest(f"The body has the key `{key}` twice.", param=key)
        position = match.end() + len(value)
        seen.add(key)
    if fields and body[position:].strip() != b"}":
        raise InvalidRequest("The body has a key twice.")
