"""A form in which models write calls: its parser, and the grammar that holds a call to its tool's schema."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

from runtime.text.grammar.schema import Schema
from runtime.text.grammar.source import GrammarBuilder, Part, json_part
from runtime.text.tool_calls.reader import ToolParser


@dataclass(frozen=True)
class Tool:
    """A function that the model may call."""

    name: str
    parameters: dict[str, Any] = field(default_factory=dict)
    """JSON schema of its arguments."""
    param: str = "tools"
    """The field that errors about the schema name."""

    @cached_property
    def schema(self) -> Schema:
        """The schema of arguments that are an object in any case, without keywords that allow everything."""
        return {**self.parameters, "type": "object"}

    @cached_property
    def arguments(self) -> Part:
        """Grammar of the arguments as JSON. Raises `InvalidRequest`."""
        return json_part(self.schema, self.param)


class ToolFormat(ABC):
    """A form of calls: its parser, and its grammars."""

    name: ClassVar[str]
    aliases: ClassVar[tuple[str, ...]] = ()
    """Further names: vLLM's."""
    marker: ClassVar[str]
    """Text that begins a call, or a list of calls."""
    marks: ClassVar[tuple[str, ...]] = ()
    """Further texts of the format that may be special tokens."""

    @property
    def special_texts(self) -> tuple[str, ...]:
        """Texts that the parser has to see although they may be special tokens."""
        return (self.marker, *self.marks)

    @abstractmethod
    def detects(self, template: str) -> bool:
        """True if a chat template tells the model to write this format."""

    @abstractmethod
    def parser(self, tools: Sequence[Tool]) -> ToolParser:
        """Parser of one answer."""

    def parser_beside_form(self, tools: Sequence[Tool]) -> ToolParser:
        """Parser of an answer that is calls, or else JSON or another form that was asked for."""
        return self.parser(tools)

    @abstractmethod
    def calls(self, builder: GrammarBuilder, tools: Sequence[Tool], *, parallel: bool) -> str:
        """Expression for an answer of calls alone: at least one, and at most one unless `parallel`."""

    @abstractmethod
    def answer(self, builder: GrammarBuilder, tools: Sequence[Tool], *, parallel: bool) -> str:
        """Expression for any answer in which a call that has begun is held to its tool. Nothing follows calls."""


class MarkedFormat(ToolFormat):
    """Base of the formats in which every call, or every list of calls, follows `marker`."""

    repeats: ClassVar[bool] = True
    """True if each of several calls has a marker of its own."""

    @abstractmethod
    def marked(self, builder: GrammarBuilder, tools: Sequence[Tool], *, parallel: bool) -> str:
        """Expression for what follows `marker`: all that one marker stands for. With `parallel` a list may hold several
        calls."""

    def calls(self, builder: GrammarBuilder, tools: Sequence[Tool], *, parallel: bool) -> str:
        group = builder.rule("group", f"{builder.marker(self.marker)} {self._marked(builder, tools, parallel)}")
        if not (parallel and self.repeats):
            return group
        # The answer may end after whitespace too: a model that has written some would be forced into a further call.
        return f"{group} ({_space(builder)}? {group})* {_space(builder)}?"

    def answer(self, builder: GrammarBuilder, tools: Sequence[Tool], *, parallel: bool) -> str:
        marked = self._marked(builder, tools, parallel)
        text = builder.text("TEXT", without=[self.marker])
        head = builder.text_through("head", self.marker)
        more = f" ({_space(builder)}? {builder.marker(self.marker)} {marked})*" if parallel and self.repeats else ""
        return f"{text} | {head} {marked}{more} {_space(builder)}?"

    def _marked(self, builder: GrammarBuilder, tools: Sequence[Tool], parallel: bool) -> str:
        return builder.rule("marked", self.marked(builder, tools, parallel=parallel))


def _space(builder: GrammarBuilder) -> str:
    return builder.rule("SPACE", r"/[ \n\r\t]{1,8}/")
