"""A version's card, its description beside the weights: `eft.json` in its folder, which PEFT does not read.

It is there, not in the database, so that a copy of the folder on another server includes it.
"""

import asyncio
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct

from runtime.support.durable import write_file
from runtime.support.logs import get_logger

CARD = "eft.json"
MAX_CARD = 512 * 1024
"""Largest size of the file in bytes."""
MAX_SYSTEM = 16 * 1024
"""Largest number of characters of a kept system message: with more, the file may exceed `MAX_CARD`."""

_log = get_logger("adapters")

PromptKind = Literal["chat", "alpaca", "text"]


class Prompt(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The prompt format of an adapter: the one in which its training rows were rendered."""

    format: PromptKind
    """chat: messages, by the model's chat template. alpaca, text: `/v1/completions`, with the template."""
    system: str | None = None
    """chat: the system message that every row had."""
    template: str | None = None
    """alpaca: with `{instruction}`; text: with `{prompt}`."""
    template_with_input: str | None = None
    """alpaca: the same with `{input}` too."""


class Card(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The contents of the file. Unknown fields are left out."""

    prompt: Prompt | None = None
    chat_template: str | None = None
    """Source of the chat template of its training rows; None: the base model's own."""
    end_ids: tuple[int, ...] = ()
    """Ids that end its answers in chats, besides those of the base model and the template."""
    stop: tuple[str, ...] = ()
    """Texts that end its answers in chats, where the template's end of a turn is no single token."""


class Cards:
    """The cards of versions, by the versions' keys, in memory. Event loop only."""

    def __init__(self) -> None:
        self._known: dict[str, Card] = {}

    def of(self, key: str) -> Card:
        """A version's card; an empty one where none was read."""
        return self._known.get(key, Card())

    async def read(self, folders: Iterable[tuple[str, Path]]) -> None:
        """Read the cards of these versions: key and folder."""
        wanted = [(key, folder) for key, folder in folders if key not in self._known]
        self._known |= await asyncio.to_thread(lambda: {key: read_card(folder) for key, folder in wanted})


def encode_card(card: Card) -> bytes:
    """The contents of the file."""
    return msgspec.json.format(msgspec.json.encode(card)) + b"\n"


def read_card(directory: Path) -> Card:
    """The card in an untrusted folder; an empty one where the file is absent or no card. Blocks."""
    try:
        # These flags neither follow a link nor wait for the other end of a pipe.
        descriptor = os.open(directory / CARD, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return Card()
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return Card()
        try:
            data = file.read(MAX_CARD + 1)
            return msgspec.json.decode(data, type=Card) if len(data) <= MAX_CARD else Card()
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            _log.warning("adapter_card_unreadable", folder=directory.name, reason=str(error))
            return Card()


def write_card(directory: Path, card: Card) -> None:
    """Write the file, unless the card is empty. Raises `OSError`."""
    if card != Card():
        write_file(directory / CARD, encode_card(card))
