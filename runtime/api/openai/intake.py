"""The way in, the same for all POST endpoints: from bytes to a checked struct."""

import asyncio
from typing import Any, Generic, TypeVar

import msgspec
from litestar import Request

from runtime.api.body import decode, parse_fields, read_body
from runtime.api.handle import Api
from runtime.api.openai.cost import check_cost, check_strings
from runtime.api.openai.fields import check_fields, report_unknown, unknown_nested

T = TypeVar("T", bound=msgspec.Struct)

LARGE = 256 * 1024
"""Bytes of a body that is worth a thread of its own."""


class Intake(Generic[T]):
    """Reads requests of one kind."""

    def __init__(self, kind: type[T]) -> None:
        self._known = frozenset(kind.__struct_fields__)
        self._decoder = msgspec.json.Decoder(kind)

    async def read(self, request: Request[Any, Any, Any], api: Api) -> T:
        """The request's body as a struct. Raises a `RequestError` for whatever is wrong with it."""
        body = await read_body(request, api.settings.server)
        limits = api.settings.limits
        if len(body) > LARGE:
            asked, unknown = await asyncio.to_thread(self._parse, body, limits.max_messages)
        else:
            asked, unknown = self._parse(body, limits.max_messages)
        report_unknown(request, unknown, limits.unknown_fields)
        return asked

    def _parse(self, body: bytes, max_messages: int) -> tuple[T, list[str]]:
        """The struct, and the names of unknown fields."""
        check_strings(body, max_messages=max_messages)
        fields = parse_fields(body)
        check_cost(fields)
        unknown = check_fields(fields, self._known)
        asked = decode(body, self._decoder)
        return asked, unknown + unknown_nested(fields, max_messages=max_messages)
