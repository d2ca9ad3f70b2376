"""Tokens that a model's vocabulary gets: further ones, and other texts for reserved ones.

They belong to an adapter, whose tokenizer is the model's with them.
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from msgspec import Struct
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend


class OwnToken(Struct, frozen=True, omit_defaults=True):
    """One token of an adapter."""

    id: int
    text: str
    special: bool = False
    """Left out of answers, and no token where a client writes its text into a message."""


class OwnText(Struct, frozen=True, kw_only=True):
    """Tokens and template of an adapter, and the ends of its answers, where they are not the base's."""

    template: str | None = None
    """Source of the chat template; None: the base's."""
    tokens: tuple[OwnToken, ...] = ()
    eos_id: int | None = None
    """Id that ends its texts; None: the base's."""
    end_ids: tuple[int, ...] = ()
    """Ids that end its answers in chats, besides those of the base and the template."""
    stop: tuple[str, ...] = ()
    """Texts that do, where no single token does."""


class TokensInvalid(ValueError):
    """The tokens do not fit the vocabulary."""


def with_own_tokens(backend: Backend, tokens: Iterable[OwnToken]) -> Backend:
    """A tokenizer with these tokens besides its own; known ones change nothing. Takes a second with a
    large vocabulary.

    Raises `TokensInvalid` where an id or a text is taken by a token that cannot be changed, or an id would be left out.
    """
    wanted = sorted((token for token in tokens if backend.id_to_token(token.id) != token.text), key=lambda one: one.id)
    renamed = [token for token in wanted if backend.id_to_token(token.id) is not None]
    made = _renamed(backend, renamed) if renamed else Backend.from_str(backend.to_str())
    for token in wanted:
        if token not in renamed:
            _add(made, token)
    return made


def new_tokens(backend: Backend, texts: Sequence[tuple[str, bool]]) -> list[OwnToken]:
    """The tokens for texts that the vocabulary lacks, with the next free ids; for each its text, and whether it is
    special."""
    if not texts:
        return []
    made = Backend.from_str(backend.to_str())
    for text, special in texts:
        made.add_tokens([AddedToken(text, normalized=False, special=special)])
    found = [(made.token_to_id(text), text, special) for text, special in texts]
    return [OwnToken(id, text, special) for id, text, special in found if id is not None]


def _add(backend: Backend, token: OwnToken) -> None:
    if backend.token_to_id(token.text) is not None:
        raise TokensInvalid(f"the token {token.text[:64]!r} has another id than {token.id} already")
    backend.add_tokens([AddedToken(token.text, normalized=False, special=token.special)])
    if (given := backend.token_to_id(token.text)) != token.id:
        raise TokensInvalid(
            f"the token {token.text[:64]!r} must have the id {token.id}, and the next free one is {given}"
        )


def _renamed(backend: Backend, tokens: Sequence[OwnToken]) -> Backend:
    """The tokenizer with other texts for some of its added tokens."""
    state: dict[str, Any] = json.loads(backend.to_str())
    added = {entry["id"]: entry for entry in state["added_tokens"]}
    vocab = state["model"].get("vocab")
    outside = json.dumps([state.get("post_processor"), state.get("decoder")], ensure_ascii=False)
    for token in tokens:
        entry, old = added.get(token.id), backend.id_to_token(token.id) or ""
        if entry is None:
            raise TokensInvalid(f"id {token.id} is {old!r}, an ordinary token, whose text cannot be another")
        if backend.token_to_id(token.text) is not None:
            raise TokensInvalid(f"the token {token.text[:64]!r} has another id than {token.id} already")
        if json.dumps(old, ensure_ascii=False) in outside:
            raise TokensInvalid(f"id {token.id} is {old!r}, which the tokenizer puts around texts by this name")
        entry["content"] = token.text
        if isinstance(vocab, dict) and old in vocab:
            vocab[token.text] = vocab.pop(old)
    made = Backend.from_str(json.dumps(state, ensure_ascii=False))
    for token in tokens:
        if made.token_to_id(token.text) != token.id:
            raise TokensInvalid(f"id {token.id} cannot be given the text {token.text[:64]!r}")
    return made
