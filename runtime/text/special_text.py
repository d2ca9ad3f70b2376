"""Separation of a template's own special tokens from the same text in a client's messages.

A message may contain the text `<|im_end|>`. If the rendered prompt were simply tokenised, that text would
end the message: a client could write turns of the system into its own. So such text is hidden while the
template renders, the template's own special tokens are swapped for stand-ins, the hidden text is restored,
and a second tokenizer, which reads special tokens as plain text and the stand-ins as tokens, encodes the
whole. What is hidden is one character of each special token, so that a template's tests on a message
(`startswith`, `trim`, `in`) see nearly the original.

A client chooses the texts. So the time of a search must not depend on their contents, and it must not hold Python's
lock throughout: the expression is a trie, and long texts are searched in pieces.
"""

import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

PIECE = 65_536
"""Number of characters that are searched without releasing Python's lock, about a millisecond."""

MAX_DEPTH = 20
"""Largest number of nested branches of the trie; more would be too deep for `re`."""


class SpecialText:
    """The special tokens of one tokenizer, and the encoding of text in which clients wrote them."""

    def __init__(self, backend: Backend, num_ids: int) -> None:
        """`num_ids`: one more than the highest id of a token of `backend`."""
        added = backend.get_added_tokens_decoder()
        self._ids = {token.content: id for id, token in added.items() if token.special and token.content}
        self._prefixes = tuple({text[:end] for text in self._ids for end in range(1, len(text))})
        self._longest = max(map(len, self._ids), default=1)
        self._pattern = re.compile(_any_of(self._ids) if self._ids else "(?!)")
        # Drawn per process, so that no client can write a stand-in. ASCII letters and digits alone, so that
        # no filter of a template changes them.
        self._nonce = f"q{secrets.token_hex(8)}q"
        self._hidden = re.compile(f"{self._nonce}([0-9]+)z")
        self._specials = {id: token for id, token in added.items() if token.special}
        self._literal = self._literal_backend(backend, added, num_ids)
        stand_ins = {self._stand_in(id): id for id in self._specials}
        self._id_of_stand_in = {
            new_id: stand_ins[token.content]
            for new_id, token in self._literal.get_added_tokens_decoder().items()
            if token.content in stand_ins
        }

    def occurs_in(self, value: object) -> bool:
        """True if any string in `value` holds a special token, or ends like the beginning of one: a template that
        writes two such strings side by side could form a token."""
        return any(
            text.endswith(self._prefixes) or next(self._find(self._pattern, self._longest, text), None) is not None
            for text in _strings(value)
        )

    def hide(self, value: Any) -> Any:
        """`value` with a character of every special token in its strings replaced by a code."""
        if isinstance(value, str):
            return self._hide_in_text(value)
        if isinstance(value, Mapping):
            return {self.hide(key): self.hide(item) for key, item in value.items()}
        if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
            return [self.hide(item) for item in value]
        return value

    def reveal(self, text: str) -> str:
        """The inverse of `hide` on text that a template rendered."""
        pieces, done = [], 0
        for code in self._find(self._hidden, len(self._nonce) + len("1114111z"), text):
            pieces += [text[done : code.start()], chr(int(code[1]))]
            done = code.end()
        return "".join([*pieces, text[done:]])

    def encode(self, rendered: str, encode: Callable[[Backend, str], list[int]] | None = None) -> list[int]:
        """Ids of a text that was rendered from hidden values: only the template's own tokens are special. `encode`
        encodes a text by a tokenizer, without tokens around it."""
        ids = (encode or _encode)(self._literal, self._with_stand_ins(rendered))
        return [self._id_of_stand_in.get(id, id) for id in ids]

    def _with_stand_ins(self, rendered: str) -> str:
        pieces, done = [], 0
        for token in self._find(self._pattern, self._longest, rendered):
            pieces += [rendered[done : token.start()], self._stand_in(self._ids[token[0]])]
            done = token.end()
        return self.reveal("".join([*pieces, rendered[done:]]))

    def _hide_in_text(self, text: str) -> str:
        pieces, done = [], 0
        for at in self._beginnings(text):
            pieces += [text[done:at], f"{self._nonce}{ord(text[at])}z"]
            done = at + 1
        return "".join([*pieces, text[done:]])

    def _find(
        self, pattern: re.Pattern[str], longest: int, text: str, *, overlapping: bool = False
    ) -> Iterator[re.Match[str]]:
        """The matches in `text`, none of them longer than `longest`."""
        at = 0
        while at < len(text):
            end = at + PIECE
            match = pattern.search(text, at, end + longest)
            if match is None or match.start() >= end:  # near the end of a piece a match may be cut off
                at = end
                continue
            yield match
            at = match.start() + 1 if overlapping else match.end()

    def _beginnings(self, text: str) -> list[int]:
        """Positions at which special tokens begin in `text`, including overlapping ones and ones that its end cuts
        off."""
        found = {match.start() for match in self._find(self._pattern, self._longest, text, overlapping=True)}
        if text.endswith(self._prefixes):
            found |= {len(text) - len(prefix) for prefix in self._prefixes if text.endswith(prefix)}
        return sorted(found)

    def _stand_in(self, id: int) -> str:
        return f"{self._nonce}s{id}z"

    def _stand_in_token(self, id: int, token: AddedToken) -> AddedToken:
        return AddedToken(self._stand_in(id), lstrip=token.lstrip, rstrip=token.rstrip, normalized=False, special=False)

    def _literal_backend(self, backend: Backend, added: Mapping[int, AddedToken], num_ids: int) -> Backend:
        """A tokenizer in which special tokens are plain text, and each has a stand-in with the same rules for the
        whitespace around it. It shares its model with `backend`: a copy would cost as much as loading it."""
        literal = Backend(backend.model)
        for part in ("normalizer", "pre_tokenizer", "decoder"):
            if (value := getattr(backend, part)) is not None:
                setattr(literal, part, value)
        literal.add_tokens([added[id] for id in sorted(added)])
        if any(literal.token_to_id(token.content) != id for id, token in added.items()):
            literal = Backend.from_str(backend.to_str())  # ids that adding the tokens again does not give
        self._fill_holes(literal, num_ids)
        literal.add_tokens([self._stand_in_token(id, token) for id, token in self._specials.items()])
        literal.encode_special_tokens = True
        return literal

    def _fill_holes(self, literal: Backend, num_ids: int) -> None:
        """Make the next added tokens get ids past all others. The library counts tokens to find a free id. In a
        vocabulary with holes a stand-in would then share its id with an ordinary token, which would become special."""
        first = f"{self._nonce}h"
        literal.add_tokens([AddedToken(first, normalized=False, special=False)])
        id = literal.token_to_id(first)
        assert id is not None
        literal.add_tokens(
            [AddedToken(f"{first}{n}z", normalized=False, special=False) for n in range(id, num_ids - 1)]
        )


