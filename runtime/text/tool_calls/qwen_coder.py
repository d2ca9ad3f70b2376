"""Qwen 3 Coder: arguments as elements, `<tool_call><function=f><parameter=a>…</parameter></function></tool_call>`."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from runtime.errors import Unsupported
from runtime.text.grammar.source import GrammarBuilder, choice_part, json_part, literal
from runtime.text.tool_calls.format import MarkedFormat, Tool
from runtime.text.tool_calls.json_calls import loads
from runtime.text.tool_calls.pythonic import in_order, properties_of
from runtime.text.tool_calls.reader import CharacterParser, Reading, ToolParser

BEGIN, END = "<tool_call>", "</tool_call>"
VALUE_END = "</parameter>"
_ANNOTATIONS = frozenset(
    {"type", "title", "description", "default", "examples", "enum", "const", "$defs", "definitions"}
)


class QwenCoderFormat(MarkedFormat):
    """Tags for a call, its function and each parameter."""

    name = "qwen3_coder"
    aliases = ("qwen3_xml",)
    marker = BEGIN
    marks = (END,)

    def detects(self, template: str) -> bool:
        return "<function=" in template and "<parameter=" in template

    def parser(self, tools: Sequence[Tool]) -> ToolParser:
        return QwenCoderParser({tool.name: tool.parameters.get("properties") or {} for tool in tools})

    def marked(self, builder: GrammarBuilder, tools: Sequence[Tool], *, parallel: bool) -> str:
        call = builder.rule("call", " | ".join(self._call(builder, tool, at) for at, tool in enumerate(tools)))
        return f'"\\n" {call} "\\n" {builder.marker(END)}'

    def _call(self, builder: GrammarBuilder, tool: Tool, number: int) -> str:
        items = []
        for index, (name, schema) in enumerate(properties_of(tool).items()):
            if set(name) & set("<>\n"):
                raise Unsupported(f"`{tool.name}` has an argument whose name has `<`, `>` or a line break.")
            value = self._value(builder, f"argument_{number}_{index}", schema, tool)
            items.append(f"{literal(f'<parameter={name}>' + chr(10))} {value} {literal(chr(10) + VALUE_END + chr(10))}")
        required = [name in tool.parameters.get("required", ()) for name in properties_of(tool)]
        body = in_order(builder, f"arguments_{number}", items, required, separator="")
        return f"{literal(f'<function={tool.name}>' + chr(10))} {body} {literal('</function>')}"

    def _value(self, builder: GrammarBuilder, name: str, schema: Mapping[str, Any], tool: Tool) -> str:
        """A value: texts as they are, all else as JSON."""
        if not is_text(schema):
            return builder.part(name, json_part(dict(schema), tool.param))
        for keyword in schema:
            if keyword not in _ANNOTATIONS:
                raise Unsupported(
                    f"`{keyword}` of a text cannot be enforced in the format of this model's calls, in `{tool.name}`.",
                    param=tool.param,
                )
        texts = schema.get("enum", [schema["const"]] if "const" in schema else None)
        if texts is not None:
            return builder.part(name, choice_part([str(text) for text in texts], tool.param))
        return builder.text(name.upper(), without=[VALUE_END])


def is_text(schema: Mapping[str, Any]) -> bool:
    """True for an argument that is written without quotes."""
    return schema.get("type") == "string"


class QwenCoderParser(CharacterParser):
    """Parser of the format. Arguments come out one by one, when each is whole."""

    def __init__(self, tools: Mapping[str, Mapping[str, Any]]) -> None:
        """`tools`: the schema of each argument of each tool."""
        self._tools = tools
        super().__init__(tools)

    def _read(self) -> Reading[None]:
        while marker := (yield from self._until_marker([BEGIN, "<function="])):
            raw = marker
            if marker == BEGIN:
                raw += (yield from self._skip_space()) + (begin := (yield from self._expect("<function=")))
                if begin != "<function=":
                    self._content(raw)
                    continue
            name = yield from self._through(">")
            raw += name
            if name[:-1] not in self._names or not name.endswith(">"):
                self._content(raw)
                continue
            index = self._begin_call(name[:-1])
            yield from self._elements(index, self._tools[name[:-1]])
            if marker == BEGIN:
                space = yield from self._skip_space()
                end = yield from self._expect(END)
                if end != END:
                    self._content(space + end)

    def _elements(self, index: int, schemas: Mapping[str, Any]) -> Reading[None]:
        """Read the arguments and the end of the function."""
        separator = "{"
        while True:
            space = yield from self._skip_space()
            begin = yield from self._expect("<parameter=")
            if begin != "<parameter=":
                end = begin + (yield from self._expect("</function>"[len(begin) :])) if begin == "<" else begin
                if end == "</function>":
                    self._arguments(index, "{}" if separator == "{" else "}")
                else:
                    self._content(space + end)
                return
            name = yield from self._through(">")
            value = yield from self._through(VALUE_END)
            if not value.endswith(VALUE_END):
                self._content(space + begin + name + value)
                return
            text = value[: -len(VALUE_END)].removeprefix("\n").removesuffix("\n")
            schema = schemas.get(name[:-1])
            self._arguments(index, f"{separator}{_dumped(name[:-1])}: {_json_of(text, schema)}")
            separator = ", "

    def _through(self, end: str) -> Reading[str]:
        """Text up to `end`, included; as much as there is where it is missing."""
        text = ""
        while not text.endswith(end) and (char := (yield from self._next())):
            text += char
        return text


def _json_of(text: str, schema: object) -> str:
    """A value as JSON. What should be JSON and is not counts as a text."""
    if isinstance(schema, Mapping) and is_text(schema):
        return _dumped(text)
    return text if loads(text) is not None or text.strip() == "null" else _dumped(text)


def _dumped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
