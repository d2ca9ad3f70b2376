"""A tiny OpenAI-style server for the tests of the command line: an ASGI app that echoes.

It knows one model, `echo`. A question that begins with "fail" gets a 400, "busy" a 429 the first
time, "gone" a connection that breaks. The answer to anything else is the question's words, a word a chunk.
"""

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

MODEL = "echo"


class FakeApi:
    """The app. Records what it was asked, and whether a stream was left before its end."""

    def __init__(self, *, key: str | None = None, pause: float = 0.0) -> None:
        self.key = key
        self.pause = pause
        self.bodies: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.left = 0
        self.at_once = 0
        self.most_at_once = 0
        self.on_word: Any = None
        """Called before each streamed word."""
        self._refused: set[str] = set()
        self.room = 100
        """Most tokens for a question that begins with "long"; others have any number."""
        self.known: dict[str, Any] = {}
        """What further paths answer."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return await _lifespan(receive, send)
        body = b""
        more = True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        self.paths.append(scope["path"])
        headers = dict(scope["headers"])
        if self.key and headers.get(b"authorization") != f"Bearer {self.key}".encode():
            return await _reply(send, 401, {"error": {"message": "wrong key"}})
        if scope["path"] == "/v1/models":
            return await _reply(send, 200, {"object": "list", "data": [{"id": MODEL}]})
        if scope["method"] == "GET":
            found = self.known.get(scope["path"])
            return await _reply(send, 200 if found else 404, found or {"error": {"message": "not found"}})
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            return await self._generate(json.loads(body), receive, send)
        finally:
            self.at_once -= 1

    async def _generate(self, body: dict[str, Any], receive: Any, send: Any) -> None:
        self.bodies.append(body)
        question = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
        if question.startswith("fail"):
            return await _reply(send, 400, {"error": {"message": "cannot do that"}})
        if question.startswith("long") and body.get("max_tokens", 0) > self.room:
            return await _reply(send, 400, {"error": {"message": "too long", "param": "max_tokens"}})
        if question.startswith("busy") and question not in self._refused:
            self._refused.add(question)
            return await _reply(send, 429, {"error": {"message": "queue full"}})
        if question.startswith("gone"):
            headers = [(b"content-length", b"100")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            raise ConnectionResetError("the fake server hangs up")
        if body.get("stream"):
            most = body.get("max_tokens") or 1_000_000
            return await self._stream(question, most, receive, send, texts="prompt" in body)
        await asyncio.sleep(self.pause)
        words = len(question.split())
        usage = {"prompt_tokens": words, "completion_tokens": words}
        choice = {"message": {"content": question}, "text": question, "finish_reason": "stop"}
        return await _reply(send, 200, {"choices": [choice], "usage": usage})

    async def _stream(self, question: str, most: int, receive: Any, send: Any, *, texts: bool) -> None:
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        gone = asyncio.ensure_future(receive())

        def piece(text: str) -> dict[str, Any]:
            return {"text": text} if texts else {"delta": {"content": text}}

        words = question.split()
        try:
            for word in words[:most]:
                await asyncio.sleep(self.pause)
                if self.on_word:
                    self.on_word(word)
                if gone.done():
                    self.left += 1
                    return
                await _event(send, {"choices": [piece(word + " ")]})
            await _event(
                send, {"choices": [{**piece(""), "finish_reason": "stop" if len(words) <= most else "length"}]}
            )
            await _event(send, {"choices": [], "usage": {"completion_tokens": min(most, len(words))}})
            await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})
        finally:
            gone.cancel()


async def _lifespan(receive: Any, send: Any) -> None:
    while True:
        message = await receive()
        await send({"type": message["type"] + ".complete"})
        if message["type"] == "lifespan.shutdown":
            return


async def _event(send: Any, data: dict[str, Any]) -> None:
    body = b"data: " + json.dumps(data).encode() + b"\n\n"
    await send({"type": "http.response.body", "body": body, "more_body": True})


async def _reply(send: Any, status: int, data: dict[str, Any]) -> None:
    headers = [(b"content-type", b"application/json"), (b"x-request-id", b"req-1")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(data).encode()})


@contextmanager
def listening(app: FakeApi) -> Iterator[str]:
    """The app on a free port of the loopback, in a thread. Yields its URL."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", http="h11"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            thread.join(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