def _encode(backend: Backend, text: str) -> list[int]:
    return backend.encode(text, add_special_tokens=False).ids


def _any_of(texts: Iterable[str], depth: int = 0) -> str:
    """An expression that matches the longest of the texts at a position, and reads each character once."""
    longest_first = sorted(texts, key=len, reverse=True)
    if depth == MAX_DEPTH:
        return f"(?:{'|'.join(map(re.escape, longest_first))})"
    by_first: dict[str, list[str]] = {}
    for text in longest_first:
        by_first.setdefault(text[:1], []).append(text)
    may_end = by_first.pop("", None) is not None
    branches = "|".join(_branch(group, depth) for group in by_first.values())
    return f"(?:{branches}){'?' if may_end else ''}"


def _branch(texts: list[str], depth: int) -> str:
    """`_any_of` for texts with the same first character."""
    first, last = min(texts), max(texts)
    size = next((at for at, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    common = first[:size]
    rest = [text[len(common) :] for text in texts]
    return re.escape(common) + (_any_of(rest, depth + 1) if any(rest) else "")


def _strings(value: object) -> Iterator[str]:
    """Every string in nested lists and dicts, keys included (a tool's parameter names are rendered too)."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, Mapping):
            stack.extend(item.keys())
            stack.extend(item.values())
        elif isinstance(item, Sequence) and not isinstance(item, bytes | bytearray):
            stack.extend(item)
