"""Log-probabilities in the shapes of OpenAI's chat and completions, and of vLLM's prompts."""

import asyncio
import codecs
from collections.abc import Callable, Sequence
from typing import TypeVar, cast

from msgspec import Raw, Struct
from msgspec.json import encode

from runtime.messages import TokenLogprob
from runtime.text.tokenizer import Tokenizer

LEAST = -9999.0
"""Lowest value that is written, as in vLLM: JSON has no infinity."""


MANY = 2000
"""Log-probabilities from which an answer is written on a thread beside the event loop."""

T = TypeVar("T")


async def write_answer(write: Callable[[], T], count: int) -> T:
    """The answer that `write` makes, with `count` log-probabilities in it."""
    return write() if count <= MANY else await asyncio.to_thread(write)


def count_logprobs(*parts: Sequence[TokenLogprob]) -> int:
    """Number of log-probabilities in an answer with these."""
    return sum(len(part) * (1 + len(part[0].top)) for part in parts if part)


def encoded(value: T) -> T:
    """`value` as JSON in its place in an answer. An answer of many is encoded in short calls so, and none of them keeps
    Python's lock for long."""
    return cast(T, Raw(encode(value)))


class TopLogprob(Struct, kw_only=True):
    """A token that could stand at a position of a chat's output."""

    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(TopLogprob, kw_only=True):
    """A token of a chat's output, and the likeliest ones at its position."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct, kw_only=True):
    """`choices[].logprobs` of a chat."""

    content: list[ChatLogprob]
    refusal: None = None


class CompletionLogprobs(Struct, kw_only=True):
    """`choices[].logprobs` of a completion: lists with one entry a token. The first token of a prompt has none."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]
    """Characters of the choice's text before the token."""


class PromptLogprob(Struct, kw_only=True):
    """A token that could stand at a position of the prompt, as vLLM describes it."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[int, PromptLogprob] | None]
"""For each token of a prompt: ids and their log-probabilities, its own and the likeliest. None for the first."""


class LogprobWriter:
    """Writer of one request's log-probabilities."""

    def __init__(self, tokenizer: Tokenizer, *, as_ids: bool = False, skip_special_tokens: bool = True) -> None:
        """`as_ids`: write tokens as `token_id:42`, so that they can be told apart."""
        self.tokenizer = tokenizer
        self._as_ids = as_ids
        self._skip_special = skip_special_tokens

    def text(self, id: int) -> str:
        """A token in an answer."""
        return f"token_id:{id}" if self._as_ids else self.tokenizer.token_text(id)

    def shown_bytes(self, id: int) -> bytes:
        """The token's share of the output's text: none for a special token that is left out."""
        if self._skip_special and not self.tokenizer.decode_one(id):
            return b""
        return self.tokenizer.token_bytes(id)

    def chat(self, ids: Sequence[int], logprobs: Sequence[TokenLogprob]) -> ChatLogprobs:
        """Those of some tokens of a chat's output."""
        return ChatLogprobs(content=[encoded(self._chat(id, one)) for id, one in zip(ids, logprobs, strict=True)])

    def prompt(self, ids: Sequence[int], logprobs: Sequence[TokenLogprob]) -> PromptLogprobs:
        """Those of a whole prompt; `logprobs` are of its tokens after the first."""
        found: PromptLogprobs = [None]
        for id, one in zip(ids[1:], logprobs, strict=True):
            ranked = {other: (value, rank) for rank, (other, value) in enumerate(one.top, 1)}
            entries = {id: (one.logprob, one.rank)} | ranked
            shown = {
                other: PromptLogprob(
                    logprob=max(value, LEAST), rank=rank, decoded_token=self.tokenizer.token_text(other)
                )
                for other, (value, rank) in entries.items()
            }
            found.append(encoded(shown))
        return found

    def _chat(self, id: int, one: TokenLogprob) -> ChatLogprob:
        return ChatLogprob(
            token=self.text(id),
            logprob=max(one.logprob, LEAST),
            bytes=list(self.tokenizer.token_bytes(id)),
            top_logprobs=[
                TopLogprob(
                    token=self.text(other), logprob=max(value, LEAST), bytes=list(self.tokenizer.token_bytes(other))
                )
                for other, value in one.top
            ],
        )


class ChoiceLogprobs:
    """Writer of one choice of a completion, whose offsets go on from part to part."""

    def __init__(self, writer: LogprobWriter, count: int) -> None:
        """`count`: most of the likeliest tokens that are written at a position."""
        self._writer = writer
        self._count = count
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._chars = 0

    def write(self, ids: Sequence[int], logprobs: Sequence[TokenLogprob | None]) -> CompletionLogprobs:
        """Those of the next tokens of the choice; None for a token that has none."""
        written = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        for id, one in zip(ids, logprobs, strict=True):
            written.tokens.append(self._writer.text(id))
            written.text_offset.append(self._chars)
            written.token_logprobs.append(None if one is None else max(one.logprob, LEAST))
            written.top_logprobs.append(None if one is None else encoded(self._top(id, one)))
            self._chars += len(self._decoder.decode(self._writer.shown_bytes(id)))
        return written

    def _top(self, id: int, one: TokenLogprob) -> dict[str, float]:
        """By text, the likeliest first, and the token's own at the end where it is not one of them."""
        found: dict[str, float] = {}
        for other, value in [*one.top[: self._count], (id, one.logprob)]:
            found.setdefault(self._writer.text(other), max(value, LEAST))
        return found
