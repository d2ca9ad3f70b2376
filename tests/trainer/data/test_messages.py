"""Rows of chats in the shapes that people have them in."""

from typing import Any

import pytest

from runtime.trainer.data.example import RowProblem
from runtime.trainer.data.messages import Chat, ChatRows
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
    found = read({**chat({"role": "developer", "content": "S"}, USER, ANSWER), "tools": [{"name": "f"}]})
    assert pairs(found) == [("system", "S"), ("user", "Hi"), ("assistant", "Hello")]
    assert (found.turns, found.tools) == ([2], [{"name": "f"}])


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


@pytest.mark.parametrize("column", ["Be brief.", None, ""])
def test_a_system_column(column: str | None) -> None:
    """It is the first message, unless the chat begins with one of the system; null and nothing count as absent."""
    row = {"system": column, **chat(USER, ANSWER)}
    own = [("system", column)] if column else []
    assert pairs(read(row)) == [*own, ("user", "Hi"), ("assistant", "Hello")]
    assert read(row).turns == [len(own) + 1]
    assert pairs(read(row, system="D"))[0] == ("system", column or "D")
    assert pairs(read({**row, **chat({"role": "system", "content": "S"}, USER)}))[0] == ("system", "S")
    assert pairs(read(row, drop_system_message=True)) == [("user", "Hi"), ("assistant", "Hello")]
    named = {"sys": column, **chat(USER, ANSWER)}
    assert pairs(read(named, field_system="sys")) == pairs(read(row))
    assert pairs(read(named))[0] == ("user", "Hi")


@pytest.mark.parametrize("empty", [[], {}, None, "", "[]"])
def test_empty_tool_calls_are_left_out(empty: object) -> None:
    assert "tool_calls" not in read(chat(USER, {**ANSWER, "tool_calls": empty})).messages[1]


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        ({**ANSWER, "content": ""}, "message 2: the answer is empty"),
        ({**ANSWER, "content": " \n"}, "message 2: the answer is empty"),
        ({**ANSWER, "content": [{"type": "text", "text": ""}]}, "message 2: the answer is empty"),
        ({**ANSWER, "content": "", "tool_calls": []}, "message 2: the answer is empty"),
        (
            {
                **ANSWER,
                "content": [{"type": "text", "text": "a", "train": 0}, {"type": "text", "text": "", "train": 1}],
            },
            "message 2: the answer is empty in the parts that are trained on",
        ),
        ({**USER, "content": "", "weight": 1}, "message 2: the user's text, which is trained on, is empty"),
        ({**ANSWER, "function_call": {"name": "f"}}, "message 2 has a function_call, OpenAI's older form"),
        ({**ANSWER, "tool_calls": {"name": "f"}}, "message 2: tool_calls is no list"),
        ({**ANSWER, "tool_calls": ["f"]}, "message 2 has a tool call that is no object"),
        ({**ANSWER, "tool_calls": [{"function": "f"}]}, "message 2 has a tool call without the name of a function"),
        ({**ANSWER, "tool_calls": [{"function": {"name": 3}}]}, "without the name of a function"),
        ({**ANSWER, "tool_calls": [{"function": {"arguments": {}}}]}, "without the name of a function"),
        ({**ANSWER, "tool_calls": [{"function": {"name": "f", "arguments": 3}}]}, "whose arguments are no object"),
        ({**ANSWER, "tool_calls": [{"name": "f", "arguments": ["a"]}]}, "whose arguments are no object"),
        ({**ANSWER, "name": 3}, "message 2: name is no text"),
        ({**ANSWER, "tool_call_id": {"a": 1}}, "message 2: tool_call_id is no text"),
        ({**ANSWER, "reasoning_content": ["thought"]}, "message 2: reasoning_content is no text"),
        ({**ANSWER, "content": [{"type": "text", "text": "a", "weight": 0.5}]}, "message 2, a part: weight must be 0"),
        ({**ANSWER, "content": [{"type": "text", "text": "a", "train": "no"}]}, "message 2, a part: train must be 0"),
        ({**ANSWER, "content": [{"type": "text", "text": "a", "train": True, "weight": 0}]}, "say different things"),
    ],
)
def test_answers_that_teach_nothing_or_are_marked_wrongly(message: dict[str, Any], problem: str) -> None:
    with pytest.raises(RowProblem, match=problem):
        read(chat(USER, message))


def test_an_empty_message_that_is_not_trained_on_may_stand() -> None:
    found = read(chat(USER, {**ANSWER, "content": "", "weight": 0}, {**USER, "content": ""}, ANSWER))
    assert found.turns == [3]
    calls = [{"type": "function", "function": {"name": "f", "arguments": {}}}]
    assert read(chat(USER, {"role": "assistant", "content": "", "tool_calls": calls})).turns == [1]
    assert read(chat(USER, {**ANSWER, "content": "", "reasoning_content": "Hm."})).turns == [1]


def test_what_nothing_reads_is_known() -> None:
    rows = ChatRows(Dataset(path="a", message_field_training="learn"), system=None, template=None)
    rows.read(chat(USER, {**ANSWER, "train": False, "learn": True, "weight": None, "id": 3}))
    assert rows.seen.unread == {"train", "id"}
    assert not rows.seen.masked
    rows.read(chat(USER, {**ANSWER, "learn": False}, ANSWER))
    assert rows.seen.masked


def test_further_fields_and_parts() -> None:
    call = {"role": "assistant", "tool_calls": [{"id": "1", "name": "f"}], "extra": 1}
    parts = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    found = read(chat(parts, call))
    assert found.messages[0]["content"] == parts["content"]
    assert found.messages[1] == {"role": "assistant", "tool_calls": [{"id": "1", "name": "f"}], "content": ""}


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
        ({**chat(USER, ANSWER), "tools": 0}, "tools is no list"),
        ({**chat(USER, ANSWER), "tools": ["f"]}, "tools has an entry that is no object"),
        ({**chat(USER, ANSWER), "tools": "[null]"}, "tools has an entry that is no object"),
        ({**chat(USER, ANSWER), "tools": [{"type": "function"}]}, "tools has an entry without the name of a function"),
        ({**chat(USER, {**ANSWER, "tool_calls": [{"arguments": {}}]})}, "without the name of a function"),
    ],
)
def test_rows_that_make_no_chat(row: dict[str, Any], message: str) -> None:
    with pytest.raises(RowProblem, match=message):
        read(row)
