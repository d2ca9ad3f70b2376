"""An example as people read it: its text, cut where what is trained on begins and ends."""

from itertools import groupby

from msgspec import Struct

from runtime.tokenizer import Tokenizer
from runtime.trainer.examples import Example

MAX_TOKENS = 2000
"""Of an example that are shown."""


class Piece(Struct, frozen=True):
    """A stretch of text."""

    text: str
    trained: bool


def preview(example: Example, tokenizer: Tokenizer) -> list[Piece]:
    """The text of an example, special tokens included, in pieces. Together they are its text."""
    pieces, done, shown = [], 0, 0
    whole = ""
    for trained, run in groupby(example.trained[:MAX_TOKENS]):
        done += len(list(run))
        text = tokenizer.decode(example.token_ids[:done], skip_special_tokens=False)
        pieces.append(Piece(text[shown:], trained))
        whole, shown = text, len(text)
    if len(example) > MAX_TOKENS and whole:
        pieces.append(Piece(f"… and {len(example) - MAX_TOKENS} more tokens", False))
    return pieces
