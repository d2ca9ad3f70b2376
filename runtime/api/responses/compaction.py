"""Compaction of a conversation: the request for a summary, and the item that carries it.

The item stands for an exchange that took place: the user's request for a summary, and the model's answer. So it fits
wherever turns of users and assistants fit. Its content is opaque to clients, but no secret: it is theirs.
"""

import base64
import binascii
from typing import Any, Literal

import msgspec
from msgspec import Struct

from runtime.api.responses.schema import Item, ResponseUsage
from runtime.errors import InvalidRequest

REQUEST = (
    "Summarise our conversation so far, so that it can go on from your summary alone. Keep every fact, name, number, "
    "decision, result of a tool and open question. Write nothing but the summary."
)
MAX_SUMMARY_TOKENS = 1024
VERSION = "eft1."
"""Beginning of the content of an item."""


class CompactRequest(Struct, kw_only=True):
    """Body of POST /v1/responses/compact."""

    model: str
    input: str | list[Item] | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    # A label for the client's own book-keeping.
    prompt_cache_key: str | None = None


class CompactionItem(Struct, kw_only=True, tag_field="type", tag="compaction"):
    id: str
    encrypted_content: str
    """OpenAI's name. Here it is encoded, and not encrypted."""


class CompactedResponse(Struct, kw_only=True):
    id: str
    object: Literal["response.compaction"] = "response.compaction"
    created_at: int
    output: list[CompactionItem]
    """Input of the next response, in place of the conversation."""
    usage: ResponseUsage


class InputTokenCount(Struct, kw_only=True):
    object: Literal["response.input_tokens"] = "response.input_tokens"
    input_tokens: int


def with_request(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A chat that ends with the request for a summary, in the last turn if that is the user's."""
    if messages and messages[-1]["role"] == "user":
        last = messages[-1]
        return [*messages[:-1], {**last, "content": f"{last['content']}\n\n{REQUEST}"}]
    return [*messages, {"role": "user", "content": REQUEST}]


def packed(summary: str) -> str:
    """Content of the item."""
    return VERSION + base64.urlsafe_b64encode(msgspec.json.encode(summary)).decode()


def unpacked(content: str | None, path: str) -> list[dict[str, Any]]:
    """Messages of a chat that an item stands for. Raises `InvalidRequest` for content that no server of ours made."""
    try:
        if content is None or not content.startswith(VERSION):
            raise ValueError
        coded = base64.b64decode(content.removeprefix(VERSION), altchars=b"-_", validate=True)
        summary = msgspec.json.decode(coded, type=str)
    except (ValueError, binascii.Error, msgspec.MsgspecError):
        raise InvalidRequest(
            f"{path}.encrypted_content must be as /v1/responses/compact of this server gave it.",
            param=f"{path}.encrypted_content",
        ) from None
    return [{"role": "user", "content": REQUEST}, {"role": "assistant", "content": summary}]
