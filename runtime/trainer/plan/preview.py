"""An example as people read it: its text, cut where what is trained on begins and ends; and many in short."""

from collections.abc import Sequence
from itertools import groupby

from msgspec import Struct

from runtime.text.tokenizer import Tokenizer
from runtime.trainer.data.example import Example

MAX_TOKENS = 2000
"""Tokens of an example that are shown."""


class PreviewPiece(Struct, frozen=True):
    """A stretch of text."""

    text: str
    trained: bool


def preview(example: Example, tokenizer: Tokenizer) -> list[PreviewPiece]:
    """The text of an example, special tokens included, in pieces. Together they are its text."""
    pieces, done, shown = [], 0, 0
    whole = ""
    for trained, run in groupby(example.trained[:MAX_TOKENS]):
        done += len(list(run))
        text = tokenizer.decode(example.token_ids[:done], skip_special_tokens=False)
        pieces.append(PreviewPiece(text[shown:], trained))
        whole, shown = text, len(text)
    if len(example) > MAX_TOKENS and whole:
        pieces.append(PreviewPiece(f"… and {len(example) - MAX_TOKENS} more tokens", False))
    return pieces


LISTED = 100
"""Examples whose sizes the summary lists."""
LISTED_CHARS = 120
"""Characters of each text that is listed."""
_LISTED_TOKENS = 60


class ExampleLine(Struct, frozen=True, kw_only=True):
    """One example in short."""

    tokens: int
    trained_tokens: int
    asks: str
    """The first words before what is trained on, without what all listed examples have in common."""
    learns: str
    """The first words that are trained on."""


def example_lines(examples: Sequence[Example], tokenizer: Tokenizer) -> list[ExampleLine]:
    """Examples in short: without special tokens, and without what all their prompts begin and end with."""
    firsts = (next((at for at, trained in enumerate(one.trained) if trained), len(one)) for one in examples)
    prompts = [example.token_ids[:first] for example, first in zip(examples, firsts, strict=True)]
    head = _num_shared(prompts)
    tail = _num_shared([prompt[head:][::-1] for prompt in prompts])
    return [
        ExampleLine(
            tokens=len(example),
            trained_tokens=example.num_trained,
            asks=_in_short(prompt[head : len(prompt) - tail] or prompt, tokenizer),
            learns=_in_short(example.token_ids[len(prompt) :], tokenizer),
        )
        for example, prompt in zip(examples, prompts, strict=True)
    ]


def _num_shared(rows: Sequence[Sequence[int]]) -> int:
    unlike = (at for at, column in enumerate(zip(*rows, strict=False)) if len(set(column)) > 1)
    return next(unlike, min(map(len, rows), default=0))


def _in_short(token_ids: Sequence[int], tokenizer: Tokenizer) -> str:
    return " ".join(tokenizer.decode(token_ids[:_LISTED_TOKENS]).split())[:LISTED_CHARS]
