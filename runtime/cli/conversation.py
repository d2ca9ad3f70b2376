"""One conversation with a chat model: its messages, and how the next answer streams in."""

from collections.abc import AsyncGenerator
from typing import Any

import httpx
import msgspec
from msgspec import Struct

from runtime.cli.client import describe, error_text
from runtime.cli.errors import CommandError


class Answer(Struct):
    """The last answer, complete once its stream has ended."""

    text: str = ""
    finish_reason: str | None = None
    """None for an answer that was stopped."""
    usage: dict[str, Any] | None = None


class Conversation:
    """Messages so far. A question that failed leaves no trace, so that it can be asked again."""

    def __init__(self, client: httpx.AsyncClient, model: str, *, system: str | None, params: dict[str, Any]) -> None:
        self._client = client
        self.model = model
        self.system = system
        self._params = params
        self._turns: list[dict[str, str]] = []
        self.answer = Answer()

    @property
    def messages(self) -> list[dict[str, str]]:
        head = [{"role": "system", "content": self.system}] if self.system else []
        return head + self._turns

    def reset(self) -> None:
        self._turns = []

    async def ask(self, question: str) -> AsyncGenerator[str]:
        """Yield the answer's pieces. Raises `CommandError` where the server has none.

        Leaving the iteration stops the answer: the connection is closed, which aborts the request.
        What had come stays in the conversation, as something that the model said.
        """
        self._turns.append({"role": "user", "content": question})
        self.answer = Answer()
        try:
            async for text in self._stream():
                self.answer.text += text
                yield text
        except (httpx.HTTPError, CommandError) as error:
            self._turns.pop()
            message = describe(error) if isinstance(error, httpx.HTTPError) else str(error)
            raise CommandError(f"no answer: {message}") from error
        except BaseException:  # stopped: by a cancellation, or by leaving the iteration
            if self.answer.text:
                self._keep()
            else:
                self._turns.pop()
            raise
        self._keep()

    def _keep(self) -> None:
        self._turns.append({"role": "assistant", "content": self.answer.text})

    async def _stream(self) -> AsyncGenerator[str]:
        body = {
            "model": self.model,
            "messages": self.messages,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._params,
        }
        async with self._client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                await response.aread()
                raise CommandError(error_text(response))
            async for line in response.aiter_lines():
                if line.startswith("data:") and (text := self._read_event(line[5:].strip())):
                    yield text

    def _read_event(self, data: str) -> str:
        """The text in one event; usage and finish reason go to `self.answer`."""
        if data == "[DONE]":
            return ""
        try:
            event = msgspec.json.decode(data)
            if error := event.get("error"):
                raise CommandError(error["message"])
            self.answer.usage = event.get("usage") or self.answer.usage
            text = ""
            for choice in event["choices"]:
                text += choice["delta"].get("content") or ""
                self.answer.finish_reason = choice.get("finish_reason") or self.answer.finish_reason
        except (msgspec.DecodeError, AttributeError, KeyError, TypeError) as error:
            raise CommandError(f"the server sent what is no chat completion chunk: {data[:200]}") from error
        return text
