"""Pythonic calls: the whole answer is a list, `[get_weather(city="Paris", days=3), now()]`."""

import ast
import json
import keyword
from collections.abc import Iterable, Sequence

from runtime.errors import Unsupported
from runtime.text.grammar.source import GrammarBuilder, json_part, literal
from runtime.text.tool_calls.format import Tool, ToolFormat
from runtime.text.tool_calls.reader import CharacterParser, Reading, ToolParser

BEGIN, END = "<|python_start|>", "<|python_end|>"
_WORDS = {"true": True, "false": False, "null": None}
_HANDLED = frozenset({
    "type", "properties", "required", "additionalProperties", "$defs", "definitions", "title", "description", "default",
    "examples", "$schema", "$id", "$comment",
})  # fmt: skip
"""Keywords of the schema of all arguments that are held to when each argument is."""


class PythonicFormat(ToolFormat):
    """A list of calls as Python writes them."""

    name = "pythonic"
    aliases = ("llama4_pythonic",)
    marker = BEGIN
    marks = (END,)

    def detects(self, template: str) -> bool:
        return BEGIN in template or "func_name1(params_name1=" in template

    def parser(self, tools: Sequence[Tool]) -> ToolParser:
        return PythonicParser([tool.name for tool in tools])

    def calls(self, builder: GrammarBuilder, tools: Sequence[Tool], *, parallel: bool) -> str:
        # The bracket and the name of the first call are one literal: a lexer that is in the middle of it must not have
        # come to the end of a shorter one.
        first, call = (
            builder.rule(rule, " | ".join(self._call(builder, tool, at, begin) for at, tool in enumerate(tools)))
            for rule, begin in (("first_call", "["), ("call", ""))
        )
        more = f' (", " {call})*' if parallel else ""
        return f'{first}{more} "]"'

    def answer(self, builder: GrammarBuilder, tools: Sequence[Tool], *, parallel: bool) -> str:
        names = "|".join(_escaped(tool.name) for tool in tools)
        text = builder.rule("TEXT", rf"{builder.any_text} & ~/(?s:\s*\[\s*({names})\(.*)/")
        calls = self.calls(builder, tools, parallel=parallel)
        if not builder.is_special(BEGIN):
            return f"{text} | {calls}"
        return f"{text} | {calls} | {builder.marker(BEGIN)} {calls} {builder.marker(END)}"

    def _call(self, builder: GrammarBuilder, tool: Tool, number: int, begin: str) -> str:
        """`name(a=1, b="x")`: the arguments in the order of the schema, their values as JSON, which is close enough to
        Python that models write it."""
        for name in properties_of(tool):
            if not name.isidentifier() or keyword.iskeyword(name):
                raise Unsupported(
                    f"The argument `{name}` of `{tool.name}` is no name in Python, in whose syntax this model calls.",
                    param=tool.param,
                )
        arguments = [
            f"{literal(name + '=')} {builder.part(f'argument_{number}_{index}', json_part(schema, tool.param))}"
            for index, (name, schema) in enumerate(properties_of(tool).items())
        ]
        required = [name in tool.parameters.get("required", ()) for name in properties_of(tool)]
        body = in_order(builder, f"arguments_{number}", arguments, required)
        return f"{literal(f'{begin}{tool.name}(')} {body} {literal(')')}"


def properties_of(tool: Tool) -> dict[str, dict[str, object]]:
    """Schema of each argument by itself. Raises `Unsupported` for keywords about the arguments as a whole."""
    schema = tool.parameters
    for key in schema:
        if key not in _HANDLED:
            raise Unsupported(
                f"`{key}` cannot be enforced for all arguments of `{tool.name}` in the format of this model's "
                "calls; use it inside of `properties`.",
                param=tool.param,
            )
    properties = schema.get("properties") or {}
    if missing := [name for name in schema.get("required", ()) if name not in properties]:
        raise Unsupported(f"`{tool.name}` requires the argument `{missing[0]}`, which has no schema.", param=tool.param)
    shared: dict[str, object] = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    return {name: {**shared, **one} if isinstance(one, dict) else dict(shared) for name, one in properties.items()}


