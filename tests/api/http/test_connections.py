"""Too many connections and too few descriptors: accepting pauses, what is open is answered, and files can be opened."""

import asyncio
import contextlib
import resource
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import httpx
import pytest

from runtime.api.http.acceptor import Acceptor, connections_for, raise_descriptor_limit
from runtime.api.http.protocol import Protocol
from tests.end_to_end.process import ServerProcess
from tests.jobs import NEWT_ROWS, newt_recipe
from tests.waiting import wait_until


@contextlib.contextmanager
def descriptors(limit: int) -> Iterator[None]:
    """This limit for processes that are started meanwhile."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_the_soft_limit_is_raised_and_a_reserve_kept() -> None:
    with descriptors(256):
        limit = raise_descriptor_limit()
        assert limit > 256
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == limit
    assert 0 < connections_for(1024) <= 1024 - 128
    assert 4 <= connections_for(64) <= 48


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nX-"])
def test_a_flood_of_sockets_leaves_jobs_and_later_clients_alone(tiny_model: Path, tmp_path: Path, sent: bytes) -> None:
    """With 100 descriptors in all, of which 300 sockets would take every one. No job is failed by them."""
    server = ServerProcess(
        str(tiny_model), tmp_path / "state", descriptors=100, header_timeout="1s", body_timeout="1s", threads=1
    )
    with server:
        assert server.soft_limit == 100
        recipe = newt_recipe(max_steps=60, save_steps=1, learning_rate=1e-4, loss_watchdog_threshold=100)
        job = server.train(recipe, {"train.jsonl": NEWT_ROWS})
        host, port = server.address
        held: list[socket.socket] = []
        end = time.monotonic() + 4
        while time.monotonic() < end:
            one = socket.socket()
            one.settimeout(0.2)
            with contextlib.suppress(OSError):
                one.connect((host, port))
                one.sendall(sent)
            held.append(one)
            if len(held) > 300:
                held.pop(0).close()
        assert server.open_descriptors <= 100
        for one in held:
            one.close()
        wait_until(lambda: httpx.get(f"{server.url}/health", trust_env=False, timeout=20).status_code == 200, 30)
        assert server.wait_for_job(job)["status"] == "succeeded"
        assert server.tokens("newt", "road", 2)


@pytest.mark.anyio
async def test_accepting_pauses_at_the_limit_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the log says so once, however often clients come back."""
    log = Mock()
    monkeypatch.setattr("runtime.api.http.acceptor._log", log)
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    address = listener.getsockname()
    rooms: list[int] = []

    class Echo(asyncio.Protocol):
        on_lost = None

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self.transport = transport
            transport.write(b"hello")  # type: ignore[attr-defined]

        def connection_lost(self, exc: Exception | None) -> None:
            assert self.on_lost is not None
            self.on_lost()

    def make() -> Protocol:
        return Echo()  # type: ignore[return-value]

    acceptor = Acceptor(listener, make, most=2, make_room=lambda: rooms.append(1))
    try:
        clients = [await asyncio.open_connection(*address) for _ in range(3)]
        for reader, _ in clients[:2]:
            assert await asyncio.wait_for(reader.readexactly(5), 5) == b"hello"
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(clients[2][0].readexactly(5), 0.2)
        assert rooms
        for index in range(5):
            clients[index][1].close()
            assert await asyncio.wait_for(clients[index + 2][0].readexactly(5), 5) == b"hello"
            clients.append(await asyncio.open_connection(*address))
            await asyncio.sleep(0.05)
        assert len(rooms) > 5
        log.warning.assert_called_once_with("connections_at_limit", limit=2)
    finally:
        acceptor.close()
        for _, writer in clients:
            writer.close()
        listener.close()
