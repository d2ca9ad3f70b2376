"""A row of a chat dataset to the messages that a chat template takes, as the API makes them of a request."""

import dataclasses
import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import msgspec

from runtime.trainer.data.example import RowProblem
from runtime.trainer.data.instructions import fields_of
from runtime.trainer.recipe.dataset import Dataset
from runtime.trainer.recipe.types import ROLES, role_names

# -- parts -----------------------------------------------------------------------------------------
#
# The parts of a message's content, and which of them are trained on.

FLAGS = ("train", "weight")
"""Fields of a part that decide whether it is trained on."""
_TEXT_PARTS = frozenset({"text", "input_text", "output_text"})


class Span(NamedTuple):
    """A stretch of a message's text, in characters."""

    start: int
    end: int
    trained: bool


Content = str | list[dict[str, str]]
"""A text, or parts of one."""


def text_of(content: Content) -> str:
    """All of a content's text."""
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def read_parts(parts: list[Any], index: int, *, trained: bool) -> tuple[Content, list[Span] | None]:
    """The content of message `index`, and where parts have flags, its spans. A part without one is as the message:
    `trained`. Parts with flags are one text, in which they follow each other without a separator. Others stay parts,
    which the chat template is given as in serving. Raises `RowProblem`.
    """
    texts = [_text(part, index) for part in parts]
    flags = [_flag(part, index) for part in parts]
    if all(flag is None for flag in flags):
        return texts[0] if len(texts) == 1 else [{"type": "text", "text": text} for text in texts], None
    spans, at = list[Span](), 0
    for text, flag in zip(texts, flags, strict=True):
        spans.append(Span(at, at + len(text), trained if flag is None else flag))
        at += len(text)
    return "".join(texts), spans


def read_ranges(value: Any, text: str, where: str, *, trained: bool) -> list[Span] | None:
    """The spans of a message's text by a list of `{begin_offset, end_offset, train}`: characters from 0, the end
    included. Text outside of all ranges is as the message: `trained`. None without ranges. Raises `RowProblem`."""
    if value in (None, [], ""):
        return None
    marks = [trained] * len(text)
    for detail in _list(value, where):
        if not isinstance(detail, Mapping):
            raise RowProblem(f"{where} has an entry that is no object")
        begin, end, train = (detail.get(name) for name in ("begin_offset", "end_offset", "train"))
        if type(begin) is not int or type(end) is not int or not isinstance(train, bool):
            raise RowProblem(f"{where}: expected begin_offset and end_offset as whole numbers, and train as a boolean")
        if not 0 <= begin <= end < len(text):
            raise RowProblem(f"{where}: {begin} to {end} is not within the {len(text)} characters of the message")
        marks[begin : end + 1] = [train] * (end + 1 - begin)
    cuts = [0, *(at for at in range(1, len(marks)) if marks[at] != marks[at - 1]), len(marks)]
    return [Span(start, stop, marks[start]) for start, stop in pairwise(cuts)]


def flag_of(item: Mapping[str, Any], field: str, where: str) -> bool | None:
    """A field that is 0 or 1, or false or true; None where it is absent. Raises `RowProblem` for any other."""
    flag = item.get(field)
    if flag is None:
        return None
    if not isinstance(flag, int | float) or flag not in (0, 1):
        raise RowProblem(f"{where}: {field} must be 0 or 1, or false or true")
    return bool(flag)


def _flag(part: Any, index: int) -> bool | None:
    if not isinstance(part, Mapping):
        return None
    given = [flag for field in FLAGS if (flag := flag_of(part, field, f"message {index}, a part")) is not None]
    if len(set(given)) > 1:
        raise RowProblem(f"message {index}, a part: {' and '.join(FLAGS)} say different things")
    return given[0] if given else None


def _text(part: Any, index: int) -> str:
    if isinstance(part, Mapping) and part.get("type") in _TEXT_PARTS and isinstance(part.get("text"), str):
        return str(part["text"])
    raise RowProblem(f"message {index} has a part that is no text")


# -- tool calls ------------------------------------------------------------------------------------
#
# Tools and calls of tools as a chat template takes them, from any kind of file.
#
# Parquet gives every object the keys of all rows and fills what a row has not with nulls, and many files have the
# arguments of a call as JSON text, as OpenAI's API sends them, where templates print an object.


def without_nulls(value: Any) -> Any:
    """`value` without the keys whose value is null, at any depth. Lists keep theirs. A map of Parquet's, which is a
    list of pairs, becomes an object."""
    if isinstance(value, list) and value and all(isinstance(item, tuple) and len(item) == 2 for item in value):
        value = dict(value)
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def tool_calls_of(value: Any, index: int) -> list[Any]:
    """The calls of message `index`, an empty list where there are none. Raises `RowProblem`."""
    if isinstance(value, str):  # in a CSV cell, or in a column of Parquet that holds JSON
        value = _decoded(value)
    if value in (None, [], {}, ""):
        return []
    if not isinstance(value, list):
        raise RowProblem(f"message {index}: tool_calls is no list")
    calls = [without_nulls(call) for call in value]
    for call in calls:
        if not isinstance(call, dict):
            raise RowProblem(f"message {index} has a tool call that is no object")
        function = call.get("function", call)
        named = isinstance(function, dict) and isinstance(function.get("name"), str)
        if not named:
            raise RowProblem(f"message {index} has a tool call without the name of a function")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            found = _decoded(arguments)  # a null in a text was written, not filled in
            if isinstance(found, dict):
                function["arguments"] = found
        elif arguments is not None and not isinstance(arguments, dict):
            raise RowProblem(f"message {index} has a tool call whose arguments are no object")
    return calls


