"""Llama 3: the whole answer is `{"name": …, "parameters": {…}}`, or several of these with semicolons between."""

from collections.abc import Sequence

from runtime.text.grammar.source import GrammarBuilder
from runtime.text.tool_calls.bare import BareCallParser, bare_begin, bare_calls
from runtime.text.tool_calls.format import Tool, ToolFormat
from runtime.text.tool_calls.json_calls import call_rule
from runtime.text.tool_calls.reader import Reading, ToolParser

TAG = "<|python_tag|>"


class LlamaFormat(ToolFormat):
    """JSON objects without tags, of name and parameters."""

    name = "llama3_json"
    aliases = ("llama", "llama4_json")
    marker = TAG

    def detects(self, template: str) -> bool:
        return TAG in template or ('"parameters"' in template and '{"name"' in template)

    def parser(self, tools: Sequence[Tool]) -> ToolParser:
        return LlamaParser([tool.name for tool in tools])

    def calls(self, builder: GrammarBuilder, tools: Sequence[Tool], *, parallel: bool) -> str:
        call = call_rule(builder, tools, key="parameters")
        return f'{call} ("; " {call})*' if parallel else call

    def answer(self, builder: GrammarBuilder, tools: Sequence[Tool], *, parallel: bool) -> str:
        """An answer that begins as a call of a tool does is one."""
        builder.reserve(bare_begin(tools))
        bare = bare_calls(builder, tools, parallel=parallel, separator=";")
        tagged = ""
        if builder.is_special(TAG):
            tagged = f" | {builder.marker(TAG)} {self.calls(builder, tools, parallel=parallel)}"
        return f"{builder.text('TEXT')} | {bare}{tagged}"


class LlamaParser(BareCallParser):
    """Parser of the format. Calls are at the beginning of the answer, or after the tag."""

    def _read(self) -> Reading[None]:
        yield from self._bare_calls(";")
        while tag := (yield from self._until_marker([TAG])):
            yield from self._calls(tag + (yield from self._skip_space()))

    def _calls(self, before: str) -> Reading[None]:
        """Read calls, if there are any. `before` is content if there are none."""
        while True:
            calls = self.num_calls
            rest = yield from self._object_call()
            if rest is not None:
                self._content((before if self.num_calls == calls else "") + rest)
                return
            before = yield from self._skip_space()
            separator = yield from self._next()
            if separator != ";":
                self._unread(separator)
                self._content(before)
                return
            before += separator + (yield from self._skip_space())
