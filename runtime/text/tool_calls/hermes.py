"""Hermes and Qwen 2.5 and 3: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, one for each call.

At the beginning of an answer a call may come without its tags, as Qwen 2.5 Coder writes it.
"""

from collections.abc import Collection, Sequence

from runtime.text.grammar.source import GrammarBuilder
from runtime.text.tool_calls.bare import BareCallParser, bare_begin, bare_calls
from runtime.text.tool_calls.format import MarkedFormat, Tool
from runtime.text.tool_calls.json_calls import call_rule
from runtime.text.tool_calls.reader import Reading, ToolParser

BEGIN, END = "<tool_call>", "</tool_call>"


class HermesFormat(MarkedFormat):
    """A JSON object between tags for each call."""

    name = "hermes"
    aliases = ("qwen", "qwen2.5", "qwen3", "granite4", "longcat")
    marker = BEGIN
    marks = (END,)

    def detects(self, template: str) -> bool:
        return BEGIN in template

    def parser(self, tools: Sequence[Tool]) -> ToolParser:
        return HermesParser([tool.name for tool in tools])

    def parser_beside_form(self, tools: Sequence[Tool]) -> ToolParser:
        """Parser of calls with their tags alone: without them the form looks the same, maybe."""
        return HermesParser([tool.name for tool in tools], bare=False)

    def answer(self, builder: GrammarBuilder, tools: Sequence[Tool], *, parallel: bool) -> str:
        builder.reserve(bare_begin(tools))
        tagged = super().answer(builder, tools, parallel=parallel)
        return f"{tagged} | {bare_calls(builder, tools, parallel=parallel)}"

    def marked(self, builder: GrammarBuilder, tools: Sequence[Tool], *, parallel: bool) -> str:
        """The end of a call may be left out. A model that wants to end its answer there would be held off from it, and
        write on: further calls, mostly."""
        space = builder.rule("BREAK", r"/[ \n]{1,2}/")
        return f"{space}? {call_rule(builder, tools)} ({space}? {builder.marker(END)})?"


class HermesParser(BareCallParser):
    """Parser of the format. The end of a call may be missing: models leave it out, mostly at the end of the answer."""

    def __init__(self, names: Collection[str], *, bare: bool = True) -> None:
        self._bare_too = bare
        super().__init__(names)

    def _read(self) -> Reading[None]:
        if self._bare_too:
            yield from self._bare_calls()
        while marker := (yield from self._until_marker([BEGIN])):
            calls = self.num_calls
            space = yield from self._skip_space()
            rest = yield from self._object_call()
            if rest is not None:
                self._content((marker + space if self.num_calls == calls else "") + rest)
                continue
            space = yield from self._skip_space()
            end = yield from self._expect(END)
            if end != END:
                self._content(space)
                self._unread(end)  # it may begin the next call
