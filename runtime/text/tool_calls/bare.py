"""Calls without tags at the beginning of an answer: some models of a format with tags leave them out.

`{"name": …, "arguments": {…}}`, in a block of code or not, as Qwen 2.5 Coder writes it, or with `"type": "function"`
before the name, as Llama 3 does. An answer in JSON may have a name too, so that only the name of a tool with arguments
right after it makes one a call.
"""

import json
import re
from collections.abc import Collection, Sequence

from runtime.text.grammar.source import WHITESPACE, GrammarBuilder, literal, pattern_of
from runtime.text.tool_calls.format import Tool
from runtime.text.tool_calls.json_calls import ARGUMENTS, JsonCallParser
from runtime.text.tool_calls.reader import Reading

FENCE, LANGUAGE = "```", "json"
_WHITESPACE = re.compile(WHITESPACE)


class BareCallParser(JsonCallParser):
    """Helper for parsers of formats whose calls may come without tags."""

    def __init__(self, names: Collection[str]) -> None:
        self._quoted = {_quoted(name): name for name in names}
        super().__init__(names)

    def _bare_calls(self, separator: str = "") -> Reading[None]:
        """Read calls without tags, at the beginning of the answer, and what may separate them. What turns out to be
        none is content."""
        read: list[str] = []
        while (yield from self._bare(read)):
            read = [(yield from self._skip_space()), (yield from self._expect(separator))]
        self._content("".join(read))

    def _bare(self, read: list[str]) -> Reading[bool]:
        """Read a call and its fence. Returns if they are whole; what is no part of them is left in `read`."""
        if not (yield from self._blank(read)):
            return False
        ticks = yield from self._expect(FENCE)
        read.append(ticks)
        if ticks:
            read.append((yield from self._expect(LANGUAGE)))
            if ticks != FENCE or read[-1] not in ("", LANGUAGE) or not (yield from self._blank(read)) or not read[-1]:
                return False
        if not (yield from self._bare_call(read)):
            return False
        if not ticks:
            return True
        if (yield from self._blank(read)):
            read.append((yield from self._expect(FENCE)))
            if read[-1] == FENCE:
                read.clear()
                return True
        return False

    def _bare_call(self, read: list[str]) -> Reading[bool]:
        if not (yield from self._parts("{", read=read)):
            return False
        key = yield from self._string(read)
        if key == '"type"':
            if not (yield from self._parts(":", '"function"', ",", read=read)):
                return False
            key = yield from self._string(read)
        if key != '"name"' or not (yield from self._parts(":", read=read)):
            return False
        name = yield from self._string(read)
        if name not in self._quoted or not (yield from self._parts(",", read=read)):
            return False
        key = yield from self._string(read)
        if key not in map(_quoted, ARGUMENTS) or not (yield from self._parts(":", read=read)):
            return False
        char = yield from self._next()
        self._unread(char)
        if char != "{":
            return False
        read.clear()
        whole, _ = yield from self._value(index=self._begin_call(self._quoted[name]))
        if not whole or not (yield from self._blank(read)):
            return False
        read.append((yield from self._expect("}")))
        if not read[-1]:
            return False
        read.clear()
        return True

    def _parts(self, *texts: str, read: list[str]) -> Reading[bool]:
        """Read texts, each with the whitespace after it, into `read`. Returns if they are as a call has them."""
        for text in texts:
            read.append((yield from self._expect(text)))
            if read[-1] != text or not (yield from self._blank(read)):
                return False
        return True

    def _string(self, read: list[str]) -> Reading[str]:
        """Read a string and the whitespace after it into `read`. Returns it with its quotes; something else where they
        are not as a call has them."""
        _, text = yield from self._value(raw_only='"')
        read.append(text)
        return text if (yield from self._blank(read)) else ""

    def _blank(self, read: list[str]) -> Reading[bool]:
        """Read whitespace into `read`. Returns if a grammar lets as much through."""
        space = yield from self._skip_space()
        read.append(space)
        return not space or _WHITESPACE.fullmatch(space) is not None


def bare_begin(tools: Sequence[Tool]) -> str:
    """Regular expression of Lark for what begins such a call."""
    return f"({WHITESPACE})?({_fence()})?({'|'.join(_head(tool) for tool in tools)})"


def bare_calls(builder: GrammarBuilder, tools: Sequence[Tool], *, parallel: bool, separator: str = "") -> str:
    """Expression for such calls, and nothing after them. `separator` may stand between them.

    What begins one is a single terminal: text and calls are told apart where the text ends to be one.
    """
    space = builder.rule("BARE_SPACE", f"/{WHITESPACE}/")
    each = []
    for index, tool in enumerate(tools):
        arguments = f'{space}? {builder.part(f"arguments_{index}", tool.arguments)} {space}? "}}"'
        plain = builder.rule(f"BARE_{index}", f"/({WHITESPACE})?{_head(tool)}/")
        fenced = builder.rule(f"FENCED_{index}", f"/({WHITESPACE})?{_fence()}{_head(tool)}/")
        each += [f"{plain} {arguments}", f'{fenced} {arguments} {space}? "{FENCE}"']
    call = builder.rule("bare_call", " | ".join(each))
    between = f"({space}? {literal(separator)})? " if separator else ""
    return f"{call}{f' ({between}{call})*' if parallel else ''} {space}?"


def _fence() -> str:
    return f"{pattern_of(FENCE)}({pattern_of(LANGUAGE)})?{WHITESPACE}"


def _head(tool: Tool) -> str:
    keys = "|".join(pattern_of(_quoted(key)) for key in ARGUMENTS)
    kind = _spaced(*map(pattern_of, ('"type"', ":", '"function"', ",", "")))
    named = map(pattern_of, ('"name"', ":", _quoted(tool.name), ","))
    return _spaced(pattern_of("{"), f"({kind})?{_spaced(*named, f'({keys})', pattern_of(':'))}")


def _spaced(*parts: str) -> str:
    return f"({WHITESPACE})?".join(parts)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
