"""Rows of chats in the shapes that people have them in."""

from typing import Any

import pytest

from runtime.trainer.data.messages import Chat, ChatRows
from runtime.trainer.data.problems import RowProblem
from runtime.trainer.recipe import Dataset

SHAREGPT = {
    "field_messages": "conversations",
    "message_property_mappings": {"role": "from", "content": "value"},
}


def read(row: dict[str, Any], *, system: str | None = None, template: str | None = None, **keys: Any) -> Chat:
    return ChatRows(Dataset(path="a", **keys), system=system, template=template).read(row)


def pairs(chat: Chat) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in chat.messages]


def chat(*messages: Any) -> dict[str, Any]:
    return {"messages": list(messages)}


USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}


def test_openais_lines() -> None:
    found = read({**chat({"role": "developer", "content": "S"}, USER, ANSWER), "tools": [{"type": "function"}]})
    assert pairs(found) == [("system", "S"), ("user", "Hi"), ("assistant", "Hello")]
    assert (found.turns, found.tools) == ([2], [{"type": "function"}])


@pytest.mark.parametrize(("template", "role"), [("…'developer'…", "developer"), ("…", "system"), (None, "system")])
def test_developers_as_the_api_takes_them(template: str | None, role: str) -> None:
    assert read(chat({"role": "developer", "content": "S"}, USER), template=template).messages[0]["role"] == role


def test_sharegpt() -> None:
    row = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
    assert pairs(read(row, **SHAREGPT)) == [("user", "Hi"), ("assistant", "Hello")]
    older = {"field_messages": "conversations", "message_field_role": "from", "message_field_content": "value"}
    assert read(row, **older) == read(row, **SHAREGPT)


def test_roles_of_the_recipe() -> None:
    row = chat({"role": "kunde", "content": "Hi"}, {"role": "wir", "content": "Hello"})
    found = read(row, roles={"user": ("kunde",), "assistant": "wir"})
    assert pairs(found) == [("user", "Hi"), ("assistant", "Hello")]
    assert found.turns == [1]


def test_whose_turns_and_which() -> None:
    row = chat(USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "weight": 1}, {**USER, "train": True}, ANSWER)
    assert read(row).turns == [3, 5]
    assert read(row, message_field_training="train").turns == [3, 4, 5]
    assert read(row, roles_to_train=("user",)).turns == [0, 2, 3, 4]


def test_system_messages() -> None:
    with_system = chat({"role": "system", "content": "S"}, USER, ANSWER)
    assert pairs(read(with_system, system="D"))[0] == ("system", "S")
    assert pairs(read(chat(USER, ANSWER), system="D"))[0] == ("system", "D")
    assert read(chat(USER, ANSWER), system="D").turns == [2]
    assert pairs(read(with_system, drop_system_message=True)) == [("user", "Hi"), ("assistant", "Hello")]


def test_further_fields_and_parts() -> None:
    call = {"role": "assistant", "tool_calls": [{"id": "1"}], "extra": 1}
    parts = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    found = read(chat(parts, call))
    assert found.messages[0]["content"] == "a\nb"
    assert found.messages[1] == {"role": "assistant", "tool_calls": [{"id": "1"}], "content": ""}


def test_reasoning() -> None:
    row = chat(USER, {**ANSWER, "thoughts": "Hm."})
    assert read(row, field_thinking="thoughts").messages[1]["reasoning_content"] == "Hm."
    assert read(row, field_thinking="thoughts", template_thinking_key="thinking").messages[1]["thinking"] == "Hm."
    assert "thoughts" not in read(row).messages[1]


def test_a_chat_in_a_csv_cell() -> None:
    assert pairs(read({"messages": '[{"role": "user", "content": "Hi"}]'})) == [("user", "Hi")]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, "no field 'messages'; it has text"),
        ({"conversations": [USER]}, "set field_messages to conversations"),
        ({"messages": []}, "messages is empty"),
        ({"messages": "Hi"}, "text that is not JSON"),
        ({"messages": 3}, "is no list"),
        (chat("Hi"), "message 1 is no object"),
        (chat({"from": "human", "value": "Hi"}), r"set message_property_mappings: \{role: from, content: value\}"),
        (chat({"role": "wizard", "content": "Hi"}), "message 1 has the role 'wizard'; known are"),
        (chat(USER, {"role": "assistant"}), "message 2 has no text in 'content'"),
        (chat({"role": "user", "content": 3}), "message 1 has no text"),
        (chat({"role": "user", "content": [{"type": "image_url"}]}), "message 1 has a part that is no text"),
        (chat({**ANSWER, "weight": 0.5}), "message 1: weight must be 0 or 1"),
    ],
)
def test_rows_that_make_no_chat(row: dict[str, Any], message: str) -> None:
    with pytest.raises(RowProblem, match=message):
        read(row)
