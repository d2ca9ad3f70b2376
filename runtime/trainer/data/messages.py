"""A row of a chat dataset to the messages that a chat template takes, as the API makes them of a request."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import msgspec

from runtime.trainer.data.problems import RowProblem
from runtime.trainer.recipe.dataset import Dataset

ROLES = ("system", "developer", "user", "assistant", "tool")
_NAMES = {
    **{role: role for role in ROLES},
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function": "tool",
    "observation": "tool",
}
"""What roles are called in the files that people have."""
_KEPT = ("name", "tool_calls", "tool_call_id", "reasoning_content")
_TEXT_PARTS = frozenset({"text", "input_text", "output_text"})


class Chat(NamedTuple):
    """What one row holds."""

    messages: list[dict[str, Any]]
    turns: list[int]
    """Indices of the messages to train on."""
    tools: list[Any] | None


class ChatRows:
    """Reads the rows of one dataset."""

    def __init__(self, entry: Dataset, *, system: str | None, template: str | None) -> None:
        """`system` is the system message of chats without one; `template` is the source of the chat template."""
        self._entry = entry
        self._system = system
        self._developer = "developer" in (template or "")
        self._properties = entry.properties
        self._names = _NAMES | {
            name: role for role, names in entry.roles.items() for name in ([names] if isinstance(names, str) else names)
        }
        self._train = frozenset(entry.roles_to_train)

    def read(self, row: Mapping[str, Any]) -> Chat:
        """Raises `RowProblem`, naming the message."""
        field = self._entry.field_messages
        if field not in row:
            raise RowProblem(f"has no field {field!r}{_hint(row, field)}")
        given = _list(row[field], field)
        if not given:
            raise RowProblem(f"{field} is empty")
        messages, turns = list[dict[str, Any]](), list[int]()
        for index, item in enumerate(given, 1):
            message, trained = self._message(item, index)
            if self._entry.drop_system_message and message["role"] == "system":
                continue
            if trained:
                turns.append(len(messages))
            messages.append(message)
        if not messages:
            raise RowProblem("has no message but those of the system, which drop_system_message leaves out")
        if self._system is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self._system})
            turns = [turn + 1 for turn in turns]
        tools = row.get(self._entry.field_tools)
        return Chat(messages, turns, _list(tools, self._entry.field_tools) if tools else None)

    def _message(self, item: Any, index: int) -> tuple[dict[str, Any], bool]:
        if not isinstance(item, Mapping):
            raise RowProblem(f"message {index} is no object")
        message = {key: item[key] for key in _KEPT if item.get(key) is not None}
        for name, field in self._properties.items():
            if item.get(field) is not None:
                message[name] = item[field]
        role = message.get("role")
        if not isinstance(role, str):
            raise RowProblem(f"message {index} has no {self._properties['role']!r}{_mapping_hint(item)}")
        if role not in self._names or self._names[role] not in ROLES:
            known = ", ".join(sorted(self._names))
            raise RowProblem(f"message {index} has the role {role[:64]!r}; known are {known}, and what `roles` adds")
        name = self._names[role]
        message["role"] = "system" if name == "developer" and not self._developer else name
        message["content"] = self._content(message, index)
        return message, self._is_trained(item, message["role"], index)

    def _content(self, message: Mapping[str, Any], index: int) -> str:
        content = message.get("content")
        if isinstance(content, str):
            return content
        if content is None and message.get("tool_calls"):
            return ""
        if isinstance(content, list) and content:
            return "\n".join(_part(part, index) for part in content)
        field = self._properties["content"]
        raise RowProblem(f"message {index} has no text in {field!r}")

    def _is_trained(self, item: Mapping[str, Any], role: str, index: int) -> bool:
        for field in (self._entry.message_field_training, "weight"):  # the latter is OpenAI's
            flag = item.get(field) if field else None
            if flag is not None:
                if flag not in (0, 1):
                    raise RowProblem(f"message {index}: {field} must be 0 or 1, or false or true")
                return bool(flag)
        return role in self._train


def _part(part: Any, index: int) -> str:
    if isinstance(part, Mapping) and part.get("type") in _TEXT_PARTS and isinstance(part.get("text"), str):
        return str(part["text"])
    raise RowProblem(f"message {index} has a part that is no text")


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


def fields_of(row: Iterable[str]) -> str:
    """What a row does have, for the message that says what it has not."""
    names = [str(name)[:40] for name in row]
    return f"; it has {', '.join(names[:8])}" if names else "; it is empty"
