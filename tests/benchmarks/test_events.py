"""Events out of answers that come in pieces, in the framings that servers use (RFC 9112, section 7.1)."""

import asyncio

import pytest

from benchmarks.peers.events import AnswerError, post

EVENTS = [b'{"a": 1}', b'{"b": "\xc3\xa9"}', b"[DONE]"]
BODY = b"".join(b"data: %s\n\n" % event for event in EVENTS)
OK = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"


def chunks(body: bytes, size: int) -> bytes:
    pieces = [body[at : at + size] for at in range(0, len(body), size)]
    return b"".join(b"%x;name=value\r\n%s\r\n" % (len(piece), piece) for piece in pieces)


def events_of(answer: bytes, *, at_once: int) -> list[bytes]:
    """What `post` finds in an answer of which so many bytes come at once; the connection ends after it."""
    asked: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readuntil(b"\r\n\r\n"))
        asked.append(await reader.readexactly(2))
        for at in range(0, len(answer), at_once):
            writer.write(answer[at : at + at_once])
            await writer.drain()
            await asyncio.sleep(0)
        writer.close()

    async def run() -> list[bytes]:
        found: list[bytes] = []
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            await post("127.0.0.1", port, "/v1/completions", b"{}", lambda event, _: found.append(event))
        return found

    found = asyncio.run(run())
    assert asked[0].startswith(b"POST /v1/completions HTTP/1.1\r\n")
    assert asked[1] == b"{}"
    return found


@pytest.mark.parametrize("at_once", [1, 7, 10_000])
@pytest.mark.parametrize(
    "answer",
    [CHUNKED + chunks(BODY, 10) + b"0\r\n\r\n", CHUNKED + chunks(BODY, 1000) + b"0\r\n\r\n", OK + b"\r\n" + BODY],
    ids=["small chunks", "one chunk", "to the end of the connection"],
)
def test_events_are_found_however_they_come(answer: bytes, at_once: int) -> None:
    assert events_of(answer, at_once=at_once) == EVENTS


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"HTTP/1.1 400 Bad Request\r\nContent-Length: 13\r\n\r\n" + b'{"no": "way"}', r'400: {"no": "way"}'),
        (
            b"HTTP/1.1 503 No\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks(b"busy\nnow", 3) + b"0\r\n\r\n",
            "503: busy",
        ),
        (CHUNKED + chunks(BODY, 10), "the connection ended before the answer did"),
        (CHUNKED[:20], "the connection ended before the answer did"),
        (b"", "the connection ended before the answer did"),
    ],
)
def test_anything_else_is_an_error(answer: bytes, said: str) -> None:
    with pytest.raises(AnswerError, match=said):
        events_of(answer, at_once=5)