def in_order(
    builder: GrammarBuilder, name: str, items: Sequence[str], required: Sequence[bool], separator: str = '", "'
) -> str:
    """Expression for the items in their order, with a separator between; any that is not required may be left out."""
    first_rest, rest = "", ""
    for at in range(len(items) - 1, -1, -1):
        # Two rules for what is left from here: at the beginning, and after another item.
        first, after = f"{items[at]} {rest}", f"{separator} {items[at]} {rest}"
        if not required[at]:
            first = f"({first} | {first_rest})" if first_rest else f"({first})?"
            after = f"({after} | {rest})" if rest else f"({after})?"
        first_rest = builder.rule(f"{name}_first_{at}", first)
        rest = builder.rule(f"{name}_after_{at}", after)
    return first_rest


def _escaped(text: str) -> str:
    return "".join(char if char.isalnum() or char == "_" else f"\\x{ord(char):02x}" for char in text)


class PythonicParser(CharacterParser):
    """Parser of the format. A call comes out when it is whole."""

    def _read(self) -> Reading[None]:
        before = yield from self._skip_space()
        begin = yield from self._expect(BEGIN)
        before += begin + ((yield from self._skip_space()) if begin == BEGIN else "")
        bracket = yield from self._expect("[")
        if (begin and begin != BEGIN) or not bracket:
            self._content(before + bracket)
        else:
            yield from self._calls(before + bracket)
        while char := (yield from self._next()):
            self._content(char)

    def _calls(self, before: str) -> Reading[None]:
        while True:
            before += yield from self._skip_space()
            call = yield from self._balanced()
            parsed = parse_call(call)
            if parsed is None or parsed[0] not in self._names:
                self._content(before + call)
                return
            self._arguments(self._begin_call(parsed[0]), parsed[1])
            before = yield from self._skip_space()
            char = yield from self._next()
            if char == "]":
                before = yield from self._skip_space()
                end = yield from self._expect(END)
                if end != END:
                    self._content(before + end)
                return
            if char != ",":
                self._unread(char)
                self._content(before)
                return
            before += char

    def _balanced(self) -> Reading[str]:
        """Text up to the bracket that closes the first one, quotes respected; as much as there is, else."""
        text, depth, quote, escaped = "", 0, "", False
        while char := (yield from self._next()):
            text += char
            if quote:
                if escaped:
                    escaped = False
                elif char == "\\":
                    escaped = True
                elif char == quote:
                    quote = ""
            elif char in "\"'":
                quote = char
            elif char in "([{":
                depth += 1
            elif char in ")]}":
                depth -= 1
                if depth <= 0:
                    return text
            elif depth == 0 and not (char.isalnum() or char in "_.-"):
                return text
        return text


def parse_call(text: str) -> tuple[str, str] | None:
    """Name and JSON arguments of a call in Python's syntax with literals alone; None where it is something else."""
    name, bracket, _ = text.partition("(")
    try:
        tree = ast.parse(f"f{text[len(name) :]}" if bracket else "", mode="eval").body
        if not isinstance(tree, ast.Call) or tree.args:
            return None
        arguments = {given.arg: _literal(given.value) for given in tree.keywords}
        if None in arguments or len(arguments) != len(tree.keywords):
            return None
        return name, json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _literal(node: ast.expr) -> object:
    """The value of a literal. JSON's `true`, `false` and `null` count as Python's."""
    if isinstance(node, ast.Constant) and (node.value is None or isinstance(node.value, str | int | float)):
        return node.value
    if isinstance(node, ast.Name) and node.id in _WORDS:
        return _WORDS[node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _literal(node.operand)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return -value
    if isinstance(node, ast.List | ast.Tuple):
        return [_literal(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        return dict(_pairs(node))
    raise ValueError("not a literal")


def _pairs(node: ast.Dict) -> Iterable[tuple[str, object]]:
    for key, value in zip(node.keys, node.values, strict=True):
        name = None if key is None else _literal(key)
        if not isinstance(name, str):
            raise ValueError("a key is not a text")
        yield name, _literal(value)
