"""JSON read character by character: where a value ends, and where it turns out to be none."""

import json
import re
from typing import Literal

_NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?", re.ASCII)
_WORDS = ("true", "false", "null")
_ESCAPES = frozenset('"\\/bfnrt')

ScanStep = Literal["more", "end", "before", "error"]
"""What a character is to a value: inside it, its last one, the first after it, or an error."""


class ValueScanner:
    """Scanner of one value, without whitespace around it."""

    def __init__(self) -> None:
        self._stack: list[str] = []
        """Open brackets."""
        self._expects = "value"
        """In the grammar of JSON: value, first (a value or a closing bracket), key, firstkey, colon, comma."""
        self._scalar = ""
        """The string, number or word that is open."""
        self._escape = ""
        self._done = False

    def feed(self, char: str) -> ScanStep:
        """Read a character, which must not follow an end or an error."""
        if self._scalar.startswith('"'):
            return self._in_string(char)
        if self._scalar:
            return self._in_scalar(char)
        if char.isspace():
            return "more" if self._stack and char in " \t\n\r" else "error"
        return self._outside(char)

    def _in_string(self, char: str) -> ScanStep:
        if self._escape:
            self._escape += char
            if self._escape[1] == "u":
                if len(self._escape) > 2 and char not in "0123456789abcdefABCDEF":
                    return "error"
                done = len(self._escape) == 6
            elif char in _ESCAPES:
                done = True
            else:
                return "error"
            if done:
                self._escape = ""
            return "more"
        if char == "\\":
            self._escape = char
        elif char < " ":
            return "error"
        elif char == '"':
            self._scalar = ""
            return self._after_string()
        return "more"

    def _after_string(self) -> ScanStep:
        if self._expects == "in key":
            self._expects = "colon"
            return "more"
        return self._after_value()

    def _in_scalar(self, char: str) -> ScanStep:
        if char.isascii() and (char.isalnum() or char in "+-."):
            self._scalar += char
            if self._scalar[0].isalpha() and not any(word.startswith(self._scalar) for word in _WORDS):
                return "error"
            return "more"
        if self._scalar not in _WORDS and not _NUMBER.fullmatch(self._scalar):
            return "error"
        self._scalar = ""
        if self._after_value() == "end":
            return "before"
        return self.feed(char)

    def _outside(self, char: str) -> ScanStep:
        expects = self._expects
        if expects in ("value", "first") and (char in '"-{[' or (char.isascii() and char.isalnum())):
            return self._begin_value(char)
        if expects in ("key", "firstkey") and char == '"':
            self._scalar, self._expects = char, "in key"
            return "more"
        if expects == "colon" and char == ":":
            self._expects = "value"
            return "more"
        if expects == "comma" and char == ",":
            self._expects = "key" if self._stack[-1] == "{" else "value"
            return "more"
        closes = (char == "}" and expects in ("firstkey", "comma") and self._stack[-1:] == ["{"]) or (
            char == "]" and expects in ("first", "comma") and self._stack[-1:] == ["["]
        )
        if not closes:
            return "error"
        self._stack.pop()
        return self._after_value()

    def _begin_value(self, char: str) -> ScanStep:
        if char in "{[":
            self._stack.append(char)
            self._expects = "firstkey" if char == "{" else "first"
            return "more"
        if char.isalpha() and not any(word.startswith(char) for word in _WORDS):
            return "error"
        self._scalar, self._expects = char, "in value"
        return "more"

    def _after_value(self) -> ScanStep:
        self._expects = "comma"
        return "more" if self._stack else "end"


def loads(text: str) -> object:
    """The value in a text; None where it is no JSON, or too deep."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