def _decoded(text: str) -> Any:
    """The value of a JSON text; any other text is left as it is."""
    try:
        return msgspec.json.decode(text)
    except (msgspec.MsgspecError, RecursionError):
        return text


_KEPT = ("name", "tool_calls", "tool_call_id", "reasoning_content")
_TEXTS = ("name", "tool_call_id", "reasoning_content")
_LABELS = frozenset({"role", "content", "name", "tool_call_id"})
_OLDER = ("function_call",)
MAX_FIELDS = 1000
"""Names of fields that are remembered."""
_THINKING = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)
"""Reasoning at the beginning of an answer."""
WEIGHT = "weight"
"""OpenAI's field of a message that decides whether it is trained on."""


class Chat(NamedTuple):
    """Messages of one row."""

    messages: list[dict[str, Any]]
    turns: list[int]
    """Indices of the messages to train on."""
    tools: list[Any] | None
    spans: dict[int, list[Span]] = {}  # noqa: RUF012  (never changed)
    """Spans to train on, by the index of a message whose parts have flags."""


@dataclasses.dataclass
class Seen:
    """Findings about the messages that were read, for warnings and notes."""

    unread: set[str] = dataclasses.field(default_factory=set)
    """Fields that nothing reads."""
    masked: bool = False
    """Some messages or parts have flags that exclude them from training."""


class ChatRows:
    """Reads the rows of one dataset."""

    def __init__(self, entry: Dataset, *, system: str | None, template: str | None) -> None:
        """`system` is the system message of chats without one; `template` is the source of the chat template."""
        self._entry = entry
        self._system = system
        self._developer = "developer" in (template or "")
        self._properties = entry.properties
        self._names = role_names(entry.roles)
        self._train = frozenset(self._names.get(name, name) for name in entry.roles_to_train)
        self.fields = frozenset({entry.field_messages, entry.field_tools, entry.field_system})
        """Columns that are read."""
        training = filter(None, [entry.message_field_training, entry.message_field_training_detail])
        self._read = frozenset([*_KEPT, "reasoning", *self._properties.values(), WEIGHT, *training])
        self.seen = Seen()

    def read(self, row: Mapping[str, Any]) -> Chat:
        """The messages of a row. Raises `RowProblem`, naming the message."""
        field = self._entry.field_messages
        if field not in row:
            raise RowProblem(f"has no field {field!r}{_hint(row, field)}")
        given = _list(row[field], field)
        if not given:
            raise RowProblem(f"{field} is empty")
        messages, turns = list[dict[str, Any]](), list[int]()
        spans: dict[int, list[Span]] = {}
        for index, item in enumerate(given, 1):
            message, marked, trained = self._message(item, index)
            if self._entry.drop_system_message and message["role"] == "system":
                continue
            if marked is not None:
                spans[len(messages)] = marked
            if trained:
                check_answer(message, index, marked)
                turns.append(len(messages))
            messages.append(message)
        if not messages:
            raise RowProblem("has no message but those of the system, which drop_system_message leaves out")
        system = self._system_of(row)
        if system is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": system})
            turns = [turn + 1 for turn in turns]
            spans = {turn + 1: marked for turn, marked in spans.items()}
        return Chat(messages, turns, _tools(row.get(self._entry.field_tools), self._entry.field_tools), spans)

    def _system_of(self, row: Mapping[str, Any]) -> str | None:
        """The system message of a chat that has none among its messages."""
        field = self._entry.field_system
        value = row.get(field)
        if value is None or value == "":
            return self._system
        if not isinstance(value, str):
            raise RowProblem(f"{field} is no text")
        return self._system if self._entry.drop_system_message else value

    def _message(self, item: Any, index: int) -> tuple[dict[str, Any], list[Span] | None, bool]:
        """The message, the spans of its text where its parts have flags, and True if any of it is trained on."""
        if not isinstance(item, Mapping):
            raise RowProblem(f"message {index} is no object")
        if len(self.seen.unread) < MAX_FIELDS:
            self.seen.unread |= {str(key) for key, value in item.items() if value is not None and key not in self._read}
        for key in _OLDER:
            if item.get(key):
                raise RowProblem(f"message {index} has a {key}, OpenAI's older form: write it as tool_calls")
        message = {key: item[key] for key in _KEPT if item.get(key) is not None}
        for name, field in self._properties.items():
            if item.get(field) is not None:
                message[name] = item[field]
        if "reasoning_content" not in message and item.get("reasoning") is not None:
            message["reasoning_content"] = item["reasoning"]  # the newer name of the same, in our answers too
        message["role"] = self._role(message, item, index)
        for key in _TEXTS:
            if not isinstance(message.get(key, ""), str):
                raise RowProblem(f"message {index}: {self._properties.get(key, key)} is no text")
        calls = tool_calls_of(message.pop("tool_calls", None), index)
        if calls:
            message["tool_calls"] = calls
        flag = self._flag(item, index)
        trained = message["role"] in self._train if flag is None else flag
        message["content"], spans = self._content(message, index, trained=trained)
        if message["role"] == "assistant" and self._entry.split_thinking:
            self._split_thinking(message, spans, index)
        spans = self._ranges(item, message["content"], index, trained=trained) or spans
        self.seen.masked = self.seen.masked or flag is False or any(not span.trained for span in spans or ())
        if spans is not None:
            trained = any(span.trained for span in spans)
        return message, spans, trained

    def _role(self, message: Mapping[str, Any], item: Mapping[str, Any], index: int) -> str:
        role = message.get("role")
        if not isinstance(role, str):
            raise RowProblem(f"message {index} has no {self._properties['role']!r}{_mapping_hint(item)}")
        if role not in self._names or self._names[role] not in ROLES:
            known = ", ".join(sorted(self._names))
            raise RowProblem(f"message {index} has the role {role[:64]!r}; known are {known}, and what `roles` adds")
        name = self._names[role]
        return "system" if name == "developer" and not self._developer else name

    def _content(self, message: Mapping[str, Any], index: int, *, trained: bool) -> tuple[Content, list[Span] | None]:
        content = message.get("content")
        if isinstance(content, str):
            return content, None
        if content is None and message.get("tool_calls"):
            return "", None
        if isinstance(content, list) and content:
            return read_parts(content, index, trained=trained)
        field = self._properties["content"]
        raise RowProblem(f"message {index} has no text in {field!r}")

    def _split_thinking(self, message: dict[str, Any], spans: list[Span] | None, index: int) -> None:
        """Take the reasoning at the beginning of an answer's text out of it, into the template's own field."""
        content, key = message["content"], self._entry.template_thinking_key
        found = _THINKING.match(content) if isinstance(content, str) and message.get(key) is None else None
        if found is None:
            return
        if spans is not None:
            raise RowProblem(f"message {index}: split_thinking cannot be used with parts that have flags")
        message[key], message["content"] = found[1].strip(), content[found.end() :]

    def _ranges(self, item: Mapping[str, Any], content: Content, index: int, *, trained: bool) -> list[Span] | None:
        field = self._entry.message_field_training_detail
        value = item.get(field) if field else None
        if value is None or value == []:
            return None
        if not isinstance(content, str):
            raise RowProblem(f"message {index}: {field} is for a content that is one text")
        return read_ranges(value, content, f"message {index}, {field}", trained=trained)

    def _flag(self, item: Mapping[str, Any], index: int) -> bool | None:
        """The message's own flag of being trained on; None without one."""
        for field in (self._entry.message_field_training, WEIGHT):
            if field and (flag := flag_of(item, field, f"message {index}")) is not None:
                return flag
        return None


