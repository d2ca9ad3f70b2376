"""Clients that read slowly, or not at all, against an app that would write for ever."""

import asyncio
import socket
from typing import Any

import pytest
import uvicorn

from runtime.api.http.protocol import Protocol, SocketProtocol

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


async def write_at_once(scope: Any, receive: Any, send: Any) -> None:
    """An app whose whole answer is in the server's buffer before the client has read any of it."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": CHUNK * 256, "more_body": False})


class Server(uvicorn.Server):
    """Closes at once, whatever is still connected."""

    def __init__(self, app: Any, write_timeout: float) -> None:
        protocol = Protocol.configured(header_timeout=5.0, write_timeout=write_timeout, socket_paths={"/socket"})
        sockets = SocketProtocol.configured(write_timeout=write_timeout)
        super().__init__(
            uvicorn.Config(app, http=protocol, ws=sockets, lifespan="off", log_config=None, access_log=False)
        )
        self.listener = socket.create_server(("127.0.0.1", 0))

    async def __aenter__(self) -> "Server":
        self._task = asyncio.create_task(self._serve([self.listener]))
        return self

    async def __aexit__(self, *error: object) -> None:
        self.should_exit = self.force_exit = True
        await self._task


HANDSHAKE = (
    b"GET /socket HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)


async def connect(server: Server, request: bytes = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n") -> socket.socket:
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
    client.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(client, server.listener.getsockname())
    await loop.sock_sendall(client, request)
    return client


async def test_a_client_that_reads_nothing_is_cut_off() -> None:
    app = Writer(chunks=10**9)
    async with Server(app, write_timeout=0.3) as server:
        client = await connect(server)
        await asyncio.wait_for(app.ended.wait(), 20)
        client.close()
    assert app.written * len(CHUNK) < 64 * 1024**2  # what waited in buffers, not gigabytes


@pytest.mark.may_block("its app writes gigabytes at once")
async def test_an_answer_that_nobody_reads_is_not_kept() -> None:
    async with Server(write_at_once, write_timeout=0.3) as server:
        client = await connect(server)
        connections = server.server_state.connections
        for wanted in (1, 0):
            for _ in range(200):
                if len(connections) == wanted:
                    break
                await asyncio.sleep(0.05)
            assert len(connections) == wanted
        client.close()


async def test_a_slow_reader_is_not_one_that_reads_nothing() -> None:
    app = Writer(chunks=100)
    async with Server(app, write_timeout=0.5) as server:
        client = await connect(server)
        loop = asyncio.get_running_loop()
        received = 0
        for _ in range(30):  # three times the write timeout, at a crawl
            received += len(await loop.sock_recv(client, 8192))
            await asyncio.sleep(0.05)
        while received < 100 * len(CHUNK):
            chunk = await asyncio.wait_for(loop.sock_recv(client, 1 << 20), 10)
            assert chunk, "a client that was reading was cut off"
            received += len(chunk)
        await asyncio.wait_for(app.ended.wait(), 10)
        client.close()


async def test_a_websocket_whose_client_reads_nothing_ends() -> None:
    ended: asyncio.Queue[type[BaseException]] = asyncio.Queue()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "websocket"
        await send({"type": "websocket.accept"})
        try:
            while True:
                await send({"type": "websocket.send", "bytes": CHUNK})
                await asyncio.sleep(0)
        except BaseException as error:
            await ended.put(type(error))
            raise

    async with Server(app, write_timeout=0.3) as server:
        client = await connect(server, HANDSHAKE)
        assert issubclass(await asyncio.wait_for(ended.get(), 20), OSError)
        client.close()
