"""Calls of tools in the text of an answer: one file a format, and the choice among them."""

from collections.abc import Mapping

from runtime.text.tool_calls.format import Tool, ToolFormat
from runtime.text.tool_calls.hermes import HermesFormat
from runtime.text.tool_calls.lists import GraniteFormat, MistralFormat, NamedMistralFormat, Phi4Format
from runtime.text.tool_calls.llama import LlamaFormat
from runtime.text.tool_calls.pythonic import PythonicFormat
from runtime.text.tool_calls.qwen_coder import QwenCoderFormat
from runtime.text.tool_calls.reader import CallDelta, Event, ToolParser

_ALL: tuple[ToolFormat, ...] = (
    QwenCoderFormat(),
    NamedMistralFormat(),
    MistralFormat(),
    Phi4Format(),
    GraniteFormat(),
    HermesFormat(),
    PythonicFormat(),
    LlamaFormat(),
)
"""In the order in which templates are asked: the more specific ones first."""

FORMATS: Mapping[str, ToolFormat] = {name: one for one in _ALL for name in (one.name, *one.aliases)}
"""Name or alias → format."""


def detect_format(template: str | None) -> ToolFormat | None:
    """The format that a chat template tells the model to write, if it tells of one that is known."""
    return next((one for one in _ALL if one.detects(template)), None) if template else None


__all__ = ["FORMATS", "CallDelta", "Event", "Tool", "ToolFormat", "ToolParser", "detect_format"]
