"""Clients that read slowly, or not at all, against an app that would write for ever."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvicorn

from runtime.api.protocol import Protocol

pytestmark = pytest.mark.anyio
CHUNK = b"x" * 65536


class Writer:
    """An app that writes `chunks` chunks, or until the client is gone."""

    def __init__(self, chunks: int) -> None:
        self.chunks = chunks
        self.written = 0
        self.ended = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass
        gone = asyncio.ensure_future(receive())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while self.written < self.chunks and not gone.done():
            await send({"type": "http.response.body", "body": CHUNK, "more_body": True})
            self.written += 1
            await asyncio.sleep(0)
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        gone.cancel()
        self.ended.set()


@asynccontextmanager
async def serving(app: Any, write_timeout: float) -> AsyncIterator[tuple[str, int]]:
    listener = socket.create_server(("127.0.0.1", 0))
    protocol = Protocol.configured(header_timeout=5.0, write_timeout=write_timeout)
    config = uvicorn.Config(app, http=protocol, ws="none", lifespan="off", log_config=None, access_log=False)
    server = uvicorn.Server(config)
    task = asyncio.create_task(server._serve([listener]))
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        yield listener.getsockname()
    finally:
        server.should_exit = server.force_exit = True
        await task


async def connect(address: tuple[str, int]) -> socket.socket:
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
    client.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(client, address)
    await loop.sock_sendall(client, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    return client


async def test_a_client_that_reads_nothing_is_cut_off() -> None:
    app = Writer(chunks=10**9)
    async with serving(app, write_timeout=0.3) as address:
        client = await connect(address)
        await asyncio.wait_for(app.ended.wait(), 20)
        client.close()
    assert app.written * len(CHUNK) < 64 * 1024**2  # what waited in buffers, not gigabytes


async def test_the_end_of_an_answer_is_not_kept_for_ever_either() -> None:
    """The app is done, the client has not read the rest, and the connection must go all the same."""
    app = Writer(chunks=100)
    async with serving(app, write_timeout=0.3) as address:
        client = await connect(address)
        loop = asyncio.get_running_loop()
        await asyncio.wait_for(app.ended.wait(), 20)
        received = 0
        with pytest.raises((ConnectionResetError, BrokenPipeError, EOFError)):
            while True:
                await asyncio.sleep(0.5)
                chunk = await loop.sock_recv(client, 1)
                if not chunk or received > 100:
                    raise EOFError
                received += 1
                await loop.sock_sendall(client, b"x")
        client.close()


async def test_a_slow_reader_is_not_one_that_reads_nothing() -> None:
    app = Writer(chunks=100)
    async with serving(app, write_timeout=0.5) as address:
        client = await connect(address)
        loop = asyncio.get_running_loop()
        received = 0
        for _ in range(15):  # three times the write timeout, at a crawl
            received += len(await loop.sock_recv(client, 2048))
            await asyncio.sleep(0.1)
        while received < 100 * len(CHUNK):
            chunk = await asyncio.wait_for(loop.sock_recv(client, 1 << 20), 10)
            assert chunk, "the server cut a client off that was reading"
            received += len(chunk)
        await asyncio.wait_for(app.ended.wait(), 10)
        client.close()
