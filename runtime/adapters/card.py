"""A version's card, its description beside the weights: `eft.json` in its folder, which PEFT does not read.

It is there, not in the database, so that a copy of the folder on another server includes it.
"""

import asyncio
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, TypeVar

import msgspec
from msgspec import Struct

from runtime.support.durable import write_file
from runtime.support.logs import get_logger
from runtime.text.own_tokens import OwnText, OwnToken

CARD = "eft.json"
MAX_CARD = 512 * 1024
"""Largest size of the file in bytes."""
MAX_SYSTEM = 16 * 1024
"""Largest number of characters of a kept system message: with more, the file may exceed `MAX_CARD`."""

TOKENIZER = "tokenizer.json"
MAX_TOKENIZER = 64 * 1024**2
MAX_TOKENS = 4096
"""Largest number of added tokens that are taken from it."""

T = TypeVar("T")

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
    tokens: tuple[OwnToken, ...] = ()
    """Tokens that the base's vocabulary has not, or has by another text."""
    eos_id: int | None = None
    """Id that ends its texts; None: the base's."""
    vocab_size: int | None = None
    """Ids below this are valid for it, where they are more than the base's."""
    went_on_from: str | None = None
    """The adapter that its training began with: `name@version` of this server, or a folder's name."""

    @property
    def own_text(self) -> OwnText:
        """The texts and tokens that an export has in place of the base's."""
        return OwnText(
            template=self.chat_template,
            tokens=self.tokens,
            eos_id=self.eos_id,
            end_ids=self.end_ids,
            stop=self.stop,
        )

    @property
    def changes_tokens(self) -> bool:
        """True if its tokenizer is not the base's."""
        return bool(self.tokens) or self.eos_id is not None or self.vocab_size is not None


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
    return _read(directory / CARD, Card, MAX_CARD) or Card()


class _Entry(Struct, frozen=True):
    id: int
    content: str
    special: bool = False


class _TokenizerFile(Struct, frozen=True):
    added_tokens: list[_Entry] = []


def read_tokens(directory: Path) -> tuple[OwnToken, ...]:
    """The added tokens of a tokenizer.json in an untrusted folder, as PEFT's users save it beside an adapter; none
    where it is absent or cannot be read. Blocks."""
    found = _read(directory / TOKENIZER, _TokenizerFile, MAX_TOKENIZER) or _TokenizerFile()
    entries = [entry for entry in found.added_tokens if entry.content and entry.id >= 0]
    return tuple(OwnToken(entry.id, entry.content, entry.special) for entry in entries[:MAX_TOKENS])


def _read(path: Path, type: type[T], limit: int) -> T | None:
    try:
        # These flags neither follow a link nor wait for the other end of a pipe.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return None
        try:
            data = file.read(limit + 1)
            return msgspec.json.decode(data, type=type) if len(data) <= limit else None
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            _log.warning("adapter_card_unreadable", folder=path.parent.name, file=path.name, reason=str(error))
            return None


def write_card(directory: Path, card: Card) -> None:
    """Write the file, unless the card is empty. Raises `OSError`."""
    if card != Card():
        write_file(directory / CARD, encode_card(card))
