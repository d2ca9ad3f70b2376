"""Reading a request's body off the wire, whatever it holds: under a limit and a deadline."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from litestar import Request

from runtime.api.errors import ClientDisconnected, RequestTimeout
from runtime.errors import PayloadTooLarge, UnsupportedMediaType


def check_encoding(request: Request[Any, Any, Any]) -> None:
    """Raise `UnsupportedMediaType` for a compressed body."""
    if request.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
        raise UnsupportedMediaType("Send the body without a Content-Encoding.")


def check_length(request: Request[Any, Any, Any], limit: int) -> None:
    """Raise `PayloadTooLarge` for a body that says beforehand that it is over `limit` bytes."""
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
    """The body as it comes; more of it must come every `timeout` seconds. Raises as `receive_all` does."""
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
    return PayloadTooLarge(f"The request's body is larger than {limit} bytes.")
