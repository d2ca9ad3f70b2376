"""Formats with all calls in one list after a marker: Mistral, Granite, Phi-4."""

from collections.abc import Sequence
from typing import ClassVar

from runtime.text.grammar.source import GrammarBuilder, literal
from runtime.text.tool_calls.format import MarkedFormat, Tool
from runtime.text.tool_calls.json_calls import JsonCallParser, call_rule
from runtime.text.tool_calls.reader import Reading, ToolParser


class ListFormat(MarkedFormat):
    """`marker[{"name": …, "arguments": {…}}, …]`, and a text after the list in some."""

    repeats = False
    end: ClassVar[str] = ""
    """Text after the list; optional in answers."""
    other_markers: ClassVar[tuple[str, ...]] = ()
    """Markers that older models of the family write. They are parsed, not asked for."""

    @property
    def special_texts(self) -> tuple[str, ...]:
        return tuple(text for text in (self.marker, *self.other_markers, self.end) if text)

    def parser(self, tools: Sequence[Tool]) -> ToolParser:
        return ListParser([tool.name for tool in tools], (self.marker, *self.other_markers), self.end)

    def marked(self, builder: GrammarBuilder, tools: Sequence[Tool], *, parallel: bool) -> str:
        call = call_rule(builder, tools)
        more = f' (", " {call})*' if parallel else ""
        return f'" "? "[" {call}{more} "]" {builder.marker(self.end) if self.end else ""}'


class MistralFormat(ListFormat):
    """Mistral's models up to version 7 of its tokenizer."""

    name = "mistral"
    marker = "[TOOL_CALLS]"

    def detects(self, template: str) -> bool:
        return self.marker in template and "[ARGS]" not in template

    def parser(self, tools: Sequence[Tool]) -> ToolParser:
        return MistralParser([tool.name for tool in tools])


class NamedMistralFormat(MarkedFormat):
    """Mistral's later models: `[TOOL_CALLS]name[ARGS]{…}` for each call."""

    name = "mistral_args"
    marker = "[TOOL_CALLS]"
    marks = ("[ARGS]",)

    def detects(self, template: str) -> bool:
        return self.marker in template and "[ARGS]" in template

    def parser(self, tools: Sequence[Tool]) -> ToolParser:
        return MistralParser([tool.name for tool in tools])

    def marked(self, builder: GrammarBuilder, tools: Sequence[Tool], *, parallel: bool) -> str:
        each = [
            f"{literal(tool.name)} {builder.marker('[ARGS]')} {builder.part(f'arguments_{index}', tool.arguments)}"
            for index, tool in enumerate(tools)
        ]
        return " | ".join(each)


class GraniteFormat(ListFormat):
    """IBM Granite 3."""

    name = "granite"
    marker = "<|tool_call|>"
    other_markers = ("<tool_call>", "<function_call>")

    def detects(self, template: str) -> bool:
        return self.marker in template


class Phi4Format(ListFormat):
    """Phi-4-mini; what it writes without the tokens is `functools[…]`."""

    name = "phi4"
    aliases = ("phi4_mini_json",)
    marker = "<|tool_call|>"
    other_markers = ("functools",)
    end = "<|/tool_call|>"

    def detects(self, template: str) -> bool:
        return self.end in template


class ListParser(JsonCallParser):
    """Parser of content, and lists of calls after markers."""

    def __init__(self, names: Sequence[str], markers: Sequence[str], end: str) -> None:
        self._markers = tuple(markers)
        self._end = end
        super().__init__(names)

    def _read(self) -> Reading[None]:
        while marker := (yield from self._until_marker(self._markers)):
            yield from self._marked(marker)

    def _marked(self, marker: str) -> Reading[None]:
        calls = self.num_calls
        space = yield from self._skip_space()
        rest = yield from self._list_of_calls()
        if rest is not None:
            self._content((marker + space if self.num_calls == calls else "") + rest)
        elif self._end:
            space = yield from self._skip_space()
            end = yield from self._expect(self._end)
            if end != self._end:
                self._content(space + end)


class MistralParser(ListParser):
    """Parser of both forms of Mistral's models."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(names, ["[TOOL_CALLS]"], "")

    def _marked(self, marker: str) -> Reading[None]:
        space = yield from self._skip_space()
        char = yield from self._next()
        self._unread(char)
        if char == "[":
            yield from super()._marked(marker + space)
            return
        name = ""
        while (char := (yield from self._next())) and (char.isalnum() or char in "_-."):
            name += char
        self._unread(char)
        between = yield from self._expect("[ARGS]")
        before_arguments = yield from self._skip_space()
        brace = yield from self._next()
        self._unread(brace)
        if name not in self._names or between not in ("", "[ARGS]") or brace != "{":
            self._content(marker + space + name + between + before_arguments)
            return
        yield from self._value(index=self._begin_call(name))
