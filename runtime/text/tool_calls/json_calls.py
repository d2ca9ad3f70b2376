"""Calls written as JSON objects with a name and arguments, which most formats are made of."""

import json
from collections.abc import Sequence

from runtime.text.grammar.source import GrammarBuilder, literal
from runtime.text.tool_calls.format import Tool
from runtime.text.tool_calls.json_values import ValueScanner, loads
from runtime.text.tool_calls.reader import CharacterParser, Reading

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
