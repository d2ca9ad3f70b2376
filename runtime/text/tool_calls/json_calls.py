"""Calls written as JSON objects with a name and arguments, which most formats are made of."""

import json
import re
from collections.abc import Sequence
from typing import Literal

from runtime.text.grammar.source import GrammarBuilder, literal
from runtime.text.tool_calls.format import Tool
from runtime.text.tool_calls.reader import CharacterParser, Reading

# -- values ----------------------------------------------------------------------------------------
#
# JSON read character by character: where a value ends, and where it turns out to be none.

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


# -- calls -----------------------------------------------------------------------------------------

ARGUMENTS = ("arguments", "parameters")
"""Keys of the arguments, one or the other."""


class JsonCallParser(CharacterParser):
    """Helpers for parsers of such calls."""

    def _object_call(self) -> Reading[str | None]:
        """Read a call `{"name": …, "arguments": {…}}`, its keys in any order, others between them passed over.

        Returns None after a whole call. Where the text is no call, or stops being one, what of it is no part of a call
        comes back: all that was read, or what came after the arguments that were complete so far.
        """
        raw = yield from self._next()
        if raw != "{":
            self._unread(raw)
            return ""
        name: str | None = None
        arguments: str | None = None
        index: int | None = None
        first = True
        while True:
            raw += yield from self._skip_space()
            char = yield from self._next()
            if char == "}" and (first or index is not None or name is not None):
                break
            if not first:
                if char != ",":
                    self._unread(char)
                    return raw
                raw += char + (yield from self._skip_space())
                char = yield from self._next()
            first = False
            self._unread(char)
            ok, key = yield from self._value(raw_only='"')
            raw += key + (yield from self._skip_space())
            colon = yield from self._expect(":")
            raw += colon + (yield from self._skip_space())
            if not ok or not colon:
                return raw
            key = str(loads(key))
            if key in ARGUMENTS and name is not None and index is None and arguments is None:
                char = yield from self._next()
                self._unread(char)
                if char == "{":
                    index = self._begin_call(name)
                    ok, _ = yield from self._value(index=index)
                    raw = ""
                    if not ok:
                        return raw
                    continue
            ok, text = yield from self._value()
            raw += text
            if not ok:
                return raw
            if key == "name" and name is None:
                found = loads(text)
                if not isinstance(found, str) or found not in self._names:
                    return raw
                name = found
            elif key in ARGUMENTS and arguments is None and index is None:
                found = loads(text)
                arguments = found if isinstance(found, str) else text  # some models write the text of the JSON
                if not isinstance(loads(arguments), dict):
                    return raw
            if name is not None and arguments is not None and index is None:
                index = self._begin_call(name)
                self._arguments(index, arguments)
                raw = ""
        if index is None:
            if name is None:
                return raw + "}"
            self._arguments(self._begin_call(name), "{}")
        return None

    def _value(self, *, raw_only: str = "", index: int | None = None) -> Reading[tuple[bool, str]]:
        """Read a JSON value, that begins with `raw_only` if given. Returns if it is whole, and its text. With `index`
        it is written as the arguments of that call as it comes, and a character that is an error is not read."""
        scanner, text = ValueScanner(), ""
        while True:
            char = yield from self._next()
            if not char or (raw_only and not text and char != raw_only):
                self._unread(char)
                return False, text
            step = scanner.feed(char)
            if step in ("before", "error"):
                self._unread(char)
                return step == "before", text
            text += char
            if index is not None:
                self._arguments(index, char)
            if step == "end":
                return True, text

    def _list_of_calls(self) -> Reading[str | None]:
        """Read calls in a list, `[{…}, {…}]`. Returns as `_object_call`."""
        raw = yield from self._expect("[")
        if not raw:
            return ""
        while True:
            raw += yield from self._skip_space()
            calls = self.num_calls
            rest = yield from self._object_call()
            if rest is not None:
                return (raw if self.num_calls == calls else "") + rest
            raw = yield from self._skip_space()
            char = yield from self._next()
            if char == "]":
                return None
            if char != ",":
                self._unread(char)
                return raw
            raw += char


def call_rule(builder: GrammarBuilder, tools: Sequence[Tool], *, key: str = "arguments") -> str:
    """Name of a rule for a call of one of the tools as a JSON object, its arguments under `key`."""
    each = []
    for index, tool in enumerate(tools):
        arguments = builder.part(f"arguments_{index}", tool.arguments)
        begin = f'{{"name": {json.dumps(tool.name, ensure_ascii=False)}, "{key}": '
        each.append(f"{literal(begin)} {arguments} {literal('}')}")
    return builder.rule("call", " | ".join(each))
