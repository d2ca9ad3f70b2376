"""The stream between two processes: whole messages, deadlines, and an other end that has gone."""

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from runtime.workers.parallel.messages import Link, LinkClosed


@pytest.fixture
def ends() -> Iterator[tuple[Link, Link, socket.socket]]:
    """Two links, and the bare socket of the second."""
    first, second = socket.socketpair()
    one, other = Link(first), Link(second)
    yield one, other, second
    one.close()
    other.close()


def test_messages_arrive_whole_and_in_order(ends: tuple[Link, Link, socket.socket]) -> None:
    one, other, _ = ends
    large = bytes(range(256)) * 20_000  # more than a socket holds: sending waits for who receives
    sender = threading.Thread(target=lambda: [one.send(data) for data in (b"", b"a", large, b"b")])
    sender.start()
    assert [other.receive(time.monotonic() + 20) for _ in range(4)] == [b"", b"a", large, b"b"]
    sender.join()


def test_deadlines(ends: tuple[Link, Link, socket.socket]) -> None:
    one, other, _ = ends
    with pytest.raises(TimeoutError):
        other.receive(time.monotonic() + 0.05)
    with pytest.raises(TimeoutError):
        one.send(bytes(50_000_000), time.monotonic() + 0.05)


def test_an_end_that_has_gone_or_sends_what_is_no_message(ends: tuple[Link, Link, socket.socket]) -> None:
    one, other, bare = ends
    one.send(b"four")
    with pytest.raises(LinkClosed, match="a message of 4 bytes"):
        other.receive(most=3)
    bare.sendall(b"\xff" * 8)
    with pytest.raises(LinkClosed, match="a message of"):
        one.receive()
    one.close()
    with pytest.raises(LinkClosed):
        other.receive()
