"""The in-process transport streams, and lets the app see that the client has gone."""

import asyncio
from typing import Any

import httpx
import pytest

from runtime.cli.client import App, InProcessTransport


def client(app: App) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=InProcessTransport(app), base_url="http://127.0.0.1")


async def start(send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"x-a", b"1")]})


def chunk(body: bytes, more: bool = True) -> dict[str, Any]:
    return {"type": "http.response.body", "body": body, "more_body": more}


def test_a_request_and_its_response_arrive_whole() -> None:
    seen: dict[str, Any] = {}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.update(scope, body=(await receive())["body"])
        await start(send)
        await send(chunk(b"a"))
        await send(chunk(b"b", more=False))

    async def go() -> httpx.Response:
        async with client(app) as http:
            return await http.post("/x%20y?q=1", content=b"hello")

    response = asyncio.run(go())
    assert (response.status_code, response.content, response.headers["x-a"]) == (200, b"ab", "1")
    assert (seen["method"], seen["path"], seen["query_string"], seen["body"]) == (
        "POST",
        "/x y",
        b"q=1",
        b"hello",
    )


def test_the_body_is_there_before_the_app_has_finished() -> None:
    async def go() -> list[bytes]:
        go_on = asyncio.Event()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await start(send)
            await send(chunk(b"first"))
            await go_on.wait()  # would wait for ever if the response came only at the end
            await send(chunk(b"last", more=False))

        got = []
        async with client(app) as http, http.stream("GET", "/") as response:
            async for piece in response.aiter_raw():
                got.append(piece)
                go_on.set()
        return got

    assert asyncio.run(go()) == [b"first", b"last"]


def test_leaving_the_response_is_a_disconnect() -> None:
    async def go() -> tuple[str, bool]:
        seen = ""
        refused = False

        async def app(scope: Any, receive: Any, send: Any) -> None:
            nonlocal seen, refused
            await receive()
            await start(send)
            await send(chunk(b"first"))
            seen = (await receive())["type"]
            try:
                await send(chunk(b"more"))
            except OSError:
                refused = True

        async with client(app) as http, http.stream("GET", "/") as response:
            await anext(response.aiter_raw())
        return seen, refused

    assert asyncio.run(go()) == ("http.disconnect", True)


def test_giving_up_before_the_response_is_a_disconnect() -> None:
    async def go() -> str:
        seen = ""

        async def app(scope: Any, receive: Any, send: Any) -> None:
            nonlocal seen
            await receive()
            seen = (await receive())["type"]

        async with client(app) as http:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await http.get("/")
        return seen

    assert asyncio.run(go()) == "http.disconnect"


def test_an_app_that_fails_raises_and_one_that_says_nothing_is_a_protocol_error() -> None:
    async def fails(scope: Any, receive: Any, send: Any) -> None:
        raise LookupError("in the app")

    async def silent(scope: Any, receive: Any, send: Any) -> None:
        return

    async def go(app: App) -> None:
        async with client(app) as http:
            await http.get("/")

    with pytest.raises(LookupError, match="in the app"):
        asyncio.run(go(fails))
    with pytest.raises(httpx.RemoteProtocolError, match="without a response"):
        asyncio.run(go(silent))
