"""A JSON body: read under a limit and a deadline (`runtime.api.receive`), and decoded into a struct.

It must be UTF-8, plainly encoded. Everything else is refused by name, not guessed at.
"""

import json
import re
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec
from litestar import Request

from runtime.api.errors import from_validation
from runtime.api.receive import check_encoding, receive_all
from runtime.errors import InvalidRequest, UnsupportedMediaType
from settings.schema import ServerSettings

T = TypeVar("T")
Fields = Mapping[str, msgspec.Raw]
"""The top level of a JSON object: each key with its value still encoded."""

_BOM = b"\xef\xbb\xbf"
_fields_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])
MAX_KEYS = 1000
MAX_KEY = 256
_KEY = re.compile(rb'[\s,{]*("[^"\\]*(?:\\.[^"\\]*)*")\s*:\s*')


async def read_body(request: Request[Any, Any, Any], settings: ServerSettings) -> bytes:
    """The whole body.

    Raises `UnsupportedMediaType`, `PayloadTooLarge`, `RequestTimeout`, `ClientDisconnected`.
    """
    _check_headers(request)
    return await receive_all(request, limit=settings.max_body, timeout=settings.body_timeout)


def parse_fields(body: bytes) -> dict[str, msgspec.Raw]:
    """The object's keys and their still encoded values. Raises `InvalidRequest` for any other body."""
    if body.startswith(_BOM):
        raise InvalidRequest("The body begins with a byte order mark; send UTF-8 without one.")
    try:
        body.decode("utf-8")  # msgspec skips over strings that nobody asked for, valid or not
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
    media_type, _, parameters = request.headers.get("content-type", "application/json").partition(";")
    if media_type.strip().lower() != "application/json":
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