def check_answer(message: Mapping[str, Any], index: int, spans: list[Span] | None) -> None:
    """Raise `RowProblem` for an empty text that is trained on: only its end would be learned."""
    content = text_of(message["content"])
    text = content if spans is None else "".join(content[span.start : span.end] for span in spans if span.trained)
    if text.strip() or message.get("tool_calls"):
        return
    if any(isinstance(value, str) and value.strip() for key, value in message.items() if key not in _LABELS):
        return  # a template's own field, such as reasoning
    what = "the answer" if message["role"] == "assistant" else f"the {message['role']}'s text, which is trained on,"
    raise RowProblem(f"message {index}: {what} is empty" + (" in the parts that are trained on" if content else ""))


def _tools(value: Any, field: str) -> list[Any] | None:
    """The tools of a chat; None where there are none."""
    if value in (None, "", [], {}):
        return None
    tools = _list(without_nulls(value), field)
    for tool in tools:
        if not isinstance(tool, Mapping):
            raise RowProblem(f"{field} has an entry that is no object")
        function = tool.get("function", tool)
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RowProblem(f"{field} has an entry without the name of a function")
    return tools or None


def _list(value: Any, field: str) -> list[Any]:
    """A list, or the JSON text of one, as CSV files have."""
    if isinstance(value, str):
        try:
            value = msgspec.json.decode(value)
        except (msgspec.MsgspecError, RecursionError):
            raise RowProblem(f"{field} is a text that is not JSON") from None
    if not isinstance(value, list):
        raise RowProblem(f"{field} is no list")
    return value


def _hint(row: Mapping[str, Any], field: str) -> str:
    lists = [name for name, value in row.items() if isinstance(value, list)]
    if lists:
        return f"; set field_messages to {lists[0]}?"
    return fields_of(row)


def _mapping_hint(item: Mapping[str, Any]) -> str:
    if "from" in item and "value" in item:
        return "; set message_property_mappings: {role: from, content: value}"
    return fields_of(item)
