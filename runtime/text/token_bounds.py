"""Limit on the length of a text for a number of tokens, without tokenising it.

It must never refuse a text that would fit. So it holds only for tokenizers that provably assign every character to a
token, except a few that may vanish and are not counted. A tokenizer that makes one token of a whole unknown word, for
example, can make a short prompt of any text, and has no limit.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

# Length of the longest canonical decomposition of one character: composing joins at most this number of characters.
_COMPOSED = 4

# Unicode's White_Space, which tokens with `lstrip` or `rstrip` swallow any amount of.
_WHITESPACE = "\t\n\v\f\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"

_KEEPING_NORMALIZERS = frozenset({"ByteLevel", "Lowercase", "NFD", "NFKD", "Prepend"})
_KEEPING_SPLITS = frozenset({"ByteLevel", "Digits", "Metaspace", "UnicodeScripts", "FixedLength"})


@dataclass(frozen=True)
class TextBound:
    """Limit of one tokenizer."""

    longest: int | None
    """Largest number of characters of one token; None where there is no limit."""
    vanishing: str = ""
    """Characters that may belong to no token, and are not counted."""

    def exceeded_by(self, text: str, max_tokens: int) -> bool:
        """True if `text` certainly has more than `max_tokens` tokens."""
        if self.longest is None or len(text) <= self.longest * max_tokens:
            return False
        return len(text) - sum(map(text.count, self.vanishing)) > self.longest * max_tokens


def bound_of(backend: Backend, vocab: Mapping[str, int]) -> TextBound:
    """The limit for a tokenizer with this vocabulary, added tokens included."""
    normalizer, splitter = _state(backend.normalizer), _state(backend.pre_tokenizer)
    shrinking = _shrinking(normalizer)
    bytewise = any(part["type"] == "ByteLevel" for part in normalizer + splitter)
    vanishing = _vanishing(backend, vocab, bytewise=bytewise)
    if shrinking is None or vanishing is None or not all(map(_keeps, splitter)):
        return TextBound(None)
    if any(token.lstrip or token.rstrip for token in backend.get_added_tokens_decoder().values()):
        vanishing += "".join(char for char in _WHITESPACE if char not in vanishing)
    return TextBound(math.ceil(shrinking * max(map(len, vocab), default=1)), vanishing)


def _state(part: Any) -> list[dict[str, Any]]:
    """The settings of a normalizer or pre-tokenizer, those of a sequence one after the other."""
    return [] if part is None else list(_flat(json.loads(part.__getstate__())))


def _flat(state: dict[str, Any]) -> Iterable[dict[str, Any]]:
    if state["type"] != "Sequence":
        yield state
        return
    for part in state.get("normalizers") or state.get("pretokenizers") or []:
        yield from _flat(part)


def _shrinking(normalizer: list[dict[str, Any]]) -> float | None:
    """Largest factor by which a normalizer may shorten a text; None where there is no limit."""
    factor = 1.0
    for part in normalizer:
        if part["type"] in ("NFC", "NFKC"):
            factor *= _COMPOSED
        elif part["type"] == "Replace":
            old, new = part["pattern"].get("String"), part["content"]
            if not old or not new:  # an expression may match any length
                return None
            factor *= max(1.0, len(old) / len(new))
        elif part["type"] not in _KEEPING_NORMALIZERS:
            return None
    return factor


def _keeps(split: Mapping[str, Any]) -> bool:
    """True if a pre-tokenizer drops no characters."""
    if split["type"] in ("Split", "Punctuation"):
        return bool(split.get("behavior", "Removed") != "Removed")
    return split["type"] in _KEEPING_SPLITS


def _vanishing(backend: Backend, vocab: Mapping[str, int], *, bytewise: bool) -> str | None:
    """Characters without a token, also without tokens for their bytes; None where their number is unlimited, or many
    become one unknown token."""
    model = backend.model
    if not isinstance(model, BPE):
        return None
    if bytewise:
        missing = {byte for byte, char in _byte_characters().items() if char not in vocab}
        # Every character of several bytes has bytes from 80 to BF (hexadecimal).
        return None if missing & set(range(0x80, 0xC0)) else "".join(chr(byte) for byte in missing if byte < 0x80)
    if model.byte_fallback:
        return "" if all(f"<0x{byte:02X}>" in vocab for byte in range(256)) else None
    return None if model.unk_token is None or model.fuse_unk else ""


def _byte_characters() -> dict[int, str]:
    """Byte → its character in byte-level vocabularies: printable ones stay themselves, the others are from U+0100
    on."""
    alphabet = sorted(ByteLevel.alphabet())
    printable = {ord(char): char for char in alphabet if ord(char) < 0x100}
    others = [byte for byte in range(0x100) if byte not in printable]
    return printable | dict(zip(others, alphabet[len(printable) :], strict=True))
