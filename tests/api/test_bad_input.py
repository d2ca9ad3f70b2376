"""Hostile bytes on a real socket. After each, the server gives the golden answer, and holds nothing."""

import contextlib
import json
import socket
from collections.abc import Iterator

import httpx
import pytest

from runtime.support import failpoints
from tests.api.conftest import RunningServer
from tests.waiting import wait_until

GOLDEN = {"prompt": "The newt is a small", "max_tokens": 12, "temperature": 0, "return_token_ids": True}
LIMIT = 1024 * 1024  # `max_body` of the shared server


def exchange(server: RunningServer, sent: bytes, *, wait: float = 10.0) -> bytes:
    """Send, and read until the server closes (or, for what it keeps open, until it has answered)."""
    with socket.create_connection(server.address, timeout=wait) as connection:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it answered before it had read all
            connection.sendall(sent)
        received = b""
        with contextlib.suppress(ConnectionResetError):
            while chunk := connection.recv(65536):
                received += chunk
        return received


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def post(body: bytes, *headers: bytes, path: bytes = b"/v1/completions") -> bytes:
    lines = [
        b"POST " + path + b" HTTP/1.1",
        b"Host: [::1]",
        b"Connection: close",
        b"Content-Type: application/json",
        *headers,
    ]
    if not any(b"ength" in header or b"ncoding" in header for header in headers):
        lines.append(b"Content-Length: %d" % len(body))
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def golden(server: RunningServer) -> object:
    answer = httpx.post(f"{server.url}/v1/completions", json=GOLDEN, timeout=30)
    assert answer.status_code == 200
    return answer.json()["choices"]


@pytest.fixture(scope="module")
def expected(server: RunningServer) -> object:
    return golden(server)


@pytest.fixture(autouse=True)
def _unharmed(server: RunningServer, expected: object) -> Iterator[None]:
    yield
    assert golden(server) == expected
    load = httpx.get(f"{server.url}/load").json()
    assert (load["running"], load["kv_cache_usage"]) == (0, 0.0)


def test_the_golden_request_over_a_raw_socket(server: RunningServer, expected: object) -> None:
    answer = exchange(server, post(json.dumps(GOLDEN).encode()))
    assert status(answer) == 200
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["choices"] == expected


@pytest.mark.parametrize(
    ("sent", "codes"),
    [
        pytest.param(post(b'{"prompt": '), {400}, id="malformed JSON"),
        pytest.param(post(b""), {400}, id="empty body"),
        pytest.param(post(b'{"prompt": "\xff"}'), {400}, id="bad UTF-8"),
        pytest.param(post(b"\xef\xbb\xbf{}"), {400}, id="byte order mark"),
        pytest.param(post(b'{"prompt": "a"} {}'), {400}, id="trailing bytes"),
        pytest.param(post(b'{"prompt": "a", "prompt": "b"}'), {400}, id="duplicate key"),
        pytest.param(post(b'{"prompt": ' + b"[" * 100_000), {400}, id="deep JSON"),
        pytest.param(post(b'{"prompt": "\\ud800"}'), {400}, id="lone surrogate"),
        pytest.param(post(b"<a/>", b"Content-Type: application/xml"), {400, 415}, id="two content types"),
        pytest.param(post(b"\x1f\x8b", b"Content-Encoding: gzip", b"Content-Length: 2"), {415}, id="gzip"),
        pytest.param(post(b"", b"Content-Length: %d" % (LIMIT + 1)), {413}, id="declared too large"),
        pytest.param(post(b" " * (LIMIT + 1)), {413}, id="too large"),
        pytest.param(
            post((b"%x\r\n" % 65536 + b" " * 65536 + b"\r\n") * 17, b"Transfer-Encoding: chunked"),
            {413},
            id="chunked too large",
        ),
        pytest.param(post(b"zz\r\n", b"Transfer-Encoding: chunked"), {400}, id="malformed chunk"),
        pytest.param(post(b"0\r\n\r\n", b"Content-Length: 5", b"Transfer-Encoding: chunked"), {400}, id="both lengths"),
        pytest.param(post(b"", b"Content-Length: -1"), {400}, id="negative length"),
        pytest.param(post(b"", b"Content-Length: 1", b"Content-Length: 2"), {400}, id="two lengths"),
        pytest.param(post(b"", b"Content-Length: 1e3"), {400}, id="length that is no number"),
        pytest.param(post(b"{}", b"X-Long: " + b"y" * 70_000), {400, 431}, id="huge header"),
        pytest.param(post(b"{}", *[b"X-H: y"] * 50_000), {400, 431}, id="50,000 headers"),
        pytest.param(post(b"{}", path=b"/" + b"a" * 70_000), {400, 431}, id="huge path"),
        pytest.param(b"GET /v1/models/\x00 HTTP/1.1\r\nHost: [::1]\r\n\r\n", {400}, id="NUL in the path"),
        pytest.param(
            b"GET /v1/models/%00 HTTP/1.1\r\nHost: [::1]\r\nConnection: close\r\n\r\n", {404}, id="an escaped NUL"
        ),
        pytest.param(
            b"GET /%ff%fe HTTP/1.1\r\nHost: [::1]\r\nConnection: close\r\n\r\n", {404}, id="path that is no UTF-8"
        ),
        pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", {400}, id="TLS"),
        pytest.param(b"GET /health HTTP/1.1\r\n\r\n", {400}, id="no host"),
        pytest.param(
            b"PUT /v1/chat/completions HTTP/1.1\r\nHost: [::1]\r\nConnection: close\r\n\r\n", {405}, id="wrong method"
        ),
        pytest.param(
            b"GET /v1/models HTTP/1.1\r\nHost: [::1]\r\nConnection: Upgrade, close\r\nUpgrade: websocket\r\n\r\n",
            {200},
            id="upgrade",
        ),
    ],
)
def test_it_is_answered_with_an_error_of_ours(server: RunningServer, sent: bytes, codes: set[int]) -> None:
    answer = exchange(server, sent)
    assert status(answer) in codes
    if codes != {200}:
        error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert "/" not in error["message"].replace("application/json", "")
        assert "Traceback" not in error["message"]


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(b"", id="silence"),
        pytest.param(b"GET /health HT", id="half a request line"),
        pytest.param(b"GET /health HTTP/1.1\r\nHost: [::1]\r\nX-", id="half headers"),
        pytest.param(b"GET /health HTTP/1.1\r\nHost: [::1]\r\n\r\nGET /hea", id="half a second request"),
    ],
)
def test_unfinished_headers_end_the_connection(server: RunningServer, sent: bytes) -> None:
    answer = exchange(server, sent)  # returns only because the server closes; the socket would time out otherwise
    complete = sent.count(b"\r\n\r\n")
    assert answer.count(b"HTTP/1.1 200") == complete


