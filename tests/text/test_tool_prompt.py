"""What templates print of tools and calls, found by rendering, and what is written as text where they print none."""

from typing import Any

import pytest

from runtime.text.chat_template import ChatTemplate
from runtime.text.tool_prompt import ToolSupport, prepare_tools

PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{{ m.content }}\n{% endfor %}"
)
TOOLS = "{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}"
OBJECTS = (
    TOOLS
    + "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for call in m.tool_calls or [] %}"
    + "{{ call.function.name }} {{ call.function.arguments | tojson }}{% endfor %}\n{% endfor %}"
)
TEXTS = OBJECTS.replace(" | tojson }}{% endfor %}\n", " }}{% endfor %}\n")

TOOL: dict[str, Any] = {"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}
CALL: dict[str, Any] = {"id": "c1", "type": "function", "function": {"name": "now", "arguments": {"zone": "UTC"}}}
USER = {"role": "user", "content": "Hi"}
CHAT: list[dict[str, Any]] = [
    USER,
    {"role": "assistant", "content": "Wait.", "tool_calls": [CALL, CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "noon"},
    {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "1"}, {"type": "text", "text": "2"}]},
]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (PLAIN, ToolSupport(tools=False, calls=False, text_arguments=False, system=True)),
        (NO_SYSTEM, ToolSupport(tools=False, calls=False, text_arguments=False, system=False)),
        (OBJECTS, ToolSupport(tools=True, calls=True, text_arguments=False, system=True)),
        (TEXTS, ToolSupport(tools=True, calls=True, text_arguments=True, system=True)),
        (TOOLS + PLAIN, ToolSupport(tools=True, calls=False, text_arguments=False, system=True)),
    ],
)
def test_support_is_found_by_rendering(source: str, expected: ToolSupport) -> None:
    assert ToolSupport.of(ChatTemplate(source)) == expected


def rendered(source: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> str:
    template = ChatTemplate(source)
    chat, shown = prepare_tools(ToolSupport.of(template), messages, tools)
    return template.render(chat, add_generation_prompt=False, tools=shown, variables={})


@pytest.mark.parametrize("source", [OBJECTS, TEXTS])
def test_arguments_are_printed_as_json_either_way(source: str) -> None:
    text = rendered(source, CHAT, [TOOL])
    assert 'now {"zone": "UTC"}' in text
    assert "tool_call>" not in text
    assert '"name": "now"' in text


@pytest.mark.parametrize("source", [PLAIN, TOOLS + PLAIN])
def test_calls_that_a_template_leaves_out_are_written(source: str) -> None:
    text = rendered(source, CHAT, [TOOL])
    call = '<tool_call>\n{"name": "now", "arguments": {"zone": "UTC"}}\n</tool_call>'
    assert f"<assistant>Wait.\n{call}\n{call}\n" in text
    results = "<tool_response>\nnoon\n</tool_response>\n<tool_response>\n1\n2\n</tool_response>"
    assert f"<user>{results}\n" in text
    assert text.count('{"name": "now", "parameters"') == 1


def test_tools_are_described_in_the_system_message() -> None:
    system = {"role": "system", "content": "Be brief."}
    assert rendered(PLAIN, [system, USER], [TOOL]).startswith("<system>Be brief.\n\nYou can call")
    assert rendered(PLAIN, [USER], [TOOL]).startswith("<system>You can call")
    assert rendered(NO_SYSTEM, [USER], [TOOL]).startswith("Hi\n\nYou can call")
    assert "You can call" not in rendered(PLAIN, CHAT, [])
