"""Telling a template's own special tokens from the same text in what a client sent.

A message may contain the text `<|im_end|>`. If the rendered prompt were simply tokenised, that text would
end the message: a client could write turns of the system into its own. So such text is hidden while the
template renders, the template's own special tokens are swapped for stand-ins, the hidden text is restored,
and a second tokenizer, which reads special tokens as plain text and the stand-ins as tokens, encodes the
whole. What is hidden is one character of each special token, so that a template's tests on a message
(`startswith`, `trim`, `in`) see nearly the original.
"""

import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend


class SpecialText:
    """The special tokens of one tokenizer, and how to encode text in which clients wrote them."""

    def __init__(self, backend: Backend) -> None:
        added = backend.get_added_tokens_decoder()
        self._ids = {token.content: id for id, token in added.items() if token.special and token.content}
        self._prefixes = tuple({text[:end] for text in self._ids for end in range(1, len(text))})
        longest_first = sorted(self._ids, key=len, reverse=True)  # the order in which the tokenizer matches
        alternatives = "|".join(map(re.escape, longest_first)) or "(?!)"
        self._pattern = re.compile(alternatives)
        # Drawn per process, so that no client can write a stand-in. ASCII letters and digits alone, so that
        # no filter of a template changes them.
        self._nonce = f"q{secrets.token_hex(8)}q"
        self._hidden = re.compile(f"{self._nonce}([0-9]+)z")
        self._specials = {id: token for id, token in added.items() if token.special}
        self._backend = backend
        self._literal: Backend | None = None
        self._id_of_stand_in: dict[int, int] = {}

    def occurs_in(self, value: object) -> bool:
        """Whether any string in `value` holds a special token, or ends like the beginning of one: two such
        strings that a template writes side by side could make up a token."""
        return any(text.endswith(self._prefixes) or self._pattern.search(text) is not None for text in _strings(value))

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
        return self._hidden.sub(lambda code: chr(int(code[1])), text)

    def encode(self, rendered: str) -> list[int]:
        """Ids of a text that was rendered from hidden values: only what the template wrote is special."""
        literal = self._literal_backend()
        swapped = self._pattern.sub(lambda token: self._stand_in(self._ids[token[0]]), rendered)
        ids = literal.encode(self.reveal(swapped), add_special_tokens=False).ids
        return [self._id_of_stand_in.get(id, id) for id in ids]

    def _hide_in_text(self, text: str) -> str:
        pieces, done = [], 0
        for at in self._beginnings(text):
            pieces += [text[done:at], f"{self._nonce}{ord(text[at])}z"]
            done = at + 1
        return "".join([*pieces, text[done:]])

    def _beginnings(self, text: str) -> list[int]:
        """Where special tokens begin in `text`, overlapping ones too, and those that its end cuts off."""
        found = set()
        match = self._pattern.search(text)
        while match is not None:
            found.add(match.start())
            match = self._pattern.search(text, match.start() + 1)
        if text.endswith(self._prefixes):
            found |= {len(text) - len(prefix) for prefix in self._prefixes if text.endswith(prefix)}
        return sorted(found)

    def _stand_in(self, id: int) -> str:
        return f"{self._nonce}s{id}z"

    def _stand_in_token(self, id: int, token: AddedToken) -> AddedToken:
        return AddedToken(self._stand_in(id), lstrip=token.lstrip, rstrip=token.rstrip, normalized=False, special=False)

    def _literal_backend(self) -> Backend:
        """A copy of the tokenizer in which special tokens are plain text, and each has a stand-in with the
        same rules for the whitespace around it. Made when it is first needed: it costs as much as loading.
        """
        if self._literal is None:
            literal = Backend.from_str(self._backend.to_str())
            literal.add_tokens([self._stand_in_token(id, token) for id, token in self._specials.items()])
            stand_ins = {self._stand_in(id): id for id in self._specials}
            for new_id, token in literal.get_added_tokens_decoder().items():
                if token.content in stand_ins:
                    self._id_of_stand_in[new_id] = stand_ins[token.content]
            literal.encode_special_tokens = True
            self._literal = literal
        return self._literal


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