def test_an_unfinished_body_is_answered_and_ends(server: RunningServer) -> None:
    answer = exchange(server, post(b'{"prompt"', b"Content-Length: 100"))
    assert status(answer) == 408
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "request_timeout"


def test_an_idle_connection_may_wait_for_its_next_request(server: RunningServer) -> None:
    with socket.create_connection(server.address, timeout=10) as connection:
        request = b"GET /version HTTP/1.1\r\nHost: [::1]\r\n\r\n"
        connection.sendall(request)
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        connection.settimeout(1.5)  # more than the header timeout
        with pytest.raises(TimeoutError):
            connection.recv(1)
        connection.settimeout(10)
        connection.sendall(request)
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")


def test_slow_headers_that_arrive_in_time(server: RunningServer) -> None:
    with socket.create_connection(server.address, timeout=10) as connection:
        for part in (b"GET /version HT", b"TP/1.1\r\nHo", b"st: [::1]\r\n", b"\r\n"):
            connection.sendall(part)
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")


def test_hundreds_of_slow_sockets_do_not_keep_others_out(server: RunningServer) -> None:
    slow = [socket.create_connection(server.address, timeout=10) for _ in range(300)]
    try:
        for index, connection in enumerate(slow):
            half = b"GET /health HTT" if index % 2 else post(b"{", b"Content-Length: 9")
            connection.sendall(half)
        assert httpx.get(f"{server.url}/health").status_code == 200
        for connection in slow:
            while connection.recv(65536):
                pass
    finally:
        for connection in slow:
            connection.close()


@pytest.mark.parametrize("begun", [False, True])
def test_a_half_closed_connection_is_a_client_that_left(server: RunningServer, begun: bool) -> None:
    """One that closes at once may have left before its request was read; one that has read a token is aborted."""
    aborted, generated = 'request_success_total{finished_reason="abort",', "generation_tokens_total{"
    before = metric(server, aborted), metric(server, generated)
    body = json.dumps({**GOLDEN, "max_tokens": 400, "ignore_eos": True, "stream": begun}).encode()
    failpoints.configure("worker.row=sleep:0.01")  # so that there is a middle to leave in
    try:
        with socket.create_connection(server.address, timeout=10) as connection:
            connection.sendall(post(body))
            received = b""
            while begun and b"data: " not in received:
                received += connection.recv(65536)
            connection.shutdown(socket.SHUT_WR)
            while chunk := connection.recv(65536):
                received += chunk
    finally:
        failpoints.configure("")
    assert b"[DONE]" not in received
    assert received.startswith(b"HTTP/1.1 200") if begun else received == b""
    wait_until(lambda: httpx.get(f"{server.url}/load").json()["server_load"] == 0)
    assert metric(server, aborted) == before[0] + 1 or not begun
    assert metric(server, generated) < before[1] + 400


def metric(server: RunningServer, name: str) -> float:
    """The value of `eft:…`, up to some of its labels."""
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    (line,) = (line for line in lines if line.startswith(f"eft:{name}"))
    return float(line.rpartition(" ")[2])
